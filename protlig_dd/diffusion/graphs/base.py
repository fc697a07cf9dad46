"""Forward processes on the 20 amino acids: corruption, score entropy, prior and reverse steps.

Everything is elementwise over tokens; nothing here knows of packs. Rates have the row convention: Q[i, j] is the rate
i -> j, rows sum to 0, P(sigma) = exp(sigma Q). The score of state y is s_y ~ p_t(y) / p_t(x_t). Ids from n_states up
(bar the mask) are context: never moved, never in the loss.

Shape suffixes: T tokens, V the n_states amino acids, S the states that a reverse step can land on (V, and the mask
for the absorbing graph).

Every graph says how fast it forgets: its slowest mode decays as exp(sigma lambda_2), and `sigma_max` is the total noise
at which exp(sigma_max lambda_2) = 1e-3.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.numerics import Sigma, Tokens, clamp_negative, to_float64

FORGOTTEN = 1e-3


class Graph(ABC):
    """A forward process: what every graph has. A new one is a subclass with a name in registry.py.

    `n_reverse_states` is S. `lambda_2` and `sigma_max` say how fast it forgets.
    """

    name: ClassVar[str]
    """In the registry."""
    masks: ClassVar[bool] = False
    """Whether residues decay to a mask, with id `mask`, so that what is not masked is clean."""
    n_states: int
    n_reverse_states: int
    lambda_2: float
    sigma_max: float

    @property
    def mask(self) -> int:
        """The id of the mask, which only graphs that mask give to a residue."""
        return self.n_states

    def time_free_with(self, parametrisation: str) -> bool:
        """Whether the best network with this parametrisation is the same at every noise level."""
        return self.masks and parametrisation == "x0"

    @abstractmethod
    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t ~ P(sigma)[x0, .]; context stays."""

    @abstractmethod
    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = torch.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens of the prior at the last noise level."""

    @abstractmethod
    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """KL( P(sigma)[x0, .] || prior ) in nats per token; 0 for context."""

    @abstractmethod
    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Log-scores of a network that gives them, 0 at x_t."""

    @abstractmethod
    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Log-scores of a softmax q over x0 given the other tokens: s_y = (q P)_y / (q P)_x."""

    @abstractmethod
    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """The distribution q of x0 given the other tokens that the scores imply."""

    @abstractmethod
    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Denoising score entropy per token, nats (arXiv 2310.16834, eq. 11), not yet times dsigma."""

    @abstractmethod
    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, left: Sigma
    ) -> Float64[Tensor, "T S"]:
        """From total noise sigma to what is `left` of it, given the distribution q of x0: exact."""

    @abstractmethod
    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """One Euler step back, onehot(x) + step * reverse rate, with step = dt * dsigma."""

    @abstractmethod
    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """One Tweedie step back over delta of noise: p(z) ~ [s^T exp(-delta Q)]_z P(delta)[z, x]."""

    @abstractmethod
    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """The last step, all of sigma at once."""


class ResidueGraph(Graph):
    """What graphs share whose states are the residues alone: the reverse steps, from `_flow` and `_into`."""

    @abstractmethod
    def _flow(self, row: Float64[Tensor, "T V"], sigma: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """row exp(sigma Q), for either sign of sigma."""

    @abstractmethod
    def _into(self, xt: Tokens, delta: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """P(delta)[., x]."""

    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """The distribution q of x0 given the other tokens that the scores imply: q P ~ s, negatives set to 0.

        Errors of the scores grow by up to exp(sigma |lambda|) on the way, lambda the fastest of Q's eigenvalues.
        """
        return clamp_negative(self._flow(to_float64(log_score).exp(), -to_float64(sigma)))[0]

    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, left: Sigma
    ) -> Float64[Tensor, "T S"]:
        """From total noise sigma to what is `left` of it, given the distribution q of x0: exact, no growing terms.

        p(z) ~ [q P(left)]_z P(sigma - left)[z, x]; to be normalised by the caller.
        """
        sigma, left = to_float64(sigma), to_float64(left)
        return self._flow(to_float64(log_q).softmax(-1), left).clamp(min=0.0) * self._into(xt, sigma - left)

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """One Tweedie step back over delta of noise: p(z) ~ [s^T exp(-delta Q)]_z P(delta)[z, x].

        Errors of the scores grow by up to exp(delta |lambda|), lambda the fastest of Q's eigenvalues; what comes out
        negative is left for the caller to clamp and count.
        """
        delta = to_float64(delta)
        return self._flow(to_float64(log_score).exp(), -delta) * self._into(xt, delta)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """The last step, all of sigma at once: analytic."""
        return self.analytic_probs(log_score, xt, sigma)
