"""Baselines of the likelihood: unigram and bigram models, which a protein language model has to beat."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.likelihood.trained_on import find_training_stores
from protlig_dd.inference.model import TrainedModel
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import N_STATES, VOCAB_SIZE

PSEUDO_COUNTS = 20.0  # added to each bigram row, in proportion to the unigram frequencies
MAX_SEQUENCES = 200_000  # enough to count 400 amino-acid pairs


@dataclass(frozen=True)
class Baselines:
    """Log-probabilities of an amino acid, alone and given the previous token."""

    unigram: np.ndarray
    """(20,)"""
    bigram: np.ndarray
    """(30, 20): a row for each previous token; the rows of context letters equal the unigram model."""
    sequences: int

    def nats(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return -log p of each token (length,) under both models, 0 for tokens that are not amino acids."""
        inside = tokens < N_STATES
        unigram, bigram = np.zeros(len(tokens)), np.zeros(len(tokens))
        unigram[inside] = -self.unigram[tokens[inside]]
        # wrong for the first token only, which is always <bos> (evaluate cuts only the end) and has no score
        before = np.roll(tokens, 1)
        bigram[inside] = -self.bigram[before[inside], tokens[inside]]
        return unigram, bigram


def fit_baselines(sequences: Iterable[np.ndarray]) -> Baselines:
    """Fit both models by counting amino acids and pairs of neighbours in sequences `<bos> residues <eos>`."""
    pairs, n = np.zeros((VOCAB_SIZE, N_STATES)), 0
    for tokens in sequences:
        before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        inside = after < N_STATES
        flat = before[inside] * N_STATES + after[inside]
        pairs += np.bincount(flat, minlength=pairs.size).reshape(pairs.shape)
        n += 1
    counts = pairs.sum(0) + 1
    unigram = counts / counts.sum()
    pairs[N_STATES : VOCAB_SIZE - 3] = 0  # rows of the mask and of the context letters
    bigram = (pairs + PSEUDO_COUNTS * unigram) / (pairs.sum(1, keepdims=True) + PSEUDO_COUNTS)
    return Baselines(np.log(unigram), np.log(bigram), n)


def training_sequences(stores: Sequence[SequenceStore]) -> Iterable[np.ndarray]:
    """Yield at most MAX_SEQUENCES sequences of the training splits, evenly spaced.

    Raises:
        ValueError: no training sequences.
    """
    rows = [store.split("train") for store in stores]
    total = sum(map(len, rows))
    if not total:
        raise ValueError(f"{', '.join(str(store.path) for store in stores)}: no training sequences")
    stride = -(-total // MAX_SEQUENCES)
    for store, store_rows in zip(stores, rows, strict=True):
        for row in store_rows[::stride]:
            yield store[row]


def find_baseline_stores(train: str | None, store: SequenceStore | None, trained: TrainedModel) -> StoreGroup | None:
    """Return the stores whose training splits the baselines are fitted to; None, with a message, if not found.

    Args:
        train: path of the store to use (`train=`). None: the stores that the model was trained on.
        store: the evaluated store, which the model may have been trained on.
    """
    candidates = [] if store is None else [store]
    stores = (
        StoreGroup([SequenceStore(train)])
        if train
        else find_training_stores(candidates, trained.saved.path, trained.saved.data_fingerprint)
    )
    if stores is None:
        announce(
            "the model's training set was not found: give train=store.h5 for unigram and bigram models",
            trained.processes,
        )
        return None
    announce(f"fitting unigram and bigram models to the training split of {stores.name}", trained.processes)
    return stores
