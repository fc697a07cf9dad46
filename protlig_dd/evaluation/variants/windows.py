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
    """The part of a variant that one window of the wild type contains.

    Args:
        variant: index of the variant in the assay.
        start, stop: residues of the window, from 0, `stop` excluded.
        change: the changes inside the window.
    """

    variant: int
    start: int
    stop: int
    change: Variant


def pieces_of(assay: Assay, length: int, max_len: int, strategy: str) -> list[Piece]:
    """Return the windows in which a model with this `max_len` scores each variant of a protein of `length` residues.

    A window is centred on the changes and moved inwards at the ends of the protein. Substitutions too far apart for
    one window are scored in several (`groups_of`) and the scores are summed; in each window, the sites of the other
    windows keep the wild type's residues. Strategies that score each site separately use one window per site. For
    strategies without masks, windows start at multiples of a quarter of the window length, so that many sites share a
    window.

    Raises:
        ValueError: an insertion or deletion too long for a window; names the row and the lengths.
    """
    pieces = []
    grid = max(1, max_len // 4) if strategy in UNMASKED else 1
    for number, (variant, where) in enumerate(zip(assay.variants, assay.where, strict=True)):
        if variant.indel is not None:
            start, stop, ids = variant.indel
            if max(length, length + length_change(variant)) > max_len and max(stop - start, len(ids)) >= max_len:
                raise ValueError(
                    f"{where}: {len(ids)} residues replace {stop - start}, which does not fit into a window of "
                    f"{max_len} residues, the most that this model was trained on"
                )
            size = max_len - max(0, length_change(variant))  # so that the variant's window fits as well
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
    """Partition the sites into groups that share a window; return indices (first, last) into `sites`, `last` excluded.

    The partition has the fewest windows possible. Among those, it maximises the smallest margin (distance from a
    site to the edge of its window), then the second smallest, and so on. Every prefix of an optimal partition is
    optimal too, so dynamic programming over the sites finds it.

    Args:
        sites: positions in ascending order, without repeats; may be empty.
    """
    if not sites or sites[-1] - sites[0] < max_len:
        return [(0, len(sites))] if sites else []
    # for each prefix of the sites: number of windows, their margins in ascending order, start of the last group
    best: list[tuple[int, list[int], int]] = [(0, [], 0)]
    for last in range(1, len(sites) + 1):
        lowest = bisect_right(sites, sites[last - 1] - max_len)  # first site that fits into a window with the last
        windows, margins, begin = best[lowest][0] + 1, list[int](), lowest
        for first in range(lowest, last):
            if best[first][0] + 1 > windows:  # the number of windows never decreases with more sites
                break
            others = best[first][1]
            if margins and others and others[0] < margins[0]:
                continue  # worse, whatever the margin of the last group
            last_margin = margin(sites[first], sites[last - 1], length, max_len)
            if margins and last_margin < margins[0]:
                continue  # worse already, without sorting
            if (candidate := sorted([*others, last_margin])) > margins:
                margins, begin = candidate, first
        best.append((windows, margins, begin))
    groups, last = [], len(sites)
    while last:
        groups.append((best[last][2], last))
        last = best[last][2]
    return groups[::-1]


def margin(first: int, last: int, length: int, max_len: int) -> int:
    """Residues between the sites first..last and the nearer edge of their window.

    The ends of the protein do not count as edges.
    """
    start, stop = window_around(first, last + 1, length, max_len)
    return min(first - start if start else length, stop - 1 - last if stop < length else length)


def length_change(change: Variant) -> int:
    """Length of the variant minus that of the wild type."""
    return len(change.indel.ids) - (change.indel.stop - change.indel.start) if change.indel else 0


def window_around(first: int, last: int, length: int, size: int, grid: int = 1) -> tuple[int, int]:
    """Return start and stop of `size` residues (or the whole protein, if shorter) centred on first..last - 1.

    The start is rounded to a multiple of `grid` and moved inwards at the ends of the protein.
    """
    size = min(size, length)
    nearest = ((first + last - size) // 2 + grid // 2) // grid * grid
    start = min(max(0, nearest), length - size)
    return start, start + size


def window_tokens(target: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Token ids of a window, with <bos> and <eos> only at the ends of the protein, as in training crops."""
    return window(np.concatenate([[BOS], target, [EOS]]), start, stop - start).astype(np.int64)
