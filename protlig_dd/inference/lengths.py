"""Choose the lengths of new proteins: one number, a range, or draws from the training proteins' lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from protlig_dd.system.random import random_key


class Lengths(NamedTuple):
    """Lengths of a model's training proteins."""

    counts: list[int]
    """counts[n] is the number of proteins with n residues. Proteins that were cropped in training are not counted."""
    description: str
    """A text for messages: how many proteins `counts` contains, and how many proteins were left out."""


def lengths_of(counts: list[int] | None, cropped: int | None, max_len: int) -> Lengths | None:
    """Return the training lengths that a checkpoint or an exported model records; None if it records none.

    Args:
        counts: counts[n] is the number of training proteins with n residues, for n up to max_len.
        cropped: the number of training proteins with more than max_len residues. It is None in files of earlier
            versions, which counted cropped proteins as having max_len residues; counts[max_len] is then left out.
    """
    if counts is None:
        return None
    if cropped is not None:
        left_out = f"{cropped:,} longer proteins were cropped in training and are left out"
    else:
        counts, at_max_len = [*counts[:max_len], 0], counts[max_len]
        left_out = (
            f"{at_max_len:,} proteins with {max_len} residues are left out, "
            "because the model does not record which of them were cropped"
        )
    return Lengths(counts, f"{sum(counts):,} training proteins of up to {max_len} residues; {left_out}")


def draw_lengths(counts: Sequence[int], n: int, seed: int) -> list[int]:
    """Draw n lengths, each with a probability proportional to counts[length] (inverse CDF)."""
    ends = np.cumsum(counts)
    return np.searchsorted(ends, length_draws(n, seed) * ends[-1], side="right").tolist()


def length_draws(n: int, seed: int) -> np.ndarray:
    """Return (n,) uniform draws on [0, 1). A larger n adds draws but does not change the earlier ones."""
    # computed as in Generator.random, but from the raw stream, which numpy promises not to change
    return (np.random.PCG64(random_key(seed, "lengths", 0)).random_raw(n) >> np.uint64(11)) * 2.0**-53


def choose_lengths(lengths: str, n: int, seed: int, training_lengths: Lengths | None) -> list[int]:
    """Return the lengths of n new proteins.

    Args:
        lengths: `empirical` (drawn like the training lengths), a number, or `shortest-longest` (uniform).

    Raises:
        ValueError: `lengths` has another form, or it is `empirical` and no training lengths are recorded.
    """
    if lengths == "empirical":
        if training_lengths is None:
            raise ValueError("this model has no record of its training lengths; give lengths=, such as 100-300")
        if not sum(training_lengths.counts):
            raise ValueError(
                f"there are no training lengths to draw from ({training_lengths.description}); give lengths=, such as "
                "100-300"
            )
        return draw_lengths(training_lengths.counts, n, seed)
    low, high = parse_range(lengths, f"lengths={lengths}", ", or empirical")
    return (low + np.floor(length_draws(n, seed) * (high - low + 1)).astype(int)).tolist()


def longest_of(lengths: str, drawn: Sequence[int]) -> int:
    """Return the largest length that `choose_lengths` may draw, or for `empirical` the largest length in `drawn`."""
    return max(drawn) if lengths == "empirical" else parse_range(lengths, f"lengths={lengths}")[1]


def parse_range(text: str, label: str, alternatives: str = "", *, least: int = 1) -> tuple[int, int]:
    """Parse a number or a range: `12-40` -> (12, 40), `77` -> (77, 77).

    Args:
        label: begins the error message.
        alternatives: ends the error message.

    Raises:
        ValueError: not a number or a range, or the range starts below `least` or ends before its start.
    """
    first, dash, last = text.partition("-")
    numbers = [first, last] if dash else [first, first]
    if not all(n.isascii() and n.isdecimal() for n in numbers) or not least <= int(numbers[0]) <= int(numbers[1]):
        raise ValueError(f"{label}: give a number or a range such as 100-300{alternatives}")
    return int(numbers[0]), int(numbers[1])
