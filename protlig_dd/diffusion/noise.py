"""Noise schedules: t in [t_min, 1] -> total noise sigma(t) and its rate dsigma = d sigma / d t.

Both are exact, in the precision of t. `t_min` belongs to the schedule, so that training, evaluation and
sampling use one range.

The first two say how much of the data is left, exp(-rate sigma). With the graph's slowest mode for `rate` (|lambda_2|)
t = 1 leaves eps of that mode, and dsigma stays below pi / 2 / (rate eps). In units of sigma itself a slow graph would
need so small an eps that much of its noise lay beyond the last float32 before t = 1.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class LogLinearNoise:
    """sigma(t) = -log(1 - (1 - eps) t) / rate: 1 - exp(-rate sigma) = (1 - eps) t (SEDD, arXiv 2310.16834, C.1)."""

    def __init__(self, eps: float = 1e-3, t_min: float = 1e-3, rate: float = 1.0) -> None:
        check_eps(eps)
        check_t_min(t_min)
        check_rate(rate)
        self.eps, self.t_min, self.rate = eps, t_min, rate

    def __call__(self, t: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        kept = (1 - t) + self.eps * t  # = exp(-rate sigma), without the cancellation near t = 1
        # log1p is exact for small t, where kept has lost digits; log(kept) is for t near 1
        sigma = torch.where(t < 0.5, -torch.log1p(-(1 - self.eps) * t), -torch.log(kept))
        return sigma / self.rate, (1 - self.eps) / kept / self.rate


class CosineNoise:
    """1 - exp(-rate sigma(t)) = (1 - eps) (1 - cos(pi t / 2)): slow near t = 0, where a moved residue weighs most.

    What is left falls as a cosine. (MaskGIT's schedule, arXiv 2202.04200, is its mirror image: there the masked share
    rises as a sine.) For the absorbing graph the loss weight of a masked residue is m' / m with m = 1 - exp(-sigma);
    its second moment, the integral of m'^2 / m, is 4.04 for eps -> 0, where no schedule is below 4 (m = t^2, by
    Cauchy-Schwarz on sqrt(m)') and the log-linear one has log(1 / t_min) = 6.9.
    """

    def __init__(self, eps: float = 1e-3, t_min: float = 1e-3, rate: float = 1.0) -> None:
        check_eps(eps)
        check_t_min(t_min)
        check_rate(rate)
        self.eps, self.t_min, self.rate = eps, t_min, rate

    def __call__(self, t: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        half_pi = math.pi / 2
        moved = 2 * (1 - self.eps) * torch.sin(half_pi * t / 2) ** 2  # 1 - cos without the cancellation near t = 0
        kept = self.eps + (1 - self.eps) * torch.sin(half_pi * (1 - t))  # and without the one near t = 1
        sigma = torch.where(t < 0.5, -torch.log1p(-moved), -torch.log(kept))
        return sigma / self.rate, (1 - self.eps) * half_pi * torch.sin(half_pi * t) / kept / self.rate


class GeometricNoise:
    """sigma(t) = sigma_min^(1-t) sigma_max^t (SEDD, arXiv 2310.16834, C.1)."""

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
    """(n,) times on [t_min, t_max], one in each of n equal strata, in random order: t_i = (u + i) / n, shuffled."""
    where = generator.device
    u = torch.rand((), generator=generator, device=where)
    strata = torch.randperm(n, generator=generator, device=where)
    return (t_min + (t_max - t_min) * (u + strata) / n).clamp(max=t_max).to(device)


def curriculum_t_max(step: int, steps: int, t_min: float) -> float:
    """The cap on t at a training step (from 0): grows linearly from t_min, and is 1 from step `steps` - 1 on."""
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
