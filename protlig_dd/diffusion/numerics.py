"""Numbers that must be right to the last digit: what the graphs, the bound and the samplers share.

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
"""One for all sequences of a pack; or one for each, and what a sequence draws does not depend on the others."""


def log_expm1(sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(e^sigma - 1), exact for small sigma and free of overflow for large."""
    return sigma + torch.log(-torch.expm1(-sigma))


def pick(values_TV: Float[Tensor, "T V"], index: Tokens) -> Float[Tensor, " T"]:
    """values[t, index[t]]; 0 where the index is a context id."""
    inside = index < values_TV.shape[-1]
    picked = values_TV.gather(-1, torch.where(inside, index, 0)[:, None])[:, 0]
    return torch.where(inside, picked, 0.0)


def one_hot(tokens: Tokens, n: int) -> Float[Tensor, "T {n}"]:
    """(T, n) float32 indicator; rows of ids outside 0..n-1 are all zero."""
    return (tokens[:, None] == torch.arange(n, device=tokens.device)).float()


def to_float64(x: Shaped[Tensor, "*n"], generator: torch.Generator | None = None) -> Float64[Tensor, "*n"]:
    """float64, on the generator's device or on x's own; on the CPU where that device has no float64."""
    return x.to(float64_device(x.device if generator is None else generator.device)).double()


def uniform_draws(n: int, generator: torch.Generator) -> Float64[Tensor, " {n}"]:
    """(n,) uniform draws on [0, 1) in float64, so that rare events keep their probability (arXiv 2409.02908)."""
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)


def categorical(probs_TS: Float64[Tensor, "T S"], u: Float64[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Inverse-CDF draw: the first state whose cumulative probability exceeds u. A state of probability 0 never comes.

    Args:
        probs_TS: non-negative, at least one positive in each row; normalised here.
        u: uniform on [0, 1), float64.
    """
    cdf = probs_TS.cumsum(-1)
    cdf = cdf / cdf[:, -1:]  # the last positive state ends at exactly 1, which no u reaches
    return (cdf <= u[:, None]).sum(-1)


def clamp_negative(probs_TS: Float64[Tensor, "T S"]) -> tuple[Float64[Tensor, "T S"], Bool[Tensor, " T"]]:
    """Negative probabilities set to 0 and each row renormalised; also which rows had one."""
    clamped = probs_TS.clamp(min=0.0)
    return clamped / clamped.sum(-1, keepdim=True), (probs_TS < 0).any(-1)


def sum_by_sequence(values: Shaped[Tensor, " total"], batch: PackedBatch) -> Float64[Tensor, " n"]:
    """Per-token values summed within each sequence, in float64."""
    values = to_float64(values)
    out = torch.zeros(len(batch.lengths), dtype=torch.float64, device=values.device)
    return out.index_add_(0, batch.segment_ids.to(values.device), values)
