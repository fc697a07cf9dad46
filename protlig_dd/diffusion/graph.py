"""Forward processes on the 20 amino acids: corruption, score entropy, prior and reverse steps.

Everything is elementwise over tokens; nothing here knows of packs. Rates have the row convention: Q[i, j] is the rate
i -> j, rows sum to 0, P(sigma) = exp(sigma Q). The score of state y is s_y ~ p_t(y) / p_t(x_t). Ids from n_states up
(bar the mask) are context: never moved, never in the loss.

Shape suffixes: T tokens, V the n_states amino acids, S the states that a reverse step can land on (V, and the mask
for the absorbing graph).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from protlig_dd.tokenizer import N_STATES

Tokens = Int64[Tensor, " T"]
Sigma = Float[Tensor, " T"]


class Absorbing:
    """Every residue decays to the mask at rate 1: Q[i, mask] = 1 (SEDD, arXiv 2310.16834, eq. 15)."""

    def __init__(self, n_states: int = N_STATES) -> None:
        self.n_states = n_states
        self.mask = n_states
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
        """Scores of the softmax posterior over x0: s_y = kappa p(x0 = y | x_t), kappa = 1 / (e^sigma - 1)."""
        scaled = F.log_softmax(logits, dim=-1) - log_expm1(sigma)[:, None]
        return torch.where((xt == self.mask)[:, None], scaled, 0.0)

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

    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """One Euler step back, onehot(x) + step * reverse rate, with step = dt * dsigma."""
        gain = to_float64(log_score).exp() * to_float64(step)[:, None]
        return self._unmask(gain, xt)

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """One Tweedie step back over delta of noise: p(z) ~ [s^T exp(-delta Q)]_z P(delta)[z, x].

        For a masked token this is (e^delta - 1) s_z, and what is left stays masked.
        """
        gain = to_float64(log_score).exp() * torch.expm1(to_float64(delta))[:, None]
        return self._unmask(gain, xt)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """The last step, all of sigma at once: analytic, with the mask removed from the choices."""
        probs = self.analytic_probs(log_score, xt, sigma)
        probs[:, self.mask] = 0.0
        return probs / probs.sum(-1, keepdim=True)

    def _unmask(self, gain_TV: Float64[Tensor, "T V"], xt: Tokens) -> Float64[Tensor, "T S"]:
        masked = (xt == self.mask).to(gain_TV.device)[:, None]
        moves = torch.cat([gain_TV, 1 - gain_TV.sum(-1, keepdim=True)], dim=-1)
        return torch.where(masked, moves, one_hot(xt, self.n_reverse_states).to(moves.device))


class Uniform:
    """Every residue jumps to a uniformly drawn one: Q = 1/N - I (SEDD, arXiv 2310.16834, eq. 16)."""

    def __init__(self, n_states: int = N_STATES) -> None:
        self.n_states = n_states
        self.n_reverse_states = n_states

    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t ~ P(sigma)[x0, .]: with probability 1 - e^-sigma a uniform residue (x0 among them)."""
        moved = uniform_draws(len(x0), generator) < to_float64(-torch.expm1(-sigma), generator)
        residue = torch.randint(self.n_states, (len(x0),), generator=generator, device=generator.device)
        return torch.where(moved.to(x0.device) & (x0 < self.n_states), residue.to(x0.device), x0)

    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = math.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens of the prior: uniform, whatever the last sigma."""
        return torch.randint(self.n_states, (n,), generator=generator, device=generator.device)

    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """KL( P(sigma)[x0, .] || uniform ) in nats per token; 0 for context."""
        n, kept = self.n_states, torch.exp(-to_float64(sigma))
        other = (1 - kept) / n
        kl = (kept + other) * torch.log1p(kept * (n - 1)) + (n - 1) * other * torch.log1p(-kept)
        return torch.where(x0 < n, kl.to(sigma), 0.0)

    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """The logits themselves, 0 at x_t: zero logits are the exact score at large sigma."""
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, logits)

    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Denoising score entropy per token, nats (arXiv 2310.16834, eq. 11), not yet times dsigma.

        sum over y != x of (1/N) (s_y - r_y log s_y + K(r_y)), with r_y = P[x0, y] / P[x0, x], K(a) = a (log a - 1).
        """
        n = self.n_states
        em1 = torch.expm1(sigma)
        log_rho = em1.log() - (em1 + n).log()
        rho = log_rho.exp()
        at_xt = one_hot(xt, n).bool()
        positive = torch.where(at_xt, 0.0, log_score.exp()).sum(-1) / n
        log_sum = torch.where(at_xt, 0.0, log_score).sum(-1) / n
        unmoved = positive - rho * log_sum + (n - 1) / n * rho * (log_rho - 1)
        k_inverse_rho = (-log_rho - 1) / rho
        moved = positive - log_sum - pick(log_score, x0) / em1 + (k_inverse_rho - (n - 2)) / n
        return torch.where(x0 < n, torch.where(xt == x0, unmoved, moved), 0.0)

    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """One Euler step back, onehot(x) + step * reverse rate, with step = dt * dsigma."""
        at_xt = one_hot(xt, self.n_states).to(to_float64(log_score).device)
        moves = to_float64(log_score).exp() * to_float64(step)[:, None] / self.n_states * (1 - at_xt)
        return moves + at_xt * (1 - moves.sum(-1, keepdim=True))

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """One Tweedie step back over delta of noise: p(z) ~ [s^T exp(-delta Q)]_z P(delta)[z, x]."""
        n = self.n_states
        score, delta = to_float64(log_score).exp(), to_float64(delta)[:, None]
        undone = delta.exp() * score - torch.expm1(delta) / n * score.sum(-1, keepdim=True)
        kept = torch.exp(-delta)
        return undone * (kept * one_hot(xt, n).to(score.device) + (1 - kept) / n)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """The last step, all of sigma at once: analytic; negatives are left for the caller to clamp."""
        return self.analytic_probs(log_score, xt, sigma)


