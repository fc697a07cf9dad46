"""From FASTA to a store: one parse into a spool beside the output, then duplicates, splits, and a bulk copy.

The spool is a folder `.NAME.partial` beside the output. What is kept for each sequence (lengths, hashes) is written
there too, so that memory holds a few columns of numbers at a time and never the sequences.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import numpy as np

from protlig_dd import __version__
from protlig_dd.data.encode import EncodedBlock, encode_block
from protlig_dd.data.fasta import STDIN, FastaBlock, FastaFile, id_of, parse_header
from protlig_dd.data.homology import COVERAGE, E_VALUE, IDENTITY, mmseqs_version, queries_with_hits
from protlig_dd.data.store import COPY_BYTES, FORMAT_VERSION, SPLITS, SequenceStore, write_columns
from protlig_dd.runtime.files import free_name, lock_may_fail, sha256, sync_folder, write_atomic
from protlig_dd.tokenizer import BOS, LETTERS, MASK, VOCAB_SIZE, ProteinTokenizer

SAMPLE_FOLDER = Path(__file__).resolve().parent / "sample"
LENGTH_BIN = 50
TRAIN, VALIDATION, TEST = range(3)
ROWS_AT_ONCE = 1 << 16
SHOWN_IDS = 3  # of sequences that are in two splits


@dataclass(frozen=True)
class Filters:
    """What is left out. Every sequence dropped is counted once, under the first of these that it fails."""

    min_length: int = 1
    max_length: int | None = None
    max_unknown: float = 1.0
    """Largest share of letters that are no amino acid (X B Z J U O)."""
    fragments: bool = True
    """False drops what its header calls a (Fragment)."""
    taxa: Sequence[int] | None = None
    """TaxIDs to keep; with taxa_nodes, everything below them as well."""
    taxa_nodes: Path | None = None
    """nodes.dmp of the NCBI taxonomy."""
    duplicates: bool = False
    """True keeps sequences that are equal to an earlier one."""


@dataclass(frozen=True)
class Split:
    """How sequences are put aside. The shares are those of a keyed hash of the id."""

    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    check: str | None = None
    """`mmseqs` searches what was put aside against the training sequences."""
    on_hit: str = "move"
    """A held-out sequence with a homolog in training is moved there, or dropped: move | drop."""


class Progress(Protocol):
    """What shows progress."""

    def __enter__(self) -> "Progress": ...
    def __exit__(self, *exception: object) -> None: ...
    def advance(self, count: int) -> None: ...


class NoProgress:
    """Shows nothing."""

    def __init__(self, description: str, total: int | None) -> None: ...
    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(self, *exception: object) -> None: ...
    def advance(self, count: int) -> None: ...


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
        if _partial(output).exists():
            with contextlib.suppress(AlreadyThereError), _partial_folder(output):
                pass  # clears what a run killed at its very end has left
        raise _taken(output)
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
    with _output_errors(output), _partial_folder(output) as folder:
        if output.exists():  # another process has just finished it
            raise _taken(output)
        spool = Spool(folder)
        sizes = [file.path.stat().st_size if file.path is not None and file.path.is_file() else None for file in files]
        with progress("reading", None if None in sizes else sum(size for size in sizes if size)) as bar:
            for file in files:
                file.on_bytes = bar.advance
            with contextlib.closing(spool):
                counts = _read_inputs(files, codes, spool, filters, taxa)
        if not spool.rows:
            failed = ", ".join(f"{count:,} by {name}" for name, count in counts["dropped"].items() if count)
            raise ValueError(f"{output}: no sequences left: of {counts['records']:,} records were dropped {failed}")
        keep, repeats = _keep(spool, files, duplicates=filters.duplicates)
        counts["dropped"]["duplicates"] = int((~keep).sum())
        splits = spool.load("split") if named else hashed_splits(spool.load("id_hash"), split)
        shared = _shared(spool, splits, repeats) if named or filters.duplicates else []
        checked = None
        if split.check:
            with progress("searching held-out sequences in the training set", None):
                checked = {"mmseqs": version, **_check_split(spool, keep, splits, split.on_hit)}
        if ("train" in named or not named) and not (keep & (splits == TRAIN)).any():
            raise _nothing_to_train_on(output, files[list(named).index("train")] if named else None, counts)
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
            _write(finished, spool, keep, splits, source, bar.advance)
        with finished.open("rb") as handle:
            os.fsync(handle.fileno())
        when = {"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": round(time.time() - began, 1)}
        told = SequenceStore(finished)
        told_by = {"fingerprint": told.fingerprint, "software": f"protlig_dd {__version__}"}
        write_atomic(folder / "manifest", json.dumps(told.manifest | when | told_by, indent=1) + "\n")
        if output.exists():  # somebody else made it meanwhile
            raise _taken(output)
        beside = manifest_path(output)
        if beside.exists():  # of a store that was moved away
            beside.rename(free_name(beside))
        (folder / "manifest").rename(beside)
        _put(finished, output)
        sync_folder(output.parent)
    return SequenceStore(output)


def _put(file: Path, output: Path) -> None:
    """Give a file its final name, which must be free."""
    try:
        os.link(file, output)
    except FileExistsError:
        raise _taken(output) from None
    except OSError:  # no hard links here
        file.rename(output)


def manifest_path(store: Path) -> Path:
    return store.with_name(f"{store.name}.manifest.json")


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


def taxa_below(taxa: Sequence[int], nodes: Path | None) -> np.ndarray:
    """The TaxIDs themselves and, with nodes.dmp of the NCBI taxonomy, everything below them; ascending.

    Raises:
        ValueError: a file that is no nodes.dmp, or a TaxID that is not in it.
    """
    if nodes is None:
        return np.unique(np.array(taxa, dtype=np.int64))
    if not nodes.is_file():
        raise ValueError(f"{nodes}: no such file (nodes.dmp is in NCBI's taxdump.tar.gz)")
    try:
        pairs = np.loadtxt(nodes, dtype=np.int64, delimiter="|", usecols=(0, 1), comments=None, ndmin=2)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{nodes}: not a nodes.dmp of the NCBI taxonomy: {error}") from error
    parent = np.full(int(pairs.max()) + 1, -1, dtype=np.int64)
    parent[pairs[:, 0]] = pairs[:, 1]
    for taxon in taxa:
        if not 0 < taxon < len(parent) or parent[taxon] < 0:
            raise ValueError(f"{nodes}: no TaxID {taxon}")
    wanted = np.zeros(len(parent), dtype=bool)
    wanted[list(taxa)] = True
    while True:  # once for each level of the tree
        grown = wanted | (wanted[parent] & (parent >= 0))
        if (grown == wanted).all():
            return np.flatnonzero(wanted)
        wanted = grown


class Spool:
    """Columns of what was read, as files in a folder: appended to, then read back."""

    COLUMNS: ClassVar = {
        "tokens": np.uint8,
        "headers": np.uint8,
        "length": np.int32,
        "header_length": np.int32,
        "id_hash": np.uint64,
        "hash_high": np.uint64,
        "hash_low": np.uint64,
        "file": np.int32,
        "record": np.int32,
        "split": np.uint8,
    }

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, 0
        self.files: dict[str, BinaryIO] = {name: self.path(name).open("wb") for name in self.COLUMNS}

    def path(self, name: str) -> Path:
        return self.folder / name

    def append(self, rows: int, **columns: np.ndarray | bytes) -> None:
        for name, values in columns.items():
            self.files[name].write(values if isinstance(values, bytes) else values.astype(self.COLUMNS[name]).data)
        self.rows += rows

    def close(self) -> None:
        """Also where the disk is full and a file cannot be flushed: the others are closed as well."""
        with contextlib.ExitStack() as stack:
            for file in self.files.values():
                stack.callback(file.close)

    def size(self, name: str) -> int:
        """Bytes of a column."""
        return self.path(name).stat().st_size

    def load(self, name: str) -> np.ndarray:
        """A column of one number for each sequence."""
        return np.fromfile(self.path(name), self.COLUMNS[name])

    def pieces(self, name: str, lengths: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first row, end row, their bytes end to end) of `tokens` or `headers`, some megabytes at a time.

        The bytes are overwritten by the next ones.
        """
        buffer = np.empty(COPY_BYTES, np.uint8)
        with self.path(name).open("rb") as file:
            for first in range(0, len(lengths), ROWS_AT_ONCE):
                ends = np.cumsum(lengths[first : first + ROWS_AT_ONCE], dtype=np.int64)
                start = row = 0
                while row < len(ends):
                    end = max(row + 1, int(np.searchsorted(ends, start + COPY_BYTES, side="right")))
                    size = int(ends[end - 1]) - start
                    if size > len(buffer):
                        buffer = np.empty(size, np.uint8)
                    if (found := file.readinto(buffer[:size].data)) != size:
                        raise ValueError(f"{self.path(name)}: {found} bytes where {size} were written")
                    yield first + row, first + end, buffer[:size]
                    row, start = end, start + size


