"""Parts of proteins that are longer than a model sees: crops and windows."""

import math
from typing import Literal, TypeVar, get_args

import numpy as np

Crop = Literal["random", "start"]
CROPS = get_args(Crop)


Count = TypeVar("Count", int, np.ndarray)


def crop_bounds(residues: Count, starts: Count, max_len: int) -> tuple[Count, Count]:
    """First and end token, in `<bos> residues <eos>`, of the crops to residues start .. start + max_len - 1.

    A crop lacks the end that was cut: `<bos>` stays with start = 0, `<eos>` with the last residue.

    Args:
        residues, starts: of one protein, or (n,) of several.
    """
    return starts + (starts > 0), starts + max_len + 1 + (starts + max_len == residues)


def check_crop(crop: str) -> None:
    """Raise unless it is one of CROPS."""
    if crop not in CROPS:
        raise ValueError(f"data.crop={crop}; there are {', '.join(CROPS)}")


def window_starts(residues: int, most: int) -> list[int]:
    """Where windows of `most` residues begin that cover a protein: as few as overlap by half, evenly spread."""
    if residues <= most:
        return [0]
    steps = math.ceil((residues - most) / max(1, most // 2))
    return [round(i * (residues - most) / steps) for i in range(steps + 1)]


def window(tokens: np.ndarray, start: int, most: int) -> np.ndarray:
    """The crop of `<bos> residues <eos>` to at most `most` residues from `start` on."""
    residues = len(tokens) - 2
    first, end = crop_bounds(residues, start, min(most, residues - start))
    return tokens[first:end]
