"""The sampler with an exact number of masked residues."""

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.numerics import sum_by_sequence, uniform_draws
from protlig_dd.diffusion.samplers.base import Analytic, Level
from protlig_dd.diffusion.score import Steer


class Ancestral(Analytic):
    """Leaves exactly round(L (1 - e^-sigma)) residues masked after each step, where L residues are masked at the start.

    With `Analytic` the number of masked residues is random, and L (1 - e^-sigma) is only its average. The scores of
    the 20 amino acids are normalised before a residue is drawn. The graph must have a mask.
    """

    needs_masks = True
    masked_n: Float64[Tensor, " n"] | None = None
    """Number of masked residues of each sequence at the start, counted in the first step."""

    def init(self, sigma: float) -> Int64[Tensor, " R"]:
        """Return masks for all residues."""
        return torch.full((sum(self.draws.lengths),), self.graph.mask, device=self.draws.device)

    def step(
        self, xt: Int64[Tensor, " total"], logits: Float64[Tensor, "total V"], level: Level
    ) -> Int64[Tensor, " total"]:
        """Draw an amino acid for every masked residue, but reveal only as many as `level.sigma_next` requires."""
        if self.masked_n is None:
            self.masked_n = sum_by_sequence(xt == self.graph.mask, self.batch)
        drawn = super().step(xt, logits, level)
        masked_next_n = (self.masked_n * -math.expm1(-level.sigma_next)).round()
        masked_now_n = sum_by_sequence(xt == self.graph.mask, self.batch)
        u_T = torch.zeros_like(self.free_T, dtype=torch.float64)
        u_T = u_T.masked_scatter(self.free_T, self.draws(uniform_draws))
        revealed_T = self.batch.random_subset(xt == self.graph.mask, masked_now_n - masked_next_n, u_T)
        return torch.where(revealed_T, drawn, xt)

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """Return the probabilities of `Analytic` for a step that removes all the noise."""
        return super().reverse_probs(logits, xt, level._replace(sigma_next=0.0), steer)
