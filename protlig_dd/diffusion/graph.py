"""Forward processes on the 20 amino acids: corruption, score entropy, prior and reverse steps.

Everything is elementwise over tokens; nothing here knows of packs. Rates have the row convention: Q[i, j] is the rate
i -> j, rows sum to 0, P(sigma) = exp(sigma Q). The score of state y is s_y ~ p_t(y) / p_t(x_t). Ids from n_states up
(bar the mask) are context: never moved, never in the loss.

Shape suffixes: T tokens, V the n_states amino acids, S the states that a reverse step can land on (V, and the mask
for the absorbing graph).

Every graph says how fast it forgets: its slowest mode decays as exp(sigma lambda_2), and `sigma_max` is the total noise
at which exp(sigma_max lambda_2) = 1e-3.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.rates import substitution_rates
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES

FORGOTTEN = 1e-3
REVERSIBLE = 1e-4  # how far two opposite fluxes may differ, in units of the largest: files round their numbers
SLOWEST = -0.1  # lambda_2 must be below; with it sigma_max is 69, and exp(-sigma_max) is still a float32
TINY = 1e-300

Tokens = Int64[Tensor, " T"]
Sigma = Float[Tensor, " T"]


class Absorbing:
    """Every residue decays to the mask at rate 1: Q[i, mask] = 1 (SEDD, arXiv 2310.16834, eq. 15)."""

    lambda_2 = -1.0
    sigma_max = -math.log(FORGOTTEN)

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

    lambda_2 = -1.0
    sigma_max = -math.log(FORGOTTEN)

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

    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Scores of a softmax q over x0 given the other tokens: s_y = (q P)_y / (q P)_x, 0 in log at x_t."""
        log_c = (log_expm1(sigma) - math.log(self.n_states))[:, None]  # (q P)_y = e^-sigma (q_y + c)
        log_p = torch.logaddexp(F.log_softmax(logits, dim=-1), log_c)
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, log_p - pick(log_p, xt)[:, None])

    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """The distribution q of x0 given the other tokens that the scores imply: q P ~ s, negatives clamped."""
        return clamp_negative(self._undo(log_score, sigma))[0]

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
        n, kept = self.n_states, torch.exp(-to_float64(delta))[:, None]
        return self._undo(log_score, delta) * (kept * one_hot(xt, n).to(kept.device) + (1 - kept) / n)

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """The last step, all of sigma at once: analytic; negatives are left for the caller to clamp."""
        return self.analytic_probs(log_score, xt, sigma)

    def _undo(self, log_score: Float[Tensor, "T V"], delta: Sigma) -> Float64[Tensor, "T V"]:
        """s^T exp(-delta Q)."""
        score, delta_T1 = to_float64(log_score).exp(), to_float64(delta)[:, None]
        return delta_T1.exp() * score - torch.expm1(delta_T1) / self.n_states * score.sum(-1, keepdim=True)


