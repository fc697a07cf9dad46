"""Embedding of the noise level."""

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

SINUSOIDS = 256  # width of the sinusoidal embedding of sigma before its MLP, as in DiT


class SigmaEmbedding(nn.Module):
    """Sinusoidal embedding of sigma, followed by a two-layer MLP: (n,) -> (n, cond_dim).

    The sinusoids are cos(sigma f_k) and sin(sigma f_k) with f_k = 10000^(-k / 128), k = 0..127.
    """

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim), nn.SiLU())

    def forward(self, sigma: Float32[Tensor, " n"]) -> Float[Tensor, "n cond_dim"]:
        half = SINUSOIDS // 2
        frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=sigma.device))
        angle = torch.outer(sigma, frequency)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
