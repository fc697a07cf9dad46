"""Where the draws of a mean lie, and the standard error that follows from pairs of them."""

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

Place = tuple[float, float, Tensor | None]  # the ends of a stratum, and where in it each sequence's draw lies, if given


def strata(draws: int, spread: Callable[[np.ndarray], np.ndarray] = np.square) -> list[tuple[float, float, float]]:
    """Where each draw lies in [0, 1), low to high, and its weight in the mean.

    Two draws lie in each of draws // 2 strata; the last of an odd number lies anywhere. A draw of a share u of the
    residues has a standard deviation of about 1 / sqrt(u), which strata that end at the squares of evenly spaced
    numbers share out evenly (Neyman's allocation; Cochran, Sampling Techniques, 1977, sec. 5.5).

    Args:
        spread: evenly spaced numbers on [0, 1] to the ends of strata.
    """
    pairs = draws // 2
    ends = spread(np.linspace(0, 1, pairs + 1)).tolist() if pairs else []
    inside = [(low, high, (high - low) * pairs / draws) for low, high in pairwise(ends) for _ in range(2)]
    return inside + [(0.0, 1.0, 1 / draws)] * (draws % 2)


def spread_of(graph: Graph, noise: Noise) -> Callable[[np.ndarray], np.ndarray]:
    """The same for times: the share of residues that have moved by then takes the place of u.

    A geometric schedule gives every magnitude of noise its time already, and gets even strata.
    """
    if isinstance(noise, GeometricNoise):
        return lambda even: even
    place = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = noise(noise.t_min + (1 - noise.t_min) * place)[0]
    root = (-torch.expm1(graph.lambda_2 * sigma)).sqrt()
    root = (root - root[0]) / (root[-1] - root[0])
    return lambda even: np.interp(even, root.numpy(), place.numpy())


def places_between(
    low: float, high: float, inside: Tensor | None, n: int, generator: Generators
) -> Float64[Tensor, " {n}"]:
    """(n,) places from low to high: those given on [0, 1), or one in each of n equal parts, in random order."""
    if inside is None:
        assert isinstance(generator, torch.Generator)
        inside = (torch.randperm(n, generator=generator, device=generator.device) + uniform_draws(n, generator)) / n
    return low + (high - low) * inside


def uniform_per_token(batch: PackedBatch, generator: Generators) -> Float64[Tensor, " total"]:
    """Draws on [0, 1) for each token, on the device of the batch or on the CPU where that has no float64."""
    home = float64_device(batch.tokens.device)
    if isinstance(generator, torch.Generator):
        return uniform_draws(len(batch.tokens), generator).to(home)
    return torch.cat([uniform_draws(n, one) for n, one in zip(batch.lengths, generator, strict=True)]).to(home)


def error_of_pairs(weighted_kn: Float64[Tensor, "draws n"]) -> Float64[Tensor, " n"]:
    """Standard errors of the sums of the draws, two of each stratum, that `strata` weighed."""
    draws = len(weighted_kn)
    if draws == 1:
        return torch.full_like(weighted_kn[0], torch.nan)
    even = draws - draws % 2
    first_sn, second_sn = weighted_kn[0:even:2], weighted_kn[1:even:2]
    return (first_sn - second_sn).square().sum(0).sqrt() * draws / even
