"""Random choices that a resumed run must repeat: orders, subsets and crop positions.

The random numbers of a choice depend only on its key (a sequence of integers) and on the version of the method. A run
keeps the version it was started with. The versions are:

    1   methods of numpy's Generator, whose random numbers may change in a new numpy release (NEP 19)
    2   raw words of PCG64 seeded by SeedSequence; numpy guarantees that these words never change
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

VERSIONS = (1, 2)
NEWEST = VERSIONS[-1]
ROWS_AT_ONCE = 1 << 20  # random words are drawn for this many rows at a time
ROWS_PER_SORT = 1 << 25  # approximate number of rows sorted at once; sorting takes 16 bytes of memory per row
MOST_PARTS = 8  # for more than 8 ROWS_PER_SORT rows, more are sorted at once, because every part draws all words again


def shuffled(rows: np.ndarray, key: Sequence[int], version: int = NEWEST) -> np.ndarray:
    """Return the given (n,) rows in random order.

    Version 2 draws a random 64-bit word for each row, replaces the word's b low bits by the row's index in `rows`, and
    sorts the words. Here b is the number of bits of the largest index. No two words are equal, so every sorting
    algorithm gives the same order. Two rows whose 64 - b high bits agree keep their given order. One shuffle of 70
    million rows (37 high bits) has about 18,000 such pairs; one shuffle of a million rows has 0.03 on average. In the
    result, the rows of such a pair are adjacent, at a random position; only the order within the pair is not random.
    """
    if version == 1:
        return np.random.default_rng(key).permutation(rows)
    n = len(rows)
    number_mask = mask_of_numbers(n)
    parts_bits = max(0, int(number_mask).bit_length() - ROWS_PER_SORT.bit_length() + 1)
    parts_bits = min(parts_bits, MOST_PARTS.bit_length() - 1)
    order, done = np.empty_like(rows), 0
    for part in range(1 << parts_bits):  # saves memory: a part sorts only the words whose highest bits equal `part`
        blocks = [np.empty(0, np.uint64)]
        for word in numbered_words(n, key):
            blocks.append(word[word >> np.uint64(64 - parts_bits) == part] if parts_bits else word)
        words_in_order = np.concatenate(blocks)
        words_in_order.sort()
        words_in_order &= number_mask
        end = done + len(words_in_order)
        order[done:end] = rows[words_in_order.view(np.int64)]
        done = end
    return order


def random_subset(rows: Any, size: int, seed: int, version: int = NEWEST) -> np.ndarray:
    """Return `size` of the rows, chosen at random, ascending like `rows`; all rows if there are at most `size`.

    Args:
        rows: an array, or an object with a length that returns the rows at ascending positions (see rows.py).
    """
    if len(rows) <= size:
        return np.asarray(rows)
    return rows[np.sort(first_shuffled(len(rows), size, [seed, size], version))]


def first_shuffled(n: int, size: int, key: Sequence[int], version: int = NEWEST) -> np.ndarray:
    """Return (size,) int64: the first numbers of `shuffled(np.arange(n))`, in any order.

    Version 2 needs memory for `size` numbers only, because these are the numbers of the smallest words.
    """
    if version == 1:
        return shuffled(np.arange(n), key, version)[:size]
    kept = np.empty(0, np.uint64)
    for word in numbered_words(n, key):
        kept = np.append(kept, word)
        if len(kept) > size:
            kept = np.partition(kept, size - 1)[:size]
    return (kept & mask_of_numbers(n)).view(np.int64)


def numbered_words(n: int, key: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield n random words in blocks, uint64. The low bits of the word i are replaced by i (see `shuffled`)."""
    stream, number_mask = random_words(key), mask_of_numbers(n)
    for first in range(0, n, ROWS_AT_ONCE):
        word = stream.random_raw(min(ROWS_AT_ONCE, n - first))
        number = np.arange(first, first + len(word), dtype=np.uint64)
        yield (word & ~number_mask) | number


def mask_of_numbers(n: int) -> np.uint64:
    """Return the bits that the numbers 0 .. n - 1 occupy."""
    return np.uint64((1 << max(n - 1, 1).bit_length()) - 1)


def random_below(limits: np.ndarray, key: Sequence[int], version: int = NEWEST) -> np.ndarray:
    """Draw one integer for each of n limits, uniform on 0 .. limit - 1. Returns (n,) int64.

    Version 2 divides a random 64-bit word by the limit and takes the remainder. The integers are then almost equally
    likely: the relative difference of two probabilities is at most limit / 2^64.
    """
    if version == 1:
        return np.random.default_rng(key).integers(limits)
    return (random_words(key).random_raw(len(limits)) % limits.astype(np.uint64)).astype(np.int64)


def random_words(key: Sequence[int]) -> np.random.PCG64:
    """Return the generator of random 64-bit words that is seeded with the key."""
    return np.random.PCG64(np.random.SeedSequence(key))


def check_version(version: int, where: object) -> int:
    """Return the version if this program supports it.

    Args:
        where: file or folder that records the version, for the error message.

    Raises:
        ValueError: the version is not supported.
    """
    if version not in VERSIONS:
        raise ValueError(
            f"{where}: the run's random choices have plan_version {version}, but this program supports only "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    return version
