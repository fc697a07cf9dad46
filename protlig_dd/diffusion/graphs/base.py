"""What graphs have in common."""

from jaxtyping import Float, Float64
from torch import Tensor

from protlig_dd.diffusion.numerics import Sigma, Tokens, clamp_negative, to_float64

FORGOTTEN = 1e-3


class ResidueGraph:
    """What graphs share whose states are the residues alone: the reverse steps, from `_flow` and `_into`."""

    def _flow(self, row: Float64[Tensor, "T V"], sigma: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """row exp(sigma Q), for either sign of sigma."""
        raise NotImplementedError

    def _into(self, xt: Tokens, delta: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """P(delta)[., x]."""
        raise NotImplementedError

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
