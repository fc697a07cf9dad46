"""Windows for proteins longer than the model's training length (`max_len`)."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from protlig_dd.data.crops import window
from protlig_dd.evaluation.variants.assays import Assay
from protlig_dd.evaluation.variants.mutants import Variant
from protlig_dd.evaluation.variants.strategies import ONE_BY_ONE, UNMASKED
from protlig_dd.tokenizer import BOS, EOS


class Piece(NamedTuple):
    """The changes of a variant that are scored together, and the window of the wild type in which they are scored.

    Args:
        variant: index of the variant in the assay.
        start, stop: first residue of the window and first residue after it, counted from 0 in the wild type.
        change: the changes that are scored. At all other positions the window has the wild type's residues.
    """

    variant: int
    start: int
    stop: int
    change: Variant


def pieces_of(assay: Assay, length: int, max_len: int, strategy: str) -> list[Piece]:
    """Return the pieces in which a model with this `max_len` scores the variants of a protein of `length` residues.

    An insertion or deletion is one piece. If the strategy scores each site separately, each substitution is one piece.
    Otherwise all substitutions of a variant are one piece, unless they are too far apart for one window: then they are
    divided among several pieces (`groups_of`). A variant's score is the sum of the scores of its pieces.

    Each window is centred on the changes of its piece, and moved inwards at the ends of the protein. For strategies
    without masks, the start of a window is rounded to a multiple of a quarter of `max_len`. Pieces with nearby sites
    then often have the same window, and the network evaluates this window only once.

    Raises:
        ValueError: an insertion or deletion is too long for a window. The message names the row and the lengths.
    """
    pieces = []
    grid = max(1, max_len // 4) if strategy in UNMASKED else 1
    for number, (variant, where) in enumerate(zip(assay.variants, assay.where, strict=True)):
        if variant.indel is not None:
            start, stop, ids = variant.indel
            if max(length, length + length_change(variant)) > max_len and max(stop - start, len(ids)) >= max_len:
                raise ValueError(
                    f"{where}: {len(ids)} residues replace {stop - start}; such a change does not fit into a window of "
                    f"{max_len} residues, the maximum length of this model"
                )
            # if the change adds residues, the wild type's window is smaller than max_len by their number, so that the
            # variant's window has at most max_len residues too
            size = max_len - max(0, length_change(variant))
            pieces.append(Piece(number, *window_around(start, stop, length, size), variant))
        sites = [site for site, _ in variant.substitutions]
        if strategy in ONE_BY_ONE:
            groups = [(i, i + 1) for i in range(len(sites))]
        else:
            groups = groups_of(sites, length, max_len)
        for first, last in groups:
            start, stop = window_around(sites[first], sites[last - 1] + 1, length, max_len, grid)
            pieces.append(Piece(number, start, stop, Variant(variant.substitutions[first:last])))
    return pieces


def groups_of(sites: Sequence[int], length: int, max_len: int) -> list[tuple[int, int]]:
    """Partition the sites into groups, each of which fits into one window.

    The partition has as few groups as possible. Among the partitions with this number of groups, it maximises the
    smallest `margin` of a group (the residues between its sites and the edge of its window), then the second smallest
    margin, and so on. If the last group is removed from an optimal partition, the rest is an optimal partition of the
    remaining sites. So dynamic programming over the sites finds an optimal partition.

    Args:
        sites: positions in ascending order, without repeats; may be empty.

    Returns:
        For each group, its bounds (first, last) as indices into `sites`, `last` excluded.
    """
    if not sites or sites[-1] - sites[0] < max_len:
        return [(0, len(sites))] if sites else []
    # best partition of each prefix of the sites: number of groups, their margins in ascending order, and the `first` of
    # the last group
    best: list[tuple[int, list[int], int]] = [(0, [], 0)]
    for last in range(1, len(sites) + 1):
        lowest = bisect_right(sites, sites[last - 1] - max_len)  # sites lowest .. last - 1 fit into one window
        windows, margins, begin = best[lowest][0] + 1, list[int](), lowest
        for first in range(lowest, last):
            if best[first][0] + 1 > windows:  # for a larger `first`, the number of windows is never smaller
                break
            others = best[first][1]
            if margins and others and others[0] < margins[0]:
                continue  # an earlier group has a smaller margin than every group of the best partition so far
            last_margin = margin(sites[first], sites[last - 1], length, max_len)
            if margins and last_margin < margins[0]:
                continue  # the last group has a smaller margin than every group of the best partition so far
            if (candidate := sorted([*others, last_margin])) > margins:
                margins, begin = candidate, first
        best.append((windows, margins, begin))
    groups, last = [], len(sites)
    while last:
        groups.append((best[last][2], last))
        last = best[last][2]
    return groups[::-1]


def margin(first: int, last: int, length: int, max_len: int) -> int:
    """Return the number of residues between the sites first..last and the nearer edge of the window around them.

    `last` is included. An end of the protein does not count as an edge; without any edge the result is `length`.
    """
    start, stop = window_around(first, last + 1, length, max_len)
    return min(first - start if start else length, stop - 1 - last if stop < length else length)


def length_change(change: Variant) -> int:
    """Return the length of the variant minus the length of the wild type."""
    return len(change.indel.ids) - (change.indel.stop - change.indel.start) if change.indel else 0


def window_around(first: int, last: int, length: int, size: int, grid: int = 1) -> tuple[int, int]:
    """Return start and stop (excluded) of a window of `size` residues that is centred on residues first..last - 1.

    The start is rounded to the nearest multiple of `grid`. At the ends of the protein, the window is moved inwards. If
    the protein has fewer than `size` residues, the window is the whole protein.
    """
    size = min(size, length)
    nearest = ((first + last - size) // 2 + grid // 2) // grid * grid
    start = min(max(0, nearest), length - size)
    return start, start + size


def window_tokens(target: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return the token ids of a window of the protein `target`.

    As in training crops, <bos> and <eos> are included only if the window reaches that end of the protein.
    """
    return window(np.concatenate([[BOS], target, [EOS]]), start, stop - start).astype(np.int64)
