"""Packs of whole sequences, as a pure function of (seed, epoch).

An epoch shuffles the rows and fills packs in that order: a pack closes when the next sequence would exceed the token
budget. With lengths 5, 6, 4, 1 in shuffled order and a budget of 12 tokens the packs are [5, 6] and [4, 1].

Every epoch has the same number of packs, floor(tokens / budget), so pack g of the whole run lies in epoch
g // packs_per_epoch: a run starts at any step at the cost of planning one epoch. Packs are never perfectly full, so
an epoch's shuffle always yields at least that many; the sequences left over (others each epoch) are its tail.

    rank r of R reads packs  step * packs_per_step + r, + R, + 2 R, ...
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from protlig_dd.batch import PackedBatch
from protlig_dd.data.store import SequenceStore, crop

# first words of the random keys, so that two purposes never share a stream
_SHUFFLE, _CROP = 1, 2


def clipped_tokens(residues: np.ndarray, max_len: int) -> np.ndarray:
    """(n,) tokens that sequences of `residues` residues take: all of them, or the most a crop of max_len takes."""
    return np.where(residues <= max_len, residues + 2, max_len + 1)


def pack_starts(tokens: np.ndarray, tokens_per_pack: int) -> np.ndarray:
    """(n_packs + 1,) bounds of the packs that filling in this order gives.

    Args:
        tokens: (n,) tokens of each sequence, none above tokens_per_pack.
    """
    ends = np.cumsum(tokens)
    starts, filled = [0], 0
    while starts[-1] < len(tokens):
        starts.append(int(np.searchsorted(ends, filled + tokens_per_pack, side="right")))
        filled = ends[starts[-1] - 1]
    return np.array(starts)


class PackDataset(Dataset[PackedBatch]):
    """The packs of a store's rows, by global pack index.

    Args:
        rows: (n,) store rows to draw from (one split's).
        max_len: longer sequences are cropped to this many residues.
        tokens_per_pack: budget of a pack, in tokens.
        seed: None packs the rows in their order and crops at the start, all of them exactly once (evaluation);
            a number shuffles and crops at random, every epoch anew (training).

    Raises:
        ValueError: a split without rows, a sequence that cannot fit, or (training) less than one pack of data.
    """

    def __init__(
        self, store: SequenceStore, rows: np.ndarray, *, max_len: int, tokens_per_pack: int, seed: int | None
    ) -> None:
        self.store, self.rows, self.max_len = store, rows, max_len
        self.tokens_per_pack, self.seed = tokens_per_pack, seed
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None
        check_pack_sizes(max_len, tokens_per_pack)
        tokens = clipped_tokens(store.lengths[rows], max_len)
        if seed is None:
            self.packs_per_epoch = len(pack_starts(tokens, tokens_per_pack)) - 1
        else:
            self.packs_per_epoch = int(tokens.sum()) // tokens_per_pack
            if self.packs_per_epoch == 0:
                raise ValueError(
                    f"{store.path}: the training split has {int(tokens.sum())} tokens, less than one pack of "
                    f"data.tokens_per_pack={tokens_per_pack}"
                )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_planned": None}  # a spawned worker plans for itself: the plan need not travel

    def __len__(self) -> int:
        """Packs in one epoch; training indices run on beyond it, epoch after epoch."""
        return self.packs_per_epoch

    def pack_rows(self, pack: int) -> np.ndarray:
        """Store rows of one pack, by global index."""
        epoch, local = divmod(pack, self.packs_per_epoch)
        order, starts = self._plan(epoch)
        return order[starts[local] : starts[local + 1]]

    def __getitem__(self, pack: int) -> PackedBatch:
        rows = self.pack_rows(pack)
        rng = None if self.seed is None else np.random.default_rng([self.seed, _CROP, pack])
        sequences = []
        for row in rows:
            tokens = self.store[row]
            spare = len(tokens) - 2 - self.max_len
            if spare > 0:
                start = 0 if rng is None else int(rng.integers(spare + 1))
                tokens = crop(tokens, start, self.max_len)
            sequences.append(torch.from_numpy(tokens.astype(np.int64)))
        return PackedBatch.pack(sequences, [int(row) for row in rows])

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one epoch in pack order, and the packs' bounds; the last epoch asked for is kept."""
        if self._planned is None or self._planned[0] != epoch:
            order = self.rows
            if self.seed is not None:
                order = np.random.default_rng([self.seed, _SHUFFLE, epoch]).permutation(order)
            tokens = clipped_tokens(self.store.lengths[order], self.max_len)
            self._planned = epoch, order, pack_starts(tokens, self.tokens_per_pack)
        return self._planned[1:]


class RankPacks(Sampler[int]):
    """Global pack indices that one rank reads, from `first_step` up to `last_step` (exclusive)."""

    def __init__(self, first_step: int, last_step: int, packs_per_step: int, rank: int, world_size: int) -> None:
        self.steps, self.packs = range(first_step, last_step), range(rank, packs_per_step, world_size)
        self.packs_per_step = packs_per_step

    def __len__(self) -> int:
        return len(self.steps) * len(self.packs)

    def __iter__(self) -> Iterator[int]:
        return (step * self.packs_per_step + pack for step in self.steps for pack in self.packs)


def pack_loader(dataset: PackDataset, packs: Sampler[int] | range, workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader over the packs of these indices, in order, whole packs at a time."""
    return DataLoader(
        dataset,
        sampler=packs,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=False,
    )


def check_pack_sizes(max_len: int, tokens_per_pack: int) -> None:
    """Raise unless a pack can hold the longest sequence with its two end tokens."""
    if max_len < 1:
        raise ValueError(f"data.max_len is {max_len}, it must be at least 1 residue")
    if tokens_per_pack < max_len + 2:
        raise ValueError(
            f"data.tokens_per_pack={tokens_per_pack} cannot hold one sequence of data.max_len={max_len} residues "
            f"(with <bos> and <eos> that is {max_len + 2} tokens)"
        )
