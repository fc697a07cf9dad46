"""The absorbing graph: residues are replaced by a mask."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.graphs.base import MIXED, Graph
from protlig_dd.diffusion.numerics import Sigma, Tokens, log_expm1, one_hot, pick, to_float64, uniform_draws
from protlig_dd.tokenizer import N_STATES


class Absorbing(Graph):
    """Every residue is replaced by the mask at rate 1: Q[i, mask] = 1 (SEDD, arXiv 2310.16834, eq. 15)."""

    name, masks = "absorbing", True
    lambda_2 = -1.0
    sigma_max = -math.log(MIXED)

    def __init__(self, n_states: int = N_STATES) -> None:
        self.n_states = n_states
        self.n_reverse_states = n_states + 1

    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t: each residue is masked with probability 1 - e^-sigma."""
        moved = uniform_draws(len(x0), generator) < to_float64(-torch.expm1(-sigma), generator)
        return torch.where(moved.to(x0.device) & (x0 < self.n_states), self.mask, x0)

    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = math.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens from the prior: with probability e^-sigma a uniformly drawn amino acid, otherwise the mask."""
        residue = torch.randint(self.n_states, (n,), generator=generator, device=generator.device)
        return torch.where(uniform_draws(n, generator) < math.exp(-sigma), residue, self.mask)

    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """Return KL( P(sigma)[x0, .] || prior ) in nats per token: e^-sigma log n_states; 0 for context ids."""
        return torch.where(x0 < self.n_states, torch.exp(-sigma) * math.log(self.n_states), 0.0)

    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Return the log-scores of masked tokens, and 0 for unmasked tokens.

        log s_y = logits_y + log(kappa / n_states), with kappa = 1 / (e^sigma - 1). This is SEDD's scaling by sigma:
        zero logits give the uniform guess s_y = kappa / n_states.
        """
        scaled = logits - (log_expm1(sigma) + math.log(self.n_states))[:, None]
        return torch.where((xt == self.mask)[:, None], scaled, 0.0)

    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Return log s_y with s_y = kappa q_y and kappa = 1 / (e^sigma - 1); 0 for unmasked tokens.

        q = softmax(logits) is the distribution of x0 at each position.
        """
        scaled = F.log_softmax(logits, dim=-1) - log_expm1(sigma)[:, None]
        return torch.where((xt == self.mask)[:, None], scaled, 0.0)

    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """Return q, the distribution of x0 at each position, as implied by the scores.

        q is conditional on the tokens of x_t at all other positions. Only the rows of masked tokens are meaningful.
        """
        return to_float64(log_score).softmax(-1)

    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Return the denoising score entropy of each token in nats (arXiv 2310.16834, eq. 11).

        The factor d sigma / d t of the loss is not included.

        A masked token contributes sum_y s_y - kappa log s_x0 + kappa (log kappa - 1) with kappa = 1 / (e^sigma - 1).
        Other tokens contribute 0.
        """
        log_kappa = -log_expm1(sigma)
        kappa = log_kappa.exp()
        loss = log_score.exp().sum(-1) - kappa * pick(log_score, x0) + kappa * (log_kappa - 1)
        return torch.where((xt == self.mask) & (x0 < self.n_states), loss, 0.0)

    def posterior_probs(
        self, log_q: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, sigma_next: Sigma
    ) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the exact reverse step from total noise `sigma` to `sigma_next`.

        q = softmax(log_q) is the distribution of x0 at each position. A masked token stays masked with probability
        (1 - e^-sigma_next) / (1 - e^-sigma). Otherwise it becomes an amino acid that is drawn from q.
        """
        stays = (torch.expm1(-to_float64(sigma_next)) / torch.expm1(-to_float64(sigma)))[:, None]
        return self._unmask(torch.cat([(1 - stays) * to_float64(log_q).softmax(-1), stays], dim=-1), xt)

    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Euler step: onehot(x_t) + step * reverse rate.

        `step` is the step in t, multiplied by the derivative d sigma / d t.
        """
        gain = to_float64(log_score).exp() * to_float64(step)[:, None]
        return self._unmask(torch.cat([gain, 1 - gain.sum(-1, keepdim=True)], dim=-1), xt)

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Tweedie step, which reduces the total noise by `delta`.

        A masked token becomes residue z with probability (e^delta - 1) s_z, and otherwise stays masked.
        """
        gain = to_float64(log_score).exp() * torch.expm1(to_float64(delta))[:, None]
        return self._unmask(torch.cat([gain, 1 - gain.sum(-1, keepdim=True)], dim=-1), xt)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after the last reverse step, an analytic step from total noise `sigma` to 0.

        The probability of the mask is set to 0, and the probabilities of the amino acids are renormalised.
        """
        probs = self.analytic_probs(log_score, xt, sigma)
        probs[:, self.mask] = 0.0
        return probs / probs.sum(-1, keepdim=True)

    def _unmask(self, moves: Float64[Tensor, "T S"], xt: Tokens) -> Float64[Tensor, "T S"]:
        """Return the probabilities `moves` for masked tokens. Other tokens keep their state with probability 1."""
        masked = (xt == self.mask).to(moves.device)[:, None]
        return torch.where(masked, moves, one_hot(xt, self.n_reverse_states).to(moves.device))