def _read_inputs(
    files: Sequence[FastaFile],
    codes: Sequence[int | None],
    spool: Spool,
    filters: Filters,
    taxa: np.ndarray | None,
) -> dict[str, Any]:
    """Parse, filter and spool every input; returns what was counted."""
    dropped = dict.fromkeys(("min_length", "max_length", "max_unknown", "fragments", "taxa", "duplicates"), 0)
    records = lower_case = nucleotides = 0
    for number, (file, code) in enumerate(zip(files, codes, strict=True)):
        for block in file.blocks():
            encoded = encode_block(block)
            records += len(block.ids)
            lower_case += encoded.lower_case
            nucleotides += encoded.nucleotides
            keep = np.ones(len(block.ids), dtype=bool)
            for name, failed in _failures(block, encoded, filters, taxa):
                dropped[name] += int((keep & failed).sum())
                keep &= ~failed
            encoded = encoded.where(keep)
            headers = block.headers if keep.all() else list(itertools.compress(block.headers, keep.tolist()))
            digests = encoded.sequence_hashes()
            spool.append(
                len(headers),
                tokens=encoded.tokens,
                headers=b"".join(headers),
                length=encoded.lengths,
                header_length=np.array([len(header) for header in headers], np.int32),
                id_hash=encoded.id_hashes,
                hash_high=digests[:, 0],
                hash_low=digests[:, 1],
                file=np.full(len(headers), number),
                record=block.first_record + np.flatnonzero(keep),
                split=np.full(len(headers), code or 0),
            )
    return {
        "records": records, "lower_case_letters": lower_case, "nucleotide_like": nucleotides, "dropped": dropped,
    }  # fmt: skip


