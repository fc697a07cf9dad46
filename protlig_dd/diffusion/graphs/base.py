"""Interface of the forward processes on the 20 amino acids: corruption, score entropy, prior and reverse steps.

All operations are elementwise over tokens and independent of how sequences are packed. Rates have the row convention:
Q[i, j] is the rate i -> j, and rows sum to 0. P(sigma) = exp(sigma Q) contains the transition probabilities at total
noise sigma. The score s_y of state y estimates p_t(y) / p_t(x_t). Ids >= n_states, except the mask, are context: they
never change and are not in the loss.

The prior is a distribution of tokens that does not depend on x0. It approximates the distribution of x_t at the largest
total noise of the noise schedule.

Shape suffixes: T tokens, V the n_states amino acids, S the states that a reverse step can reach (the V amino acids, and
the mask for the absorbing graph).

The slowest mode of a graph decays as exp(sigma lambda_2), where lambda_2 is the second largest eigenvalue of Q.
`sigma_max` is the total noise at which exp(sigma_max lambda_2) = 1e-3. At this noise the process counts as mixed.
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
    """Whether the process replaces residues by a mask. If so, every unmasked residue of x_t is the same as in x0."""
    n_states: int
    n_reverse_states: int
    lambda_2: float
    sigma_max: float

    @property
    def mask(self) -> int:
        """The token id of the mask. Only graphs whose `masks` is True replace residues by this token."""
        return self.n_states

    def time_free_with(self, parametrisation: str) -> bool:
        """Whether the output of the optimal network with this parametrisation is the same at every noise level."""
        return self.masks and parametrisation == "x0"

    @abstractmethod
    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t from P(sigma)[x0, .]. Context ids are unchanged."""

    @abstractmethod
    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = torch.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens from the prior. `sigma` is the largest total noise of the noise schedule."""

    @abstractmethod
    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """Return KL( P(sigma)[x0, .] || prior ) in nats per token; 0 for context ids."""

    @abstractmethod
    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Convert logits of the parametrisation `log_score` to log-scores log s_y. At y = x_t the log-score is 0."""

    @abstractmethod
    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Convert logits of the parametrisation `x0` to log-scores log s_y. At y = x_t the log-score is 0.

        q = softmax(logits) is the distribution of x0 at each position, given the tokens of x_t at all other positions.
        With x = x_t and P = P(sigma), the scores are s_y = (q P)_y / (q P)_x.
        """

    @abstractmethod
    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """Return q, the distribution of x0 at each position, as implied by the scores.

        q is conditional on the tokens of x_t at all other positions, as in `log_score_from_x0`.
        """

    @abstractmethod
    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Return the denoising score entropy of each token in nats (arXiv 2310.16834, eq. 11).

        The factor d sigma / d t of the loss is not included.
        """

    @abstractmethod
    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, sigma_next: Sigma
    ) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the exact reverse step from total noise `sigma` to `sigma_next`.

        q = softmax(log_q) is the distribution of x0 at each position, as in `log_score_from_x0`.
        """

    @abstractmethod
    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Euler step: onehot(x_t) + step * reverse rate.

        `step` is the step in t, multiplied by the derivative d sigma / d t.
        """

    @abstractmethod
    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Tweedie step, which reduces the total noise by `delta`.

        The probability of state z is proportional to [s^T exp(-delta Q)]_z P(delta)[z, x_t], where s is the vector of
        the scores s_y.
        """

    @abstractmethod
    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the last reverse step, which goes from total noise `sigma` to 0."""


class ResidueGraph(Graph):
    """Base class of graphs whose states are the amino acids only, without a mask.

    All reverse steps except Euler steps are computed with `_propagate` and `_probs_into`.
    """

    @abstractmethod
    def _propagate(self, row: Float64[Tensor, "T V"], sigma: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """Multiply each row vector in `row` by the matrix exp(sigma Q) from the right. sigma may be negative."""

    @abstractmethod
    def _probs_into(self, xt: Tokens, delta: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """Return the column P(delta)[., x_t]: the probability of a transition to x_t from each state."""

    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """Return q, the distribution of x0 at each position, as implied by the scores.

        q is conditional on the tokens of x_t at all other positions. It solves q P = s, where s is the vector of the
        scores. Negative entries of the solution are set to 0, and the solution is normalised. Solving this equation
        amplifies errors of the scores by up to exp(sigma |lambda|), where lambda is the most negative eigenvalue of Q.
        """
        return clamp_negative(self._propagate(to_float64(log_score).exp(), -to_float64(sigma)))[0]

    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, sigma_next: Sigma
    ) -> Float64[Tensor, "T S"]:
        """Return the unnormalised probabilities after the exact reverse step from total noise `sigma` to `sigma_next`.

        q = softmax(log_q) is the distribution of x0 at each position. The probability of state z is proportional to
        [q P(sigma_next)]_z P(sigma - sigma_next)[z, x_t]. Unlike the formula of the analytic step, this formula has no
        exponentials that grow with the noise.
        """
        sigma, sigma_next = to_float64(sigma), to_float64(sigma_next)
        marginal = self._propagate(to_float64(log_q).softmax(-1), sigma_next).clamp(min=0.0)
        return marginal * self._probs_into(xt, sigma - sigma_next)

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """Return the unnormalised probabilities after one Tweedie step, which reduces the total noise by `delta`.

        The probability of state z is proportional to [s^T exp(-delta Q)]_z P(delta)[z, x_t], where s is the vector of
        the scores s_y. The factor exp(-delta Q) amplifies errors of the scores by up to exp(delta |lambda|), where
        lambda is the most negative eigenvalue of Q. Entries can be negative: callers set them to 0, and the samplers
        count how often this happens.
        """
        delta = to_float64(delta)
        return self._propagate(to_float64(log_score).exp(), -delta) * self._probs_into(xt, delta)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the last reverse step, an analytic step from total noise `sigma` to 0."""
        return self.analytic_probs(log_score, xt, sigma)
