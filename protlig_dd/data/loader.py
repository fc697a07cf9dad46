"""Packs of whole sequences by global index, for any number of ranks and workers.

    rank r of R reads packs  step * packs_per_step + r, + R, + 2 R, ...

What is in a pack follows from (seed, epoch) (see packing.py) and where its crops lie from (seed, pack): neither knows
of ranks or workers.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler

from protlig_dd.batch import PackedBatch
from protlig_dd.data.crops import check_crop, crop_bounds
from protlig_dd.data.draws import NEWEST, below
from protlig_dd.data.packing import Plan, epoch_rows, make_plan, packs_in_epoch, quotas, total_tokens
from protlig_dd.data.plan_cache import remove_plans, shared_plan
from protlig_dd.data.store import SequenceStore, StoreGroup

_CROP = 2  # first word of the random key; packing.py has the others
PREFETCH = 4  # packs that each worker keeps ready


class PackDataset(Dataset[PackedBatch]):
    """The packs of a store's rows (or of several stores'), by global pack index.

    Args:
        rows: (n,) rows to draw from (one split's), ascending.
        max_len: longer sequences are cropped to this many residues.
        tokens_per_pack: budget of a pack, in tokens.
        seed: None packs the rows in their order and crops at the start, all of them exactly once (evaluation);
            a number shuffles, every epoch anew (training).
        crop: where training crops a long sequence: at `random`, anew in every epoch, or at its `start`.
        weights: shares of tokens of the group's stores; None passes each once in an epoch.
        version: of how chance enters (see draws.py); a run keeps the one that it has begun with.

    Raises:
        ValueError: a split without rows, a sequence that cannot fit, (training) less than one pack of data, or weights
            that do not go with the stores.
    """

    def __init__(
        self,
        stores: SequenceStore | StoreGroup,
        rows: np.ndarray,
        *,
        max_len: int,
        tokens_per_pack: int,
        seed: int | None,
        crop: str = "random",
        weights: Sequence[float] | None = None,
        version: int = NEWEST,
    ) -> None:
        group = stores if isinstance(stores, StoreGroup) else StoreGroup([stores])
        self.group, self.rows, self.max_len = group, rows.astype(group.row_type, copy=False), max_len
        self.tokens_per_pack, self.seed, self.crop, self.version = tokens_per_pack, seed, crop, version
        self.ahead = True
        """Whether the next epoch is planned in the background as soon as one begins."""
        self._planned: tuple[int, Plan] | None = None
        self.planner: threading.Thread | None = None
        check_pack_sizes(max_len, tokens_per_pack)
        check_crop(crop)
        if weights is not None:
            check_weights(weights, len(group.stores))
        own_rows = list(self._rows_of_stores())
        self._totals = [total_tokens(group.lengths, own, max_len) for own in own_rows]
        if seed is None:
            self._planned = 0, self._make(0)
            self.packs_per_epoch = len(self._planned[1].starts) - 1
            return
        for store, total in zip(group.stores, self._totals, strict=True):
            if not total:
                raise ValueError(f"{store.path} has no training sequences")
        self.mean_tokens = min(total / len(own) for total, own in zip(self._totals, own_rows, strict=True))
        """Of a sequence, cropped; of several stores, in the one where they are shortest."""
        self._quotas = quotas(self._totals, weights)
        self.packs_per_epoch = packs_in_epoch(self._totals, self._quotas, tokens_per_pack, max_len)
        if self.packs_per_epoch <= 0:
            raise ValueError(
                f"{group.name}: the training split has {sum(self._quotas)} tokens an epoch, less than one pack of "
                f"data.tokens_per_pack={tokens_per_pack}; lower that"
            )
        rows_digest = xxhash.xxh3_128_hexdigest(self.rows.data)
        parts = [version, group.fingerprint, rows_digest, max_len, tokens_per_pack, seed, self._quotas]
        self.key = xxhash.xxh3_128_hexdigest(repr(parts).encode())

    def __getstate__(self) -> dict[str, object]:
        planned = self._planned if self.seed is None else None
        state = self.__dict__ | {"planner": None, "_planned": planned}
        state.pop("tokens", None)
        return state

    def __len__(self) -> int:
        """Packs in one epoch; training indices run on beyond it, epoch after epoch."""
        return self.packs_per_epoch

    @cached_property
    def tokens(self) -> list[np.ndarray]:
        """Of each store, (total,) uint8, mapped by this process; in training for reads at random."""
        if self.seed is None:
            return [store.tokens for store in self.group.stores]
        return [store.tokens_at_random() for store in self.group.stores]

    def pack_rows(self, pack: int) -> np.ndarray:
        """(n,) int64 rows of one pack, by global index."""
        epoch, local = divmod(pack, self.packs_per_epoch)
        rows, starts = self.plan(epoch)
        return rows[starts[local] : starts[local + 1]].astype(np.int64)

    def __getitem__(self, pack: int) -> PackedBatch:
        rows = self.pack_rows(pack)
        store_of, begins, residues = self.group.places(rows, self.tokens)
        cut = np.flatnonzero(residues > self.max_len)
        starts = np.zeros(len(cut), np.int64)
        if self.seed is not None and self.crop == "random" and len(cut):
            starts = below(residues[cut] - self.max_len + 1, [self.seed, _CROP, pack], self.version)
        ends = begins + residues + 2
        first, last = crop_bounds(residues[cut], starts, self.max_len)
        begins[cut], ends[cut] = begins[cut] + first, begins[cut] + last
        bounds = zip(store_of.tolist(), begins.tolist(), ends.tolist(), strict=True)
        flat = np.concatenate([self.tokens[store][begin:end] for store, begin, end in bounds])
        return PackedBatch.from_flat(torch.from_numpy(flat), (ends - begins).tolist(), rows.tolist())

    def plan(self, epoch: int) -> Plan:
        """The plan of one epoch. The last one asked for is kept, and the next one is made in the background."""
        if self._planned is None or self._planned[0] != epoch:
            plan = shared_plan(self.key, epoch, lambda: self._make(epoch))
            assert plan is not None
            self._planned = epoch, plan
            if self.ahead:
                self.planner = threading.Thread(target=self._make_ahead, args=(epoch + 1,), daemon=True)
                self.planner.start()
        return self._planned[1]

    def tail(self, epoch: int) -> int:
        """Sequences of an epoch that fill no pack."""
        rows, starts = self.plan(epoch)
        return len(rows) - int(starts[self.packs_per_epoch])

    def _make_ahead(self, epoch: int) -> None:
        try:
            shared_plan(self.key, epoch, lambda: self._make(epoch), wait=False)
        except ValueError:
            return  # who needs this plan tries again, and is told

    def forget_plans(self) -> None:
        """Remove this dataset's plans from the temporary folder."""
        if self.planner is not None:
            self.planner.join()
        if self.seed is not None:
            remove_plans(self.key)

    def _rows_of_stores(self) -> list[np.ndarray]:
        return np.split(self.rows, np.searchsorted(self.rows, self.group.bases[1:]))

    def _make(self, epoch: int) -> Plan:
        rows, lengths = self.rows, self.group.lengths
        if self.seed is not None:
            rows = epoch_rows(
                self._rows_of_stores(),
                lengths,
                self._totals,
                self._quotas,
                max_len=self.max_len,
                seed=self.seed,
                epoch=epoch,
                version=self.version,
            )
        return make_plan(rows, lengths, max_len=self.max_len, tokens_per_pack=self.tokens_per_pack)


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
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers > 0 else None,
        worker_init_fn=ignore_signals if workers > 0 else None,
    )


