"""A model's bound on the NLL of proteins, beside what other measures say of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.config.verbs import EvaluateConfig
from protlig_dd.diffusion.exact_count import masked_cross_entropy
from protlig_dd.diffusion.likelihood import ProteinDraws, nll_bound, protein_draws
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.likelihood.baselines import Baselines
from protlig_dd.evaluation.likelihood.leaks import FEWEST, Leaks
from protlig_dd.inference.model import TrainedModel
from protlig_dd.inference.sharing import Tick, Work
from protlig_dd.runs.metrics import without_nan
from protlig_dd.system.random import places_of_set, protein_keys
from protlig_dd.tokenizer import N_STATES

MASKED_SHARE = 0.15
COLUMNS = ("bound", "compared", "unigram", "bigram", "oadm", "evodiff", "masked")


@dataclass
class Scored:
    """Nats of one protein, and those of each of its amino acids."""

    residues: int
    nats: dict[str, float]
    """By column; those that were measured."""
    bound_se: float
    masked: dict[str, float | int]
    """Tokens that were masked, for the columns that are means over those and not over residues: in all draws, or a draw
    on average."""
    counts: np.ndarray
    """(20,) how often each amino acid is there."""
    by_letter: dict[str, np.ndarray]
    """(20,) nats of each amino acid, for bound, unigram and bigram."""


def score(
    trained: TrainedModel,
    sequences: Sequence[np.ndarray],
    config: EvaluateConfig,
    baselines: Baselines | None,
    *,
    alone: bool = False,
) -> list[Scored]:
    """Every sequence once, packs shared out over the ranks; what it draws follows from the seed and the set of
    sequences, not from their packs."""
    keys = protein_keys(sequences)
    places = places_of_set(keys, config.draws, config.seed)

    def score_some(indices: range, tick: Tick) -> dict[int, Scored]:
        some = [sequences[i] for i in indices]
        drawn = protein_draws(keys[indices], places[:, indices], config.seed)
        found = score_pack(trained, some, drawn, config, baselines, alone=alone)
        tick()
        return dict(zip(indices, found, strict=True))

    work = Work(config.tokens_per_pack, "evaluating", trained.processes)
    found = work.share([len(tokens) - 2 for tokens in sequences], score_some)
    return [found[i] for i in range(len(sequences))]


def score_pack(
    trained: TrainedModel,
    sequences: Sequence[np.ndarray],
    drawn: ProteinDraws,
    config: EvaluateConfig,
    baselines: Baselines | None,
    *,
    alone: bool,
) -> list[Scored]:
    """Those of one pack; of the bound alone, or of what else is measured too."""
    score_fn = trained.score_fn
    batch = PackedBatch.pack([torch.from_numpy(tokens.astype(np.int64)) for tokens in sequences]).to(trained.device)
    bound = nll_bound(score_fn, batch, generator=drawn, draws=config.draws)
    per_token, whole, masked = {"bound": bound.token_nats}, {}, {}
    if trained.graph.masks and not alone:
        oadm = bound
        if bound.estimator != "exact_count":
            oadm = nll_bound(score_fn, batch, generator=drawn, draws=config.draws, estimator="exact_count")
        per_token["oadm"] = oadm.token_nats
        whole["evodiff"], masked["evodiff"] = oadm.pooled_nats, oadm.pooled
        if config.masked:
            per_token["masked"], masked["masked"] = masked_cross_entropy(
                score_fn, batch, share=MASKED_SHARE, draws=config.draws, generator=drawn.generators
            )
    parts = {name: [part.numpy() for part in batch.unpack(nats)] for name, nats in per_token.items()}
    scored = []
    for i, tokens in enumerate(sequences):
        nats = {name: part[i] for name, part in parts.items()}
        if baselines is not None:
            nats["unigram"], nats["bigram"] = baselines.nats(tokens)
        inside = tokens < N_STATES
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
    return np.array([one.nats[name] for one in scored])


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Nats a residue (or a masked token: see Scored) with standard errors over proteins, and paired differences to the
    unigram model and to the model compared with.
    """
    residues = np.array([one.residues for one in scored])
    found: dict[str, Any] = {}
    for name in COLUMNS:
        if name not in scored[0].nats:
            continue
        count = np.array([one.masked.get(name, one.residues) for one in scored])
        found[name], found[f"{name}_se"] = per_residue(column(scored, name), count)
        if len(scored) == 1 and name == "bound":  # there is no spread between proteins; the draws' own is known
            found["bound_se"] = scored[0].bound_se / scored[0].residues
        found[f"{name}_perplexity"] = float(np.exp(found[name]))
    for name, other in (("bound", "unigram"), ("compared", "unigram"), ("bigram", "unigram"), ("bound", "compared")):
        if name in found and other in found:
            difference = column(scored, name) - column(scored, other)
            found[f"{name}_to_{other}"], found[f"{name}_to_{other}_se"] = per_residue(difference, residues)
    return found


def in_training(leaks: Leaks, scored: Sequence[Scored]) -> dict[str, Any]:
    """What is known of proteins that trained the model and, where some have, the figures of the others."""
    others = [one for one, leaked in zip(scored, leaks.leaked, strict=True) if not leaked] if leaks.leaked.any() else []
    enough = len(others) >= FEWEST and sum(one.residues for one in others) > 0
    figures = {"sequences": len(others), **without_nan(summary(others))} if enough else None
    return {**leaks.report(), "others": figures}
