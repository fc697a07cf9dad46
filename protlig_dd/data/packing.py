"""The plan of an epoch: which sequences are in which pack.

For given data and settings, a plan depends only on (seed, epoch). The processes of a node share the plan as a file (see
plan_cache.py). The method of random choices has a version number. A resumed run uses the version that it was started
with (see draws.py).

For each epoch, the rows are shuffled and packs are filled with the shuffled sequences. The budget is the maximum number
of tokens of a pack. A pack closes when the next sequence does not fit into its budget. If the shuffled sequences have
5, 6, 4 and 1 tokens and the budget is 12, the packs are [5, 6] and [4, 1].

Every epoch has the same number of packs, packs_per_epoch. It is floor(tokens of an epoch / budget), or slightly less
for mixed stores (see packs_in_epoch). Pack g of the whole run is therefore in epoch g // packs_per_epoch, and a run can
start at any step at the cost of planning one epoch. No pack exceeds the budget, so every shuffle fills at least
packs_per_epoch packs. The sequences after these packs are the epoch's tail, which is not read. The tail differs from
epoch to epoch.

A pass over a store reads each of its sequences once. Without weights, an epoch is one pass over every store. With
weights, store s contributes its quota q_s of tokens to each epoch, and q_s is proportional to the store's weight w_s.
The quotas are scaled so that an epoch is one pass over the store with the largest (tokens of s) / w_s. Every other
store is shuffled again for each pass, and its passes, one after another, form an endless stream of tokens. Epoch e
takes the sequences that begin at tokens e q_s .. (e + 1) q_s - 1 of the stream, so each sequence of the stream is in
exactly one epoch. After each epoch, all sequences of a store have been read equally often, or some of them once more
than the others (if sequences in tails count as read).
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from protlig_dd.data.draws import shuffled
from protlig_dd.data.lengths import Lengths

_SHUFFLE, _PASS = 1, 3  # second integer of the random keys, one for each purpose; loader.py uses 2
ROWS_AT_ONCE = 1 << 20


class Plan(NamedTuple):
    rows: np.ndarray
    """(n,) row numbers of the epoch's sequences, in the order of the packs; the tail is at the end."""
    starts: np.ndarray
    """(n_packs + 1,) pack i has rows[starts[i]:starts[i + 1]]. The packs i >= packs_per_epoch are the tail."""


def clipped_tokens(residues: np.ndarray, max_len: int) -> np.ndarray:
    """Return (n,), the number of tokens of each sequence.

    A sequence longer than max_len counts max_len + 1 tokens, the most that its crop can have: max_len residues and
    either `<bos>` or `<eos>`.
    """
    return np.where(residues <= max_len, residues + 2, max_len + 1)


def total_tokens(lengths: np.ndarray | Lengths, rows: np.ndarray, max_len: int) -> int:
    """Return the sum of `clipped_tokens` over the sequences with these row numbers.

    Args:
        lengths: number of residues of every row of the stores.
    """
    blocks = (rows[first : first + ROWS_AT_ONCE] for first in range(0, len(rows), ROWS_AT_ONCE))
    return sum(int(clipped_tokens(lengths[block], max_len).sum(dtype=np.int64)) for block in blocks)


def token_quotas(totals: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Return how many tokens each store contributes to an epoch (see the module's docstring).

    Args:
        totals: number of tokens in each store.
    """
    if weights is None:
        return list(totals)
    longest = max(total / weight for total, weight in zip(totals, weights, strict=True))
    return [round(longest * weight) for weight in weights]


def packs_in_epoch(totals: Sequence[int], quotas: Sequence[int], tokens_per_pack: int, max_len: int) -> int:
    """Return the number of packs that every epoch is guaranteed to fill.

    If a store's quota is not exactly one pass, a sequence may lie across the boundary of two epochs. Such a sequence
    belongs to the earlier epoch. The later epoch may then get fewer tokens than the quota, by less than one sequence.
    """
    cut = sum(quota != total for total, quota in zip(totals, quotas, strict=True))
    return (sum(quotas) - cut * (max_len + 2)) // tokens_per_pack


def epoch_rows(
    groups: Sequence[np.ndarray],
    lengths: np.ndarray | Lengths,
    totals: Sequence[int],
    quotas: Sequence[int],
    *,
    max_len: int,
    seed: int,
    epoch: int,
    version: int,
) -> np.ndarray:
    """Return the row numbers of the sequences of one epoch, shuffled.

    Args:
        groups: row numbers of each store's sequences.
        lengths: number of residues of every row of the stores.
        totals: number of tokens in each store.
        quotas: number of tokens that each store contributes to an epoch.
        version: version of the method of random choices (see draws.py).
    """
    parts = []
    for number, (rows, total, quota) in enumerate(zip(groups, totals, quotas, strict=True)):
        start, end = epoch * quota, (epoch + 1) * quota
        for pass_number in range(start // total, -(-end // total)):
            first, last = max(start - pass_number * total, 0), min(end - pass_number * total, total)
            if (first, last) == (0, total):
                parts.append(rows)
                continue
            order = shuffled(rows, [seed, _PASS, number, pass_number], version)
            parts.append(order[slice(*sequences_before(order, lengths, [first, last], max_len))])
    all_rows = parts[0] if len(parts) == 1 else np.concatenate(parts)  # do not copy 70 million rows needlessly
    return shuffled(all_rows, [seed, _SHUFFLE, epoch], version)


def sequences_before(
    order: np.ndarray, lengths: np.ndarray | Lengths, tokens: Sequence[int], max_len: int
) -> np.ndarray:
    """Return for each of these numbers of tokens how many sequences of `order` begin before it."""
    counts, tokens_before = np.zeros(len(tokens), np.int64), 0
    for first in range(0, len(order), ROWS_AT_ONCE):
        block = clipped_tokens(lengths[order[first : first + ROWS_AT_ONCE]], max_len)
        ends = tokens_before + np.cumsum(block, dtype=np.int64)
        counts += np.searchsorted(ends - block, tokens)
        tokens_before = int(ends[-1])
    return counts


def pack_starts(token_blocks: Iterable[np.ndarray], tokens_per_pack: int) -> np.ndarray:
    """Fill packs with sequences in the given order. Return the packs' (n_packs + 1,) bounds (see Plan.starts).

    Args:
        token_blocks: arrays with the number of tokens of each sequence, in order. No number exceeds tokens_per_pack.
    """
    starts = array("q", [0])  # 8 bytes a pack, where a list of integers takes 40
    rows_before = tokens_before = 0  # rows and tokens of the blocks before the current one
    pack_start = 0  # tokens before the pack that is being filled
    for block in token_blocks:
        ends = tokens_before + np.cumsum(block, dtype=np.int64)
        find = ends.searchsorted
        while (row := int(find(pack_start + tokens_per_pack, "right"))) < len(ends):  # first row of the next pack
            pack_start = int(ends[row - 1]) if row else tokens_before
            starts.append(rows_before + row)
        rows_before, tokens_before = rows_before + len(block), int(ends[-1])
    if rows_before:
        starts.append(rows_before)
    return np.array(starts)


def make_plan(rows: np.ndarray, lengths: np.ndarray | Lengths, *, max_len: int, tokens_per_pack: int) -> Plan:
    """Fill packs with the rows in the given order, and return the plan.

    Args:
        lengths: number of residues of every row of the stores.
    """
    blocks = (rows[first : first + ROWS_AT_ONCE] for first in range(0, len(rows), ROWS_AT_ONCE))
    return Plan(rows, pack_starts((clipped_tokens(lengths[block], max_len) for block in blocks), tokens_per_pack))
