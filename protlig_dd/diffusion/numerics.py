"""Numerical functions that keep full precision, shared by the graphs, the bound and the samplers.

Shape suffixes: T tokens, V amino acids, S states.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.system.device import float64_device

Tokens = Int64[Tensor, " T"]
Sigma = Float[Tensor, " T"]
Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for all sequences of a pack, or one per sequence, so that the draws of a sequence do not depend on the
other sequences."""


def log_expm1(sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return log(e^sigma - 1), accurate for small sigma and without overflow for large sigma."""
    return sigma + torch.log(-torch.expm1(-sigma))


def pick(values_TV: Float[Tensor, "T V"], index: Tokens) -> Float[Tensor, " T"]:
    """Return values[t, index[t]], or 0 where index[t] is not below V (the mask and context ids)."""
    inside = index < values_TV.shape[-1]
    picked = values_TV.gather(-1, torch.where(inside, index, 0)[:, None])[:, 0]
    return torch.where(inside, picked, 0.0)


def one_hot(tokens: Tokens, n: int) -> Float[Tensor, "T {n}"]:
    """Return the (T, n) float32 indicator of the tokens. Rows of ids outside 0..n-1 are all zero."""
    return (tokens[:, None] == torch.arange(n, device=tokens.device)).float()


def to_float64(x: Shaped[Tensor, "*n"], generator: torch.Generator | None = None) -> Float64[Tensor, "*n"]:
    """Return x as float64 on the generator's device (default: x's device); on the CPU if that device has no float64."""
    return x.to(float64_device(x.device if generator is None else generator.device)).double()


def uniform_draws(n: int, generator: torch.Generator) -> Float64[Tensor, " {n}"]:
    """Return (n,) uniform draws on [0, 1) in float64, so that rare events keep their probability (arXiv 2409.02908)."""
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)


def categorical(probs_TS: Float64[Tensor, "T S"], u: Float64[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Draw a state per row by inverse CDF: the first state whose cumulative probability exceeds u.

    A state of probability 0 is never drawn.

    Args:
        probs_TS: non-negative, with at least one positive entry per row. Rows are normalised here.
        u: uniform on [0, 1), float64.
    """
    cdf = probs_TS.cumsum(-1)
    cdf = cdf / cdf[:, -1:]  # exactly 1 from the last state of positive probability on, so above every u
    return (cdf <= u[:, None]).sum(-1)


def clamp_negative(probs_TS: Float64[Tensor, "T S"]) -> tuple[Float64[Tensor, "T S"], Bool[Tensor, " T"]]:
    """Set negative probabilities to 0 and renormalise each row. Also return which rows had a negative entry."""
    clamped = probs_TS.clamp(min=0.0)
    return clamped / clamped.sum(-1, keepdim=True), (probs_TS < 0).any(-1)


def sum_by_sequence(values: Shaped[Tensor, " total"], batch: PackedBatch) -> Float64[Tensor, " n"]:
    """Sum per-token values within each sequence, in float64."""
    values = to_float64(values)
    out = torch.zeros(len(batch.lengths), dtype=torch.float64, device=values.device)
    return out.index_add_(0, batch.segment_ids.to(values.device), values)
