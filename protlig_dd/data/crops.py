"""Crops and windows of proteins that are longer than the model's maximum length."""

import math
from typing import Literal, TypeVar, get_args

import numpy as np

from protlig_dd.tokenizer import N_STATES

Crop = Literal["random", "start"]
CROPS = get_args(Crop)


Count = TypeVar("Count", int, np.ndarray)


def crop_bounds(residues: Count, starts: Count, max_len: int) -> tuple[Count, Count]:
    """Return the token bounds (first, end) of crops to residues start .. start + max_len - 1.

    Tokens are counted in `<bos> residues <eos>`. A crop keeps `<bos>` only if it begins with the first residue, and
    `<eos>` only if it ends with the last one.

    Args:
        residues, starts: length and first residue of one protein, or (n,) arrays for n proteins.
    """
    return starts + (starts > 0), starts + max_len + 1 + (starts + max_len == residues)


def check_crop(crop: str) -> None:
    """Raise ValueError unless `crop` is one of CROPS."""
    if crop not in CROPS:
        raise ValueError(f"data.crop={crop}; choose from {', '.join(CROPS)}")


def designed_crops(targets: np.ndarray, max_len: int, *, first: bool) -> np.ndarray:
    """Return the first residues of crops of max_len residues that contain designed residues, ascending.

    If no crop contains any, all of them are returned.

    Args:
        targets: `<bos> residues <eos>` with X for context residues and more than max_len residues (see `targets_of`).
        first: return a single crop, the first of those with the most designed residues. It begins at residue 0 if
            everything is designed.
    """
    before = np.append(0, np.cumsum(targets[1:-1] < N_STATES))
    counts = before[max_len:] - before[:-max_len]
    if first:
        return counts.argmax(keepdims=True)
    return np.flatnonzero(counts) if counts.any() else np.arange(len(counts))


def window_starts(residues: int, max_len: int) -> list[int]:
    """Return the first residues of windows of `max_len` residues that cover a protein.

    The windows are evenly spaced. There are as few as needed for neighbours to overlap by at least half.
    """
    if residues <= max_len:
        return [0]
    steps = math.ceil((residues - max_len) / max(1, max_len // 2))
    return [round(i * (residues - max_len) / steps) for i in range(steps + 1)]


def window(tokens: np.ndarray, start: int, max_len: int) -> np.ndarray:
    """Crop `<bos> residues <eos>` to at most `max_len` residues, beginning with residue `start`."""
    residues = len(tokens) - 2
    first, end = crop_bounds(residues, start, min(max_len, residues - start))
    return tokens[first:end]
