"""The order `data.order=blocks`: an epoch shuffles blocks of consecutive rows, and then the rows of each window.

A block is BLOCK_ROWS consecutive rows of a store (see rows.py); only the selected rows count, such as those of a split.
A window is WINDOW_BLOCKS blocks, or a few more. Packs are made of the rows of one window at a time. So a run reads the
store nearly in sequence, and a plan contains the rows of one window only.

The blocks, in the order of the store, are divided into WINDOW_BLOCKS ranges. Each epoch shuffles the blocks of every
range, and takes a block from each range in turn. Consecutive blocks of this order are a window. So each window has
blocks from all parts of the store, and its lengths resemble those of the whole store even if the store is sorted by
length. The rows of a window are then shuffled and packed as in packing.py. No pack contains rows of two windows.

The number of windows, w, depends only on the number of blocks. A window of T tokens has floor(T / budget) packs,
because every order of its rows fills at least that many. The other rows are its tail, which the epoch does not read.
The T of each window is known from sums over blocks, so a run can start at any step at the cost of planning one window.

The windows of an epoch have at least (total - w (budget - 1)) / budget packs together, where total is the number of
tokens of an epoch. Every epoch has this number of packs, rounded up. So the tail of an epoch also includes fewer than w
packs of its last windows.

A change of this method, of BLOCK_ROWS or of WINDOW_BLOCKS needs a new version of the random choices (see draws.py).
"""

from typing import NamedTuple

import numpy as np

from protlig_dd.data import rows
from protlig_dd.data.draws import shuffled
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.packing import Plan, make_plan

WINDOW_BLOCKS = 16
_BLOCKS, _WINDOW = 4, 5  # second integer of the random keys; packing.py, loader.py and member_packs.py use others


def count_windows(n_blocks: int) -> int:
    """Return the number of windows of an epoch."""
    return max(1, n_blocks // WINDOW_BLOCKS)


def blocks_of_windows(n_blocks: int, seed: int, epoch: int, version: int) -> list[np.ndarray]:
    """Return the numbers of the blocks in each window of an epoch. Every block is in one window."""
    ranges = np.array_split(np.arange(n_blocks), WINDOW_BLOCKS)
    orders = [shuffled(blocks, [seed, _BLOCKS, epoch, i], version) for i, blocks in enumerate(ranges)]
    turns = np.concatenate([np.arange(len(order)) for order in orders])
    in_turn = np.concatenate(orders)[np.argsort(turns, kind="stable")]
    return np.array_split(in_turn, count_windows(n_blocks))


def packs_in_windows(total: int, windows: int, tokens_per_pack: int) -> int:
    """Return the number of packs that the windows of every epoch are guaranteed to fill together."""
    return -(-(total - windows * (tokens_per_pack - 1)) // tokens_per_pack)


class Windows(NamedTuple):
    """The windows of one epoch."""

    epoch: int
    blocks: list[np.ndarray]
    """Numbers of the blocks in each window."""
    ends: np.ndarray
    """(n_windows,) int64: the number of packs in the first window, in the first two windows, and so on."""


class BlockDataset(PackDataset):
    """Packs for training in the order of `data.order=blocks`, without weights.

    Plan number e * w + i is the plan of window i of epoch e, where w is the number of windows of an epoch.
    """

    read_at_random = False
    _latest: Windows | None = None

    @property
    def n_windows(self) -> int:
        """Number of windows in an epoch."""
        return count_windows(len(self.blocks.rows))

    def windows(self, epoch: int) -> Windows:
        """Return the windows of an epoch. The most recent result is cached."""
        latest = self._latest
        if latest is None or latest.epoch != epoch:
            assert self.seed is not None
            blocks = blocks_of_windows(len(self.blocks.rows), self.seed, epoch, self.version)
            packs = [int(self.blocks.tokens[window].sum()) // self.tokens_per_pack for window in blocks]
            latest = self._latest = Windows(epoch, blocks, np.cumsum(packs))
        return latest

    def tail(self, epoch: int) -> int:
        """Return how many sequences of an epoch are in none of its packs. Plans all windows of the epoch."""
        ends, read = self.windows(epoch).ends.tolist(), 0
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            packs = min(end, self.packs_per_epoch) - start
            read += int(self._make_plan(epoch * self.n_windows + i).starts[packs]) if packs > 0 else 0
        return len(self.rows) - read

    def description(self, epoch: int) -> str:
        """Return the numbers of sequences, windows and packs of an epoch, for the user."""
        most = max(int(self.blocks.rows[blocks].sum()) for blocks in self.windows(epoch).blocks)
        return (
            f"{len(self.rows):,} sequences in {self.n_windows:,} windows of at most {most:,} (data.order=blocks); "
            f"{self.packs_per_epoch:,} packs"
        )

    def _method(self) -> list[object]:
        return ["blocks", rows.BLOCK_ROWS, WINDOW_BLOCKS]

    def _count_packs(self) -> int:
        return packs_in_windows(sum(self._totals), self.n_windows, self.tokens_per_pack)

    def _mean_tokens(self) -> float:
        """The smallest mean of the windows of the first epoch, because a window may have shorter sequences."""
        counts, tokens = self.blocks.rows, self.blocks.tokens
        return float(min(tokens[window].sum() / counts[window].sum() for window in self.windows(0).blocks))

    def _find(self, pack: int) -> tuple[int, int]:
        epoch, local = divmod(pack, self.packs_per_epoch)
        ends = self.windows(epoch).ends
        window = int(np.searchsorted(ends, local, side="right"))
        return epoch * self.n_windows + window, local - (int(ends[window - 1]) if window else 0)

    def _make_plan(self, number: int) -> Plan:
        assert self.seed is not None
        epoch, window = divmod(number, self.n_windows)
        blocks = blocks_of_windows(len(self.blocks.rows), self.seed, epoch, self.version)[window]
        bounds = zip(self.blocks.first[blocks].tolist(), self.blocks.end[blocks].tolist(), strict=True)
        of_window = np.concatenate([rows.rows_between(self.rows, first, end) for first, end in bounds])
        order = shuffled(of_window, [self.seed, _WINDOW, epoch, window], self.version)
        return make_plan(order, self.group.lengths, max_len=self.max_len, tokens_per_pack=self.tokens_per_pack)
