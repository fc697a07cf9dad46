"""Strata of Monte-Carlo draws, and the standard error from the pairs of draws in each stratum."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.noise import GeometricNoise, Noise
from protlig_dd.diffusion.numerics import Generators, uniform_draws
from protlig_dd.system.device import float64_device

Stratum = tuple[float, float, Tensor | None]
"""Lower and upper end on [0, 1], and each sequence's position within the stratum, on [0, 1); None: random positions."""


def strata(draws: int, warp: Callable[[np.ndarray], np.ndarray] = np.square) -> list[tuple[float, float, float]]:
    """Return the stratum of each draw, and the draw's weight in the mean.

    [0, 1] is divided into draws // 2 strata with two draws each. If the number of draws is odd, the last draw may be
    anywhere on [0, 1). The default `warp` is for draws that mask a fraction u of the residues: their standard deviation
    is roughly proportional to 1 / sqrt(u). Strata that end at the squares of evenly spaced numbers have equal integrals
    of this standard deviation over u (Neyman's allocation; Cochran, Sampling Techniques, 1977, sec. 5.5).

    Args:
        warp: maps evenly spaced numbers on [0, 1] to the ends of the strata.

    Returns:
        For each draw the lower and upper end of its stratum, and its weight. The weights sum to 1.
    """
    pairs = draws // 2
    ends = warp(np.linspace(0, 1, pairs + 1)).tolist() if pairs else []
    inside = [(low, high, (high - low) * pairs / draws) for low, high in pairwise(ends) for _ in range(2)]
    return inside + [(0.0, 1.0, 1 / draws)] * (draws % 2)


def time_warp(graph: Graph, noise: Noise) -> Callable[[np.ndarray], np.ndarray]:
    """Return the `warp` of `strata` for times on [t_min, 1], scaled to [0, 1].

    The strata end at times at which the square root of u is evenly spaced, where u = 1 - exp(lambda_2 sigma) is roughly
    the fraction of residues that the noise has changed by time t (for lambda_2 see graphs/base.py). A geometric
    schedule already gives every order of magnitude of the noise the same range of times, so the strata of this schedule
    have equal widths.
    """
    if isinstance(noise, GeometricNoise):
        return lambda even: even
    time = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = noise(noise.t_min + (1 - noise.t_min) * time)[0]
    root = (-torch.expm1(graph.lambda_2 * sigma)).sqrt()
    root = (root - root[0]) / (root[-1] - root[0])
    return lambda even: np.interp(even, root.numpy(), time.numpy())


def points_in_stratum(
    low: float, high: float, positions: Tensor | None, n: int, generator: Generators
) -> Float64[Tensor, " {n}"]:
    """Return (n,) points of a stratum, at the given positions within it.

    If `positions` is None, each of n equal parts of the stratum contains one random point, in random order.
    """
    if positions is None:
        assert isinstance(generator, torch.Generator)
        positions = (torch.randperm(n, generator=generator, device=generator.device) + uniform_draws(n, generator)) / n
    return low + (high - low) * positions


def uniform_per_token(batch: PackedBatch, generator: Generators) -> Float64[Tensor, " total"]:
    """Return a uniform draw on [0, 1) per token, on the batch's device, or on the CPU if that device has no float64."""
    device = float64_device(batch.tokens.device)
    if isinstance(generator, torch.Generator):
        return uniform_draws(len(batch.tokens), generator).to(device)
    pairs = zip(batch.lengths, generator, strict=True)
    return torch.cat([uniform_draws(length, sequence_generator) for length, sequence_generator in pairs]).to(device)


def error_of_pairs(weighted_kn: Float64[Tensor, "draws n"]) -> Float64[Tensor, " n"]:
    """Return the standard error (n,) of the sum over draws, from the difference of the two draws in each stratum.

    If the number of draws is odd, the last draw is left out. A single draw gives NaN.

    Args:
        weighted_kn: (draws, n), draws in the order of `strata`, each multiplied by its weight.
    """
    draws = len(weighted_kn)
    if draws == 1:
        return torch.full_like(weighted_kn[0], torch.nan)
    even = draws - draws % 2
    first_sn, second_sn = weighted_kn[0:even:2], weighted_kn[1:even:2]
    return (first_sn - second_sn).square().sum(0).sqrt() * draws / even
