"""The windows through which a model sees the variants of a long protein."""

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
    """What a variant changes within one window of the wild type, residues start..stop (from 0, stop not included)."""

    variant: int
    start: int
    stop: int
    change: Variant


def pieces_of(assay: Assay, length: int, longest: int, strategy: str) -> list[Piece]:
    """The windows through which a model that sees `longest` residues sees the variants of a protein of this length.

    A window lies around the middle of the changes, as far inside the protein as it can. Substitutions that no window
    holds together are scored in several (`groups_of`), each with the wild type's residues at the other windows' sites,
    and summed.
    Where nothing is masked, each site has a window by itself; these begin at multiples of a quarter of their length,
    so that all sites share a few.

    Raises:
        ValueError: an insertion or deletion that no window holds; names the row and the lengths.
    """
    pieces, unmasked = [], strategy in UNMASKED
    grid = max(1, longest // 4) if unmasked else 1
    for number, (variant, where) in enumerate(zip(assay.variants, assay.where, strict=True)):
        if variant.indel is not None:
            start, stop, ids = variant.indel
            if max(length, length + longer(variant)) > longest and max(stop - start, len(ids)) >= longest:
                raise ValueError(
                    f"{where}: {stop - start} residues become {len(ids)}, too many for a window of the {longest} "
                    "that this model was trained on"
                )
            size = longest - max(0, longer(variant))  # of the wild type's window; the variant's is no longer either
            pieces.append(Piece(number, *around(start, stop, length, size), variant))
        alone, sites = strategy in ONE_BY_ONE, [site for site, _ in variant.substitutions]
        for first, last in [(i, i + 1) for i in range(len(sites))] if alone else groups_of(sites, length, longest):
            start, stop = around(sites[first], sites[last - 1] + 1, length, longest, grid)
            pieces.append(Piece(number, start, stop, Variant(variant.substitutions[first:last])))
    return pieces


def groups_of(sites: Sequence[int], length: int, longest: int) -> list[tuple[int, int]]:
    """Which sites share a window: first, last (not among them) of each group of neighbours.

    As few windows as hold all the sites; of such partitions the one whose site nearest to its window's edge lies
    furthest inside, then the next nearest window's, and so on. So the part of a best partition that ends at a site is
    itself best, and a table over the sites finds it.

    Args:
        sites: in ascending order, without repeats; none has no groups.
    """
    if not sites or sites[-1] - sites[0] < longest:
        return [(0, len(sites))] if sites else []
    # of the sites before each: how many windows, their margins in ascending order, and where the last group begins
    best: list[tuple[int, list[int], int]] = [(0, [], 0)]
    for last in range(1, len(sites) + 1):
        lowest = bisect_right(sites, sites[last - 1] - longest)  # the first site that a window with the last can hold
        windows, margins, begin = best[lowest][0] + 1, list[int](), lowest
        for first in range(lowest, last):
            if best[first][0] + 1 > windows:  # more sites never need fewer
                break
            others = best[first][1]
            if margins and others and others[0] < margins[0]:
                continue  # whatever the last group's
            mine = margin(sites[first], sites[last - 1], length, longest)
            if margins and mine < margins[0]:
                continue  # not worth sorting
            if (candidate := sorted([*others, mine])) > margins:
                margins, begin = candidate, first
        best.append((windows, margins, begin))
    groups, last = [], len(sites)
    while last:
        groups.append((best[last][2], last))
        last = best[last][2]
    return groups[::-1]


def margin(first: int, last: int, length: int, longest: int) -> int:
    """Residues between the sites first..last and the nearer edge of their window; the protein's ends are no edges."""
    start, stop = around(first, last + 1, length, longest)
    return min(first - start if start else length, stop - 1 - last if stop < length else length)


def longer(change: Variant) -> int:
    """By how many residues a variant is longer than the wild type."""
    return len(change.indel.ids) - (change.indel.stop - change.indel.start) if change.indel else 0


def around(first: int, last: int, length: int, size: int, grid: int = 1) -> tuple[int, int]:
    """start, stop of `size` residues (all, of a shorter protein) around first..last; from the nearest multiple of
    `grid`, unless the protein ends before.
    """
    size = min(size, length)
    nearest = ((first + last - size) // 2 + grid // 2) // grid * grid
    start = min(max(0, nearest), length - size)
    return start, start + size


def windowed(target: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Ids of a window; <bos> and <eos> stand at the protein's own ends alone, as in the crops of training."""
    return window(np.concatenate([[BOS], target, [EOS]]), start, stop - start).astype(np.int64)
