"""Upper bounds on -log p(x0), with standard errors.

    -log p(x0) <= integral over t of the weighted loss            (estimated with stratified times)
                + sum_l KL( P(sigma(1))[x0_l, .] || prior )        (closed form)
                - E log p(x0 | x_{t_min})                          (the last, denoising step)

The sum runs over the positions l of the residues. The estimator that computes these three terms is called `integral`.

For the absorbing graph the same bound can be computed from k masked residues out of L (estimator `exact_count`): k is
uniform on 1..L, the masked set is uniform, and L/k times the sum of the masked residues' cross-entropies is averaged.
This estimator has a far lower variance. It covers all t, so the second and the third term above are not needed. A
time-conditioned network receives the sigma that matches the masked fraction, 1 - e^-sigma = k/L. The bound then holds
for a decoder that uses the same sigma.

Context letters (X B Z J U O), <bos> and <eos> are given to the network and are not scored. The same holds for residues
that a pack marks as context (`PackedBatch.context`). L and k count only the residues that are scored, and the bound is
on -log p of these residues given the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.exact_count import exact_count_draws
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.numerics import Generators, Sigma, Tokens, clamp_negative, pick, sum_by_sequence, to_float64
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.diffusion.strata import Stratum, error_of_pairs, points_in_stratum, strata, time_warp
from protlig_dd.system.device import float64_device
from protlig_dd.system.random import keyed_generator

ESTIMATORS = ("integral", "exact_count")
FLOOR = 1e-9  # lowest probability of an amino acid in the last denoising step


@dataclass(frozen=True)
class NLLBound:
    """Upper bounds on -log p(x0) of n sequences in nats, float64 on the CPU."""

    nats: Float64[Tensor, " n"]
    standard_error: Float64[Tensor, " n"]
    """Monte-Carlo standard error of `nats`, from the difference of the two draws in each stratum. If the number of
    draws is odd, the last draw is left out. A single draw gives NaN."""
    residues: Int64[Tensor, " n"]
    """Number of residues, without context letters and context residues."""
    estimator: str
    draws: int
    t_min: float
    token_nats: Float64[Tensor, " total"]
    """Contribution of each token to the bound of its sequence; 0 for context."""
    pooled_nats: Float64[Tensor, " n"]
    """For EvoDiff's perplexity: the sum of the masked residues' cross-entropies, without the factor L / k of the bound,
    averaged over draws; 0 for the estimator `integral`."""
    pooled: Float64[Tensor, " n"]
    """Number of masked residues in a draw, averaged over draws; 0 for the estimator `integral`."""


class BoundsPerResidue(NamedTuple):
    """Upper bounds on the NLL of n proteins, on the CPU."""

    bound: Float64[Tensor, " n"]
    """In nats per scored residue."""
    standard_error: Float64[Tensor, " n"]
    """Monte Carlo standard error of `bound` over the draws; NaN for a single draw."""
    residues: Int64[Tensor, " n"]
    """Number of scored residues: amino acids that are not context."""

    @property
    def perplexity(self) -> Float64[Tensor, " n"]:
        """Return exp(bound)."""
        return self.bound.exp()

    @property
    def perplexity_standard_error(self) -> Float64[Tensor, " n"]:
        """Return perplexity x standard_error, by propagation of the error of `bound`."""
        return self.perplexity * self.standard_error


@dataclass(frozen=True)
class ProteinDraws:
    """Sources of randomness for each sequence, so that its bound does not depend on the other sequences of its pack."""

    generators: Sequence[torch.Generator]
    """One generator per sequence."""
    positions: Float64[Tensor, "draws n"]
    """Position of each draw of each sequence within its stratum, on [0, 1)."""


@torch.no_grad()
def nll_bound(
    score_fn: ScoreFn,
    batch: PackedBatch,
    *,
    generator: torch.Generator | ProteinDraws,
    draws: int = 8,
    estimator: str | None = None,
    tokens_at_once: int = 0,
) -> NLLBound:
    """Return an upper bound on -log p(x0) for each sequence of a pack, given the sequence's length and context.

    Context (letters and residues) is not scored.

    Args:
        generator: one generator for all sequences, or a source of randomness for each sequence. With one generator,
            the draws of different sequences are also distributed evenly within each stratum.
        draws: number of Monte-Carlo draws per sequence, two in each stratum (see `strata`). A stratum is a range of t
            or, for `exact_count`, of the masked fraction k / L.
        estimator: `integral` is valid for every graph. `exact_count` is valid for the absorbing graph only, and bounds
            the NLL of a decoder that normalises the scores of masked tokens (with the parametrisation `x0` these scores
            are normalised already). None: `score_fn.estimator`.
        tokens_at_once: maximum number of tokens in one evaluation of the network. As many draws as fit are evaluated
            together, but at least one draw. With 0, the default, each draw is evaluated on its own.

    Raises:
        ValueError: an unknown estimator, exact_count with another graph, or draws below 1.
    """
    graph, noise, estimator = score_fn.graph, score_fn.noise, estimator or score_fn.estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose from {', '.join(ESTIMATORS)}")
    if estimator == "exact_count" and not graph.masks:
        raise ValueError("estimator=exact_count is for the absorbing graph; use integral")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    n, device = len(batch.lengths), batch.tokens.device
    nats_T = torch.zeros(len(batch.tokens), dtype=torch.float64, device=float64_device(device))
    drawn = []
    pooled_nats_n, pooled_n = torch.zeros(2, n, dtype=torch.float64, device=nats_T.device)
    levels = strata(draws) if estimator == "exact_count" else strata(draws, time_warp(graph, noise))
    at_once = max(1, tokens_at_once // len(batch.tokens))
    positions_dn: Sequence[Tensor | None] = [None] * draws
    generators: Generators
    if isinstance(generator, torch.Generator):
        generators = generator
    else:
        positions_dn, generators = list(generator.positions), generator.generators
    for first in range(0, draws, at_once):
        chunk = levels[first : first + at_once]
        in_strata = [(low, high, positions_dn[first + i]) for i, (low, high, _) in enumerate(chunk)]
        copies = batch if len(chunk) == 1 else batch.repeated(len(chunk))
        weight_n = torch.tensor([weight for *_, weight in chunk], dtype=torch.float64).repeat_interleave(n).to(nats_T)
        if estimator == "exact_count":
            draw_T, masked_T = exact_count_draws(score_fn, batch, copies, in_strata, generators)
            residue_T = copies.targets < graph.n_states
            count_n, length_n = sum_by_sequence(masked_T, copies), sum_by_sequence(residue_T, copies)
            factor_n = weight_n * count_n / length_n.clamp(min=1)  # k / L undoes the bound's L / k
            pooled_nats_n += (factor_n * sum_by_sequence(draw_T, copies)).view(-1, n).sum(0)
            pooled_n += (weight_n * count_n).view(-1, n).sum(0)
        else:
            draw_T = _integral_draws(score_fn, batch, copies, in_strata, generators)
        draw_T = draw_T * weight_n.index_select(0, copies.segment_ids.to(weight_n.device))
        drawn.append(sum_by_sequence(draw_T, copies).view(-1, n))
        nats_T += draw_T.view(len(chunk), -1).sum(0)
    if estimator == "integral":
        sigma_T = noise(torch.ones(len(batch.tokens), device=device))[0]
        nats_T += to_float64(graph.prior_kl(batch.targets, sigma_T))
    return NLLBound(
        nats=sum_by_sequence(nats_T, batch).cpu(),
        standard_error=error_of_pairs(torch.cat(drawn)).cpu(),
        residues=sum_by_sequence(batch.targets < graph.n_states, batch).long().cpu(),
        estimator=estimator,
        draws=draws,
        t_min=noise.t_min,
        token_nats=nats_T.cpu(),
        pooled_nats=pooled_nats_n.cpu(),
        pooled=pooled_n.cpu(),
    )


def _transition(batch: PackedBatch, graph: Graph, sigma_T: Sigma, generator: Generators) -> Tokens:
    """Draw x_t of a batch at total noise sigma_T. If there are several generators, each sequence uses its own."""
    if isinstance(generator, torch.Generator):
        return graph.sample_transition(batch.targets, sigma_T, generator)
    device = generator[0].device
    # copy the whole pack at once: separate copies of the sequences would each wait for the device
    parts = zip(batch.unpack(batch.targets.to(device)), batch.unpack(sigma_T.to(device)), generator, strict=True)
    return torch.cat([graph.sample_transition(*part) for part in parts]).to(batch.tokens.device)


def _integral_draws(
    score_fn: ScoreFn,
    batch: PackedBatch,
    copies: PackedBatch,
    in_strata: Sequence[Stratum],
    generator: Generators,
) -> Float64[Tensor, " total_of_copies"]:
    """Take one draw per sequence in each stratum, and return what the draws contribute to the bound.

    The contribution of a draw is the sum of two terms: the integral and the last denoising step. The prior term is not
    included. The network evaluates all draws together.

    Args:
        copies: the sequences of `batch`, repeated once per stratum, as one pack.

    Returns:
        Each token's contribution to the bound in each draw, in nats.
    """
    graph, noise = score_fn.graph, score_fn.noise
    lowest_n = torch.full((len(batch.lengths),), noise.t_min, device=batch.tokens.device)
    drawn = []
    for stratum in in_strata:  # one after another, so that draws do not depend on how many are evaluated together
        u_n = points_in_stratum(*stratum, len(batch.lengths), generator).float().to(batch.tokens.device)
        t_n = (noise.t_min + (1 - noise.t_min) * u_n).clamp(max=1)
        levels = (noise(times_n)[0].index_select(0, batch.segment_ids) for times_n in (t_n, lowest_n))
        drawn.append((t_n, *(_transition(batch, graph, sigma_T, generator) for sigma_T in levels)))
    t_n, xt, last = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    sigma_n = noise(lowest_n)[0].repeat(len(in_strata))
    return integrand(score_fn, copies, t_n, xt) + reconstruction(score_fn, copies, sigma_n, last)


def integrand(score_fn: ScoreFn, batch: PackedBatch, t: Float[Tensor, " n"], xt: Tokens) -> Float64[Tensor, " total"]:
    """Return each token's contribution to the integral, in nats, for a draw at times t (n,) with noised tokens x_t."""
    noise = score_fn.noise
    sigma, dsigma = noise(t)
    sigma_T = sigma.index_select(0, batch.segment_ids)
    log_score = score_fn(batch.with_tokens(xt), sigma)
    loss_T = to_float64(score_fn.graph.score_entropy(log_score, sigma_T, xt, batch.targets))
    return (1 - noise.t_min) * to_float64(dsigma.index_select(0, batch.segment_ids)) * loss_T


