"""The exact-count bound of the absorbing graph (see likelihood.py), and cross-entropies of masked residues."""

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
from protlig_dd.diffusion.strata import Stratum, points_in_stratum, uniform_per_token
from protlig_dd.system.device import float64_device


def exact_count_draws(
    score_fn: ScoreFn,
    batch: PackedBatch,
    copies: PackedBatch,
    in_strata: Sequence[Stratum],
    generator: Generators,
) -> tuple[Float64[Tensor, " total_of_copies"], Bool[Tensor, " total_of_copies"]]:
    """Take one draw per sequence in each stratum, and return what the draws contribute to the exact-count bound.

    A draw masks a random set of a sequence's residues. A stratum is a range of the masked fraction (see strata.py). The
    network evaluates all draws together.

    Args:
        copies: the sequences of `batch`, repeated once per stratum, as one pack.

    Returns:
        For each token of each draw, the token's contribution to the bound in nats, and whether the token was masked.
    """
    residue_T = batch.targets < score_fn.graph.n_states
    length_n = sum_by_sequence(residue_T, batch).clamp(min=1)
    drawn = []
    for stratum in in_strata:
        u_n = points_in_stratum(*stratum, len(batch.lengths), generator).to(length_n)
        count_n = ((u_n * length_n).floor() + 1).clamp(max=length_n)  # uniform on 1..L if u is uniform on [0, 1)
        drawn.append(batch.random_subset(residue_T, count_n, uniform_per_token(batch, generator)))
    masked_T = torch.cat(drawn)
    return masked_nats(score_fn, copies, masked_T), masked_T


def masked_nats(score_fn: ScoreFn, batch: PackedBatch, masked: Bool[Tensor, " total"]) -> Float64[Tensor, " total"]:
    """Return each token's contribution to the exact-count bound, in nats, for a draw that masks the tokens in `masked`.

    If k >= 1 of a sequence's L residues are masked, a masked residue contributes L / k times its cross-entropy. Other
    tokens contribute 0.
    """
    nats_T = cross_entropies(score_fn, batch, masked)
    residue_T = batch.targets < score_fn.graph.n_states
    length_n, count_n = (sum_by_sequence(selected_T, batch) for selected_T in (residue_T, masked))
    return nats_T * (length_n / count_n.clamp(min=1)).index_select(0, batch.segment_ids.to(length_n.device))


def cross_entropies(score_fn: ScoreFn, batch: PackedBatch, masked: Bool[Tensor, " total"]) -> Float64[Tensor, " total"]:
    """Return -log p of each masked residue given the unmasked tokens, in nats; 0 for the unmasked tokens."""
    graph = score_fn.graph
    length_n = sum_by_sequence(batch.targets < graph.n_states, batch).clamp(min=1)
    sigma = masked_sigma(score_fn.noise, sum_by_sequence(masked, batch).clamp(min=1) / length_n).to(batch.tokens.device)
    log_score = score_fn(batch.with_tokens(torch.where(masked, graph.mask, batch.tokens)), sigma)
    return to_float64(torch.where(masked, -pick(F.log_softmax(log_score, -1), batch.tokens), 0.0))


def masked_sigma(noise: Noise, fraction: Float64[Tensor, " n"]) -> Float32[Tensor, " n"]:
    """Return the total noise sigma at which the masked fraction 1 - e^-sigma is `fraction`.

    The result is limited to the schedule's sigma at t = 1.
    """
    last_sigma = noise(torch.ones(1))[0].to(fraction.device)
    return torch.minimum(-torch.log1p(-fraction.float()), last_sigma)  # a fraction of 1 would give infinity


def scheduled_sigma(noise: Noise, fraction: Float64[Tensor, " n"]) -> Float32[Tensor, " n"]:
    """Return the sigma of `masked_sigma`, limited to the schedule's sigmas at t_min and at t = 1."""
    return masked_sigma(noise, fraction).clamp(min=float(noise(torch.tensor(noise.t_min, dtype=torch.float64))[0]))


@torch.no_grad()
def masked_cross_entropy(
    score_fn: ScoreFn,
    batch: PackedBatch,
    *,
    fraction: float,
    draws: int,
    generator: Generators,
) -> tuple[Float64[Tensor, " total"], Int64[Tensor, " n"]]:
    """Mask random residues, and return -log p of these residues given the unmasked tokens. This is not a likelihood.

    Masked language models are measured in a similar way (ESM-2, doi 10.1126/science.ade2574, on 15% of the
    residues). There, some of the chosen residues are kept or replaced by another amino acid. Here, all chosen residues
    are masked.

    Args:
        fraction: fraction of each sequence's residues that a draw masks. The number of masked residues is rounded, and
            at least 1.
        draws: number of random sets of masked residues.

    Returns:
        Nats of each token, summed over the draws that masked it, and the number of masked residues of each sequence,
        summed over all draws.
    """
    graph = score_fn.graph
    residue_T = batch.targets < graph.n_states
    count_n = (fraction * sum_by_sequence(residue_T, batch)).round().clamp(min=1)
    sigma = torch.full((len(batch.lengths),), -math.log1p(-fraction), device=batch.tokens.device)
    nats_T = torch.zeros(len(batch.tokens), dtype=torch.float64, device=float64_device(batch.tokens.device))
    masked_n = torch.zeros(len(batch.lengths), dtype=torch.int64)
    for _ in range(draws):
        masked_T = batch.random_subset(residue_T, count_n, uniform_per_token(batch, generator))
        log_score = score_fn(batch.with_tokens(torch.where(masked_T, graph.mask, batch.tokens)), sigma)
        nats_T += to_float64(torch.where(masked_T, -pick(F.log_softmax(log_score, -1), batch.tokens), 0.0))
        masked_n += sum_by_sequence(masked_T, batch).long().cpu()
    return nats_T.cpu(), masked_n
