"""The bound of the absorbing graph by the number of masked residues, and cross-entropies of masked residues."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.numerics import Generators, pick, sum_by_sequence, to_float64
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.diffusion.strata import Place, places_between, uniform_per_token
from protlig_dd.system.device import float64_device


def exact_count_draws(
    score_fn: ScoreFn,
    batch: PackedBatch,
    copies: PackedBatch,
    places: Sequence[Place],
    generator: Generators,
) -> tuple[Float64[Tensor, " total_of_copies"], Bool[Tensor, " total_of_copies"]]:
    """A draw of the exact count for each place, seen together as copies of the batch; and what was masked."""
    residue_T = batch.tokens < score_fn.graph.n_states
    length_n = sum_by_sequence(residue_T, batch).clamp(min=1)
    drawn = []
    for place in places:
        u_n = places_between(*place, len(batch.lengths), generator).to(length_n)
        count_n = ((u_n * length_n).floor() + 1).clamp(max=length_n)  # uniform on 1..L
        drawn.append(batch.random_subset(residue_T, count_n, uniform_per_token(batch, generator)))
    masked_T = torch.cat(drawn)
    return masked_nats(score_fn, copies, masked_T), masked_T


def masked_nats(score_fn: ScoreFn, batch: PackedBatch, masked: Bool[Tensor, " total"]) -> Float64[Tensor, " total"]:
    """What the exact count's draw that masks these residues, k of the L of each sequence (at least one), adds to the
    bound at each token: L / k times the cross-entropies of the masked, nats.
    """
    nats_T = cross_entropies(score_fn, batch, masked)
    residue_T = batch.tokens < score_fn.graph.n_states
    length_n, count_n = (sum_by_sequence(some, batch) for some in (residue_T, masked))
    return nats_T * (length_n / count_n.clamp(min=1)).index_select(0, batch.segment_ids.to(length_n.device))


def cross_entropies(score_fn: ScoreFn, batch: PackedBatch, masked: Bool[Tensor, " total"]) -> Float64[Tensor, " total"]:
    """-log p of each residue that is masked given those that are shown, nats; 0 for the shown."""
    graph = score_fn.graph
    length_n = sum_by_sequence(batch.tokens < graph.n_states, batch).clamp(min=1)
    sigma = masked_sigma(score_fn.noise, sum_by_sequence(masked, batch).clamp(min=1) / length_n).to(batch.tokens.device)
    log_score = score_fn(batch.with_tokens(torch.where(masked, graph.mask, batch.tokens)), sigma)
    return to_float64(torch.where(masked, -pick(F.log_softmax(log_score, -1), batch.tokens), 0.0))


def masked_sigma(noise: Noise, share: Float64[Tensor, " n"]) -> Float32[Tensor, " n"]:
    """The noise level at which this share of the residues is masked, 1 - e^-sigma; the last one at most."""
    last_sigma = noise(torch.ones(1))[0].to(share.device)
    return torch.minimum(-torch.log1p(-share.float()), last_sigma)  # all of them would be infinite


@torch.no_grad()
def masked_cross_entropy(
    score_fn: ScoreFn,
    batch: PackedBatch,
    *,
    share: float,
    draws: int,
    generator: Generators,
) -> tuple[Float64[Tensor, " total"], Int64[Tensor, " n"]]:
    """-log p of residues that were masked, `share` of each sequence at a time, given the others: no likelihood.

    As masked language models are measured (ESM-2, doi 10.1126/science.ade2574, with 15%), but that all of these are
    masked: none is kept or replaced by another amino acid.

    Returns:
        nats of each token, summed over the draws that masked it, and how many tokens of each sequence were masked.
    """
    graph = score_fn.graph
    residue_T = batch.tokens < graph.n_states
    count_n = (share * sum_by_sequence(residue_T, batch)).round().clamp(min=1)
    sigma = torch.full((len(batch.lengths),), -math.log1p(-share), device=batch.tokens.device)
    nats_T = torch.zeros(len(batch.tokens), dtype=torch.float64, device=float64_device(batch.tokens.device))
    masked_n = torch.zeros(len(batch.lengths), dtype=torch.int64)
    for _ in range(draws):
        masked_T = batch.random_subset(residue_T, count_n, uniform_per_token(batch, generator))
        log_score = score_fn(batch.with_tokens(torch.where(masked_T, graph.mask, batch.tokens)), sigma)
        nats_T += to_float64(torch.where(masked_T, -pick(F.log_softmax(log_score, -1), batch.tokens), 0.0))
        masked_n += sum_by_sequence(masked_T, batch).long().cpu()
    return nats_T.cpu(), masked_n