def reconstruction(
    score_fn: ScoreFn, batch: PackedBatch, sigma: Float[Tensor, " n"], xt: Tokens
) -> Float64[Tensor, " total"]:
    """Return -log p(x0 | x_t) of each token, in nats, for the last denoising step from total noise sigma (n,)."""
    graph, sigma_T = score_fn.graph, sigma.index_select(0, batch.segment_ids)
    log_score = score_fn(batch.with_tokens(xt), sigma)
    residue_T = batch.targets < graph.n_states
    probs, _ = clamp_negative(
        graph.denoise_probs(log_score[residue_T], xt[residue_T], sigma_T[residue_T])[:, : graph.n_states]
    )
    # without the floor, one residue whose probability was clamped to 0 would make the bound infinite; with the
    # floor the step is still a valid decoder
    probs = (probs + FLOOR) / (1 + graph.n_states * FLOOR)
    nats_T = torch.zeros(len(batch.tokens), dtype=torch.float64, device=probs.device)
    nats_T[residue_T.to(probs.device)] = -pick(probs, batch.tokens[residue_T].to(probs.device)).log()
    return nats_T


def protein_draws(
    keys: UInt64[np.ndarray, " n"], positions: Float64[torch.Tensor, "draws n"], seed: int
) -> ProteinDraws:
    """Return the sources of randomness of proteins. Each protein has its own generator, on the CPU.

    Args:
        keys: the `protein_keys` of the proteins; with the seed, a key determines the protein's generator.
        positions: position of each draw of each protein within its stratum, on [0, 1).
    """
    return ProteinDraws([keyed_generator(seed, "evaluation", int(key), torch.device("cpu")) for key in keys], positions)
