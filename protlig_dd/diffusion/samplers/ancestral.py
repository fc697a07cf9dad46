"""The sampler with an exact number of masked residues."""

import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.numerics import sum_by_sequence, uniform_draws
from protlig_dd.diffusion.samplers.base import Analytic, Level
from protlig_dd.diffusion.score import Steer


class Ancestral(Analytic):
    """Keeps the number of masked residues of each sequence exactly on the noise schedule. The graph must have a mask.

    If L residues of a sequence are masked at the start, exactly round(L (1 - e^-sigma)) are masked after a step
    to total noise sigma (`level.sigma_next`). With `Analytic` this number is random, with mean L (1 - e^-sigma).

    The amino acid of a residue is drawn from the scores of the 20 amino acids, normalised to probabilities.
    """

    needs_masks = True
    masked_n: Float64[Tensor, " n"] | None = None
    """Number of masked residues of each sequence at the start, counted in the first step."""

    def init(self, sigma: float) -> Int64[Tensor, " R"]:
        """Return the residues (R,) at the start: the token id of the mask for each residue."""
        return torch.full((sum(self.draws.lengths),), self.graph.mask, device=self.draws.device)

    def step(
        self, xt: Int64[Tensor, " total"], logits: Float64[Tensor, "total V"], level: Level
    ) -> Int64[Tensor, " total"]:
        """Draw an amino acid for every masked residue, but reveal only a random subset of these residues.

        The size of the subset is such that the number of residues that stay masked matches `level.sigma_next`.
        """
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
        """Return the probabilities (T, S) that `Analytic` computes for a step from `level.sigma` to total noise 0."""
        return super().reverse_probs(logits, xt, level._replace(sigma_next=0.0), steer)