def end_workers(packs: Iterator[PackedBatch]) -> None:
    """End the processes behind an iterator of `pack_loader`.

    Without this they end with the last reference to it, which the traceback of an exception may hold; Python would then
    wait at its exit for processes that ignore SIGTERM.
    """
    shut_down = getattr(packs, "_shutdown_workers", None)  # torch has no public name for it; None without workers
    if shut_down is not None:
        shut_down()


def ignore_signals(worker: int) -> None:
    """Ctrl-C in a terminal and a scheduler's signals reach loaders too; the trainer tells them when to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def check_pack_sizes(max_len: int, tokens_per_pack: int) -> None:
    """Raise unless a pack can hold the longest sequence with its two end tokens."""
    if max_len < 1:
        raise ValueError(f"data.max_len is {max_len}, it must be at least 1 residue")
    if tokens_per_pack < max_len + 2:
        raise ValueError(
            f"data.tokens_per_pack={tokens_per_pack} cannot hold one sequence of data.max_len={max_len} residues "
            f"(with <bos> and <eos> that is {max_len + 2} tokens)"
        )


def check_weights(weights: Sequence[float], stores: int) -> None:
    """Raise unless there is one positive weight for each store."""
    if len(weights) != stores:
        raise ValueError(f"data.weights has {len(weights)} weights for {stores} stores in data.path")
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ValueError(f"data.weights: {weight} is not above 0")