def _failures(
    block: FastaBlock, encoded: EncodedBlock, filters: Filters, taxa: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name of a filter, (n,) whether each record fails it), for the filters that are on."""
    residues = encoded.lengths - 2
    if filters.min_length > 1:
        yield "min_length", residues < filters.min_length
    if filters.max_length is not None:
        yield "max_length", residues > filters.max_length
    if filters.max_unknown < 1:
        starts = np.cumsum(encoded.lengths) - encoded.lengths
        unknown = (encoded.tokens > MASK) & (encoded.tokens < BOS)
        yield "max_unknown", np.add.reduceat(unknown, starts, dtype=np.int64) / residues > filters.max_unknown
    if not filters.fragments:
        yield "fragments", np.array([b"(Fragment" in header for header in block.headers])
    if taxa is not None:
        tax_ids = [parse_header(header.decode()).tax_id for header in block.headers]
        yield "taxa", ~np.isin([-1 if tax_id is None else tax_id for tax_id in tax_ids], taxa)


def hashed_splits(id_hashes: np.ndarray, split: Split) -> np.ndarray:
    """(n,) uint8 split of each id: depends on nothing but the id and the fractions, so it stays when data grows."""
    test_end, validation_end = (
        np.uint64(min(int(share * 2**64), 2**64 - 1))
        for share in (split.test_fraction, split.test_fraction + split.validation_fraction)
    )
    codes = np.full(len(id_hashes), TRAIN, np.uint8)
    codes[id_hashes < validation_end] = VALIDATION
    codes[id_hashes < test_end] = TEST
    return codes


def _keep(spool: Spool, files: Sequence[FastaFile], *, duplicates: bool) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) bool: False for sequences that are equal to an earlier one, unless `duplicates` are kept; and (k, 2)
    rows: each that is equal to an earlier one, and the first of its equals.

    Raises:
        ValueError: an id that occurs twice; names both records.
    """
    rows = repeated_rows(spool.load("id_hash"))
    if len(rows):
        _refuse_repeated_ids(spool, files, rows)
    keep = np.ones(spool.rows, dtype=bool)
    rows = repeated_rows(spool.load("hash_high"))
    if not len(rows):
        return keep, np.empty((0, 2), np.int64)
    high, low = (np.memmap(spool.path(name), np.uint64, "r")[rows] for name in ("hash_high", "hash_low"))
    order = np.lexsort((rows, low, high))
    same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    firsts = np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order))))
    repeats = rows[np.stack([order[1:][same], order[firsts[1:][same]]], axis=1)]
    if not duplicates:
        keep[repeats[:, 0]] = False
    return keep, repeats


