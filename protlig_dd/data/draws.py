"""Random choices that a run repeats when it goes on: orders, subsets and places, from a key of whole numbers.

They come in versions, of which a run keeps the one that it has begun with:

    1   by the methods of numpy's Generator, whose streams a new numpy may change (NEP 19)
    2   from the words of PCG64 seeded by SeedSequence, which numpy promises to keep
"""

from collections.abc import Sequence

import numpy as np

VERSIONS = (1, 2)
NEWEST = VERSIONS[-1]
AT_ONCE = 1 << 20  # rows that are drawn for at once
PART = 1 << 25  # rows of an order that are sorted at once, about: 16 bytes of memory each


def shuffled(rows: np.ndarray, key: Sequence[int], version: int = NEWEST) -> np.ndarray:
    """(n,) the same rows in random order.

    Version 2 gives each row a word and sorts by it. The low bits of the word, as many as number the rows, are the row's
    number instead, so that no two are equal and any way of sorting gives the same. Two rows whose other bits agree
    stay in the order in which they were given. Of 70 million rows (37 other bits) that happens to some 18,000 pairs, of
    a million to 30 pairs in a thousand epochs: they are neighbours anywhere in the order, and only which of the two
    comes first is no chance.
    """
    if version == 1:
        return np.random.default_rng(key).permutation(rows)
    n = len(rows)
    number_bits = max(n - 1, 1).bit_length()
    number_mask = np.uint64((1 << number_bits) - 1)
    parts_bits = max(0, number_bits - PART.bit_length() + 1)
    order, done = np.empty_like(rows), 0
    for part in range(1 << parts_bits):  # words that begin with these bits
        words, found = words_of(key), [np.empty(0, np.uint64)]
        for first in range(0, n, AT_ONCE):
            word = words.random_raw(min(AT_ONCE, n - first))
            number = np.arange(first, first + len(word), dtype=np.uint64)
            if parts_bits:
                own = word >> np.uint64(64 - parts_bits) == part
                word, number = word[own], number[own]
            found.append((word & ~number_mask) | number)
        words_in_order = np.concatenate(found)
        words_in_order.sort()
        words_in_order &= number_mask
        end = done + len(words_in_order)
        order[done:end] = rows[words_in_order.view(np.int64)]
        done = end
    return order


def some_of(rows: np.ndarray, most: int, seed: int, version: int = NEWEST) -> np.ndarray:
    """At most `most` of these ascending rows, ascending."""
    return rows if len(rows) <= most else np.sort(shuffled(rows, [seed, most], version)[:most])


def below(limits: np.ndarray, key: Sequence[int], version: int = NEWEST) -> np.ndarray:
    """(n,) int64, uniform on 0 .. limit - 1 for each limit.

    In version 2 the remainder of a word: no number is likelier than another by more than a share of limit / 2^64.
    """
    if version == 1:
        return np.random.default_rng(key).integers(limits)
    return (words_of(key).random_raw(len(limits)) % limits.astype(np.uint64)).astype(np.int64)


def words_of(key: Sequence[int]) -> np.random.PCG64:
    """The stream of 64-bit words of a key."""
    return np.random.PCG64(np.random.SeedSequence(key))


def check_version(version: int, where: object) -> int:
    """The version, if it is known here.

    Raises:
        ValueError: it is not; names it and those that are.
    """
    if version not in VERSIONS:
        raise ValueError(
            f"{where} is of a run whose packs are drawn by plan version {version}; "
            f"this version of the program knows {' and '.join(map(str, VERSIONS))}"
        )
    return version
