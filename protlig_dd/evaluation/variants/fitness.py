"""Fitness scores of protein variants: log p(variant) - log p(wild type), nats; higher is fitter.

A protein longer than the model's training length (`max_len`) is scored in windows of at most that length around the
changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.exact_count import scheduled_sigma
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.variants.assays import Assay, all_substitutions, assay_of
from protlig_dd.evaluation.variants.bounds import bound_differences
from protlig_dd.evaluation.variants.mutants import MutantScores, Numbering
from protlig_dd.evaluation.variants.strategies import UNMASKED, choose_strategies, rows_by_strategy
from protlig_dd.evaluation.variants.windows import Piece, pieces_of, window_tokens
from protlig_dd.inference.sequences import check_whole, encode_whole
from protlig_dd.inference.sharing import QUIET, Tick, Work


@dataclass(frozen=True)
class Scores:
    nats: np.ndarray
    """(variants,) float64."""
    standard_error: np.ndarray | None
    """(variants,) Monte Carlo standard error of the scores by the strategy `bound`. It is NaN for variants scored by
    other strategies, which need no random draws. None if no variant is scored by `bound`."""


def score_variants(
    score_fn: ScoreFn,
    target: np.ndarray,
    assay: Assay,
    work: Work,
    *,
    strategy: str,
    max_len: int,
    draws: int,
    seed: int,
) -> Scores:
    """Score the variants of one protein. The wild type scores 0.

    The ranks share the work, and every rank returns all scores.

    Args:
        target: (length,) ids of the wild type.
        strategy: one of `strategies_of(graph)`:

            - masked_marginals: sum over the changed sites of log p(variant's residue) - log p(wild type's residue),
              with all changed sites masked at once (Meier et al. 2021, "Language models enable zero-shot prediction of
              the effects of mutations on protein function", doi 10.1101/2021.07.09.450648);
            - site_marginals: the same sum, with one site masked at a time and the wild type's residues elsewhere;
            - wildtype_marginals: the same sum, with the unmasked wild type as input (also Meier et al. 2021);
            - ratio: sum over the changed sites of the substitution's log-score, with the wild type as input, at the
              schedule's smallest noise. For a single substitution this estimates log(p(variant) / p(wild type))
              (arXiv 2310.16834, sec. 3.1);
            - bound: the bound on -log p of the wild type minus the bound on -log p of the variant, with the same noise
              for both. If the variant has d more residues than the wild type (d < 0: fewer), d times the wild type's
              bound per residue is added. Without this term every longer variant would score lower: the bound is for
              p given the length, so it grows by about 3 nats with each extra residue. With the term, the score equals
              the variant's length times (the wild type's bound per residue minus the variant's bound per residue).
        max_len: the longest window that the model can score, in residues.
        draws, seed: number of Monte Carlo draws of the bound, even and at least 4, and their seed.

    Raises:
        ValueError: an indel too long for a window, an invalid number of draws, or a score that is not finite.
    """
    pieces = pieces_of(assay, len(target), max_len, strategy)
    owner, n = np.array([piece.variant for piece in pieces], dtype=np.int64), len(assay.variants)
    if strategy == "bound":
        found_kp = bound_differences(score_fn, target, pieces, work, draws=draws, seed=seed)
        scores = average_draws(np.stack([np.bincount(owner, row, n) for row in found_kp]))
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
    """Score each variant by its own strategy.

    All strategies estimate log p(variant) - log p(wild type) in nats, so their scores can be in one column.

    Args:
        strategies: the strategy of each variant.
        settings: max_len, draws and seed; the other arguments and the errors are those of `score_variants`.
    """
    n = len(assay.variants)
    nats, errors = np.zeros(n), np.full(n, np.nan)
    for strategy, rows in rows_by_strategy(strategies).items():
        scores = score_variants(score_fn, target, assay.subset(rows), work, strategy=strategy, **settings)
        nats[rows] = scores.nats
        if scores.standard_error is not None:
            errors[rows] = scores.standard_error
    return Scores(nats, None if np.isnan(errors).all() else errors)


def score_mutants(
    score_fn: ScoreFn,
    target: str,
    mutations: Sequence[str] | None,
    *,
    strategy: str,
    offset: int,
    **settings: int,
) -> MutantScores:
    """Score mutants of a protein as `protlig_dd.variants` does.

    Args:
        target: the wild type, letters in either case.
        mutations: see `assay_of`; None: every single substitution.
        strategy: see `choose_strategies`.
        offset: number to subtract from the positions in `mutations`: with 100, M101A changes residue 1.
        settings: max_len, draws and seed, as in `score_variants`.

    Raises:
        ValueError: an illegal letter, an invalid mutation, or an error of `choose_strategies` or `score_variants`.
    """
    for name, value in {"offset": offset, **settings}.items():
        check_whole(value, f"{name} is a whole number")
    ids = encode_whole(target, "target")[1:-1]
    assay = all_substitutions(ids) if mutations is None else assay_of(mutations, ids, Numbering(offset))
    strategies, _ = choose_strategies(strategy, score_fn.graph, assay)
    scores = score_each(score_fn, ids, assay, QUIET, strategies=strategies, **settings)
    error = None if scores.standard_error is None else torch.from_numpy(scores.standard_error)
    return MutantScores([row[0] for row in assay.rows], torch.from_numpy(scores.nats), error)


def average_draws(nats_kn: np.ndarray) -> Scores:
    """Return the means over draws, with standard errors from the antithetic pairs of draws 2 i and 2 i + 1.

    The error treats pairs as independent although they are stratified, so it tends to be too large.

    Args:
        nats_kn: (draws, variants).
    """
    pair_kn = (nats_kn[0::2] + nats_kn[1::2]) / 2
    return Scores(pair_kn.mean(0), pair_kn.std(0, ddof=1) / np.sqrt(len(pair_kn)))


Context = tuple[int, int, tuple[int, ...]]
"""Start and stop of a window of the wild type, and the positions in the protein that are masked in this window."""


@torch.no_grad()
def marginals(score_fn: ScoreFn, target: np.ndarray, pieces: Sequence[Piece], work: Work, strategy: str) -> np.ndarray:
    """Return the scores of the pieces, (pieces,) float64, by any strategy except `bound`.

    A piece has the changes of a variant that are scored together in one window. Pieces with the same context, that is
    the same window and masks, share one evaluation of the network.
    """
    contexts: dict[Context, list[int]] = {}
    for i, piece in enumerate(pieces):
        masked = () if strategy in UNMASKED else tuple(site for site, _ in piece.change.substitutions)
        contexts.setdefault((piece.start, piece.stop, masked), []).append(i)
    n_states, noise, device = score_fn.graph.n_states, score_fn.noise, score_fn.device
    contexts_in_order = list(contexts)

    def score(indices: range, tick: Tick) -> dict[int, float]:
        keys = contexts_in_order[indices.start : indices.stop]
        tokens, masked_fractions, found = [], [], {}
        for start, stop, masked in keys:
            ids = torch.from_numpy(window_tokens(target, start, stop))
            ids[torch.tensor(masked, dtype=torch.int64) + (start == 0) - start] = n_states
            tokens.append(ids)
            masked_fractions.append(len(masked) / max(1, int((target[start:stop] < n_states).sum())))
        batch = PackedBatch.pack(tokens).to(device)
        sigma = scheduled_sigma(noise, torch.tensor(masked_fractions, dtype=torch.float64)).to(device)
        values = score_fn.logits(batch, sigma) if strategy == "wildtype_marginals" else score_fn(batch, sigma)
        for key, values_TV in zip(keys, batch.unpack(values.cpu().double()), strict=True):
            table = values_TV[1 if key[0] == 0 else 0 :].numpy()  # drop <bos>
            for i in contexts[key]:
                sites, residues = np.array(pieces[i].change.substitutions).T
                rows = sites - key[0]
                found[i] = float((table[rows, residues] - table[rows, target[sites]]).sum())
        tick()
        return found

    found = work.share([stop - start for start, stop, _ in contexts_in_order], score)
    return np.array([found[i] for i in range(len(pieces))])