def _shared(spool: Spool, splits: np.ndarray, repeats: np.ndarray) -> list[dict[str, Any]]:
    """Of each two splits how many sequences of one are in the other, where they were read first, and the first of them.

    Args:
        repeats: (k, 2) rows, each equal to an earlier one, and the first of its equals.
    """
    repeats = repeats[np.argsort(repeats[:, 0])]
    found = []
    for code, name in enumerate(SPLITS):
        for other, earlier in enumerate(SPLITS):
            both = repeats[(splits[repeats[:, 0]] == code) & (splits[repeats[:, 1]] == other)]
            if code != other and len(both):
                ids = [[_id(spool, row) for row in rows] for rows in both[:SHOWN_IDS].tolist()]
                found.append({"of": name, "in": earlier, "sequences": len(both), "first": ids})
    return found


def _id(spool: Spool, row: int) -> str:
    lengths = np.memmap(spool.path("header_length"), np.int32, "r")
    start = int(lengths[:row].sum(dtype=np.int64))
    with spool.path("headers").open("rb") as file:
        file.seek(start)
        return id_of(file.read(int(lengths[row])).decode())


def _nothing_to_train_on(output: Path, file: FastaFile | None, counts: Mapping[str, Any]) -> ValueError:
    failed = ", ".join(f"{count:,} by {name}" for name, count in counts["dropped"].items() if count) or "none"
    dropped = f"dropped of all {counts['records']:,} records: {failed}"
    if file is None:
        why = f"the ids of all sequences are in the shares that are put aside, which are too large ({dropped})"
    else:
        why = f"none of the {file.records:,} records of {file.name} is left ({dropped})"
    return ValueError(f"{output}: the train split is empty: {why}")


def repeated_rows(hashes: np.ndarray) -> np.ndarray:
    """Ascending rows whose hash occurs more than once."""
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(repeated):
        return np.empty(0, np.int64)
    pieces = []
    for first in range(0, len(hashes), ROWS_AT_ONCE):
        block = hashes[first : first + ROWS_AT_ONCE]
        nearest = np.searchsorted(repeated, block).clip(max=len(repeated) - 1)
        pieces.append(first + np.flatnonzero(repeated[nearest] == block))
    return np.concatenate(pieces)


def _refuse_repeated_ids(spool: Spool, files: Sequence[FastaFile], rows: np.ndarray) -> None:
    """Raise for the first id of these rows that an earlier row has; hashes may collide."""
    ends = np.cumsum(spool.load("header_length"), dtype=np.int64)
    headers = np.memmap(spool.path("headers"), np.uint8, "r")
    seen: dict[str, int] = {}
    for row in rows.tolist():
        start = int(ends[row - 1]) if row else 0
        id_ = id_of(headers[start : ends[row]].tobytes().decode())
        if id_ in seen:
            first, second = (_where(spool, files, place) for place in (seen[id_], row))
            raise ValueError(f"{second}: the id {id_} occurs already in {first}")
        seen[id_] = row


def _where(spool: Spool, files: Sequence[FastaFile], row: int) -> str:
    """File, record and, where it can be read again (not from a pipe), line of a row."""
    file, number = files[spool.load("file")[row]], int(spool.load("record")[row])
    if file.path is not None and file.path.is_file():
        for block in FastaFile(file.path).blocks():
            if number < block.first_record + len(block.ids):
                return block.where(number - block.first_record)
    return f"{file.name}: record {number}"


def _check_split(spool: Spool, keep: np.ndarray, splits: np.ndarray, on_hit: str) -> dict[str, Any]:
    """Move to training, or drop, the held-out sequences with a homolog there; changes `keep` and `splits`.

    What is moved becomes a training sequence that others may resemble, so the rest is searched in it, until nothing
    hits.
    """
    names = SPLITS[1:]
    report: dict[str, Any] = {
        "identity": IDENTITY,
        "coverage": COVERAGE,
        "e_value": E_VALUE,
        "on_hit": on_hit,
        "rounds": 0,
    }
    report |= {"searched": {name: int((keep & (splits == SPLITS.index(name))).sum()) for name in names}}
    report["hits"] = dict.fromkeys(names, 0)
    targets = keep & (splits == TRAIN)
    queries, against = spool.folder / "queries.fasta", spool.folder / "targets.fasta"
    while True:
        held_out = keep & (splits != TRAIN)
        if not held_out.any() or not targets.any():
            break
        _write_fasta(queries, spool, held_out)
        _write_fasta(against, spool, targets)
        hits = queries_with_hits(queries, against, spool.folder / "mmseqs")
        report["rounds"] += 1
        for name in names:
            report["hits"][name] += int((splits[hits] == SPLITS.index(name)).sum())
        targets = np.zeros_like(keep)
        if on_hit == "drop":
            keep[hits] = False
        else:
            splits[hits] = TRAIN
            targets[hits] = True
    for file in (queries, against):
        file.unlink(missing_ok=True)
    return report


