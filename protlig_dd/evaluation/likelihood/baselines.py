"""Models that a protein language model has to beat: single amino acids, and pairs of neighbours."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.likelihood.trained_on import own_data
from protlig_dd.inference.model import TrainedModel
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import N_STATES, VOCAB_SIZE

PSEUDO_COUNTS = 20.0  # of a bigram row, shared out as the unigram model says
MOST_SEQUENCES = 200_000  # that are counted: 400 amino-acid pairs need no more


@dataclass(frozen=True)
class Baselines:
    """Log-probabilities of an amino acid, by itself and after the token before it."""

    unigram: np.ndarray
    """(20,)"""
    bigram: np.ndarray
    """(30, 20): rows are tokens; after a context letter the unigram model stands in."""
    sequences: int

    def nats(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-log p of each token (length,) under both, 0 for those that are no amino acids."""
        inside = tokens < N_STATES
        unigram, bigram = np.zeros(len(tokens)), np.zeros(len(tokens))
        unigram[inside] = -self.unigram[tokens[inside]]
        before = np.roll(tokens, 1)  # an amino acid is never first: <bos> is, or the one before a crop's start
        bigram[inside] = -self.bigram[before[inside], tokens[inside]]
        return unigram, bigram


def fit_baselines(sequences: Iterable[np.ndarray]) -> Baselines:
    """Count amino acids and neighbours in tokenised sequences, `<bos> residues <eos>`."""
    pairs, n = np.zeros((VOCAB_SIZE, N_STATES)), 0
    for tokens in sequences:
        before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        inside = after < N_STATES
        flat = before[inside] * N_STATES + after[inside]
        pairs += np.bincount(flat, minlength=pairs.size).reshape(pairs.shape)
        n += 1
    counts = pairs.sum(0) + 1
    unigram = counts / counts.sum()
    pairs[N_STATES : VOCAB_SIZE - 3] = 0  # after a mask or a context letter
    bigram = (pairs + PSEUDO_COUNTS * unigram) / (pairs.sum(1, keepdims=True) + PSEUDO_COUNTS)
    return Baselines(np.log(unigram), np.log(bigram), n)


def training_sequences(stores: Sequence[SequenceStore]) -> Iterable[np.ndarray]:
    """The training splits' sequences, evenly thinned out to MOST_SEQUENCES.

    Raises:
        ValueError: no training sequences.
    """
    rows = [store.split("train") for store in stores]
    total = sum(map(len, rows))
    if not total:
        raise ValueError(f"{', '.join(str(store.path) for store in stores)}: no training sequences")
    stride = -(-total // MOST_SEQUENCES)
    for store, mine in zip(stores, rows, strict=True):
        for row in mine[::stride]:
            yield store[row]


def find_baselines(wanted: str | None, store: SequenceStore | None, trained: TrainedModel) -> StoreGroup | None:
    """Whose training split unigram and bigram models are made of: `train=`, else what the model was trained on."""
    given = [] if store is None else [store]
    found = (
        StoreGroup([SequenceStore(wanted)])
        if wanted
        else own_data(given, trained.saved.path, trained.saved.data_fingerprint)
    )
    if found is None:
        announce(
            "the model's training set was not found: give train=store.h5 for unigram and bigram models",
            trained.processes,
        )
        return None
    announce(f"unigram and bigram models are those of the training split of {found.name}", trained.processes)
    return found
