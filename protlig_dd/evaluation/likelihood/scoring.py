"""Score proteins by a model's bound on the NLL, by the baselines, and by other measures of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.config.verbs import EvaluateConfig
from protlig_dd.data.case import targets_of
from protlig_dd.data.context import joined_context
from protlig_dd.diffusion.exact_count import masked_cross_entropy
from protlig_dd.diffusion.likelihood import ProteinDraws, nll_bound, protein_draws
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.likelihood.baselines import Baselines
from protlig_dd.evaluation.likelihood.leaks import MIN_PROTEINS, Leaks
from protlig_dd.inference.model import TrainedModel
from protlig_dd.inference.sharing import Tick, Work
from protlig_dd.runs.metrics import without_nan
from protlig_dd.system.random import protein_keys, stratified_positions
from protlig_dd.tokenizer import N_STATES

MASKED_FRACTION = 0.15
# keys of `Scored.nats`: the model's bound, the bound of the model of compare=, the baselines, and other measures of the
# model (OADM, EvoDiff's test convention, cross-entropy of a masked MASKED_FRACTION of the residues)
COLUMNS = ("bound", "compared", "unigram", "bigram", "oadm", "evodiff", "masked")


class Given(NamedTuple):
    """A protein to score."""

    tokens: np.ndarray
    """(length,)"""
    is_context: np.ndarray | None
    """(length,) bool: True for context residues. These are given to the model and not scored. None: there is no
    context."""


@dataclass
class Scored:
    """Nats of one protein, in total and for each amino acid. Context residues are not counted."""

    residues: int
    nats: dict[str, float]
    """Total nats for each of COLUMNS that was computed."""
    bound_se: float
    masked: dict[str, float | int]
    """Number of masked tokens, for the columns that are means over masked tokens and not over residues. For the column
    `masked` this is the sum over draws, for `evodiff` the mean over draws."""
    counts: np.ndarray
    """(20,) how often each amino acid occurs."""
    by_letter: dict[str, np.ndarray]
    """(20,) nats of each amino acid, for bound, unigram and bigram."""


def score(
    trained: TrainedModel,
    proteins: Sequence[Given],
    config: EvaluateConfig,
    baselines: Baselines | None,
    *,
    bound_only: bool = False,
) -> list[Scored]:
    """Score every protein. The ranks share the work.

    The random draws depend on the seed and on the set of proteins, not on how the proteins are packed.

    Args:
        bound_only: compute only the bound of the model and the baselines, not the other measures of the model.
    """
    keys = protein_keys(protein.tokens for protein in proteins)
    positions = stratified_positions(keys, config.draws, config.seed)

    def score_indices(indices: range, tick: Tick) -> dict[int, Scored]:
        pack = [proteins[i] for i in indices]
        keyed_draws = protein_draws(keys[indices], positions[:, indices], config.seed)
        scored = score_pack(trained, pack, keyed_draws, config, baselines, bound_only=bound_only)
        tick()
        return dict(zip(indices, scored, strict=True))

    work = Work(config.tokens_per_pack, "evaluating", trained.processes)
    results = work.share([len(protein.tokens) - 2 for protein in proteins], score_indices)
    return [results[i] for i in range(len(proteins))]


def score_pack(
    trained: TrainedModel,
    proteins: Sequence[Given],
    keyed_draws: ProteinDraws,
    config: EvaluateConfig,
    baselines: Baselines | None,
    *,
    bound_only: bool,
) -> list[Scored]:
    """Score the proteins of one pack."""
    score_fn = trained.score_fn
    lengths, contexts = [len(protein.tokens) for protein in proteins], [protein.is_context for protein in proteins]
    batch = PackedBatch.pack(
        [torch.from_numpy(protein.tokens.astype(np.int64)) for protein in proteins],
        context=joined_context(contexts, [0] * len(proteins), lengths),
    ).to(trained.device)
    bound = nll_bound(score_fn, batch, generator=keyed_draws, draws=config.draws)
    per_token, whole, masked = {"bound": bound.token_nats}, {}, {}
    if trained.graph.masks and not bound_only:
        oadm = bound
        if bound.estimator != "exact_count":
            oadm = nll_bound(score_fn, batch, generator=keyed_draws, draws=config.draws, estimator="exact_count")
        per_token["oadm"] = oadm.token_nats
        whole["evodiff"], masked["evodiff"] = oadm.pooled_nats, oadm.pooled
        if config.masked:
            per_token["masked"], masked["masked"] = masked_cross_entropy(
                score_fn, batch, fraction=MASKED_FRACTION, draws=config.draws, generator=keyed_draws.generators
            )
    parts = {name: [part.numpy() for part in batch.unpack(nats)] for name, nats in per_token.items()}
    scored = []
    for i, (tokens, is_context) in enumerate(proteins):
        nats = {name: part[i] for name, part in parts.items()}
        if baselines is not None:
            nats["unigram"], nats["bigram"] = baselines.nats(tokens, is_context)
        inside = targets_of(tokens, is_context) < N_STATES
        letters = tokens[inside]
        scored.append(
            Scored(
                residues=int(inside.sum()),
                nats={name: float(values.sum()) for name, values in nats.items()}
                | {name: float(values[i]) for name, values in whole.items()},
                bound_se=float(bound.standard_error[i]),
                masked={name: counts[i].item() for name, counts in masked.items()},
                counts=np.bincount(letters, minlength=N_STATES),
                by_letter={
                    name: np.bincount(letters, nats[name][inside], minlength=N_STATES)
                    for name in ("bound", "unigram", "bigram")
                    if name in nats
                },
            )
        )
    return scored


def column(scored: Sequence[Scored], name: str) -> np.ndarray:
    return np.array([protein.nats[name] for protein in scored])


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return nats/residue (nats per masked token for columns in Scored.masked) with standard errors over proteins.

    Also returns perplexities, and paired differences to the unigram model and to the model of `compare=`.
    """
    residues = np.array([protein.residues for protein in scored])
    figures: dict[str, Any] = {}
    for name in COLUMNS:
        if name not in scored[0].nats:
            continue
        count = np.array([protein.masked.get(name, protein.residues) for protein in scored])
        figures[name], figures[f"{name}_se"] = per_residue(column(scored, name), count)
        if len(scored) == 1 and name == "bound":  # no variation between proteins: use the Monte Carlo error
            figures["bound_se"] = scored[0].bound_se / scored[0].residues
        figures[f"{name}_perplexity"] = float(np.exp(figures[name]))
    for name, other in (("bound", "unigram"), ("compared", "unigram"), ("bigram", "unigram"), ("bound", "compared")):
        if name in figures and other in figures:
            difference = column(scored, name) - column(scored, other)
            figures[f"{name}_to_{other}"], figures[f"{name}_to_{other}_se"] = per_residue(difference, residues)
    return figures


def in_training(leaks: Leaks, scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the counts of leaked proteins and, if there are any, the figures of the other proteins."""
    others: list[Scored] = []
    if leaks.leaked.any():
        others = [protein for protein, leaked in zip(scored, leaks.leaked, strict=True) if not leaked]
    enough = len(others) >= MIN_PROTEINS and sum(protein.residues for protein in others) > 0
    figures = {"sequences": len(others), **without_nan(summary(others))} if enough else None
    return {**leaks.report(), "others": figures}
