"""Load packs of sequences, for any number of ranks and workers. The packs of a run are numbered 0, 1, 2, ...

A sequence is never divided between packs. Sequences longer than max_len are cropped.

    in a step, rank r of R reads the packs  first + r, first + r + R, first + r + 2 R, ...  < first + packs_per_step
    where first = step * packs_per_step

For given data and settings, (seed, epoch) determines which sequences are in each pack of an epoch (see packing.py),
and (seed, pack number) determines where the sequences of a pack are cropped. The numbers of ranks and workers have no
influence on the packs.
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
from protlig_dd.data.case import targets_of
from protlig_dd.data.context import context_of, joined_context
from protlig_dd.data.crops import check_crop, crop_bounds, designed_crops
from protlig_dd.data.draws import NEWEST, random_below
from protlig_dd.data.packing import Plan, epoch_rows, make_plan, packs_in_epoch, token_quotas, total_tokens
from protlig_dd.data.plan_cache import remove_plans, shared_plan
from protlig_dd.data.store import SequenceStore, StoreGroup

_CROP = 2  # second integer of the random keys of crops; packing.py uses 1 and 3
PREFETCH = 4  # packs that each worker prepares in advance


class PackDataset(Dataset[PackedBatch]):
    """Packs of the selected rows of one or several stores: `dataset[i]` is pack i of the run, counted over all epochs.

    Args:
        rows: (n,) row numbers of the sequences to pack, ascending; usually the rows of one split.
        max_len: longer sequences are cropped to this many residues.
        tokens_per_pack: maximum number of tokens of a pack.
        seed: a number for training, which shuffles the rows for every epoch. None for evaluation, which packs every row
            exactly once in the given order and always crops as with crop=start.
        crop: how training crops a sequence longer than max_len. random: a new random crop in each epoch; start: the
            first max_len residues. Sequences with context are cropped differently. random chooses among the crops that
            contain a designed residue (an amino acid outside the context). start takes the crop with the most designed
            residues, and the first such crop if there are several.
        weights: one number per store, proportional to the tokens that an epoch reads from the store; None reads every
            store once per epoch.
        version: version of the method of random choices (see draws.py); a run keeps the version it was started with.

    Raises:
        ValueError: max_len is below 1 or too large for a pack, crop is unknown, or weights are not one positive number
            per store. In training also: a store has no rows, or the rows do not fill one pack.
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
        self.plan_ahead = True
        """Whether `plan` also makes the plan of the following epoch, in a background thread."""
        self._planned: tuple[int, Plan] | None = None
        self.planner: threading.Thread | None = None
        check_pack_sizes(max_len, tokens_per_pack)
        check_crop(crop)
        if weights is not None:
            check_weights(weights, len(group.stores))
        store_rows = self._rows_by_store()
        self._totals = [total_tokens(group.lengths, rows_of_store, max_len) for rows_of_store in store_rows]
        if seed is None:
            self._planned = 0, self._make_plan(0)
            self.packs_per_epoch = len(self._planned[1].starts) - 1
            return
        for store, total in zip(group.stores, self._totals, strict=True):
            if not total:
                raise ValueError(f"{store.path} has no training sequences")
        self._quotas = token_quotas(self._totals, weights)
        self.packs_per_epoch = self._count_packs()
        if self.packs_per_epoch <= 0:
            raise ValueError(
                f"{group.name}: the training split has {sum(self._quotas)} tokens per epoch, too few for one pack of "
                f"data.tokens_per_pack={tokens_per_pack}; lower data.tokens_per_pack, and data.max_len if it is then "
                "too large"
            )
        rows_digest = xxhash.xxh3_128_hexdigest(self.rows.data)
        parts = [version, group.fingerprint, rows_digest, max_len, tokens_per_pack, seed, self._quotas]
        parts += self._method()
        self.key = xxhash.xxh3_128_hexdigest(repr(parts).encode())
        self.mean_tokens = self._mean_tokens()
        """Mean number of tokens per sequence after cropping; with several stores, the smallest of their means."""

    def _count_packs(self) -> int:
        """Return the number of packs that every epoch is guaranteed to fill."""
        return packs_in_epoch(self._totals, self._quotas, self.tokens_per_pack, self.max_len)

    def _method(self) -> list[object]:
        """Return what the plans of a subclass depend on, besides the data and the arguments."""
        return []

    def _mean_tokens(self) -> float:
        counts = map(len, self._rows_by_store())
        return min(total / count for total, count in zip(self._totals, counts, strict=True))

    def __getstate__(self) -> dict[str, object]:
        planned = self._planned if self.seed is None else None
        state = self.__dict__ | {"planner": None, "_planned": planned}
        state.pop("tokens", None)
        return state

    def __len__(self) -> int:
        """Return the number of packs in one epoch. In training, larger indices continue with the next epochs."""
        return self.packs_per_epoch

    @cached_property
    def tokens(self) -> list[np.ndarray]:
        """The (total,) uint8 tokens of each store, memory-mapped by this process (in training, for random access)."""
        if self.seed is None:
            return [store.tokens for store in self.group.stores]
        return [store.tokens_at_random() for store in self.group.stores]

    def pack_rows(self, pack: int) -> np.ndarray:
        """Return the (n,) int64 row numbers of the sequences in a pack. Packs are counted over all epochs."""
        epoch, local = divmod(pack, self.packs_per_epoch)
        rows, starts = self.plan(epoch)
        return rows[starts[local] : starts[local + 1]].astype(np.int64)

    def __getitem__(self, pack: int) -> PackedBatch:
        rows = self.pack_rows(pack)
        store_numbers, begins, residues = self.group.locate(rows, self.tokens)
        ends, cut = begins + residues + 2, np.flatnonzero(residues > self.max_len)
        starts, limits = np.zeros(len(cut), np.int64), residues[cut] - self.max_len + 1
        contexts = None
        if self.group.context != "none":
            contexts = [context_of(self.group, row) for row in rows.tolist()]
        # cut: indices of the pack's sequences to crop. choices[k], only for a sequence with context: the residues at
        # which the crop of sequence cut[k] may begin
        choices: dict[int, np.ndarray] = {}
        for k, i in enumerate(cut.tolist()):
            if contexts is not None and (is_context := contexts[i]) is not None:
                targets = targets_of(self.tokens[store_numbers[i]][begins[i] : ends[i]], is_context)
                choices[k] = designed_crops(targets, self.max_len, first=self.seed is None or self.crop == "start")
                limits[k] = len(choices[k])
        if self.seed is not None and self.crop == "random" and len(cut):
            starts = random_below(limits, [self.seed, _CROP, pack], self.version)
        for k, choice in choices.items():
            starts[k] = choice[starts[k]]
        first = np.zeros(len(rows), np.int64)
        first[cut], last = crop_bounds(residues[cut], starts, self.max_len)
        ends[cut] = begins[cut] + last
        begins += first
        bounds = zip(store_numbers.tolist(), begins.tolist(), ends.tolist(), strict=True)
        flat = np.concatenate([self.tokens[store][begin:end] for store, begin, end in bounds])
        lengths = (ends - begins).tolist()
        context_T = None if contexts is None else joined_context(contexts, first.tolist(), lengths)
        return PackedBatch.from_flat(torch.from_numpy(flat), lengths, rows.tolist(), context_T)

    def plan(self, epoch: int) -> Plan:
        """Return the plan of one epoch: which sequences are in which pack.

        The most recently returned plan is cached. For a plan that is not cached, a background thread also makes the
        plan of `epoch + 1`, unless `plan_ahead` is False.
        """
        if self._planned is None or self._planned[0] != epoch:
            plan = shared_plan(self.key, epoch, lambda: self._make_plan(epoch))
            assert plan is not None
            self._planned = epoch, plan
            if self.plan_ahead:
                self.planner = threading.Thread(target=self._make_ahead, args=(epoch + 1,), daemon=True)
                self.planner.start()
        return self._planned[1]

    def tail(self, epoch: int) -> int:
        """Return how many sequences of an epoch are left over after its last pack."""
        rows, starts = self.plan(epoch)
        return len(rows) - int(starts[self.packs_per_epoch])

    def _make_ahead(self, epoch: int) -> None:
        try:
            shared_plan(self.key, epoch, lambda: self._make_plan(epoch), wait=False)
        except ValueError:
            return  # when this plan is needed, `plan` tries to make it again and raises the error

    def forget_plans(self) -> None:
        """Remove this dataset's plans from the temporary folder."""
        if self.planner is not None:
            self.planner.join()
        if self.seed is not None:
            remove_plans(self.key)

    def _rows_by_store(self) -> list[np.ndarray]:
        return np.split(self.rows, np.searchsorted(self.rows, self.group.bases[1:]))

    def _make_plan(self, epoch: int) -> Plan:
        rows, lengths = self.rows, self.group.lengths
        if self.seed is not None:
            rows = epoch_rows(
                self._rows_by_store(),
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
    """The numbers of the packs that one rank reads in steps first_step .. last_step - 1, in this order."""

    def __init__(self, first_step: int, last_step: int, packs_per_step: int, rank: int, world_size: int) -> None:
        self.steps, self.packs = range(first_step, last_step), range(rank, packs_per_step, world_size)
        self.packs_per_step = packs_per_step

    def __len__(self) -> int:
        return len(self.steps) * len(self.packs)

    def __iter__(self) -> Iterator[int]:
        return (step * self.packs_per_step + pack for step in self.steps for pack in self.packs)


def pack_loader(dataset: PackDataset, packs: Sampler[int] | range, workers: int, pin_memory: bool) -> DataLoader:
    """Return a DataLoader that yields the packs with the numbers `packs`, in this order."""
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
    """Stop the worker processes of an iterator over `pack_loader`.

    Without this call, the workers run until the last reference to the iterator is gone. An exception's traceback may
    keep such a reference, and Python would then wait at exit for the workers, which ignore SIGTERM.
    """
    shut_down = getattr(packs, "_shutdown_workers", None)  # torch has no public method; None without workers
    if shut_down is not None:
        shut_down()


def ignore_signals(worker: int) -> None:
    """Make a worker ignore Ctrl-C and the scheduler's signals. The trainer receives them too and stops the workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def check_pack_sizes(max_len: int, tokens_per_pack: int) -> None:
    """Raise ValueError unless max_len is positive and a pack can contain max_len residues, `<bos>` and `<eos>`."""
    if max_len < 1:
        raise ValueError(f"data.max_len must be at least 1 residue, got {max_len}")
    if tokens_per_pack < max_len + 2:
        raise ValueError(
            f"data.tokens_per_pack={tokens_per_pack} cannot hold one sequence of data.max_len={max_len} residues "
            f"(with <bos> and <eos> that is {max_len + 2} tokens); lower data.max_len or raise data.tokens_per_pack"
        )


def check_weights(weights: Sequence[float], stores: int) -> None:
    """Raise ValueError unless there is one positive weight for each store."""
    if len(weights) != stores:
        raise ValueError(f"data.weights has {len(weights)} weights for {stores} stores in data.path")
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ValueError(f"data.weights: {weight} is not a positive finite number")