def _write_fasta(path: Path, spool: Spool, wanted: np.ndarray) -> None:
    """FASTA of some rows, named by their numbers."""
    decode, lengths = ProteinTokenizer().decode, spool.load("length")
    with path.open("w") as file:
        for first, end, tokens in spool.pieces("tokens", lengths):
            ends = np.cumsum(lengths[first:end])
            for i in np.flatnonzero(wanted[first:end]).tolist():
                file.write(f">{first + i}\n{decode(tokens[ends[i] - lengths[first + i] : ends[i]])}\n")


def _write(
    path: Path,
    spool: Spool,
    keep: np.ndarray,
    splits: np.ndarray,
    source: dict[str, Any],
    on_bytes: Callable[[int], None],
) -> None:
    """The store of the kept rows; `source` becomes its manifest, with what the splits hold."""
    lengths, header_lengths = spool.load("length"), spool.load("header_length")
    token_counts = np.zeros((len(SPLITS), VOCAB_SIZE), dtype=np.int64)

    others = VALIDATION, TEST, len(SPLITS)  # the last: dropped

    def tokens() -> Iterator[np.ndarray]:
        for first, end, block in spool.pieces("tokens", lengths):
            row_splits = np.where(keep[first:end], splits[first:end], len(SPLITS))
            counts = {code: count_tokens(_rows(block, lengths[first:end], row_splits == code)) for code in others}
            token_counts[TRAIN] += count_tokens(block) - sum(counts.values())  # no copy of the many
            token_counts[VALIDATION] += counts[VALIDATION]
            token_counts[TEST] += counts[TEST]
            on_bytes(len(block))
            yield _rows(block, lengths[first:end], keep[first:end])

    def headers() -> Iterator[np.ndarray]:
        for first, end, block in spool.pieces("headers", header_lengths):
            on_bytes(len(block))
            yield _rows(block, header_lengths[first:end], keep[first:end])

    n = int(keep.sum())
    totals = [int(column.sum(where=keep, dtype=np.int64)) for column in (lengths, header_lengths)]
    write_columns(
        path,
        {
            "tokens": (totals[0], tokens()),
            "offsets": (n + 1, _offsets(lengths, keep)),
            "headers": (totals[1], headers()),
            "header_offsets": (n + 1, _offsets(header_lengths, keep)),
            "split": (n, [splits[keep]]),
            "token_counts": (token_counts.size, [token_counts.reshape(-1)]),
        },
        lambda: source | {"splits": _describe_splits(lengths, keep, splits, token_counts), "length_bin": LENGTH_BIN},
    )


