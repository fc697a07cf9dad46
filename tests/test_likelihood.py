import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graph import Absorbing, Uniform
from protlig_dd.diffusion.likelihood import nll_bound, per_residue
from protlig_dd.diffusion.noise import GeometricNoise, LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn, make_score_fn
from protlig_dd.tokenizer import ProteinTokenizer

from . import brute_force
from .conftest import graph_of, make_model, random_batch, refuses

NOISE = LogLinearNoise(eps=1e-7, t_min=1e-5)


def exact_score(toy: brute_force.Toy) -> ScoreFn:
    """The toy's exact scores for a pack of its sequences, one sigma after the other."""

    def score_fn(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        xt = batch.tokens.view(-1, toy.sites)
        rows = [toy.log_score(xt[i : i + 1], float(sigma[i])) for i in range(len(xt))]
        return torch.cat(rows).reshape(-1, toy.n).float()

    return score_fn


def zeros(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
    """A network that has learnt nothing."""
    return torch.zeros(len(batch.tokens), 20)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [("absorbing", "integral"), ("absorbing", "exact_count"), ("uniform", "integral"), ("substitution", "integral")],
)
def test_with_exact_scores_the_bound_is_the_likelihood(name: str, estimator: str) -> None:
    toy = brute_force.random_toy(name, n=3, sites=2)
    copies = 120
    for x0 in [(0, 0), (2, 1)]:
        batch = PackedBatch.pack([torch.tensor(x0)] * copies)
        bound = nll_bound(
            exact_score(toy),
            batch,
            graph_of(name, 3),
            GeometricNoise(1e-5, 25.0, 1e-5) if name == "substitution" else NOISE,
            generator=torch.Generator().manual_seed(5),
            draws=16,
            estimator=estimator,
        )
        mean, error = float(bound.nats.mean()), float(bound.nats.std()) / copies**0.5
        assert abs(mean + math.log(toy.p0[x0])) < 4 * error + 1e-3
        assert error < 0.15
        assert bound.residues.tolist() == [2] * copies


def exact_bound(toy: brute_force.Toy, scores: brute_force.Toy, x0: tuple[int, ...], sigma_max: float = 30.0) -> float:
    """The bound of x0 under the scores of another toy, all in float64: no draw, no time grid.

    Every x_t is enumerated, and the integral over sigma (dsigma(t) dt) is Gauss-Legendre quadrature in log sigma.
    """
    sigma_min = 1e-6
    graph = graph_of(toy.graph, toy.n)
    s = graph.n_reverse_states
    xt = torch.cartesian_prod(*[torch.arange(s)] * toy.sites).view(-1, toy.sites)
    clean = torch.tensor(x0).expand_as(xt)

    def terms(sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probabilities of every x_t, the exact log-scores, sigma per token."""
        p = brute_force.transition(toy.graph, toy.n, sigma)
        probability = p[clean, xt].prod(1)
        log_score = scores.log_score(xt, sigma).view(-1, toy.n)
        return probability, log_score, torch.full((xt.numel(),), sigma, dtype=torch.float64)

    total = 0.0
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(math.log(sigma_min), math.log(sigma_max), 11)
    for low, high in itertools.pairwise(edges):
        for node, weight in zip(nodes, weights, strict=True):
            sigma = math.exp((low + high) / 2 + (high - low) / 2 * node)
            probability, log_score, sigma_T = terms(sigma)
            loss = graph.score_entropy(log_score, sigma_T, xt.reshape(-1), clean.reshape(-1)).view_as(xt).sum(1)
            total += float(weight) * (high - low) / 2 * sigma * float(probability @ loss)
    prior = graph.prior_kl(torch.tensor(x0), torch.full((toy.sites,), sigma_max, dtype=torch.float64)).sum()
    probability, log_score, sigma_T = terms(sigma_min)
    decoder = graph.denoise_probs(log_score, xt.reshape(-1), sigma_T).clamp(min=1e-300)
    log_p = decoder.gather(1, clean.reshape(-1, 1)).log().view_as(xt).sum(1)
    return total + float(prior) - float(probability @ log_p)


@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
@pytest.mark.parametrize(("n", "sites"), [(3, 2), (4, 2), (3, 3)])
def test_with_exact_scores_the_bound_is_the_likelihood_to_a_millionth(name: str, n: int, sites: int) -> None:
    toy = brute_force.random_toy(name, n=n, sites=sites)
    for x0 in [(0,) * sites, (2, 1, 1)[:sites]]:
        assert exact_bound(toy, toy, x0) == pytest.approx(-math.log(toy.p0[x0]), abs=1e-6)


@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
def test_with_wrong_scores_the_average_bound_exceeds_the_entropy(name: str) -> None:
    """The wrong scores are another distribution's exact ones, so the gap is known: at least KL(toy || other)."""
    toy, wrong = brute_force.random_toy(name), brute_force.random_toy(name, seed=9)
    bound = sum(float(toy.p0[x]) * exact_bound(toy, wrong, x) for x in itertools.product(range(3), repeat=2))
    entropy = -float((toy.p0 * toy.p0.log()).sum())
    divergence = float((toy.p0 * (toy.p0 / wrong.p0).log()).sum())
    assert bound > entropy + divergence - 1e-6
    assert divergence > 0.05


def test_with_a_wrong_network_the_average_bound_exceeds_the_entropy() -> None:
    toy = brute_force.random_toy("absorbing", n=3, sites=2)
    wrong = brute_force.random_toy("absorbing", n=3, sites=2, seed=9)
    states = list(itertools.product(range(3), repeat=2))
    copies = 60
    batch = PackedBatch.pack([torch.tensor(x) for x in states for _ in range(copies)])
    bound = nll_bound(
        exact_score(wrong),
        batch,
        Absorbing(3),
        NOISE,
        generator=torch.Generator().manual_seed(0),
        draws=8,
        estimator="exact_count",
    )
    p0 = torch.stack([toy.p0[x] for x in states])
    cross = float((bound.nats.view(len(states), copies).mean(1) * p0).sum())
    exact_cross = -float((p0 * torch.stack([wrong.p0[x] for x in states]).log()).sum())
    entropy = -float((p0 * p0.log()).sum())
    assert cross > entropy + 0.05
    assert cross == pytest.approx(exact_cross, abs=0.05)  # the wrong scores are another distribution's exact ones


def test_a_zero_network_scores_log_20_a_residue() -> None:
    batch = random_batch([50] * 40)

    score_fn = make_score_fn(zeros, Absorbing(), "x0")
    exact = nll_bound(
        score_fn,
        batch,
        Absorbing(),
        LogLinearNoise(),
        generator=torch.Generator().manual_seed(0),
        draws=4,
        estimator="exact_count",
    )
    assert torch.allclose(exact.nats, torch.full((40,), 50 * math.log(20)).double(), rtol=1e-6)
    integral = nll_bound(
        score_fn, batch, Absorbing(), LogLinearNoise(), generator=torch.Generator().manual_seed(0), draws=16
    )
    nll, error = per_residue(integral.nats.numpy(), integral.residues.numpy())
    assert abs(nll - math.log(20)) < 4 * error
    for i in range(40):  # the per-sequence errors are of the right size too
        assert abs(float(integral.nats[i]) - 50 * math.log(20)) < 6 * float(integral.standard_error[i])


def test_every_term_of_the_bound_counts() -> None:
    """With eps and t_min of 0.1, prior, integral and reconstruction are large; together they are still log 20.

    eps log 20 + (1 - eps)(1 - t_min) log 20 + (1 - eps) t_min log 20 for the uniform guess.
    """
    noise, batch = LogLinearNoise(eps=0.1, t_min=0.1), random_batch([80] * 40)

    score_fn = make_score_fn(zeros, Absorbing(), "log_score")
    bound = nll_bound(score_fn, batch, Absorbing(), noise, generator=torch.Generator().manual_seed(0), draws=32)
    nll, error = per_residue(bound.nats.numpy(), bound.residues.numpy())
    assert error < 0.02
    assert abs(nll - math.log(20)) < 4 * error


def test_both_estimators_agree_on_a_network_and_exact_count_has_less_variance() -> None:
    batch = random_batch([40] * 25)
    score_fn = make_score_fn(make_model(), Absorbing(), "x0", time_conditioning=False)
    results = {}
    for estimator in ("integral", "exact_count"):
        results[estimator] = nll_bound(
            score_fn,
            batch,
            Absorbing(),
            LogLinearNoise(),
            generator=torch.Generator().manual_seed(1),
            draws=16,
            estimator=estimator,
        )
    difference = (results["integral"].nats - results["exact_count"].nats).numpy()
    mean, error = per_residue(difference, np.full(25, 40))
    assert abs(mean) < 4 * error
    assert results["exact_count"].standard_error.mean() < 0.5 * results["integral"].standard_error.mean()


def test_context_letters_are_given_not_scored() -> None:
    tokens = torch.from_numpy(ProteinTokenizer().encode("MKXVBZJUOA")).long()
    nothing = torch.from_numpy(ProteinTokenizer().encode("XX")).long()
    score_fn = make_score_fn(make_model(), Absorbing(), "x0", time_conditioning=False)
    bound = nll_bound(
        score_fn,
        PackedBatch.pack([tokens, nothing]),
        Absorbing(),
        LogLinearNoise(),
        generator=torch.Generator().manual_seed(1),
        draws=4,
        estimator="exact_count",
    )
    assert bound.residues.tolist() == [4, 0]
    assert float(bound.nats[0]) > 0
    assert float(bound.nats[1]) == 0


def test_options_that_cannot_work_are_refused() -> None:
    batch = random_batch([5])
    score_fn = make_score_fn(make_model(), Uniform(), "log_score")
    generator = torch.Generator()
    with refuses("exact_count is for the absorbing graph"):
        nll_bound(score_fn, batch, Uniform(), LogLinearNoise(), generator=generator, estimator="exact_count")
    with refuses("no estimator 'elbo'"):
        nll_bound(score_fn, batch, Uniform(), LogLinearNoise(), generator=generator, estimator="elbo")
    with refuses("draws must be at least 1, got 0"):
        nll_bound(score_fn, batch, Uniform(), LogLinearNoise(), generator=generator, draws=0)
    with refuses("cannot average"):
        per_residue(np.zeros(2), np.zeros(2))


@given(st.integers(2, 30), st.integers(0, 999))
def test_the_corpus_figure_is_total_nats_over_total_residues(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    residues = rng.integers(1, 500, n)
    nats = residues * rng.normal(2.9, 0.1, n)
    mean, error = per_residue(nats, residues)
    assert mean == pytest.approx(nats.sum() / residues.sum())
    assert error >= 0
    shifted, same = per_residue(nats + residues, residues)
    assert shifted == pytest.approx(mean + 1)
    assert same == pytest.approx(error, abs=1e-9)


def test_the_standard_error_covers_the_truth() -> None:
    """Of 400 corpora drawn alike, about 95% lie within 1.96 standard errors of the population's figure."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        residues = rng.integers(50, 500, 100)
        nats = residues * (2.9 + 0.1 * rng.standard_normal(100))
        mean, error = per_residue(nats, residues)
        hits += abs(mean - 2.9) < 1.96 * error
    assert 0.91 < hits / 400 < 0.98
