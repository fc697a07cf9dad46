"""Sequences and ids that occur more than once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from protlig_dd.data.fasta import FastaFile, id_of
from protlig_dd.data.prepare.spool import ROWS_AT_ONCE, Spool
from protlig_dd.data.store import SPLITS

SHOWN_IDS = 3  # of sequences that are in two splits


def kept_rows(spool: Spool, files: Sequence[FastaFile], *, duplicates: bool) -> tuple[np.ndarray, np.ndarray]:
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


def shared_sequences(spool: Spool, splits: np.ndarray, repeats: np.ndarray) -> list[dict[str, Any]]:
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
                ids = [[id_of_row(spool, row) for row in rows] for rows in both[:SHOWN_IDS].tolist()]
                found.append({"of": name, "in": earlier, "sequences": len(both), "first": ids})
    return found


def id_of_row(spool: Spool, row: int) -> str:
    lengths = np.memmap(spool.path("header_length"), np.int32, "r")
    start = int(lengths[:row].sum(dtype=np.int64))
    with spool.path("headers").open("rb") as file:
        file.seek(start)
        return id_of(file.read(int(lengths[row])).decode())


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