def _rows(block: np.ndarray, lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The bytes of the wanted rows of a block."""
    if wanted.all():
        return block
    runs = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).reshape(-1, 2)  # first and end rows
    bounds = np.append(0, np.cumsum(lengths, dtype=np.int64))[runs].tolist()
    return np.concatenate([block[:0], *(block[start:end] for start, end in bounds)])


def _offsets(lengths: np.ndarray, keep: np.ndarray) -> Iterator[np.ndarray]:
    """0 and the running total of the kept lengths."""
    total = np.zeros(1, np.int64)
    yield total
    for first in range(0, len(lengths), ROWS_AT_ONCE):
        block = slice(first, first + ROWS_AT_ONCE)
        ends = total[-1] + np.cumsum(lengths[block][keep[block]], dtype=np.int64)
        yield ends
        total = ends if len(ends) else total


def count_tokens(tokens: np.ndarray) -> np.ndarray:
    """(30,) int64: how often each id occurs; pairs at a time, which is twice as fast as np.bincount alone."""
    counts = np.zeros(VOCAB_SIZE, np.int64)
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        piece = tokens[start : start + ROWS_AT_ONCE]
        even = len(piece) // 2 * 2
        pairs = np.bincount(piece[:even].view(np.uint16), minlength=VOCAB_SIZE << 8)[: VOCAB_SIZE << 8].reshape(-1, 256)
        counts += pairs[:, :VOCAB_SIZE].sum(0) + pairs.sum(1)
        counts[piece[even:]] += 1
    return counts


def _describe_splits(
    lengths: np.ndarray, keep: np.ndarray, splits: np.ndarray, token_counts: np.ndarray
) -> dict[str, Any]:
    """What each split holds: sequences, residues, letters, and how many lengths lie in each LENGTH_BIN."""
    described = {}
    for code, name in enumerate(SPLITS):
        residues = lengths[keep & (splits == code)] - 2
        described[name] = {
            "sequences": len(residues),
            "residues": int(residues.sum(dtype=np.int64)),
            "letters": {
                x: int(c) for x, c in zip(LETTERS, token_counts[code, : len(LETTERS)], strict=True) if x != "_"
            },
            "lengths": np.bincount(residues // LENGTH_BIN).tolist(),
        }
    return described


def _options(named: Mapping[str, Any], filters: Filters, split: Split) -> dict[str, Any]:
    """The options as the manifest keeps them: a file is its name and SHA-256."""
    kept: dict[str, Any] = {"splits": list(named) or asdict(split), "filters": asdict(filters)}
    if filters.taxa_nodes is not None:
        kept["filters"]["taxa_nodes"] = {"name": filters.taxa_nodes.name, "sha256": sha256(filters.taxa_nodes)}
    return kept


class AlreadyThereError(ValueError):
    """The output exists, or another process is writing it."""


def _taken(output: Path) -> AlreadyThereError:
    return AlreadyThereError(f"{output} exists already; give another output or move it away")


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def _partial_folder(output: Path) -> Iterator[Path]:
    """A locked folder `.NAME.partial` beside the output, removed at the end; what a killed process left is cleared.

    Raises:
        AlreadyThereError: another process holds it.
        ValueError: a folder of that name that is not ours.
    """
    folder = _partial(output)
    lock = None
    while lock is None:
        if _is_foreign(folder):
            raise ValueError(f"{folder} is in the way and was not made by this program; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = (folder / "lock").open("w")
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            with lock_may_fail(folder):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise AlreadyThereError(f"{output}: another process is writing it (it holds {folder / 'lock'})") from None
        with contextlib.suppress(FileNotFoundError):
            if (folder / "lock").stat().st_ino == os.fstat(handle.fileno()).st_ino:
                lock = handle
        if lock is None:
            handle.close()
    try:
        _clear(folder)
        yield folder
    finally:
        _clear(folder)
        # the lock goes last: without it the rest would not be known for ours
        (folder / "lock").unlink()
        with contextlib.suppress(OSError):  # the next writer may be in it already
            folder.rmdir()
        lock.close()


def _is_foreign(folder: Path) -> bool:
    """Whether it has files and no lock. Others of this program may take and leave it meanwhile: a lock comes before all
    files and goes after them, so that of one who came between two looks the second sees it, or its files are gone."""
    try:
        found = [path for path in folder.iterdir() if path.name != "lock"]
    except FileNotFoundError:
        return False
    return bool(found) and not (folder / "lock").exists() and any(map(os.path.lexists, found))


def _clear(folder: Path) -> None:
    for leftover in folder.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != "lock":
            leftover.unlink()


@contextlib.contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """A full disk and the like as one line that names the output. (Inputs name themselves.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:  # HDF5 reports what it meets while closing a file as a RuntimeError
        found = re.search(r"errno = (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number is None:
            raise
        reason = os.strerror(number)
        raise ValueError(f"{output}: cannot be written: {reason}") from error


def bundled_store(folder: Path = Path("data")) -> SequenceStore:
    """The store of the bundled sample, built in `folder` when it is not there yet; named after its contents."""
    inputs = {split: SAMPLE_FOLDER / f"{split}.fasta.gz" for split in SPLITS}
    digest = hashlib.sha256(f"{FORMAT_VERSION}".encode() + "".join(map(sha256, inputs.values())).encode()).hexdigest()
    path = folder / f"sample-{digest[:8]}.h5"
    while not path.exists():
        try:
            return build_store(inputs, path)
        except AlreadyThereError:  # another process makes it
            time.sleep(0.1)
    return SequenceStore(path)