Graph = Absorbing | Uniform

GRAPHS: dict[str, type[Graph]] = {"absorbing": Absorbing, "uniform": Uniform}


def log_expm1(sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(e^sigma - 1), exact for small sigma and free of overflow for large."""
    return sigma + torch.log(-torch.expm1(-sigma))


def pick(values_TV: Float[Tensor, "T V"], index: Tokens) -> Float[Tensor, " T"]:
    """values[t, index[t]]; 0 where the index is a context id."""
    inside = index < values_TV.shape[-1]
    picked = values_TV.gather(-1, torch.where(inside, index, 0)[:, None])[:, 0]
    return torch.where(inside, picked, 0.0)


def one_hot(tokens: Tokens, n: int) -> Float[Tensor, "T {n}"]:
    """(T, n) float32 indicator; rows of ids outside 0..n-1 are all zero."""
    return (tokens[:, None] == torch.arange(n, device=tokens.device)).float()


def to_float64(x: Float[Tensor, "*n"], generator: torch.Generator | None = None) -> Float64[Tensor, "*n"]:
    """float64, on the generator's device or on x's own; on the CPU where that device has no float64 (MPS)."""
    device = generator.device if generator is not None else x.device
    return x.to(torch.device("cpu") if device.type == "mps" else device).double()


def uniform_draws(n: int, generator: torch.Generator) -> Float64[Tensor, " {n}"]:
    """(n,) uniform draws on [0, 1) in float64, so that rare events keep their probability (arXiv 2409.02908)."""
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)


def categorical(probs_TS: Float64[Tensor, "T S"], u: Float64[Tensor, " T"]) -> Int64[Tensor, " T"]:
    """Inverse-CDF draw: the first state whose cumulative probability exceeds u. A state of probability 0 never comes.

    Args:
        probs_TS: non-negative, at least one positive in each row; normalised here.
        u: uniform on [0, 1), float64.
    """
    cdf = probs_TS.cumsum(-1)
    cdf = cdf / cdf[:, -1:]  # the last positive state ends at exactly 1, which no u reaches
    return (cdf <= u[:, None]).sum(-1)


def clamp_negative(probs_TS: Float64[Tensor, "T S"]) -> tuple[Float64[Tensor, "T S"], Bool[Tensor, " T"]]:
    """Negative probabilities set to 0 and each row renormalised; also which rows had one."""
    clamped = probs_TS.clamp(min=0.0)
    return clamped / clamped.sum(-1, keepdim=True), (probs_TS < 0).any(-1)
