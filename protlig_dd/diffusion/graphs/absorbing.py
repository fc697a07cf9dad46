"""Residues decay to a mask."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.graphs.base import FORGOTTEN, Graph
from protlig_dd.diffusion.numerics import Sigma, Tokens, log_expm1, one_hot, pick, to_float64, uniform_draws
from protlig_dd.tokenizer import N_STATES


class Absorbing(Graph):
    """Every residue decays to the mask at rate 1: Q[i, mask] = 1 (SEDD, arXiv 2310.16834, eq. 15)."""

    name, masks = "absorbing", True
    lambda_2 = -1.0
    sigma_max = -math.log(FORGOTTEN)

    def __init__(self, n_states: int = N_STATES) -> None:
        self.n_states = n_states
        self.n_reverse_states = n_states + 1

    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t ~ P(sigma)[x0, .]: each residue is masked with probability 1 - e^-sigma."""
        moved = uniform_draws(len(x0), generator) < to_float64(-torch.expm1(-sigma), generator)
        return torch.where(moved.to(x0.device) & (x0 < self.n_states), self.mask, x0)

    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = math.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens of the prior at the last noise level: the mask, but with probability e^-sigma any residue."""
        residue = torch.randint(self.n_states, (n,), generator=generator, device=generator.device)
        return torch.where(uniform_draws(n, generator) < math.exp(-sigma), residue, self.mask)

    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """KL( P(sigma)[x0, .] || prior ) in nats per token: e^-sigma log n_states for residues, 0 for context."""
        return torch.where(x0 < self.n_states, torch.exp(-sigma) * math.log(self.n_states), 0.0)

    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """SEDD's parametrisation, scaled by sigma: zero logits are the uniform guess kappa / n_states."""
        scaled = logits - (log_expm1(sigma) + math.log(self.n_states))[:, None]
        return torch.where((xt == self.mask)[:, None], scaled, 0.0)

    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Scores of a softmax over x0 given the other tokens: s_y = kappa p(x0 = y), kappa = 1 / (e^sigma - 1)."""
        scaled = F.log_softmax(logits, dim=-1) - log_expm1(sigma)[:, None]
        return torch.where((xt == self.mask)[:, None], scaled, 0.0)

    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """The distribution of x0 given the other tokens that the scores of a masked token imply."""
        return to_float64(log_score).softmax(-1)

    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Denoising score entropy per token, nats (arXiv 2310.16834, eq. 11), not yet times dsigma.

        sum_y s_y - kappa log s_x0 + kappa (log kappa - 1) on masked tokens, 0 elsewhere.
        """
        log_kappa = -log_expm1(sigma)
        kappa = log_kappa.exp()
        loss = log_score.exp().sum(-1) - kappa * pick(log_score, x0) + kappa * (log_kappa - 1)
        return torch.where((xt == self.mask) & (x0 < self.n_states), loss, 0.0)

    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, left: Sigma
    ) -> Float64[Tensor, "T S"]:
        """From total noise sigma to what is `left` of it, given the distribution q of x0: exact, no growing terms.

        A masked token stays masked with probability (1 - e^-left) / (1 - e^-sigma), and becomes x0 otherwise.
        """
        stays = (torch.expm1(-to_float64(left)) / torch.expm1(-to_float64(sigma)))[:, None]
        return self._unmask(torch.cat([(1 - stays) * to_float64(log_q).softmax(-1), stays], dim=-1), xt)

    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """One Euler step back, onehot(x) + step * reverse rate, with step = dt * dsigma."""
        gain = to_float64(log_score).exp() * to_float64(step)[:, None]
        return self._unmask(torch.cat([gain, 1 - gain.sum(-1, keepdim=True)], dim=-1), xt)

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """One Tweedie step back over delta of noise: p(z) ~ [s^T exp(-delta Q)]_z P(delta)[z, x].

        For a masked token this is (e^delta - 1) s_z, and what is left stays masked.
        """
        gain = to_float64(log_score).exp() * torch.expm1(to_float64(delta))[:, None]
        return self._unmask(torch.cat([gain, 1 - gain.sum(-1, keepdim=True)], dim=-1), xt)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """The last step, all of sigma at once: analytic, with the mask removed from the choices."""
        probs = self.analytic_probs(log_score, xt, sigma)
        probs[:, self.mask] = 0.0
        return probs / probs.sum(-1, keepdim=True)

    def _unmask(self, moves: Float64[Tensor, "T S"], xt: Tokens) -> Float64[Tensor, "T S"]:
        """The moves of a masked token; any other stays what it is."""
        masked = (xt == self.mask).to(moves.device)[:, None]
        return torch.where(masked, moves, one_hot(xt, self.n_reverse_states).to(moves.device))
