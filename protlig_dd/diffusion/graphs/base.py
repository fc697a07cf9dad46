"""Forward processes on the 20 amino acids: corruption, score entropy, prior and reverse steps.

All operations are elementwise over tokens and independent of how sequences are packed. Rates have the row convention:
Q[i, j] is the rate i -> j, rows sum to 0, and P(sigma) = exp(sigma Q). The score s_y of state y estimates
p_t(y) / p_t(x_t). Ids >= n_states, except the mask, are context: they never change and are not in the loss.

Shape suffixes: T tokens, V the n_states amino acids, S the states that a reverse step can reach (the V amino acids, and
the mask for the absorbing graph).

The slowest mode of a graph decays as exp(sigma lambda_2). `sigma_max` is the total noise at which
exp(sigma_max lambda_2) = 1e-3, where the process counts as mixed.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.numerics import Sigma, Tokens, clamp_negative, to_float64

MIXED = 1e-3  # remaining fraction of the slowest mode at which the process counts as mixed


class Graph(ABC):
    """Interface of a forward process. To add a process, write a subclass and add its name to registry.py.

    `n_states` is V and `n_reverse_states` is S. `lambda_2` is the second largest eigenvalue of Q (the largest is 0).
    """

    name: ClassVar[str]
    """The graph's name in the registry."""
    masks: ClassVar[bool] = False
    """Whether residues decay to a mask, whose id is `mask`. If they do, every unmasked residue is as in x0."""
    n_states: int
    n_reverse_states: int
    lambda_2: float
    sigma_max: float

    @property
    def mask(self) -> int:
        """The id of the mask. Only graphs with `masks` assign it to residues."""
        return self.n_states

    def time_free_with(self, parametrisation: str) -> bool:
        """Whether the optimal network with this parametrisation is the same at every noise level."""
        return self.masks and parametrisation == "x0"

    @abstractmethod
    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t from P(sigma)[x0, .]. Context ids are unchanged."""

    @abstractmethod
    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = torch.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens from the prior of a noise schedule whose largest total noise is `sigma`."""

    @abstractmethod
    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """Return KL( P(sigma)[x0, .] || prior ) in nats per token; 0 for context ids."""

    @abstractmethod
    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Convert logits of the parametrisation `log_score` to log-scores, 0 at x_t."""

    @abstractmethod
    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Convert logits of the parametrisation `x0` to log-scores, 0 at x_t.

        q = softmax(logits) is the distribution of x0 given the other tokens. With x = x_t and P = P(sigma), the scores
        are s_y = (q P)_y / (q P)_x.
        """

    @abstractmethod
    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """Return the distribution q of x0 given the other tokens, as implied by the scores."""

    @abstractmethod
    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Return the denoising score entropy per token in nats (arXiv 2310.16834, eq. 11), without dsigma."""

    @abstractmethod
    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, sigma_next: Sigma
    ) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the exact reverse step from total noise `sigma` to `sigma_next`.

        q = softmax(log_q) is the distribution of x0.
        """

    @abstractmethod
    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Euler step: onehot(x_t) + step * reverse rate, with step = dt * dsigma."""

    @abstractmethod
    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Tweedie step, which removes total noise `delta`.

        p(z) is proportional to [s^T exp(-delta Q)]_z P(delta)[z, x_t].
        """

    @abstractmethod
    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the last reverse step, which removes all noise `sigma`."""


class ResidueGraph(Graph):
    """Reverse steps of graphs whose only states are the residues, computed from `_propagate` and `_probs_into`."""

    @abstractmethod
    def _propagate(self, row: Float64[Tensor, "T V"], sigma: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """Return row exp(sigma Q), for sigma of either sign."""

    @abstractmethod
    def _probs_into(self, xt: Tokens, delta: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """Return P(delta)[., x_t]."""

    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """Return the distribution q of x0 given the other tokens, as implied by the scores.

        q is the solution of q P = s, normalised after negative entries are set to 0. Solving amplifies errors of the
        scores by up to exp(sigma |lambda|), where lambda is the most negative eigenvalue of Q.
        """
        return clamp_negative(self._propagate(to_float64(log_score).exp(), -to_float64(sigma)))[0]

    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, sigma_next: Sigma
    ) -> Float64[Tensor, "T S"]:
        """Return the unnormalised probabilities after the exact reverse step from total noise `sigma` to `sigma_next`.

        With q = softmax(log_q), the distribution of x0, p(z) is proportional to
        [q P(sigma_next)]_z P(sigma - sigma_next)[z, x_t]. Unlike the analytic step, this has no growing exponentials.
        """
        sigma, sigma_next = to_float64(sigma), to_float64(sigma_next)
        marginal = self._propagate(to_float64(log_q).softmax(-1), sigma_next).clamp(min=0.0)
        return marginal * self._probs_into(xt, sigma - sigma_next)

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Tweedie step, which removes total noise `delta`.

        p(z) is proportional to [s^T exp(-delta Q)]_z P(delta)[z, x_t]. The factor exp(-delta Q) amplifies errors of the
        scores by up to exp(delta |lambda|), where lambda is the most negative eigenvalue of Q. Entries can be negative:
        the caller clamps and counts them.
        """
        delta = to_float64(delta)
        return self._propagate(to_float64(log_score).exp(), -delta) * self._probs_into(xt, delta)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the last reverse step, which is analytic and removes all noise `sigma`."""
        return self.analytic_probs(log_score, xt, sigma)
