"""Build a store from FASTA: parse once into a spool, find duplicates, assign splits, then copy the kept rows in bulk.

The spool is a folder `.NAME.partial` beside the output. It has one file per column: the sequences, their headers, and
their lengths, hashes and other numbers. So only a few columns of numbers are in memory at a time, and never all the
sequences.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from protlig_dd import __version__
from protlig_dd.data.datasets import first_offset
from protlig_dd.data.fasta import STDIN, FastaFile
from protlig_dd.data.mmseqs import mmseqs_version
from protlig_dd.data.prepare.case import repeats_in_other_case
from protlig_dd.data.prepare.duplicates import kept_rows, shared_sequences
from protlig_dd.data.prepare.filters import Filters, taxa_below
from protlig_dd.data.prepare.output import (
    OutputExistsError,
    manifest_path,
    output_errors,
    output_exists,
    partial_folder,
    partial_path,
    put_in_place,
)
from protlig_dd.data.prepare.read import NoProgress, Progress, read_inputs
from protlig_dd.data.prepare.splits import TRAIN, Split, empty_training_split, hashed_splits, search_held_out
from protlig_dd.data.prepare.spool import Spool
from protlig_dd.data.prepare.write import write_store
from protlig_dd.data.store import FORMAT_VERSION, SPLITS, SequenceStore
from protlig_dd.system.files import free_name, sha256, sync_folder, write_atomic
from protlig_dd.system.tables import as_json
from protlig_dd.system.workers import Workers, keep_freed_memory


def build_store(
    inputs: Mapping[str, Path | str] | Iterable[Path | str],
    output: Path,
    *,
    filters: Filters | None = None,
    split: Split | None = None,
    workers: int = 1,
    progress: Callable[[str, int | None], Progress] = NoProgress,
) -> SequenceStore:
    """Build a new store from FASTA, and write its manifest beside it (`<output>.manifest.json`).

    The same inputs and options give bit-identical stores; times are only in the manifest file. The store appears
    under its name only when it is complete and synced.

    Args:
        inputs: {split: file}, or files whose sequences are assigned to splits by a hash of their ids; `-` is stdin.
        workers: number of processes that parse the input; 1 parses in this process.
        progress: called with a description and the total bytes (None if unknown); returns a progress bar.

    Raises:
        ValueError: an input cannot be read (the message names file, record, line and position), an option is invalid,
            the output exists or another process is writing it, or the disk is full.
    """
    filters, split, output = filters or Filters(), split or Split(), Path(output)
    began = time.time()
    keep_freed_memory()
    if output.is_symlink():  # write the link's target, even if it does not exist yet
        output = output.resolve()
    if output.exists():
        if partial_path(output).exists():
            with contextlib.suppress(OutputExistsError), partial_folder(output):
                pass  # partial_folder removes the files of a process that was killed after it finished the output
        raise output_exists(output)
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    for name in named:
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; choose from {', '.join(SPLITS)}")
    check_options(filters, split)
    version = mmseqs_version() if split.check else None
    taxa = taxa_below(filters.taxa, filters.taxa_nodes) if filters.taxa is not None else None
    paths = list(named.values()) if named else [Path(str(path)) for path in inputs]
    if not paths:
        raise ValueError("no input file given")
    if [str(path) for path in paths].count(STDIN) > 1:
        raise ValueError("stdin (-) can be given only once as input")
    files = [FastaFile(path) for path in paths]
    codes: list[int | None] = [SPLITS.index(name) for name in named] if named else [None] * len(files)
    with output_errors(output), partial_folder(output) as folder, Workers(workers) as pool:
        if output.exists():  # another process has just finished the output
            raise output_exists(output)
        spool = Spool(folder, first_offset())
        sizes = [file.path.stat().st_size if file.path is not None and file.path.is_file() else None for file in files]
        with progress("reading", None if None in sizes else sum(size for size in sizes if size)) as bar:
            for file in files:
                file.on_bytes = bar.advance
            with contextlib.closing(spool):
                counts = read_inputs(files, codes, spool, filters, taxa, pool)
        if not spool.rows:
            dropped = ", ".join(f"{count:,} by {name}" for name, count in counts["dropped"].items() if count)
            raise ValueError(
                f"{output}: no sequence is left of {counts['records']:,} records; the filters dropped {dropped}"
            )
        keep, repeats = kept_rows(spool, files, duplicates=filters.duplicates)
        counts["dropped"]["duplicates"] = int((~keep).sum())
        if in_other_case := repeats_in_other_case(spool, repeats):
            counts["repeated_in_other_case"] = in_other_case
        splits = spool.load("split") if named else hashed_splits(spool.load("id_hash"), split)
        shared = shared_sequences(spool, splits, repeats) if named or filters.duplicates else []
        checked = None
        if split.check:
            with progress("comparing held-out sequences with the training set", None):
                checked = {"mmseqs": version, **search_held_out(spool, keep, splits, split.on_hit)}
        if ("train" in named or not named) and not (keep & (splits == TRAIN)).any():
            raise empty_training_split(output, files[list(named).index("train")] if named else None, counts)
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
            write_store(finished, spool, keep, splits, source, pool, bar.advance)
        with finished.open("rb") as handle:
            os.fsync(handle.fileno())
        times = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.time() - began, 1),
        }
        store = SequenceStore(finished)
        identity = {"fingerprint": store.fingerprint, "software": f"protlig_dd {__version__}"}
        write_atomic(folder / "manifest", as_json(store.manifest | times | identity))
        if output.exists():  # another process created the output meanwhile
            raise output_exists(output)
        manifest = manifest_path(output)
        if manifest.exists():  # this manifest belongs to a store that has been moved elsewhere
            manifest.rename(free_name(manifest))
        (folder / "manifest").rename(manifest)
        put_in_place(finished, output)
        sync_folder(output.parent)
    return SequenceStore(output)


def check_options(filters: Filters, split: Split) -> None:
    """Raise ValueError for invalid options, before anything is read."""
    fractions = split.validation_fraction, split.test_fraction
    if not (min(fractions) >= 0 and sum(fractions) < 1):
        raise ValueError(
            f"split.validation_fraction={fractions[0]} and split.test_fraction={fractions[1]} must not be negative and "
            "must sum to less than 1"
        )
    for key, value, allowed in (
        ("split.check", split.check, (None, "mmseqs")),
        ("split.on_hit", split.on_hit, ("move", "drop")),
    ):
        if value not in allowed:
            raise ValueError(f"{key}={value}; choose from {', '.join(str(choice or 'null') for choice in allowed)}")
    if filters.min_length < 1 or (filters.max_length is not None and filters.max_length < filters.min_length):
        raise ValueError(
            f"filter.min_length={filters.min_length} and filter.max_length={filters.max_length} must satisfy "
            "1 <= min_length <= max_length"
        )
    if not 0 <= filters.max_unknown <= 1:
        raise ValueError(f"filter.max_unknown={filters.max_unknown} must be a fraction between 0 and 1")
    if filters.taxa is not None and not filters.taxa:
        raise ValueError("filter.taxa=[] keeps no sequence; set it to null to keep all sequences")
    if filters.taxa is None and filters.taxa_nodes is not None:
        raise ValueError("filter.taxa_nodes has no effect without filter.taxa; set filter.taxa too")


def _options(named: Mapping[str, Any], filters: Filters, split: Split) -> dict[str, Any]:
    """Return the options for the manifest. A file is recorded as its name and SHA-256."""
    options: dict[str, Any] = {"splits": list(named) or asdict(split), "filters": asdict(filters)}
    if filters.taxa_nodes is not None:
        options["filters"]["taxa_nodes"] = {"name": filters.taxa_nodes.name, "sha256": sha256(filters.taxa_nodes)}
    return options
