"""The sampler with Euler steps."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.samplers.base import Analytic, Level
from protlig_dd.diffusion.score import Steer


class Euler(Analytic):
    """Euler steps, which are accurate to first order in the length of the step. The last step is analytic."""

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """Return the probabilities (T, S) after an Euler step or, in the last step, after an analytic step.

        Entries can be negative.
        """
        if not level.sigma_next:
            return super().reverse_probs(logits, xt, level, steer)
        sigma_T, step_T = (torch.full_like(logits[:, 0], value) for value in (level.sigma, level.euler_step))
        return self.graph.euler_probs(self.score_fn.log_score(logits, xt, sigma_T, steer), xt, step_T)
