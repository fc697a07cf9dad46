"""Noise schedules, which map t in [t_min, 1] to the total noise sigma(t) and its derivative dsigma = d sigma / d t.

sigma and dsigma are exact formulas, evaluated in the precision of t. `t_min` belongs to the schedule, so that training,
evaluation and sampling use the same range.

The log-linear and the cosine schedule prescribe exp(-rate sigma), which falls from 1 at t = 0 to eps at t = 1. `rate`
should be |lambda_2|, the decay rate of the graph's slowest mode (see graphs/base.py). Then exp(-rate sigma) is the
remaining fraction of this mode, and dsigma is below pi / 2 / (rate eps) at every t. With rate = 1, a graph with a small
|lambda_2| would need a very small eps, and much of the noise would be added between the largest float32 number below 1
and t = 1.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class LogLinearNoise:
    """sigma(t) = -log(1 - (1 - eps) t) / rate, so 1 - exp(-rate sigma) = (1 - eps) t (SEDD, arXiv 2310.16834, C.1).

    Args:
        eps: exp(-rate sigma) at t = 1.
        t_min: smallest time.
        rate: decay rate per unit of sigma.
    """

    def __init__(self, eps: float = 1e-3, t_min: float = 1e-3, rate: float = 1.0) -> None:
        check_eps(eps)
        check_t_min(t_min)
        check_rate(rate)
        self.eps, self.t_min, self.rate = eps, t_min, rate

    def __call__(self, t: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        kept = (1 - t) + self.eps * t  # = exp(-rate sigma); 1 - (1 - eps) t would lose digits near t = 1
        # log1p is accurate for small t, where `kept` has lost digits; log(kept) is accurate near t = 1
        sigma = torch.where(t < 0.5, -torch.log1p(-(1 - self.eps) * t), -torch.log(kept))
        return sigma / self.rate, (1 - self.eps) / kept / self.rate


class CosineNoise:
    """1 - exp(-rate sigma(t)) = (1 - eps) (1 - cos(pi t / 2)).

    The noise grows slowly near t = 0, where a noised residue has the largest weight in the loss. exp(-rate sigma), the
    remaining fraction of the data, falls as a cosine. (MaskGIT's schedule, arXiv 2202.04200, is the mirror image: its
    masked fraction rises as a sine.)

    For the absorbing graph the loss weight of a masked residue is m' / m with m = 1 - exp(-sigma) and m' = d m / d t. A
    residue is masked with probability m, so the second moment of this weight is the integral of m (m' / m)^2 over t. It
    is 4.04 for eps -> 0. The minimum over all schedules is 4, reached by m = t^2 (Cauchy-Schwarz applied to the
    derivative of sqrt(m)). For the log-linear schedule the second moment is log(1 / t_min) = 6.9.

    Args:
        eps: exp(-rate sigma) at t = 1.
        t_min: smallest time.
        rate: decay rate per unit of sigma.
    """

    def __init__(self, eps: float = 1e-3, t_min: float = 1e-3, rate: float = 1.0) -> None:
        check_eps(eps)
        check_t_min(t_min)
        check_rate(rate)
        self.eps, self.t_min, self.rate = eps, t_min, rate

    def __call__(self, t: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        half_pi = math.pi / 2
        moved = 2 * (1 - self.eps) * torch.sin(half_pi * t / 2) ** 2  # = 1 - kept, but keeps its digits near t = 0
        kept = self.eps + (1 - self.eps) * torch.sin(half_pi * (1 - t))  # keeps its digits near t = 1
        sigma = torch.where(t < 0.5, -torch.log1p(-moved), -torch.log(kept))
        return sigma / self.rate, (1 - self.eps) * half_pi * torch.sin(half_pi * t) / kept / self.rate


class GeometricNoise:
    """sigma(t) = sigma_min^(1-t) sigma_max^t (SEDD, arXiv 2310.16834, C.1).

    Args:
        sigma_min, sigma_max: total noise at t = 0 and at t = 1.
        t_min: smallest time.
    """

    def __init__(self, sigma_min: float = 1e-4, sigma_max: float = 20.0, t_min: float = 1e-3) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"noise needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        check_t_min(t_min)
        self.sigma_min, self.sigma_max, self.t_min = sigma_min, sigma_max, t_min

    def __call__(self, t: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(t * log_ratio)
        return sigma, sigma * log_ratio


Noise = LogLinearNoise | CosineNoise | GeometricNoise

NOISES: dict[str, Callable[..., Noise]] = {
    "loglinear": LogLinearNoise,
    "cosine": CosineNoise,
    "geometric": GeometricNoise,
}


def stratified_times(
    n: int, t_min: float, generator: torch.Generator, device: torch.device | str, t_max: float = 1.0
) -> Float[Tensor, " {n}"]:
    """Return (n,) times on [t_min, t_max], one time in each of n equal strata, in random order.

    t_i = t_min + (t_max - t_min) (u + i) / n with one uniform u for all i = 0..n-1, shuffled.
    """
    draw_device = generator.device
    u = torch.rand((), generator=generator, device=draw_device)
    strata = torch.randperm(n, generator=generator, device=draw_device)
    return (t_min + (t_max - t_min) * (u + strata) / n).clamp(max=t_max).to(device)


def curriculum_t_max(step: int, steps: int, t_min: float) -> float:
    """Return the upper limit of t in training step `step` (from 0), which grows linearly to 1 at step `steps` - 1."""
    return 1.0 if step + 1 >= steps else t_min + (1 - t_min) * (step + 1) / steps


def check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise ValueError(f"noise.eps must lie in (0, 1), got {eps}")


def check_rate(rate: float) -> None:
    if not rate > 0:
        raise ValueError(f"noise.rate must be above 0, got {rate}")


def check_t_min(t_min: float) -> None:
    if not 0 < t_min < 1:
        raise ValueError(f"noise.t_min must lie in (0, 1), got {t_min}")
