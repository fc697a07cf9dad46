"""The uniform graph: residues change to all other amino acids at the same rate."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.graphs.base import MIXED, ResidueGraph
from protlig_dd.diffusion.numerics import Sigma, Tokens, log_expm1, one_hot, pick, to_float64, uniform_draws
from protlig_dd.tokenizer import N_STATES


class Uniform(ResidueGraph):
    """Every residue is replaced at rate 1 by a uniformly drawn amino acid (SEDD, arXiv 2310.16834, eq. 16).

    The drawn amino acid may equal the old one. With N amino acids, Q[i, j] = 1/N for i != j, and Q[i, i] = 1/N - 1.
    """

    name = "uniform"
    lambda_2 = -1.0
    sigma_max = -math.log(MIXED)

    def __init__(self, n_states: int = N_STATES) -> None:
        self.n_states = n_states
        self.n_reverse_states = n_states

    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t: with probability 1 - e^-sigma a uniformly drawn amino acid, which may equal x0; otherwise x0."""
        u, p_moved = uniform_draws(len(x0), generator), to_float64(-torch.expm1(-sigma), generator)
        # where u < p_moved, u / p_moved is uniform on [0, 1) and also selects the residue
        residue = (u / p_moved * self.n_states).clamp(max=self.n_states - 1).long()
        return torch.where((u < p_moved).to(x0.device) & (x0 < self.n_states), residue.to(x0.device), x0)

    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = math.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens from the prior, which is uniform for every `sigma`."""
        return torch.randint(self.n_states, (n,), generator=generator, device=generator.device)

    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """Return KL( P(sigma)[x0, .] || uniform ) in nats per token; 0 for context ids."""
        n, kept = self.n_states, torch.exp(-to_float64(sigma))
        other = (1 - kept) / n
        kl = (kept + other) * torch.log1p(kept * (n - 1)) + (n - 1) * other * torch.log1p(-kept)
        return torch.where(x0 < n, kl.to(sigma), 0.0)

    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Return the logits as log-scores, with 0 at x_t. Zero logits give the exact score at large sigma."""
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, logits)

    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Return log s_y with s_y = (q P)_y / (q P)_x, x = x_t and P = P(sigma).

        q = softmax(logits) is the distribution of x0 at each position.
        """
        log_c = (log_expm1(sigma) - math.log(self.n_states))[:, None]  # (q P)_y = e^-sigma (q_y + c)
        log_p = torch.logaddexp(F.log_softmax(logits, dim=-1), log_c)
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, log_p - pick(log_p, xt)[:, None])

    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Return the denoising score entropy of each token in nats (arXiv 2310.16834, eq. 11).

        The factor d sigma / d t of the loss is not included.

        With x = x_t, r_y = P[x0, y] / P[x0, x] and K(a) = a (log a - 1), the entropy is the sum over y != x of
        (1/N) (s_y - r_y log s_y + K(r_y)).
        """
        n = self.n_states
        em1 = torch.expm1(sigma)
        log_rho = -torch.log1p(n / em1)
        rho = log_rho.exp()
        at_xt = one_hot(xt, n).bool()
        positive = torch.where(at_xt, 0.0, log_score.exp()).sum(-1) / n
        log_sum = torch.where(at_xt, 0.0, log_score).sum(-1) / n
        unmoved = positive - rho * log_sum + (n - 1) / n * rho * (log_rho - 1)
        k_inverse_rho = (-log_rho - 1) / rho
        moved = positive - log_sum - pick(log_score, x0) / em1 + (k_inverse_rho - (n - 2)) / n
        return torch.where(x0 < n, torch.where(xt == x0, unmoved, moved), 0.0)

    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Euler step: onehot(x_t) + step * reverse rate.

        `step` is the step in t, multiplied by the derivative d sigma / d t.
        """
        at_xt = one_hot(xt, self.n_states).to(to_float64(log_score).device)
        moves = to_float64(log_score).exp() * to_float64(step)[:, None] / self.n_states * (1 - at_xt)
        return moves + at_xt * (1 - moves.sum(-1, keepdim=True))

    def _probs_into(self, xt: Tokens, delta: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        moved = -torch.expm1(-delta)[:, None]
        return (1 - moved) * one_hot(xt, self.n_states).to(moved.device) + moved / self.n_states

    def _propagate(self, row: Float64[Tensor, "T V"], sigma: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        sigma_T1 = sigma[:, None]
        return torch.exp(-sigma_T1) * row - torch.expm1(-sigma_T1) / self.n_states * row.sum(-1, keepdim=True)
