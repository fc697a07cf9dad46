"""Upper bounds on -log p(x0), with standard errors.

    -log p(x0) <= integral over t of the weighted loss            (estimated with stratified times)
                + sum_l KL( P(sigma(1))[x0_l, .] || prior )        (closed form)
                - E log p(x0 | x_{t_min})                          (the last, denoising step)

For the absorbing graph the same bound can be written with k masked residues out of L (`exact_count`): k is uniform on
1..L, the masked set uniform, and L/k times the masked cross-entropies has far less variance. It is exact for all t,
so it has no prior or reconstruction term. With a time-conditioned network it is the bound of the decoder that is shown
1 - e^-sigma = k/L.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.exact_count import exact_count_draws
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.numerics import Generators, Sigma, Tokens, clamp_negative, pick, sum_by_sequence, to_float64
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.diffusion.strata import Place, error_of_pairs, places_between, spread_of, strata
from protlig_dd.system.device import float64_device
from protlig_dd.system.random import keyed_generator

ESTIMATORS = ("integral", "exact_count")
FLOOR = 1e-9  # least probability of a residue in the last denoising step


@dataclass(frozen=True)
class NLLBound:
    """Per-sequence bound in nats, float64 on the CPU."""

    nats: Float64[Tensor, " n"]
    standard_error: Float64[Tensor, " n"]
    """Of the Monte-Carlo draws, from the differences of the two in each stratum. An odd number of draws leaves the last
    one out of the error; a single draw has none (NaN)."""
    residues: Int64[Tensor, " n"]
    estimator: str
    draws: int
    t_min: float
    token_nats: Float64[Tensor, " total"]
    """What each token adds to its sequence's bound; 0 for context letters."""
    pooled_nats: Float64[Tensor, " n"]
    """Cross-entropies of the residues that the exact count's draws masked, a draw on average and without the bound's
    L / k; 0 for the integral."""
    pooled: Float64[Tensor, " n"]
    """How many residues those are, a draw on average."""


