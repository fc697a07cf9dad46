"""Unigram and bigram models, the baselines of the likelihood. A protein language model has to beat them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from protlig_dd.data.case import Context, targets_of
from protlig_dd.data.context import context_of
from protlig_dd.data.rows import SplitRows
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.likelihood.trained_on import find_training_stores
from protlig_dd.inference.model import TrainedModel
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import CONTEXT, N_STATES, VOCAB_SIZE

PSEUDO_COUNTS = 20.0  # added to each bigram row, in proportion to the unigram frequencies
MAX_SEQUENCES = 200_000  # maximum number of sequences to fit to; enough to count 400 amino-acid pairs


@dataclass(frozen=True)
class Baselines:
    """Log-probabilities of an amino acid: alone (unigram model) and given the previous token (bigram model)."""

    unigram: np.ndarray
    """(20,)"""
    bigram: np.ndarray
    """(30, 20): a row for each previous token. The rows of the letters X, B, Z, J, U and O equal the unigram model."""
    sequences: int

    def nats(self, tokens: np.ndarray, is_context: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return -log p of each token (length,) under the unigram model and under the bigram model.

        Context residues, and tokens that are not amino acids, get 0. The bigram model reads the previous token, even if
        that token is context.

        Args:
            is_context: (length,) bool: which tokens are context residues. None: there is no context.
        """
        inside = targets_of(tokens, is_context) < N_STATES
        unigram, bigram = np.zeros(len(tokens)), np.zeros(len(tokens))
        unigram[inside] = -self.unigram[tokens[inside]]
        # a crop may begin inside a protein: the token before it is then unknown, so the row of X is used for it
        before = np.append(CONTEXT, tokens[:-1])
        bigram[inside] = -self.bigram[before[inside], tokens[inside]]
        return unigram, bigram


def fit_baselines(sequences: Iterable[np.ndarray], contexts: Iterable[np.ndarray | None] = repeat(None)) -> Baselines:
    """Fit the unigram and the bigram model by counting amino acids and pairs of neighbours in the sequences.

    Args:
        sequences: `<bos> residues <eos>` of each protein.
        contexts: for each sequence (length,) bool, which tokens are context residues; None for a sequence without
            context. Context residues are not counted as amino acids, but a pair may begin with a context residue.
    """
    pairs, n = np.zeros((VOCAB_SIZE, N_STATES)), 0
    for tokens, is_context in zip(sequences, contexts, strict=False):
        before, after = tokens[:-1].astype(np.int64), targets_of(tokens, is_context)[1:].astype(np.int64)
        inside = after < N_STATES
        flat = before[inside] * N_STATES + after[inside]
        pairs += np.bincount(flat, minlength=pairs.size).reshape(pairs.shape)
        n += 1
    counts = pairs.sum(0) + 1
    unigram = counts / counts.sum()
    pairs[N_STATES : VOCAB_SIZE - 3] = 0  # rows of the mask and of the letters X, B, Z, J, U and O
    bigram = (pairs + PSEUDO_COUNTS * unigram) / (pairs.sum(1, keepdims=True) + PSEUDO_COUNTS)
    return Baselines(np.log(unigram), np.log(bigram), n)


def baselines_of(stores: StoreGroup) -> Baselines:
    """Fit the two models to at most MAX_SEQUENCES sequences of the training splits, evenly spaced in each store.

    Raises:
        ValueError: no training sequences.
    """
    if not (total := len(SplitRows(stores, "train"))):
        raise ValueError(f"{stores.name}: no training sequences")
    stride, rows = -(-total // MAX_SEQUENCES), list[int]()
    for base, store in zip(stores.bases.tolist(), stores.stores, strict=True):
        train = SplitRows(StoreGroup([store]), "train")
        rows += (base + train[np.arange(0, len(train), stride)].astype(np.int64)).tolist()
    found = (stores.find(row) for row in rows)
    return fit_baselines((store[row] for store, row in found), (context_of(stores, row) for row in rows))


def find_baseline_stores(
    train: str | None, store: SequenceStore | None, trained: TrainedModel, context: Context = "none"
) -> StoreGroup | None:
    """Return the stores whose training splits the baselines are fitted to.

    If the stores are not found, print a message and return None.

    Args:
        train: path of the store to use (`train=`). None: the stores that the model was trained on.
        store: the evaluated store, which the model may have been trained on.
        context: the case that marks residues as context, or none. If a store does not keep the case, the baselines are
            fitted to all residues, and a message reports this.
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
    residues = ""
    if context != "none":
        kept = all(item.has_case for item in stores.stores)
        stores = StoreGroup(stores.stores, context if kept else "none")
        residues = "the designed residues of " if kept else "all residues (not every store keeps the case) of "
    announce(f"fitting unigram and bigram models to {residues}the training split of {stores.name}", trained.processes)
    return stores
