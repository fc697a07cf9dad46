"""Parts of proteins that are longer than a model sees: crops and windows."""

import math
from typing import Literal, get_args

import numpy as np

Crop = Literal["random", "start"]
CROPS = get_args(Crop)


def crop_bounds(residues: np.ndarray, starts: np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """First and end token, in `<bos> residues <eos>`, of the crops to residues start .. start + max_len - 1.

    A crop lacks the end that was cut: `<bos>` stays with start = 0, `<eos>` with the last residue.
    """
    return starts + (starts > 0), starts + max_len + 1 + (starts + max_len == residues)


def check_crop(crop: str) -> None:
    """Raise unless it is one of CROPS."""
    if crop not in CROPS:
        raise ValueError(f"data.crop={crop}; there are {', '.join(CROPS)}")


def cropped(tokens: np.ndarray, max_len: int) -> np.ndarray:
    """The first max_len residues; a crop lacks <eos>, as in training."""
    return tokens if len(tokens) - 2 <= max_len else tokens[: max_len + 1]


def window_starts(residues: int, most: int) -> list[int]:
    """Where windows of `most` residues begin that cover a protein: as few as overlap by half, evenly spread."""
    if residues <= most:
        return [0]
    steps = math.ceil((residues - most) / max(1, most // 2))
    return [round(i * (residues - most) / steps) for i in range(steps + 1)]


def window(tokens: np.ndarray, start: int, most: int) -> np.ndarray:
    """At most `most` residues from `start` on, of `<bos> residues <eos>`: as in training, an end that is cut lacks its
    token."""
    first = 0 if start == 0 else start + 1
    last = len(tokens) if start + most >= len(tokens) - 2 else start + most + 1
    return tokens[first:last]
