"""From FASTA to a store: one parse into a spool beside the output, then duplicates, splits, and a bulk copy.

The spool is a folder `.NAME.partial` beside the output. What is kept for each sequence (lengths, hashes) is written
there too, so that memory holds a few columns of numbers at a time and never the sequences.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protlig_dd import __version__
from protlig_dd.data.fasta import STDIN, FastaFile
from protlig_dd.data.mmseqs import mmseqs_version
from protlig_dd.data.prepare.duplicates import kept_rows, shared_sequences
from protlig_dd.data.prepare.filters import Filters, taxa_below
from protlig_dd.data.prepare.output import (
    AlreadyThereError,
    already_there,
    manifest_path,
    output_errors,
    partial_folder,
    partial_path,
    put_in_place,
)
from protlig_dd.data.prepare.read import NoProgress, Progress, read_inputs
from protlig_dd.data.prepare.splits import TRAIN, Split, hashed_splits, nothing_to_train_on, search_held_out
from protlig_dd.data.prepare.spool import Spool
from protlig_dd.data.prepare.write import write_store
from protlig_dd.data.store import FORMAT_VERSION, SPLITS, SequenceStore
from protlig_dd.system.files import free_name, sha256, sync_folder, write_atomic
from protlig_dd.system.tables import as_json


def build_store(
    inputs: Mapping[str, Path | str] | Iterable[Path | str],
    output: Path,
    *,
    filters: Filters | None = None,
    split: Split | None = None,
    progress: Callable[[str, int | None], Progress] = NoProgress,
) -> SequenceStore:
    """Read FASTA into a new store, and write its manifest beside it (`<output>.manifest.json`).

    The same inputs and options give the same bytes; the time stands in the manifest alone. The store appears under its
    name when it is complete and synced.

    Args:
        inputs: {split: file}, or files whose sequences are split by hash; `-` is stdin.
        progress: (description, total bytes or None where they are not known) -> what shows it.

    Raises:
        ValueError: naming file, record, line and position of whatever cannot be read, or an option; an output that
            exists or that another process is writing; a full disk.
    """
    filters, split, output = filters or Filters(), split or Split(), Path(output)
    began = time.time()
    if output.is_symlink():  # what a link points to is written, also where it is not there yet
        output = output.resolve()
    if output.exists():
        if partial_path(output).exists():
            with contextlib.suppress(AlreadyThereError), partial_folder(output):
                pass  # clears what a run killed at its very end has left
        raise already_there(output)
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    for name in named:
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; the splits are {', '.join(SPLITS)}")
    check_options(filters, split)
    version = mmseqs_version() if split.check else None
    taxa = taxa_below(filters.taxa, filters.taxa_nodes) if filters.taxa is not None else None
    paths = list(named.values()) if named else [Path(str(path)) for path in inputs]
    if not paths:
        raise ValueError("no input file is named")
    if [str(path) for path in paths].count(STDIN) > 1:
        raise ValueError("stdin (-) can be read once only")
    files = [FastaFile(path) for path in paths]
    codes: list[int | None] = [SPLITS.index(name) for name in named] if named else [None] * len(files)
    with output_errors(output), partial_folder(output) as folder:
        if output.exists():  # another process has just finished it
            raise already_there(output)
        spool = Spool(folder)
        sizes = [file.path.stat().st_size if file.path is not None and file.path.is_file() else None for file in files]
        with progress("reading", None if None in sizes else sum(size for size in sizes if size)) as bar:
            for file in files:
                file.on_bytes = bar.advance
            with contextlib.closing(spool):
                counts = read_inputs(files, codes, spool, filters, taxa)
        if not spool.rows:
            failed = ", ".join(f"{count:,} by {name}" for name, count in counts["dropped"].items() if count)
            raise ValueError(f"{output}: no sequences left: of {counts['records']:,} records were dropped {failed}")
        keep, repeats = kept_rows(spool, files, duplicates=filters.duplicates)
        counts["dropped"]["duplicates"] = int((~keep).sum())
        splits = spool.load("split") if named else hashed_splits(spool.load("id_hash"), split)
        shared = shared_sequences(spool, splits, repeats) if named or filters.duplicates else []
        checked = None
        if split.check:
            with progress("searching held-out sequences in the training set", None):
                checked = {"mmseqs": version, **search_held_out(spool, keep, splits, split.on_hit)}
        if ("train" in named or not named) and not (keep & (splits == TRAIN)).any():
            raise nothing_to_train_on(output, files[list(named).index("train")] if named else None, counts)
        source = {
            "format_version": FORMAT_VERSION,
            "inputs": [
                {"name": Path(file.name).name, "bytes": file.size, "sha256": file.sha256, "records": file.records}
                | ({"split": SPLITS[code]} if code is not None else {})
                for file, code in zip(files, codes, strict=True)
            ],
            "options": _options(named, filters, split),
            **counts,
            "shared": shared,
            "split_check": checked,
        }
        finished = folder / "store.h5"
        with progress("writing", spool.size("tokens") + spool.size("headers")) as bar:
            write_store(finished, spool, keep, splits, source, bar.advance)
        with finished.open("rb") as handle:
            os.fsync(handle.fileno())
        when = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": round(time.time() - began, 1)}
        told = SequenceStore(finished)
        told_by = {"fingerprint": told.fingerprint, "software": f"protlig_dd {__version__}"}
        write_atomic(folder / "manifest", as_json(told.manifest | when | told_by))
        if output.exists():  # somebody else made it meanwhile
            raise already_there(output)
        beside = manifest_path(output)
        if beside.exists():  # of a store that was moved away
            beside.rename(free_name(beside))
        (folder / "manifest").rename(beside)
        put_in_place(finished, output)
        sync_folder(output.parent)
    return SequenceStore(output)


def check_options(filters: Filters, split: Split) -> None:
    """Raise for values that make no sense, before anything is read."""
    shares = split.validation_fraction, split.test_fraction
    if not (min(shares) >= 0 and sum(shares) < 1):
        raise ValueError(
            f"split.validation_fraction={shares[0]} and split.test_fraction={shares[1]} must leave some to train on"
        )
    for key, value, allowed in (
        ("split.check", split.check, (None, "mmseqs")),
        ("split.on_hit", split.on_hit, ("move", "drop")),
    ):
        if value not in allowed:
            raise ValueError(f"{key}={value}; there are {', '.join(str(a or 'null') for a in allowed)}")
    if filters.min_length < 1 or (filters.max_length is not None and filters.max_length < filters.min_length):
        raise ValueError(
            f"filter.min_length={filters.min_length} and filter.max_length={filters.max_length} leave no length"
        )
    if not 0 <= filters.max_unknown <= 1:
        raise ValueError(f"filter.max_unknown={filters.max_unknown} is a share of letters, between 0 and 1")
    if filters.taxa is not None and not filters.taxa:
        raise ValueError("filter.taxa=[] keeps nothing; leave it null to keep everything")
    if filters.taxa is None and filters.taxa_nodes is not None:
        raise ValueError("filter.taxa_nodes without filter.taxa does nothing")


def _options(named: Mapping[str, Any], filters: Filters, split: Split) -> dict[str, Any]:
    """The options as the manifest keeps them: a file is its name and SHA-256."""
    kept: dict[str, Any] = {"splits": list(named) or asdict(split), "filters": asdict(filters)}
    if filters.taxa_nodes is not None:
        kept["filters"]["taxa_nodes"] = {"name": filters.taxa_nodes.name, "sha256": sha256(filters.taxa_nodes)}
    return kept
