"""Rows of a split of one or several stores, read in blocks and never kept all at once."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xxhash

from protlig_dd.data.packing import clipped_tokens
from protlig_dd.data.store import StoreGroup

BLOCK_ROWS = 1 << 16  # data.order=blocks depends on this number, so it must not change


class SplitRows:
    """The rows of one split, ascending, as an array that is read from the mapped stores where it is needed.

    `rows[positions]` are the rows at ascending positions of the split. `np.asarray(rows)` are all rows, 4 bytes each if
    there are fewer than 2^32 (see `StoreGroup.row_type`).
    """

    def __init__(self, group: StoreGroup, split: str) -> None:
        self.group, self.split = group, split

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of rows in each block of `StoreGroup.split_blocks`."""
        return np.array([len(block) for block in self.group.split_blocks(self.split)], np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        ends = np.cumsum(self.counts)
        cuts = np.searchsorted(positions, ends)  # positions[:cuts[i]] are in the blocks 0 .. i
        blocks = zip(self.group.split_blocks(self.split), ends - self.counts, np.append(0, cuts), cuts, strict=False)
        found = [block[positions[first:end] - start] for block, start, first, end in blocks]
        return np.concatenate(found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows, end = np.empty(len(self), self.group.row_type), 0
        for block in self.group.split_blocks(self.split):
            rows[end : end + len(block)] = block
            end += len(block)
        return rows if dtype is None else rows.astype(dtype, copy=False)


def rows_between(rows: np.ndarray | SplitRows, first: int, end: int) -> np.ndarray:
    """Return those of the ascending rows that are in first .. end - 1, a range of rows of one store."""
    if isinstance(rows, SplitRows):
        store, start = rows.group.find(first)
        base = first - start
        return (store.split_between(rows.split, start, end - base) + base).astype(rows.group.row_type)
    bounds = np.array([first, end], rows.dtype)  # with another type, searchsorted would copy all rows
    return rows[slice(*np.searchsorted(rows, bounds))]


class BlockIndex(NamedTuple):
    """Sums over blocks of BLOCK_ROWS consecutive rows of the stores. No block has rows of two stores.

    It takes 40 bytes for 65,536 sequences.
    """

    first: np.ndarray
    """(n_blocks,) int64: first row of each block, counted over all stores."""
    end: np.ndarray
    """(n_blocks,) int64: the row after the block's last row."""
    store: np.ndarray
    """(n_blocks,) int64: number of the store."""
    rows: np.ndarray
    """(n_blocks,) int64: number of selected rows, for example those of a split."""
    tokens: np.ndarray
    """(n_blocks,) int64: `clipped_tokens` of the selected rows."""
    digest: str
    """Hash of all selected rows."""

    def of_stores(self, sums: np.ndarray, stores: int) -> list[int]:
        """Return the sum over the blocks of each store."""
        return [int(sums[self.store == number].sum()) for number in range(stores)]


def index_blocks(group: StoreGroup, rows: np.ndarray | SplitRows, max_len: int) -> BlockIndex:
    """Read the lengths of the given ascending rows once, and return the sums over the blocks that have such rows."""
    digest, lengths, blocks = xxhash.xxh3_128(), group.lengths, []
    for number, (base, store) in enumerate(zip(group.bases.tolist(), group.stores, strict=True)):
        for start in range(0, len(store), BLOCK_ROWS):
            first, end = base + start, base + min(start + BLOCK_ROWS, len(store))
            selected = rows_between(rows, first, end)
            if len(selected):
                digest.update(selected.data)
                tokens = int(clipped_tokens(lengths[selected], max_len).sum(dtype=np.int64))
                blocks.append((first, end, number, len(selected), tokens))
    starts, ends, stores, counts, sums = np.array(blocks, np.int64).reshape(-1, 5).T.copy()
    return BlockIndex(starts, ends, stores, counts, sums, digest.hexdigest())
