"""An independent reference for the diffusion, computed with dense float64 matrices and by enumeration of all states.

It does not use the formulas of protlig_dd.diffusion. A toy is a joint distribution p0 over a few sites with n states
each. S, the number of states of a noised site, is n + 1 for the absorbing graph, whose last state is the mask, and n
for the other graphs.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def rate_matrix(graph: str, n: int) -> Tensor:
    """Return the rates Q of shape (S, S). Q[i, j] is the rate i -> j, and rows sum to 0.

    For `substitution` Q is a random reversible matrix with mean rate 1.
    """
    if graph == "substitution":
        generator = torch.Generator().manual_seed(n)
        pi = torch.rand(n, generator=generator, dtype=torch.float64) + 0.2
        pi = pi / pi.sum()
        exchange = torch.rand(n, n, generator=generator, dtype=torch.float64) ** 3 + 0.01
        q = (exchange + exchange.T) * pi
        q = q - torch.diag(q.diag())
        q = q / (pi * q.sum(1)).sum()
        return q - torch.diag(q.sum(1))
    if graph == "uniform":
        return torch.full((n, n), 1 / n, dtype=torch.float64) - torch.eye(n, dtype=torch.float64)
    if graph != "absorbing":
        raise KeyError(graph)
    q = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    q[:n, :n] = -torch.eye(n, dtype=torch.float64)
    q[:n, n] = 1.0
    return q


@functools.cache
def transition(graph: str, n: int, sigma: float) -> Tensor:
    """Return P(sigma) = exp(sigma Q), of shape (S, S)."""
    return torch.linalg.matrix_exp(sigma * rate_matrix(graph, n))


def equilibrium(graph: str, n: int) -> Tensor:
    """Return the equilibrium (n,) of the uniform or the substitution process: its distribution at a huge sigma."""
    return transition(graph, n, 1e4)[0]


def score_entropy(graph: str, n: int, sigma: float, log_score: Tensor, xt: int, x0: int) -> tuple[float, float]:
    """Return the score entropy of one token, and the largest absolute value of its terms.

    With x = `xt` the score entropy is sum_{y != x} Q[y, x] (s_y - r_y log s_y + K(r_y)), where
    P = exp(sigma Q), r_y = P[x0, y] / P[x0, x] and K(r) = r (log r - 1). The rounding error in float32 is proportional
    to the largest term.

    Args:
        log_score: log s_y for each of the n states y.
    """
    rates, p = rate_matrix(graph, n)[:, xt].tolist(), transition(graph, n, sigma)[x0].tolist()
    log_s = log_score.tolist()
    terms = [0.0]
    for y, rate in enumerate(rates):
        if y == xt or rate == 0:
            continue
        r = p[y] / p[xt]
        k = r * (math.log(r) - 1) if r > 0 else 0.0
        terms += [rate * term for term in (math.exp(log_s[y]), -r * log_s[y], k)]
    return sum(terms), max(abs(term) for term in terms)


@dataclass
class Toy:
    """A joint distribution p0 over `sites` sites with `n` states each.

    The methods compute marginals, scores and posteriors by enumeration.
    """

    graph: str
    n: int
    sites: int
    p0: Tensor
    """The probability of each combination of states, of shape (n,) * sites. It sums to 1."""

    def marginal(self, sigma: float) -> Tensor:
        """Return p_t, the distribution of x_t at total noise `sigma`, of shape (S,) * sites.

        It is p0 with P(sigma) applied to every site.
        """
        p = transition(self.graph, self.n, sigma)[: self.n]
        out = self.p0
        for _ in range(self.sites):  # sum over the first axis (x0 of one site), and append the axis of its x_t
            out = torch.tensordot(out, p, dims=([0], [0]))
        return out

    def log_score(self, xt: Tensor, sigma: float) -> Tensor:
        """Return the exact log-scores log(p_t(x') / p_t(x)) of x = `xt`, of shape (batch, sites, n).

        x' is x with one site set to the state y. The log-score is 0 if y is the state of x at this site, and at
        unmasked sites of the absorbing graph.
        """
        log_p = self.marginal(sigma).log()
        changed = xt[:, None, None, :].repeat(1, self.sites, self.n, 1)  # (batch, site, y, sites)
        for site in range(self.sites):
            changed[:, site, :, site] = torch.arange(self.n)
        out = log_p[changed.unbind(-1)] - log_p[xt.unbind(-1)][:, None, None]
        unmasked = xt < self.n if self.graph == "absorbing" else torch.zeros_like(xt, dtype=torch.bool)
        return torch.where(unmasked[..., None], 0.0, out)

    def posterior(self, xt: Tensor, sigma: float) -> Tensor:
        """Return p(x0 at a site | x_t at all other sites), of shape (batch, sites, n), by enumeration."""
        p = transition(self.graph, self.n, sigma)
        out = torch.zeros(*xt.shape, self.n, dtype=torch.float64)
        for x0 in itertools.product(range(self.n), repeat=self.sites):
            like = p[torch.tensor(x0), xt]
            for site in range(self.sites):
                others = torch.cat([like[:, :site], like[:, site + 1 :]], dim=1).prod(1)
                out[:, site, x0[site]] += self.p0[x0] * others
        return out / out.sum(-1, keepdim=True)


def prior(graph: str, n: int, sigma_max: float) -> Tensor:
    """Return the distribution of shape (S,) from which sampling starts, at the total noise `sigma_max`."""
    if graph != "absorbing":
        return equilibrium(graph, n)
    out = torch.full((n + 1,), math.exp(-sigma_max) / n, dtype=torch.float64)
    out[n] = 1 - math.exp(-sigma_max)
    return out


def random_toy(graph: str, n: int = 3, sites: int = 2, seed: int = 0) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    p0 = torch.rand((n,) * sites, generator=generator, dtype=torch.float64) ** 2 + 0.01
    return Toy(graph, n, sites, p0 / p0.sum())