class SubstitutionGraph:
    """Residues turn into one another as they do in evolution: any reversible rates over the amino acids.

    With pi_i Q_ij = pi_j Q_ji and D = diag(pi), D^1/2 Q D^-1/2 = U Lambda U^T is symmetric, and
    P(sigma) = I + D^-1/2 U expm1(sigma Lambda) U^T D^1/2: expm1, because for small sigma the entries off the diagonal
    are the small differences that exp loses. The matrices and all that is computed with them are float64.

    Args:
        rates: (N, N) Q[i, j], the rate i -> j; the diagonal is not read, and the unit of sigma is chosen such that one
            residue in equilibrium is substituted at rate 1: -sum_i pi_i Q_ii = 1.

    Raises:
        ValueError: rates that are no rate matrix, are not reversible, or leave states that hardly reach one another.
    """

    def __init__(self, rates: Sequence[Sequence[float]] | Float64[np.ndarray, "n n"]) -> None:
        q = np.array(rates, dtype=np.float64)
        if q.ndim != 2 or q.shape[0] != q.shape[1] or len(q) < 2:
            raise ValueError(f"rates must be a square matrix, got shape {q.shape}")
        np.fill_diagonal(q, 0.0)
        if not np.isfinite(q).all() or q.min() < 0:
            raise ValueError(f"rates must be finite and at least 0 off the diagonal, got {q.min():g} to {q.max():g}")
        n = len(q)
        names = AMINO_ACIDS if n == N_STATES else [f"state {i}" for i in range(n)]
        balance = np.vstack([(q - np.diag(q.sum(1))).T, np.ones(n)])
        pi = np.linalg.lstsq(balance, np.append(np.zeros(n), 1.0), rcond=None)[0]
        if pi.min() <= 0:
            raise ValueError(f"the rates do not mix: {names[pi.argmin()]} has no share in equilibrium ({pi.min():.1e})")
        flux = pi[:, None] * q
        i, j = np.unravel_index(np.abs(flux - flux.T).argmax(), flux.shape)
        if abs(flux[i, j] - flux[j, i]) > REVERSIBLE * flux.max():
            raise ValueError(
                f"the rates are not reversible: in equilibrium {flux[i, j]:.6g} flows from {names[i]} to {names[j]}, "
                f"and {flux[j, i]:.6g} back"
            )
        flux = (flux + flux.T) / 2 / flux.sum()
        root = np.sqrt(pi)
        symmetric = flux / np.outer(root, root) - np.diag(flux.sum(1) / pi)
        eigenvalues, u = np.linalg.eigh(symmetric)
        self.lambda_2 = float(eigenvalues[-2])
        if self.lambda_2 > SLOWEST:
            raise ValueError(
                f"the rates do not mix: lambda_2 = {self.lambda_2:.3g} must be below {SLOWEST}, or it takes more than "
                f"sigma = {math.log(FORGOTTEN) / SLOWEST:.0f} to forget where a residue came from"
            )
        self.sigma_max = math.log(FORGOTTEN) / self.lambda_2 * (1 + 1e-6)  # below the threshold, not at it
        self.n_states = self.n_reverse_states = n
        eigenvalues[-1] = 0.0  # exactly, so that P's rows sum to 1 at any sigma
        self.pi = torch.from_numpy(pi / pi.sum())
        self.rates = torch.from_numpy(flux / pi[:, None] - np.diag(flux.sum(1) / pi))
        self._eigenvalues = torch.from_numpy(eigenvalues)
        self._left, self._right = torch.from_numpy(u / root[:, None]), torch.from_numpy(u.T * root)

    def transition_probs(self, x0: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """P(sigma)[x0, .], float64; rows of context ids are those of state 0."""
        sigma = to_float64(sigma)
        x0 = torch.where(x0 < self.n_states, x0, 0).to(sigma.device)
        growth = torch.expm1(sigma[:, None] * self._on(sigma, self._eigenvalues))
        moved = (self._on(sigma, self._left)[x0] * growth) @ self._on(sigma, self._right)
        return (one_hot(x0, self.n_states) + moved).clamp(min=TINY)

    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t ~ P(sigma)[x0, .] by inverse CDF."""
        u = uniform_draws(len(x0), generator)
        xt = categorical(self.transition_probs(x0, sigma).to(u.device), u).to(x0.device)
        return torch.where(x0 < self.n_states, xt, x0)

    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = math.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens of the prior: the equilibrium pi, whatever the last sigma."""
        u = uniform_draws(n, generator)
        return categorical(self._on(u, self.pi).expand(n, -1), u)

    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """KL( P(sigma)[x0, .] || pi ) in nats per token; 0 for context."""
        p = self.transition_probs(x0, sigma)
        kl = (p * (p / self._on(p, self.pi)).log()).sum(-1)
        return torch.where(x0 < self.n_states, kl.to(sigma), 0.0)

    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """log pi_y - log pi_x + logits, 0 at x_t: zero logits are the exact score at large sigma."""
        log_pi = self._on(logits, self.pi).log().to(logits)
        scaled = logits + log_pi - log_pi[torch.where(xt < self.n_states, xt, 0)][:, None]
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, scaled)

    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Scores of a softmax q over x0 given the other tokens: s_y = (q P)_y / (q P)_x, 0 in log at x_t."""
        log_p = self._flow(to_float64(logits).softmax(-1), to_float64(sigma)).clamp(min=TINY).log()
        log_score = (log_p - pick(log_p, xt.to(log_p.device))[:, None]).to(logits)
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, log_score)

    def x0_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """The distribution q of x0 given the other tokens that the scores imply: q P ~ s, negatives clamped."""
        return clamp_negative(self._flow(to_float64(log_score).exp(), -to_float64(sigma)))[0]

    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Denoising score entropy per token, nats (arXiv 2310.16834, eq. 11), not yet times dsigma.

        sum over y != x of Q[y, x] (s_y - r_y log s_y + K(r_y)), with r_y = P[x0, y] / P[x0, x], K(a) = a (log a - 1).
        """
        log_s, p = to_float64(log_score), self.transition_probs(x0, sigma)
        x = torch.where(xt < self.n_states, xt, 0).to(p.device)
        r = p / pick(p, x)[:, None]
        rate_in = self._rates_into(x) * (1 - one_hot(x, self.n_states))
        loss = (rate_in * (log_s.exp() - r * log_s + r * (r.log() - 1))).sum(-1)
        return torch.where(x0 < self.n_states, loss.to(log_score), 0.0)

    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """One Euler step back, onehot(x) + step * reverse rate, with step = dt * dsigma."""
        score = to_float64(log_score).exp()
        xt = xt.to(score.device)
        at_xt = one_hot(xt, self.n_states)
        moves = score * to_float64(step)[:, None] * self._rates_into(xt) * (1 - at_xt)
        return moves + at_xt * (1 - moves.sum(-1, keepdim=True))

    def analytic_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, delta: Sigma) -> Float64[Tensor, "T S"]:
        """One Tweedie step back over delta of noise: p(z) ~ [s^T exp(-delta Q)]_z P(delta)[z, x]."""
        delta = to_float64(delta)
        xt, pi = xt.to(delta.device), self._on(delta, self.pi)
        undone = self._flow(to_float64(log_score).exp(), -delta)
        into_x = self.transition_probs(xt, delta) * pi[xt][:, None] / pi  # by detailed balance
        return undone * into_x

    def denoise_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float64[Tensor, "T S"]:
        """The last step, all of sigma at once: analytic; negatives are left for the caller to clamp."""
        return self.analytic_probs(log_score, xt, sigma)

    def _flow(self, row: Float64[Tensor, "T V"], sigma: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """row exp(sigma Q), for either sign of sigma."""
        growth = torch.expm1(sigma[:, None] * self._on(row, self._eigenvalues))
        return row + ((row @ self._on(row, self._left)) * growth) @ self._on(row, self._right)

    def _rates_into(self, x: Tokens) -> Float64[Tensor, "T V"]:
        """Q[., x]."""
        return self._on(x, self.rates).T[x]

    @staticmethod
    def _on(like: Tensor, constant: Float64[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
        return constant.to("cpu" if like.device.type == "mps" else like.device)


Graph = Absorbing | Uniform | SubstitutionGraph


def make_substitution_graph(
    matrix: str, kind: str = "log_odds", scale: float | None = None, rates: Sequence[Sequence[float]] | None = None
) -> SubstitutionGraph:
    """The graph of a named matrix or file (see `substitution_rates`), or of rates that were read from one before."""
    return SubstitutionGraph(substitution_rates(matrix, kind, scale) if rates is None else rates)


GRAPHS: dict[str, Callable[..., Graph]] = {
    "absorbing": partial(Absorbing, N_STATES),  # the vocabulary is not an option
    "uniform": partial(Uniform, N_STATES),
    "substitution": make_substitution_graph,
}


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
