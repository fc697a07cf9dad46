"""The substitution graph: residues are substituted at the rates of a substitution matrix."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from protlig_dd.diffusion.graphs.base import MIXED, ResidueGraph
from protlig_dd.diffusion.graphs.rates import substitution_rates
from protlig_dd.diffusion.numerics import Sigma, Tokens, categorical, one_hot, pick, to_float64, uniform_draws
from protlig_dd.system.device import float64_device
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES

# Largest allowed difference between the flux i -> j, pi_i Q_ij, and the opposite flux j -> i, relative to the largest
# flux. The tolerance is above 0 because the numbers in files are rounded.
FLUX_TOLERANCE = 1e-4
MAX_LAMBDA_2 = -0.1  # graphs that mix more slowly are rejected; with this lambda_2, sigma_max is 69
TINY = 1e-300  # lower limit of probabilities, so that their logarithms are finite
CPU = torch.device("cpu")


class Spectrum(NamedTuple):
    """The process in float64 on one device: P(sigma) = I + left diag(expm1(sigma eigenvalues)) right.

    `pi` is the equilibrium distribution of the amino acids, and `rates` is Q.
    """

    pi: Float64[Tensor, " V"]
    rates: Float64[Tensor, "V V"]
    eigenvalues: Float64[Tensor, " V"]
    left: Float64[Tensor, "V V"]
    right: Float64[Tensor, "V V"]


class SubstitutionGraph(ResidueGraph):
    """Residues are substituted as in evolution, at any reversible rates between the amino acids.

    pi contains the equilibrium frequencies of the amino acids. With pi_i Q_ij = pi_j Q_ji and D = diag(pi), the matrix
    D^1/2 Q D^-1/2 = U Lambda U^T is symmetric, and P(sigma) = I + D^-1/2 U expm1(sigma Lambda) U^T D^1/2. For small
    sigma the off-diagonal entries of P(sigma) are small: expm1 keeps their precision, which exp would lose to rounding.
    The matrices and all computations with them are float64.

    Args:
        rates: (N, N) Q[i, j], the rate i -> j. The diagonal is ignored. The rates are scaled so that a residue in
            equilibrium is substituted at rate 1: -sum_i pi_i Q_ii = 1.

    Raises:
        ValueError: the rates are not a rate matrix, are not reversible, or mix too slowly.
    """

    name = "substitution"

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
            raise ValueError(
                f"the rates do not mix: the equilibrium frequency of {names[pi.argmin()]} is {pi.min():.1e} "
                "but must be above 0"
            )
        flux = pi[:, None] * q
        i, j = np.unravel_index(np.abs(flux - flux.T).argmax(), flux.shape)
        if abs(flux[i, j] - flux[j, i]) > FLUX_TOLERANCE * flux.max():
            raise ValueError(
                f"the rates are not reversible: in equilibrium the flux from {names[i]} to {names[j]} is "
                f"{flux[i, j]:.6g}, and the flux back is {flux[j, i]:.6g}"
            )
        flux = (flux + flux.T) / 2 / flux.sum()
        root = np.sqrt(pi)
        symmetric = flux / np.outer(root, root) - np.diag(flux.sum(1) / pi)
        eigenvalues, u = np.linalg.eigh(symmetric)
        self.lambda_2 = float(eigenvalues[-2])
        if self.lambda_2 > MAX_LAMBDA_2:
            raise ValueError(
                f"the rates mix too slowly: lambda_2 = {self.lambda_2:.3g} must be at most {MAX_LAMBDA_2} "
                f"(at {MAX_LAMBDA_2}, mixing takes a total noise of {math.log(MIXED) / MAX_LAMBDA_2:.0f})"
            )
        # slightly increased, so that in spite of rounding the slowest mode has fallen to at most MIXED at sigma_max
        self.sigma_max = math.log(MIXED) / self.lambda_2 * (1 + 1e-6)
        self.n_states = self.n_reverse_states = n
        eigenvalues[-1] = 0.0  # exactly 0, so that P's rows sum to 1 at any sigma
        spectrum = Spectrum(
            pi=torch.from_numpy(pi / pi.sum()),
            rates=torch.from_numpy(flux / pi[:, None] - np.diag(flux.sum(1) / pi)),
            eigenvalues=torch.from_numpy(eigenvalues),
            left=torch.from_numpy(u / root[:, None]),
            right=torch.from_numpy(u.T * root),
        )
        self.pi, self.rates = spectrum.pi, spectrum.rates
        self._on_device = {CPU: spectrum}

    def transition_probs(self, x0: Tokens, sigma: Sigma) -> Float64[Tensor, "T V"]:
        """Return P(sigma)[x0, .] in float64. A context id gets the row of state 0, which callers ignore."""
        sigma = to_float64(sigma)
        x0 = torch.where(x0 < self.n_states, x0, 0).to(sigma.device)
        return self._propagate(one_hot(x0, self.n_states).double(), sigma).clamp(min=TINY)

    def sample_transition(self, x0: Tokens, sigma: Sigma, generator: torch.Generator) -> Tokens:
        """Draw x_t from P(sigma)[x0, .] by inverse CDF."""
        u = uniform_draws(len(x0), generator)
        xt = categorical(self.transition_probs(x0, sigma).to(u.device), u).to(x0.device)
        return torch.where(x0 < self.n_states, xt, x0)

    def sample_limit(self, n: int, generator: torch.Generator, sigma: float = math.inf) -> Int64[Tensor, " {n}"]:
        """Draw n tokens from the prior, which is the equilibrium pi for every `sigma`."""
        u = uniform_draws(n, generator)
        return categorical(self._spectrum(u).pi.expand(n, -1), u)

    def prior_kl(self, x0: Tokens, sigma: Sigma) -> Float[Tensor, " T"]:
        """Return KL( P(sigma)[x0, .] || pi ) in nats per token; 0 for context ids."""
        p = self.transition_probs(x0, sigma)
        kl = (p * (p / self._spectrum(p).pi).log()).sum(-1)
        return torch.where(x0 < self.n_states, kl.to(sigma), 0.0)

    def log_score(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Return the log-scores log pi_y - log pi_x + logits with x = x_t; 0 at y = x.

        Zero logits give the exact score at large sigma.
        """
        log_pi = self._spectrum(logits).pi.log().to(logits)
        scaled = logits + log_pi - log_pi[torch.where(xt < self.n_states, xt, 0)][:, None]
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, scaled)

    def log_score_from_x0(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Return log s_y with s_y = (q P)_y / (q P)_x, x = x_t and P = P(sigma).

        q = softmax(logits) is the distribution of x0 at each position.
        """
        log_p = self._propagate(to_float64(logits).softmax(-1), to_float64(sigma)).clamp(min=TINY).log()
        log_score = (log_p - pick(log_p, xt.to(log_p.device))[:, None]).to(logits)
        return torch.where(one_hot(xt, self.n_states).bool(), 0.0, log_score)

    def score_entropy(
        self, log_score: Float[Tensor, "T V"], sigma: Sigma, xt: Tokens, x0: Tokens
    ) -> Float[Tensor, " T"]:
        """Return the denoising score entropy of each token in nats (arXiv 2310.16834, eq. 11).

        The factor d sigma / d t of the loss is not included.

        With x = x_t, r_y = P[x0, y] / P[x0, x] and K(a) = a (log a - 1), the entropy is the sum over y != x of
        Q[y, x] (s_y - r_y log s_y + K(r_y)).
        """
        log_s, p = to_float64(log_score), self.transition_probs(x0, sigma)
        x = torch.where(xt < self.n_states, xt, 0).to(p.device)
        r = p / pick(p, x)[:, None]
        rate_in = self._rates_into(x) * (1 - one_hot(x, self.n_states))
        loss = (rate_in * (log_s.exp() - r * log_s + r * (r.log() - 1))).sum(-1)
        return torch.where(x0 < self.n_states, loss.to(log_score), 0.0)

    def euler_probs(self, log_score: Float[Tensor, "T V"], xt: Tokens, step: Sigma) -> Float64[Tensor, "T S"]:
        """Return the probabilities after one Euler step: onehot(x_t) + step * reverse rate.

        `step` is the step in t, multiplied by the derivative d sigma / d t.
        """
        score = to_float64(log_score).exp()
        xt = xt.to(score.device)
        at_xt = one_hot(xt, self.n_states)
        moves = score * to_float64(step)[:, None] * self._rates_into(xt) * (1 - at_xt)
        return moves + at_xt * (1 - moves.sum(-1, keepdim=True))

    def _propagate(self, row: Float64[Tensor, "T V"], sigma: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """Multiply each row vector in `row` by the matrix exp(sigma Q) from the right. sigma may be negative."""
        process = self._spectrum(row)
        growth = torch.expm1(sigma[:, None] * process.eigenvalues)
        return row + ((row @ process.left) * growth) @ process.right

    def _probs_into(self, xt: Tokens, delta: Float64[Tensor, " T"]) -> Float64[Tensor, "T V"]:
        """Return the column P(delta)[., x_t], computed from the row P(delta)[x_t, .] by detailed balance."""
        pi = self._spectrum(delta).pi
        return self.transition_probs(xt, delta) * pi[xt.to(pi.device)][:, None] / pi

    def _rates_into(self, x: Tokens) -> Float64[Tensor, "T V"]:
        """Return the column Q[., x]: the rates into x from each state."""
        return self._spectrum(x).rates.T[x]

    def _spectrum(self, like: Tensor) -> Spectrum:
        """Return the spectrum on the tensor's device, or on the CPU if that device has no float64.

        The spectrum is copied to each device once.
        """
        device = float64_device(like.device)
        if device not in self._on_device:
            self._on_device[device] = Spectrum(*(constant.to(device) for constant in self._on_device[CPU]))
        return self._on_device[device]


def make_substitution_graph(
    matrix: str, kind: str = "log_odds", scale: float | None = None, rates: Sequence[Sequence[float]] | None = None
) -> SubstitutionGraph:
    """Return the graph of a matrix (see `substitution_rates`), or of `rates` that were computed from a matrix earlier.

    Raises:
        ValueError: as in SubstitutionGraph and substitution_rates, or if `rates` does not have 20 rows.
    """
    graph = SubstitutionGraph(substitution_rates(matrix, kind, scale) if rates is None else rates)
    if graph.n_states != N_STATES:
        raise ValueError(f"graph.rates must have {N_STATES} rows, one per amino acid, got {graph.n_states}")
    return graph
