"""Which sequences are in which pack of an epoch: a pure function of (seed, epoch), kept in a file that processes share.
How chance enters has a version, which a run keeps (see draws.py).

An epoch shuffles the rows and fills packs in that order: a pack closes when the next sequence would exceed the token
budget. With lengths 5, 6, 4, 1 in shuffled order and a budget of 12 tokens the packs are [5, 6] and [4, 1].

Every epoch has the same number of packs, floor(tokens / budget), so pack g of the whole run lies in epoch
g // packs_per_epoch: a run starts at any step at the cost of planning one epoch. Packs are never perfectly full, so
an epoch's shuffle always yields at least that many; the sequences left over (others each epoch) are its tail.

A mixture of stores with weights w_s (shares of tokens) has as its epoch one pass over the store that lasts longest,
the one with the largest (tokens of s) / w_s. Each of the others is read through in passes of its own, shuffled anew
for each, which run on from epoch to epoch: in epoch e it gives those sequences whose first token is among tokens
e q_s .. (e + 1) q_s - 1 of its endless stream, q_s being its share of tokens. So within a pass every sequence of a
store comes exactly once, and over a run no two sequences of a store differ by more than one in how often they came,
but for the tails.
Without weights every store is passed once in an epoch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from protlig_dd.data.draws import shuffled

_SHUFFLE, _PASS = 1, 3  # first words of the random keys, so that two purposes never share a stream
AT_ONCE = 1 << 22  # rows


class Plan(NamedTuple):
    rows: np.ndarray
    """(n,) rows of the epoch in pack order, the tail included."""
    starts: np.ndarray
    """(packs + 1,) bounds of the packs in `rows`."""


def clipped_tokens(residues: np.ndarray, max_len: int) -> np.ndarray:
    """(n,) tokens that sequences of `residues` residues take: all of them, or the most a crop of max_len takes."""
    return np.where(residues <= max_len, residues + 2, max_len + 1)


def total_tokens(lengths: np.ndarray, rows: np.ndarray, max_len: int) -> int:
    """Tokens of these rows (of a table of lengths in residues), clipped."""
    blocks = (rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE))
    return sum(int(clipped_tokens(lengths[block], max_len).sum(dtype=np.int64)) for block in blocks)


def quotas(totals: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Tokens that each store gives to an epoch (see the module's docstring).

    Args:
        totals: tokens of each store.
    """
    if weights is None:
        return list(totals)
    longest = max(total / weight for total, weight in zip(totals, weights, strict=True))
    return [round(longest * weight) for weight in weights]


def packs_in_epoch(totals: Sequence[int], wanted: Sequence[int], tokens_per_pack: int, max_len: int) -> int:
    """Packs that every epoch is sure to fill.

    A store that gives a part of a pass gives its quota but for one sequence, cut where the next epoch begins.
    """
    cut = sum(quota != total for total, quota in zip(totals, wanted, strict=True))
    return (sum(wanted) - cut * (max_len + 2)) // tokens_per_pack


def epoch_rows(
    groups: Sequence[np.ndarray],
    lengths: np.ndarray,
    totals: Sequence[int],
    wanted: Sequence[int],
    *,
    max_len: int,
    seed: int,
    epoch: int,
    version: int,
) -> np.ndarray:
    """Rows of one epoch, shuffled.

    Args:
        groups: rows of each store.
        lengths: residues of every row.
        totals, wanted: tokens of each store, and those that it gives to an epoch.
        version: see draws.py.
    """
    parts = []
    for number, (rows, total, quota) in enumerate(zip(groups, totals, wanted, strict=True)):
        start, end = epoch * quota, (epoch + 1) * quota
        for turn in range(start // total, -(-end // total)):
            first, last = max(start - turn * total, 0), min(end - turn * total, total)
            if (first, last) == (0, total):
                parts.append(rows)
                continue
            order = shuffled(rows, [seed, _PASS, number, turn], version)
            begins = np.cumsum(tokens := clipped_tokens(lengths[order], max_len), dtype=np.int64) - tokens
            parts.append(order[slice(*np.searchsorted(begins, [first, last]))])
    every = parts[0] if len(parts) == 1 else np.concatenate(parts)  # 70 million rows are not copied without need
    return shuffled(every, [seed, _SHUFFLE, epoch], version)


def pack_starts(token_blocks: Iterable[np.ndarray], tokens_per_pack: int) -> np.ndarray:
    """(n_packs + 1,) bounds of the packs that filling in this order gives.

    Args:
        token_blocks: tokens of each sequence, none above tokens_per_pack; arrays that end to end are the order.
    """
    starts = [0]
    rows = seen = 0  # before the block
    opened = 0  # tokens before the pack that is being filled
    for block in token_blocks:
        ends = seen + np.cumsum(block, dtype=np.int64)
        find = ends.searchsorted
        while (place := int(find(opened + tokens_per_pack, "right"))) < len(ends):
            opened = int(ends[place - 1]) if place else seen
            starts.append(rows + place)
        rows, seen = rows + len(block), int(ends[-1])
    if rows:
        starts.append(rows)
    return np.array(starts)


def make_plan(rows: np.ndarray, lengths: np.ndarray, *, max_len: int, tokens_per_pack: int) -> Plan:
    """Fill packs with rows in this order.

    Args:
        lengths: residues of every row.
    """
    blocks = (rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE))
    return Plan(rows, pack_starts((clipped_tokens(lengths[block], max_len) for block in blocks), tokens_per_pack))
