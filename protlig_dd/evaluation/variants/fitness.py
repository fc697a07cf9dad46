"""How fit a model thinks the variants of a protein are: log-likelihood to the wild type, nats, higher is fitter.

A protein longer than the model was trained on is seen through windows of that length around what a variant changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.exact_count import masked_sigma
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.variants.assays import Assay
from protlig_dd.evaluation.variants.bounds import bound_differences
from protlig_dd.evaluation.variants.strategies import UNMASKED, rows_by_strategy
from protlig_dd.evaluation.variants.windows import Piece, pieces_of, windowed
from protlig_dd.inference.sharing import Tick, Work


@dataclass(frozen=True)
class Scores:
    nats: np.ndarray
    """(variants,) float64."""
    standard_error: np.ndarray | None
    """(variants,) of the bound's draws."""


def score_variants(
    score_fn: ScoreFn,
    target: np.ndarray,
    assay: Assay,
    work: Work,
    *,
    strategy: str,
    longest: int,
    draws: int,
    seed: int,
) -> Scores:
    """Score the variants of one protein, on all ranks; the same on each. What equals the wild type has 0.

    Args:
        target: (length,) ids of the wild type.
        strategy: one of `strategies_of` the graph:

            - masked_marginals: sum over the changed sites of log p(variant) - log p(wild type), all of them masked at
              once (Meier et al. 2021, "Language models enable zero-shot prediction of the effects of mutations on
              protein function", doi 10.1101/2021.07.09.450648);
            - site_marginals: the same, each site masked by itself beside the wild type's residues at the others;
            - wildtype_marginals: the same from one look at the wild type, nothing masked (the same paper);
            - ratio: sum over the changed sites of the log-scores of the wild type at the schedule's smallest noise,
              log p(y) / p(x) itself for a single substitution (arXiv 2310.16834, sec. 3.1);
            - bound: the bound on -log p of the wild type less that of the variant, with the same noise for both.
              Where the variant is by d residues longer (or shorter, d < 0), plus d times the wild type's bound per
              residue: the bound is of log p given the length, and without that term each residue more would cost some
              3 nats, whatever it is. The score is then the variant's length times the difference in nats per residue.
        longest: residues that the model can see.
        draws, seed: of the bound; an even number, at least 4.

    Raises:
        ValueError: an indel that no window holds, a number of draws that does not do, scores that are not finite.
    """
    pieces = pieces_of(assay, len(target), longest, strategy)
    owner, n = np.array([piece.variant for piece in pieces], dtype=np.int64), len(assay.variants)
    if strategy == "bound":
        found_kp = bound_differences(score_fn, target, pieces, work, draws=draws, seed=seed)
        scores = over_draws(np.stack([np.bincount(owner, row, n) for row in found_kp]))
    else:
        scores = Scores(np.bincount(owner, marginals(score_fn, target, pieces, work, strategy), n), None)
    wrong = np.flatnonzero(~np.isfinite(scores.nats))
    if len(wrong):
        raise ValueError(f"{assay.where[wrong[0]]}: the score is not finite")
    return scores


def score_each(
    score_fn: ScoreFn,
    target: np.ndarray,
    assay: Assay,
    work: Work,
    *,
    strategies: Sequence[str],
    **settings: int,
) -> Scores:
    """Score each variant by its own strategy; the standard error of those that have none is NaN, None if no one has.

    All estimate log p(variant) - log p(wild type) in nats, so that they may stand in one column.

    Args:
        strategies: of each variant.
        settings: longest, draws and seed of `score_variants`, which has the other arguments and errors too.
    """
    n = len(assay.variants)
    nats, errors = np.zeros(n), np.full(n, np.nan)
    for strategy, rows in rows_by_strategy(strategies).items():
        some = assay.only(rows)
        scores = score_variants(score_fn, target, some, work, strategy=strategy, **settings)
        nats[rows] = scores.nats
        if scores.standard_error is not None:
            errors[rows] = scores.standard_error
    return Scores(nats, None if np.isnan(errors).all() else errors)


def over_draws(nats_kn: np.ndarray) -> Scores:
    """Means over draws (draws, variants), with standard errors from the pairs of mirrored draws, 2 i and 2 i + 1.

    Pairs lie in different strata, which the error does not credit: it errs on the large side.
    """
    pair_kn = (nats_kn[0::2] + nats_kn[1::2]) / 2
    return Scores(pair_kn.mean(0), pair_kn.std(0, ddof=1) / np.sqrt(len(pair_kn)))


Context = tuple[int, int, tuple[int, ...]]
"""A window of the wild type, and the sites that are masked in it."""


@torch.no_grad()
def marginals(score_fn: ScoreFn, target: np.ndarray, pieces: Sequence[Piece], work: Work, strategy: str) -> np.ndarray:
    """(pieces,) float64; the network is asked once for each context that they have."""
    contexts: dict[Context, list[int]] = {}
    for i, piece in enumerate(pieces):
        masked = () if strategy in UNMASKED else tuple(site for site, _ in piece.change.substitutions)
        contexts.setdefault((piece.start, piece.stop, masked), []).append(i)
    n_states, noise, device = score_fn.graph.n_states, score_fn.noise, score_fn.device
    contexts_in_order = list(contexts)
    least = float(noise(torch.tensor(noise.t_min, dtype=torch.float64))[0])

    def score(indices: range, tick: Tick) -> dict[int, float]:
        keys = contexts_in_order[indices.start : indices.stop]
        tokens, shares, found = [], [], {}
        for start, stop, masked in keys:
            ids = torch.from_numpy(windowed(target, start, stop))
            ids[torch.tensor(masked, dtype=torch.int64) + (start == 0) - start] = n_states
            tokens.append(ids)
            shares.append(len(masked) / max(1, int((target[start:stop] < n_states).sum())))
        batch = PackedBatch.pack(tokens).to(device)
        sigma = masked_sigma(noise, torch.tensor(shares, dtype=torch.float64)).clamp(min=least).to(device)
        values = score_fn.logits(batch, sigma) if strategy == "wildtype_marginals" else score_fn(batch, sigma)
        for key, values_TV in zip(keys, batch.unpack(values.cpu().double()), strict=True):
            table = values_TV[1 if key[0] == 0 else 0 :].numpy()  # without <bos>
            for i in contexts[key]:
                sites, residues = np.array(pieces[i].change.substitutions).T
                rows = sites - key[0]
                found[i] = float((table[rows, residues] - table[rows, target[sites]]).sum())
        tick()
        return found

    found = work.share([stop - start for start, stop, _ in contexts_in_order], score)
    return np.array([found[i] for i in range(len(pieces))])
