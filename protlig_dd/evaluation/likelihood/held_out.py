"""Compute the numbers of a run's report: NLL bounds of held-out proteins, the unigram NLL, and training statistics."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.data.context import designed_counts
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SPLITS, StoreGroup
from protlig_dd.diffusion.likelihood import nll_bound, protein_draws
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.inference.sharing import Tick, share
from protlig_dd.system.distributed import Processes
from protlig_dd.system.random import protein_keys, stratified_positions
from protlig_dd.system.tables import csv_text
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES

LENGTH_BINS = 40  # maximum number of bins in the histogram of lengths


@dataclass(frozen=True)
class HeldOut:
    """NLL bounds of the sequences of one split, in the order of their store rows. All ranks have the same bounds."""

    rows: np.ndarray
    nats: np.ndarray
    residues: np.ndarray
    unigram_nats: np.ndarray
    """The unigram model's exact NLL of the same residues."""
    estimator: str

    def summary(self) -> dict[str, Any]:
        """Return nats/residue with standard errors: the model's bound, the unigram NLL, and their paired difference."""
        nll, nll_se = per_residue(self.nats, self.residues)
        unigram, unigram_se = per_residue(self.unigram_nats, self.residues)
        difference, difference_se = per_residue(self.nats - self.unigram_nats, self.residues)
        return {
            "nll": nll,
            "nll_se": nll_se,
            "unigram_nll": unigram,
            "unigram_nll_se": unigram_se,
            "difference": difference,
            "difference_se": difference_se,
            "sequences": len(self.rows),
            "residues": int(self.residues.sum()),
            "estimator": self.estimator,
        }


def held_out_bound(
    score_fn: ScoreFn,
    dataset: PackDataset,
    *,
    unigram: np.ndarray,
    draws: int,
    seed: int,
    processes: Processes,
    description: str,
) -> HeldOut:
    """Compute a bound on the NLL of every sequence of the dataset. The ranks share the work.

    The random draws depend on the seed and on the set of sequences, not on how the sequences are packed.

    Args:
        dataset: unshuffled (seed None). If the dataset's stores have context, the bound is on the NLL of the designed
            residues (all residues that are not context) given the context. A sequence longer than max_len is cropped to
            max_len consecutive residues. If the sequence has no context residues, the crop is its first max_len
            residues. Otherwise it is the crop with the most designed residues. If several crops have the most, the
            first of them is used.
        unigram: (20,) amino-acid frequencies.
    """
    log_unigram = torch.from_numpy(np.log(unigram))
    pack_starts = np.cumsum([0, *(len(dataset.pack_rows(pack)) for pack in range(len(dataset)))])
    batches = map(dataset.__getitem__, range(len(dataset)))
    keys = protein_keys(tokens.numpy() for batch in batches for tokens in batch.unpack(batch.tokens))
    positions = stratified_positions(keys, draws, seed)

    def bound_of(pack: int, tick: Tick) -> dict[int, tuple[np.ndarray, ...]]:
        batch = dataset[pack]
        in_pack = slice(pack_starts[pack], pack_starts[pack + 1])
        keyed_draws = protein_draws(keys[in_pack], positions[:, in_pack], seed)
        bound = nll_bound(score_fn, batch.to(score_fn.device), generator=keyed_draws, draws=draws)
        unigram_nats = (-residue_counts(batch) @ log_unigram).numpy()
        tick()
        return {pack: (batch.rows.numpy(), bound.nats.numpy(), bound.residues.numpy(), unigram_nats)}

    results = share(range(len(dataset)), bound_of, description=description, processes=processes)
    rows, nats, residues, unigram_nats = (np.concatenate(column) for column in zip(*results.values(), strict=True))
    order = rows.argsort()
    return HeldOut(rows[order], nats[order], residues[order], unigram_nats[order], score_fn.estimator)


def per_sequence_csv(store: StoreGroup, held: HeldOut) -> str:
    """Return CSV with the total nats of each sequence, so that two models can be compared sequence by sequence."""
    ids = [store.id(row) for row in held.rows]
    columns = zip(ids, held.residues, held.nats, held.unigram_nats, strict=True)
    return csv_text(["id", "residues", "nll_nats", "unigram_nats"], columns)


def residue_counts(batch: PackedBatch) -> torch.Tensor:
    """Return (n, 20) float64: how often each amino acid occurs in each sequence. Context residues are not counted."""
    counts = torch.zeros(len(batch.lengths), N_STATES, dtype=torch.float64)
    inside = batch.targets < N_STATES
    flat = batch.segment_ids[inside] * N_STATES + batch.tokens[inside]
    return counts.view(-1).index_add_(0, flat, torch.ones(len(flat), dtype=torch.float64)).view_as(counts)


def designed_frequencies(store: StoreGroup) -> np.ndarray:
    """Return the (20,) amino-acid frequencies of the training split, computed without the context residues.

    Each amino acid has one pseudo-count.
    """
    counts = designed_counts(store)[SPLITS.index("train")][:N_STATES] + 1
    return counts / counts.sum()


def training_frequencies(store: StoreGroup) -> np.ndarray:
    """Return the (20,) amino-acid frequencies of the training split, with one pseudo-count for each amino acid."""
    counts = store.token_counts[SPLITS.index("train")][:N_STATES] + 1
    return counts / counts.sum()


def composition_kl(samples: list[np.ndarray], frequencies: np.ndarray) -> float:
    """Return KL(pooled composition of the samples || frequencies) in nats."""
    counts = np.bincount(np.concatenate(samples), minlength=N_STATES)[:N_STATES]
    composition = counts / counts.sum()
    used = composition > 0
    return float((composition[used] * np.log(composition[used] / frequencies[used])).sum())


def length_counts(store: StoreGroup, max_len: int) -> tuple[list[int], int]:
    """Return how many training sequences have 0, 1, ..., max_len residues, and how many have more.

    Longer sequences are counted separately, not under max_len, because a crop of max_len residues is not a whole
    protein.
    """
    counts, total = np.zeros(max_len + 1, np.int64), 0
    for rows in store.split_blocks("train"):
        lengths = store.lengths[rows]
        counts += np.bincount(lengths[lengths <= max_len], minlength=max_len + 1)
        total += len(rows)
    return counts.tolist(), total - int(counts.sum())


def training_statistics(store: StoreGroup, max_len: int) -> dict[str, Any]:
    """Return statistics of the training sequences, for comparison with the samples.

    The statistics are the frequency of each amino acid, a histogram of the lengths up to max_len in bins of
    `length_bin` residues, and the number of longer sequences. Training reads only a crop of each longer sequence.
    """
    counts, cropped = length_counts(store, max_len)
    width = -(-len(counts) // LENGTH_BINS)
    return {
        "length_bin": width,
        "length_counts": [sum(counts[start : start + width]) for start in range(0, len(counts), width)],
        "cropped": cropped,
        "composition": dict(zip(AMINO_ACIDS, training_frequencies(store).tolist(), strict=True)),
    }