@dataclass(frozen=True)
class ProteinDraws:
    """What sequences draw whose bounds are not to depend on the pack that they are in."""

    generators: Sequence[torch.Generator]
    """Each sequence's own."""
    places: Float64[Tensor, "draws n"]
    """Where in its stratum each draw of a sequence lies, on [0, 1)."""


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
    """Bound -log p(x0) of each sequence of a pack; lengths and context letters are given, residues are scored.

    Args:
        generator: one for all sequences, which stratifies their places in each stratum as well; or what is drawn for
            each sequence by itself.
        draws: Monte-Carlo draws per sequence, two in each stratum of t (or k), see `strata`.
        estimator: `integral` for every graph; `exact_count` for the absorbing one, of the decoder that normalises the
            scores of a masked token (which those of x0 are); None for the score function's own.
        tokens_at_once: the network sees so many of several draws together; one draw at least.

    Raises:
        ValueError: an unknown estimator, exact_count with another graph, or no draws.
    """
    graph, noise, estimator = score_fn.graph, score_fn.noise, estimator or score_fn.estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"no estimator {estimator!r}; there are {', '.join(ESTIMATORS)}")
    if estimator == "exact_count" and not graph.masks:
        raise ValueError("estimator=exact_count is for the absorbing graph; use integral")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    n, device = len(batch.lengths), batch.tokens.device
    nats_T = torch.zeros(len(batch.tokens), dtype=torch.float64, device=float64_device(device))
    drawn = []
    pooled_nats_n, pooled_n = torch.zeros(2, n, dtype=torch.float64, device=nats_T.device)
    levels = strata(draws) if estimator == "exact_count" else strata(draws, spread_of(graph, noise))
    at_once = max(1, tokens_at_once // len(batch.tokens))
    given_dn: Sequence[Tensor | None] = [None] * draws
    generators: Generators
    if isinstance(generator, torch.Generator):
        generators = generator
    else:
        given_dn, generators = list(generator.places), generator.generators
    for first in range(0, draws, at_once):
        some = levels[first : first + at_once]
        places = [(low, high, given_dn[first + i]) for i, (low, high, _) in enumerate(some)]
        copies = batch if len(some) == 1 else PackedBatch.pack(batch.unpack(batch.tokens) * len(some))
        weight_n = torch.tensor([weight for *_, weight in some], dtype=torch.float64).repeat_interleave(n).to(nats_T)
        if estimator == "exact_count":
            draw_T, masked_T = exact_count_draws(score_fn, batch, copies, places, generators)
            count_n, length_n = (sum_by_sequence(what, copies) for what in (masked_T, copies.tokens < graph.n_states))
            share_n = weight_n * count_n / length_n.clamp(min=1)
            pooled_nats_n += (share_n * sum_by_sequence(draw_T, copies)).view(-1, n).sum(0)
            pooled_n += (weight_n * count_n).view(-1, n).sum(0)
        else:
            draw_T = _integral_draws(score_fn, batch, copies, places, generators)
        draw_T = draw_T * weight_n.index_select(0, copies.segment_ids.to(weight_n.device))
        drawn.append(sum_by_sequence(draw_T, copies).view(-1, n))
        nats_T += draw_T.view(len(some), -1).sum(0)
    if estimator == "integral":
        sigma_T = noise(torch.ones(len(batch.tokens), device=device))[0]
        nats_T += to_float64(graph.prior_kl(batch.tokens, sigma_T))
    return NLLBound(
        nats=sum_by_sequence(nats_T, batch).cpu(),
        standard_error=error_of_pairs(torch.cat(drawn)).cpu(),
        residues=sum_by_sequence(batch.tokens < graph.n_states, batch).long().cpu(),
        estimator=estimator,
        draws=draws,
        t_min=noise.t_min,
        token_nats=nats_T.cpu(),
        pooled_nats=pooled_nats_n.cpu(),
        pooled=pooled_n.cpu(),
    )


def _transition(batch: PackedBatch, graph: Graph, sigma_T: Sigma, generator: Generators) -> Tokens:
    """x_t of a batch, each sequence's from its own generator where there are several."""
    if isinstance(generator, torch.Generator):
        return graph.sample_transition(batch.tokens, sigma_T, generator)
    home = generator[0].device  # once for all: a copy of each would wait for the device
    parts = zip(batch.unpack(batch.tokens.to(home)), batch.unpack(sigma_T.to(home)), generator, strict=True)
    return torch.cat([graph.sample_transition(*part) for part in parts]).to(batch.tokens.device)


def _integral_draws(
    score_fn: ScoreFn,
    batch: PackedBatch,
    copies: PackedBatch,
    places: Sequence[Place],
    generator: Generators,
) -> Float64[Tensor, " total_of_copies"]:
    """A draw of the integral and of the last step for each place, seen together as copies of the batch."""
    graph, noise = score_fn.graph, score_fn.noise
    lowest_n = torch.full((len(batch.lengths),), noise.t_min, device=batch.tokens.device)
    drawn = []
    for place in places:  # drawn in turn, whatever is seen together
        u_n = places_between(*place, len(batch.lengths), generator).float().to(batch.tokens.device)
        t_n = (noise.t_min + (1 - noise.t_min) * u_n).clamp(max=1)
        levels = (noise(times_n)[0].index_select(0, batch.segment_ids) for times_n in (t_n, lowest_n))
        drawn.append((t_n, *(_transition(batch, graph, sigma_T, generator) for sigma_T in levels)))
    t_n, xt, last = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    sigma_n = noise(lowest_n)[0].repeat(len(places))
    return integrand(score_fn, copies, t_n, xt) + reconstruction(score_fn, copies, sigma_n, last)


def integrand(score_fn: ScoreFn, batch: PackedBatch, t: Float[Tensor, " n"], xt: Tokens) -> Float64[Tensor, " total"]:
    """What the integral's draw at times t and noised tokens x_t adds to the bound at each token, nats."""
    noise = score_fn.noise
    sigma, dsigma = noise(t)
    sigma_T = sigma.index_select(0, batch.segment_ids)
    log_score = score_fn(batch.with_tokens(xt), sigma)
    loss_T = to_float64(score_fn.graph.score_entropy(log_score, sigma_T, xt, batch.tokens))
    return (1 - noise.t_min) * to_float64(dsigma.index_select(0, batch.segment_ids)) * loss_T


def reconstruction(
    score_fn: ScoreFn, batch: PackedBatch, sigma: Float[Tensor, " n"], xt: Tokens
) -> Float64[Tensor, " total"]:
    """-log p(x0 | x_t) of each token under the last denoising step, from sigma; nats."""
    graph, sigma_T = score_fn.graph, sigma.index_select(0, batch.segment_ids)
    log_score = score_fn(batch.with_tokens(xt), sigma)
    residue_T = batch.tokens < graph.n_states
    probs, _ = clamp_negative(
        graph.denoise_probs(log_score[residue_T], xt[residue_T], sigma_T[residue_T])[:, : graph.n_states]
    )
    # a decoder too: without the floor, one residue whose probability was clamped at 0 makes the bound infinite
    probs = (probs + FLOOR) / (1 + graph.n_states * FLOOR)
    nats_T = torch.zeros(len(batch.tokens), dtype=torch.float64, device=probs.device)
    nats_T[residue_T.to(probs.device)] = -pick(probs, batch.tokens[residue_T].to(probs.device)).log()
    return nats_T


def protein_draws(keys: UInt64[np.ndarray, " n"], places: Float64[torch.Tensor, "draws n"], seed: int) -> ProteinDraws:
    """What proteins with these keys and places draw: each from a generator of its own, which lives on the CPU."""
    return ProteinDraws([keyed_generator(seed, "evaluation", int(key), torch.device("cpu")) for key in keys], places)
