"""Crops and windows of proteins that are longer than the model's maximum length."""

import math
from typing import Literal, TypeVar, get_args

import numpy as np

from protlig_dd.tokenizer import N_STATES

Crop = Literal["random", "start"]
CROPS = get_args(Crop)


Count = TypeVar("Count", int, np.ndarray)


def crop_bounds(residues: Count, starts: Count, max_len: int) -> tuple[Count, Count]:
    """Return the bounds (first, end) of a crop: tokens[first:end] has the residues start .. start + max_len - 1.

    `tokens` is `<bos> residues <eos>`, and residues are counted from 0. A crop keeps `<bos>` only if it begins with the
    first residue of the protein, and `<eos>` only if it ends with the last residue.

    Args:
        residues: number of residues of one protein, or (n,) for n proteins.
        starts: first residue of the crop, or (n,) for n proteins.
    """
    return starts + (starts > 0), starts + max_len + 1 + (starts + max_len == residues)


def check_crop(crop: str) -> None:
    """Raise ValueError unless `crop` is one of CROPS."""
    if crop not in CROPS:
        raise ValueError(f"data.crop={crop}; choose from {', '.join(CROPS)}")


def designed_crops(targets: np.ndarray, max_len: int, *, first: bool) -> np.ndarray:
    """Return the residues (counted from 0, ascending) at which a crop with designed residues may begin.

    A crop has max_len residues. A designed residue is an amino acid that is not context. If no crop contains a designed
    residue, return the starts of all crops.

    Args:
        targets: tokens `<bos> residues <eos>` of a protein longer than max_len, with X in place of context residues
            (see `targets_of` in case.py).
        first: whether to return only one start, that of the crop with the largest number of designed residues. If
            several crops have this number, the first of them is taken. So if every residue is designed, the start is 0.
    """
    before = np.append(0, np.cumsum(targets[1:-1] < N_STATES))
    counts = before[max_len:] - before[:-max_len]
    if first:
        return counts.argmax(keepdims=True)
    return np.flatnonzero(counts) if counts.any() else np.arange(len(counts))


def window_starts(residues: int, max_len: int) -> list[int]:
    """Return the first residue of each window, for windows of `max_len` residues that together cover a protein.

    The windows are evenly spaced. Their number is the smallest for which neighbouring windows overlap by at least half.
    """
    if residues <= max_len:
        return [0]
    steps = math.ceil((residues - max_len) / max(1, max_len // 2))
    return [round(i * (residues - max_len) / steps) for i in range(steps + 1)]


def window(tokens: np.ndarray, start: int, max_len: int) -> np.ndarray:
    """Return `<bos> residues <eos>` cropped to at most `max_len` residues, beginning with residue `start` (from 0)."""
    residues = len(tokens) - 2
    first, end = crop_bounds(residues, start, min(max_len, residues - start))
    return tokens[first:end]
