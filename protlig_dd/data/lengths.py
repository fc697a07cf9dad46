"""Lengths of the sequences of one or several stores, read from the mapped offsets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

ROWS_AT_ONCE = 1 << 20


class Lengths:
    """Number of residues of each sequence: `lengths[row]`, `lengths[rows]` and `lengths[first:end]` are int32.

    Nothing is kept: every access subtracts values of the mapped offsets. So a process needs memory only for the rows
    that it reads at once (a slice first reads all rows), and all processes of a machine share the mapped pages.

    Args:
        offsets: of each store, (n + 1,) int64: sequence i is tokens[offsets[i]:offsets[i + 1]], with <bos> and <eos>.
            Row numbers continue from store to store. They must not be negative.
    """

    def __init__(self, offsets: Sequence[np.ndarray]) -> None:
        self.offsets = list(offsets)
        self.bases = np.cumsum([0, *(len(part) - 1 for part in self.offsets)])  # the last value is the number of rows

    def __len__(self) -> int:
        return int(self.bases[-1])

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return self.in_memory()[rows]
        rows = np.asarray(rows)
        if len(self.offsets) == 1:
            return residues_of(self.offsets[0], rows)
        numbers, found = np.searchsorted(self.bases[1:], rows, side="right"), np.empty(rows.shape, np.int32)
        for number in np.unique(numbers).tolist():
            in_store = numbers == number
            found[in_store] = residues_of(self.offsets[number], rows[in_store] - self.bases[number])
        return found

    def in_memory(self) -> np.ndarray:
        """Return all lengths, (n,) int32. Reading them in random order is faster than reading the offsets."""
        found, done = np.empty(len(self), np.int32), 0
        for offsets in self.offsets:
            for first in range(0, len(offsets) - 1, ROWS_AT_ONCE):
                block = np.diff(offsets[first : first + ROWS_AT_ONCE + 1])
                found[done : done + len(block)] = block - 2
                done += len(block)
        return found


def residues_of(offsets: np.ndarray, rows: np.ndarray) -> Any:
    """Return the number of residues of these rows of one store, int32."""
    return (offsets[rows + 1] - offsets[rows] - 2).astype(np.int32)
