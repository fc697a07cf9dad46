"""Exact numbers of masked residues."""

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.numerics import sum_by_sequence, uniform_draws
from protlig_dd.diffusion.samplers.base import Analytic, Level
from protlig_dd.diffusion.score import Steer


class Ancestral(Analytic):
    """The number of masked residues follows the noise exactly, L (1 - e^-sigma) to the nearest, instead of on average;
    scores are normalised. For graphs that mask.
    """

    needs_masks = True
    masked_n: Float64[Tensor, " n"] | None = None
    """How many residues of each sequence are masked at the start, after `project`."""

    def init(self, sigma: float) -> Int64[Tensor, " R"]:
        """As of `Analytic`, but always all masked."""
        return torch.full((sum(self.draws.lengths),), self.graph.mask, device=self.draws.device)

    def step(
        self, xt: Int64[Tensor, " total"], logits: Float64[Tensor, "total V"], level: Level
    ) -> Int64[Tensor, " total"]:
        """As of `Analytic`: every masked residue is drawn, and as many are masked again as the noise wants."""
        if self.masked_n is None:
            self.masked_n = sum_by_sequence(xt == self.graph.mask, self.batch)
        drawn = super().step(xt, logits, level)
        wanted_n = (self.masked_n * -math.expm1(-level.left)).round()
        now_n = sum_by_sequence(xt == self.graph.mask, self.batch)
        u_T = torch.zeros_like(self.free_T, dtype=torch.float64)
        u_T = u_T.masked_scatter(self.free_T, self.draws(uniform_draws))
        revealed_T = self.batch.random_subset(xt == self.graph.mask, now_n - wanted_n, u_T)
        return torch.where(revealed_T, drawn, xt)

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """As of `Analytic`, with no noise left."""
        return super().reverse_probs(logits, xt, level._replace(left=0.0), steer)
