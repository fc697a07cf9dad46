"""Find sequences and ids that occur more than once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from protlig_dd.data.fasta import FastaFile, id_of
from protlig_dd.data.prepare.spool import ROWS_AT_ONCE, Spool
from protlig_dd.data.store import SPLITS

SHOWN_IDS = 3  # maximum number of examples in a list of the manifest


def kept_rows(spool: Spool, files: Sequence[FastaFile], *, duplicates: bool) -> tuple[np.ndarray, np.ndarray]:
    """Find repeated sequences, and which rows to keep.

    Args:
        duplicates: whether to keep sequences that are equal to an earlier sequence.

    Returns:
        keep: (rows,) bool, whether each row is kept.
        repeats: (k, 2) row numbers. Column 0 has the rows whose sequence occurs in an earlier row, and column 1 the
            first row with this sequence.

    Raises:
        ValueError: an id occurs twice. The message names both records.
    """
    rows = repeated_rows(spool.load("id_hash"))
    if len(rows):
        _raise_for_repeated_id(spool, files, rows)
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


def shared_sequences(spool: Spool, splits: np.ndarray, repeats: np.ndarray) -> list[dict[str, Any]]:
    """Count, for each pair of splits, the sequences of one split whose first occurrence is in the other split.

    Return the counts that are not zero, each with the ids of up to SHOWN_IDS examples.

    Args:
        repeats: (k, 2) row numbers. Column 0 has the rows whose sequence occurs in an earlier row, and column 1 the
            first row with this sequence.
    """
    repeats = repeats[np.argsort(repeats[:, 0])]
    shared = []
    for code, name in enumerate(SPLITS):
        for earlier_code, earlier in enumerate(SPLITS):
            pairs = repeats[(splits[repeats[:, 0]] == code) & (splits[repeats[:, 1]] == earlier_code)]
            if code != earlier_code and len(pairs):
                ids = [[id_of_row(spool, row) for row in rows] for rows in pairs[:SHOWN_IDS].tolist()]
                shared.append({"of": name, "in": earlier, "sequences": len(pairs), "first": ids})
    return shared


def id_of_row(spool: Spool, row: int) -> str:
    lengths = np.memmap(spool.path("header_length"), np.int32, "r")
    start = int(lengths[:row].sum(dtype=np.int64))
    with spool.path("headers").open("rb") as file:
        file.seek(start)
        return id_of(file.read(int(lengths[row])).decode())


def repeated_rows(hashes: np.ndarray) -> np.ndarray:
    """Return the rows, ascending, whose hash occurs more than once."""
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


def _raise_for_repeated_id(spool: Spool, files: Sequence[FastaFile], rows: np.ndarray) -> None:
    """Raise ValueError if two of these rows have the same id. The ids are compared, as their hashes may collide."""
    ends = np.cumsum(spool.load("header_length"), dtype=np.int64)
    headers = np.memmap(spool.path("headers"), np.uint8, "r")
    seen: dict[str, int] = {}
    for row in rows.tolist():
        start = int(ends[row - 1]) if row else 0
        id_ = id_of(headers[start : ends[row]].tobytes().decode())
        if id_ in seen:
            first, second = (_location(spool, files, repeated) for repeated in (seen[id_], row))
            raise ValueError(f"{second}: the id {id_} already occurs in {first}")
        seen[id_] = row


def _location(spool: Spool, files: Sequence[FastaFile], row: int) -> str:
    """Return the file and record of a row, and the line if the file can be read again (a pipe cannot)."""
    file, number = files[spool.load("file")[row]], int(spool.load("record")[row])
    if file.path is not None and file.path.is_file():
        for block in FastaFile(file.path).blocks():
            if number < block.first_record + len(block.ids):
                return block.location(number - block.first_record)
    return f"{file.name}: record {number}"
