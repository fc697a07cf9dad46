"""Lengths of new proteins: those of a model's training proteins, a number, or a range."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from protlig_dd.system.random import random_key


class Lengths(NamedTuple):
    """Of a model's training proteins."""

    counts: list[int]
    """How many have 0, 1, ... residues, those that were cropped in training left out."""
    told: str
    """How many there are, and what was left out."""


def lengths_of(counts: list[int] | None, cropped: int | None, max_len: int) -> Lengths | None:
    """What a checkpoint or an exported model keeps of them; None of one that keeps nothing.

    Args:
        counts: how many training proteins have 0, 1, ... max_len residues.
        cropped: how many have more. None is what earlier versions wrote, which counted those as proteins of max_len:
            what is there is then left out.
    """
    if counts is None:
        return None
    if cropped is not None:
        left_out = f"{cropped:,} that are longer were cropped in training and are left out"
    else:
        counts, left = [*counts[:max_len], 0], counts[max_len]
        left_out = f"{left:,} of {max_len}, whole or cropped to it, are left out, as this model cannot tell which"
    return Lengths(counts, f"{sum(counts):,} training proteins of up to {max_len} residues; {left_out}")


def draw_lengths(counts: Sequence[int], n: int, seed: int) -> list[int]:
    """n lengths, drawn as often as counts[length] says (inverse CDF)."""
    ends = np.cumsum(counts)
    return np.searchsorted(ends, length_draws(n, seed) * ends[-1], side="right").tolist()


def length_draws(n: int, seed: int) -> np.ndarray:
    """(n,) uniform draws on [0, 1); the first of many are those of few."""
    # as Generator.random makes them, but of the stream that numpy promises to keep
    return (np.random.PCG64(random_key(seed, "lengths", 0)).random_raw(n) >> np.uint64(11)) * 2.0**-53


def choose_lengths(wanted: str, n: int, seed: int, known: Lengths | None) -> list[int]:
    """n lengths: `empirical` (the training set's), a number, or `shortest-longest` (uniform).

    Raises:
        ValueError: anything else; or empirical ones of a model that knows none.
    """
    if wanted == "empirical":
        if known is None:
            raise ValueError("this checkpoint does not know its training lengths; give lengths=, such as 100-300")
        if not sum(known.counts):
            raise ValueError(f"no lengths to draw from ({known.told}); give lengths=, such as 100-300")
        return draw_lengths(known.counts, n, seed)
    low, high = parse_range(wanted, f"lengths={wanted}", ", or empirical")
    return (low + np.floor(length_draws(n, seed) * (high - low + 1)).astype(int)).tolist()


def parse_range(text: str, told: str, more: str = "", *, least: int = 1) -> tuple[int, int]:
    """`12-40` -> (12, 40), `77` -> (77, 77).

    Args:
        told: what the error message calls it.

    Raises:
        ValueError: anything else, or a range that starts below `least` or runs backwards.
    """
    first, dash, last = text.partition("-")
    numbers = [first, last] if dash else [first, first]
    if not all(n.isascii() and n.isdecimal() for n in numbers) or not least <= int(numbers[0]) <= int(numbers[1]):
        raise ValueError(f"{told}: give a number or a range such as 100-300{more}")
    return int(numbers[0]), int(numbers[1])
