import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_noise
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.substitution import SubstitutionGraph, make_substitution_graph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.likelihood import integrand, nll_bound, reconstruction
from protlig_dd.diffusion.noise import CosineNoise, GeometricNoise, LogLinearNoise
from protlig_dd.diffusion.numerics import clamp_negative
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.diffusion.strata import error_of_pairs, spread_of, strata
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.inference.model import load_trained
from protlig_dd.tokenizer import ProteinTokenizer

from . import brute_force
from .conftest import exact_score_fn, graph_of, make_model, random_batch, refuses, thorough

GRAPHS = ["absorbing", "uniform", "substitution"]
NOISE = LogLinearNoise(eps=1e-7, t_min=1e-5)

Scores = Callable[[Tensor, float], Tensor]
"""(batch, sites) states, sigma -> (batch, sites, n) log-scores."""


def zeros(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
    """A network that has learnt nothing."""
    return torch.zeros(len(batch.tokens), 20)


@pytest.mark.slow
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
            replace(exact_score_fn(toy), noise=NOISE if name == "absorbing" else GeometricNoise(0.001, 12.0, 0.001)),
            batch,
            generator=torch.Generator().manual_seed(5),
            draws=16,
            estimator=estimator,
        )
        mean, error = float(bound.nats.mean()), float(bound.nats.std()) / copies**0.5
        assert abs(mean + math.log(toy.p0[x0])) < 4 * error + 1e-3
        assert error < 0.15
        assert bound.residues.tolist() == [2] * copies


class GivenScores(ScoreFn):
    """Log-scores as they are given, in any precision."""

    def __call__(self, batch: PackedBatch, sigma: Tensor) -> Tensor:
        return self.model(batch, sigma)


def all_states(graph: Graph, sites: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(graph.n_reverse_states)] * sites).view(-1, sites)


def exact_noise(graph: Graph) -> LogLinearNoise:
    return LogLinearNoise(eps=1e-7, t_min=1e-5, rate=-graph.lambda_2)


def nodes_of(noise: LogLinearNoise) -> list[tuple[Tensor, float]]:
    """Times and weights whose sum is the mean over t in [t_min, 1]: Gauss-Legendre in log sigma, t in float64."""
    ends = [float(noise(torch.tensor(t, dtype=torch.float64))[0]) for t in (noise.t_min, 1.0)]
    points, weights = np.polynomial.legendre.leggauss(16)
    found = []
    for low, high in itertools.pairwise(np.linspace(*np.log(ends), 8)):
        for point, weight in zip(points, weights, strict=True):
            sigma = math.exp((low + high) / 2 + (high - low) / 2 * point)
            t = torch.tensor(-math.expm1(-noise.rate * sigma) / (1 - noise.eps), dtype=torch.float64)
            d_log_sigma = float(weight) * (high - low) / 2
            found.append((t, d_log_sigma * sigma / float(noise(t)[1]) / (1 - noise.t_min)))
    assert sum(weight for _, weight in found) == pytest.approx(1, abs=1e-8)
    return found


def exact_bound(
    toy: brute_force.Toy, scores: Scores, x0: tuple[int, ...], noise: LogLinearNoise | None = None
) -> float:
    """`nll_bound` of x0 under the given scores in float64, its draws replaced by enumeration and quadrature."""
    graph = graph_of(toy.graph, toy.n)
    noise, xt = noise or exact_noise(graph), all_states(graph, toy.sites)
    clean = torch.tensor(x0).expand_as(xt)
    batch = PackedBatch.pack(list(clean))  # as many copies as there are x_t

    def given(noised: PackedBatch, sigma: Tensor) -> Tensor:
        return scores(noised.tokens.view_as(xt), float(sigma[0])).view(-1, toy.n)

    score_fn = GivenScores(given, graph, noise, "log_score")

    def probability(sigma: float) -> Tensor:
        """Of every x_t."""
        return brute_force.transition(toy.graph, toy.n, sigma)[clean, xt].prod(1)

    total = 0.0
    for t, weight in nodes_of(noise):
        nats = integrand(score_fn, batch, t.expand(len(xt)), xt.reshape(-1)).view_as(xt).sum(1)
        total += weight * float(probability(float(noise(t)[0])) @ nats)
    lowest, highest = (noise(torch.tensor(t, dtype=torch.float64))[0] for t in (noise.t_min, 1.0))
    total += float(graph.prior_kl(torch.tensor(x0), highest.expand(toy.sites)).sum())
    nats = reconstruction(score_fn, batch, lowest.expand(len(xt)), xt.reshape(-1)).view_as(xt).sum(1)
    return total + float(probability(float(lowest)) @ nats)


def own_likelihood(toy: brute_force.Toy, scores: Scores) -> Tensor:
    """(n,) * sites: what the model with these scores samples with infinitely many steps.

    The prior is carried back by the reverse process' master equation, whose rates are Q[z, x] s_z, and then denoised.
    """
    graph = graph_of(toy.graph, toy.n)
    noise = exact_noise(graph)
    xt, q = all_states(graph, toy.sites), brute_force.rate_matrix(toy.graph, toy.n)
    place = graph.n_reverse_states ** torch.arange(toy.sites - 1, -1, -1)
    index = torch.arange(len(xt))
    lowest, highest = (float(noise(torch.tensor(t, dtype=torch.float64))[0]) for t in (noise.t_min, 1.0))

    def change(log_sigma: float, p: np.ndarray) -> np.ndarray:
        """dp / d log sigma, with sigma falling."""
        sigma = math.exp(log_sigma)
        score, rates = scores(xt, sigma).exp(), torch.zeros(len(xt), len(xt), dtype=torch.float64)
        for site, z in itertools.product(range(toy.sites), range(toy.n)):
            x = xt[:, site]
            target = index + (z - x) * place[site]
            rates[index, target] += torch.where(x == z, 0.0, q[z, x] * score[:, site, z])
        rates -= torch.diag(rates.sum(1))
        return np.asarray(-sigma * (torch.from_numpy(p) @ rates))

    start = brute_force.prior(toy.graph, toy.n, highest)[xt].prod(1).numpy()
    span = (math.log(highest), math.log(lowest))
    end = torch.from_numpy(solve_ivp(change, span, start, method="LSODA", rtol=1e-8, atol=1e-11).y[:, -1])
    sigma_T = torch.full((xt.numel(),), lowest, dtype=torch.float64)
    probs, _ = clamp_negative(graph.denoise_probs(scores(xt, lowest).view(-1, toy.n), xt.reshape(-1), sigma_T))
    decoded = probs.view(*xt.shape, -1)
    out = torch.zeros(toy.p0.shape, dtype=torch.float64)
    for x0 in itertools.product(range(toy.n), repeat=toy.sites):
        out[x0] = end @ torch.stack([decoded[:, site, state] for site, state in enumerate(x0)]).prod(0)
    return out


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("n", "sites"), [(3, 2), (4, 2), (3, 3)])
def test_with_exact_scores_the_bound_is_the_likelihood_to_a_millionth(name: str, n: int, sites: int) -> None:
    toy = brute_force.random_toy(name, n=n, sites=sites)
    for x0 in [(0,) * sites, (2, 1, 1)[:sites]]:
        assert exact_bound(toy, toy.log_score, x0) == pytest.approx(-math.log(toy.p0[x0]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_with_wrong_scores_the_bound_is_above_the_models_own_likelihood(name: str) -> None:
    """Scores that are wrong by another factor in every state belong to no distribution.

    Each sequence's bound is above its -log p under the model that samples with them, and the average is above the
    entropy by at least the divergence from that model.
    """
    toy = brute_force.random_toy(name)
    graph = graph_of(name, toy.n)
    noise = torch.randn((graph.n_reverse_states,) * 2 + (2, 3), generator=torch.Generator().manual_seed(1)).double()

    def wrong(xt: Tensor, sigma: float) -> Tensor:
        exact = toy.log_score(xt, sigma)
        return torch.where(exact == 0, 0.0, exact + 0.5 * math.exp(-sigma) * noise[tuple(xt.T)])

    assert torch.allclose(own_likelihood(toy, toy.log_score), toy.p0, rtol=1e-5)  # exact scores sample the toy itself
    own = own_likelihood(toy, wrong)
    assert float(own.sum()) == pytest.approx(1, abs=1e-6)
    bound = torch.zeros_like(toy.p0)
    for x0 in itertools.product(range(3), repeat=2):
        bound[x0] = exact_bound(toy, wrong, x0)
    assert (bound > -own.log()).all()
    entropy, cross = (-float((toy.p0 * p.log()).sum()) for p in (toy.p0, own))
    assert float((toy.p0 * bound).sum()) > cross > entropy + 1e-3
    assert ((bound + own.log()) < 1).all()  # above, but not by anything


def test_the_exact_count_is_the_average_over_orders_of_a_wrong_network() -> None:
    """A time-free network decodes in a random order: its own -log p is below the average of its -log p's by order."""
    logits = torch.randn(4, 4, 2, 3, generator=torch.Generator().manual_seed(3))
    log_q = logits.double().log_softmax(-1)

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        return logits[tuple(batch.tokens.view(-1, 2).T)].view(-1, 3)

    score_fn = ScoreFn(network, Absorbing(3), NOISE, "x0", time_conditioning=False)
    copies = 400
    for x0 in [(0, 1), (2, 2)]:
        orders = [
            log_q[3, 3, 0, x0[0]] + log_q[x0[0], 3, 1, x0[1]],
            log_q[3, 3, 1, x0[1]] + log_q[3, x0[1], 0, x0[0]],
        ]
        expected = -float(torch.stack(orders).mean())
        bound = nll_bound(
            score_fn,
            PackedBatch.pack([torch.tensor(x0)] * copies),
            generator=torch.Generator().manual_seed(0),
            draws=8,
            estimator="exact_count",
        )
        error = float(bound.nats.std()) / copies**0.5
        assert abs(float(bound.nats.mean()) - expected) < 4 * error
        assert error < 0.05
        assert expected > -math.log(sum(math.exp(order) for order in orders) / 2)


def test_a_zero_network_scores_log_20_a_residue() -> None:
    batch = random_batch([50] * 40)

    score_fn = ScoreFn(zeros, Absorbing(), LogLinearNoise(), "x0")
    exact = nll_bound(
        score_fn,
        batch,
        generator=torch.Generator().manual_seed(0),
        draws=4,
        estimator="exact_count",
    )
    assert torch.allclose(exact.nats, torch.full((40,), 50 * math.log(20)).double(), rtol=1e-6)
    integral = nll_bound(score_fn, batch, generator=torch.Generator().manual_seed(0), draws=16)
    nll, error = per_residue(integral.nats.numpy(), integral.residues.numpy())
    assert abs(nll - math.log(20)) < 4 * error
    for i in range(40):  # the per-sequence errors are of the right size too
        assert abs(float(integral.nats[i]) - 50 * math.log(20)) < 6 * float(integral.standard_error[i])


@pytest.mark.slow
@pytest.mark.parametrize(
    "graph", [Absorbing(), Uniform(), make_substitution_graph("BLOSUM62")], ids=["absorbing", "uniform", "blosum62"]
)
def test_every_term_of_the_bound_counts(graph: Graph) -> None:
    """With eps and t_min of 0.1, prior, integral and reconstruction are large; a zero network still gets -log pi.

    It believes in the equilibrium pi: uniform, or the substitution matrix' own.
    """
    noise, batch = LogLinearNoise(eps=0.1, t_min=0.1), random_batch([80] * 40)
    pi = graph.pi if isinstance(graph, SubstitutionGraph) else torch.full((20,), 0.05).double()
    score_fn = ScoreFn(zeros, graph, noise, "log_score")
    bound = nll_bound(score_fn, batch, generator=torch.Generator().manual_seed(0), draws=32)
    expected = -pi.log()[batch.tokens].view(40, 80).sum(1)
    excess, error = per_residue((bound.nats - expected).numpy(), bound.residues.numpy())
    assert error < 0.02
    assert abs(excess) < 4 * error


@pytest.mark.parametrize("matrix", ["BLOSUM62", "PAM30"])
def test_a_network_that_is_wrong_at_high_noise_pays_for_it(matrix: str) -> None:
    """Scores of another equilibrium cost the same at any noise; the draws must find all of it, up to sigma_max."""
    graph = make_substitution_graph(matrix)
    noise = build_noise({"name": "loglinear", "eps": None, "rate": None, "t_min": 1e-3}, graph)
    v = torch.randn(20, generator=torch.Generator().manual_seed(0)) / 2

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        return v - v[batch.tokens][:, None]

    score_fn, batch = ScoreFn(network, graph, noise, "log_score"), random_batch([80] * 40)
    bound = nll_bound(score_fn, batch, generator=torch.Generator().manual_seed(0), draws=32)
    excess, error = per_residue(bound.nats.numpy(), bound.residues.numpy())
    expected, every = 0.0, PackedBatch.pack(list(torch.arange(20).repeat_interleave(20)[:, None]))
    xt, counts = torch.arange(20).repeat(20), torch.bincount(batch.tokens, minlength=20) / 3200

    def mean_over_x(nats: Tensor, sigma: float) -> float:
        p = graph.transition_probs(every.tokens, torch.full((400,), sigma, dtype=torch.float64))
        return float((counts[every.tokens] * p.gather(1, xt[:, None])[:, 0] * nats).sum())

    def exact(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        return score_fn.log_score(network(batch, sigma).double(), batch.tokens, sigma)

    exact_fn = GivenScores(exact, graph, noise, "log_score")
    for t, weight in nodes_of(noise):
        nats = integrand(exact_fn, every, t.expand(400), xt)
        expected += weight * mean_over_x(nats, float(noise(t)[0]))
    lowest, highest = (noise(torch.tensor(t, dtype=torch.float64))[0] for t in (noise.t_min, 1.0))
    expected += float((counts * graph.prior_kl(torch.arange(20), highest.expand(20))).sum())
    expected += mean_over_x(reconstruction(exact_fn, every, lowest.expand(400), xt), float(lowest))
    assert abs(excess - expected) < 4 * error
    assert error < 0.1 * expected


def test_both_estimators_agree_on_a_network_and_exact_count_has_less_variance() -> None:
    batch = random_batch([40] * 25)
    score_fn = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0", time_conditioning=False)
    results = {}
    for estimator in ("integral", "exact_count"):
        results[estimator] = nll_bound(
            score_fn,
            batch,
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
    score_fn = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0", time_conditioning=False)
    bound = nll_bound(
        score_fn,
        PackedBatch.pack([tokens, nothing]),
        generator=torch.Generator().manual_seed(1),
        draws=4,
        estimator="exact_count",
    )
    assert bound.residues.tolist() == [4, 0]
    assert float(bound.nats[0]) > 0
    assert float(bound.nats[1]) == 0


def test_options_that_cannot_work_are_refused() -> None:
    batch = random_batch([5])
    score_fn = ScoreFn(make_model(), Uniform(), LogLinearNoise(), "log_score")
    generator = torch.Generator()
    with refuses("exact_count is for the absorbing graph"):
        nll_bound(score_fn, batch, generator=generator, estimator="exact_count")
    with refuses("no estimator 'elbo'"):
        nll_bound(score_fn, batch, generator=generator, estimator="elbo")
    with refuses("draws must be at least 1, got 0"):
        nll_bound(score_fn, batch, generator=generator, draws=0)
    with refuses("cannot average"):
        per_residue(np.zeros(2), np.zeros(2))


@given(st.integers(2, 30), st.integers(0, 999))
def test_the_corpus_figure_is_total_nats_over_total_residues(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    residues = rng.integers(1, 500, n)
    nats = residues * rng.normal(2.9, 0.1, n)
    mean, error = per_residue(nats, residues)
    assert mean == pytest.approx(nats.sum() / residues.sum())
    deviations = [float(x - mean * r) for x, r in zip(nats, residues, strict=True)]
    assert error == pytest.approx((sum(d * d for d in deviations) * n / (n - 1)) ** 0.5 / residues.sum())
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


@pytest.mark.slow
@pytest.mark.parametrize(("draws", "covered"), [(8, 0.8), (32, 0.88)])
@pytest.mark.parametrize("estimator", ["integral", "exact_count"])
def test_a_proteins_standard_error_is_the_spread_of_its_bounds(
    estimator: str, draws: int, covered: float, trained_run: Path, store: SequenceStore
) -> None:
    """One protein many times: of a trained network, whose residues cost unlike amounts."""
    trained = load_trained(str(trained_run), device="cpu", precision="fp32")
    tokens = next(store[row] for row in store.split("test") if 60 < len(store[row]) < 130)[:62]
    times, margin = (4, 0.12) if thorough() else (2, 0.25)
    found = [
        nll_bound(
            trained.score_fn,
            PackedBatch.pack([torch.from_numpy(tokens.astype(np.int64))] * 100),
            generator=torch.Generator().manual_seed(seed),
            draws=draws,
            estimator=estimator,
        )
        for seed in range(times)
    ]
    nats, errors = (torch.cat([getattr(one, name) for one in found]) for name in ("nats", "standard_error"))
    assert 1 - margin < float(errors.square().mean().sqrt() / nats.std()) < 1 + margin
    assert float(((nats - nats.mean()).abs() < 1.96 * errors).double().mean()) > covered


def test_strata_are_narrow_where_little_is_masked() -> None:
    assert strata(8) == [
        (low, high, (high - low) / 2)
        for low, high in ((0, 1 / 16), (1 / 16, 1 / 4), (1 / 4, 9 / 16), (9 / 16, 1))
        for _ in range(2)
    ]
    assert strata(1) == [(0, 1, 1)]
    for draws in range(1, 20):
        for spread in (np.square, spread_of(Absorbing(), CosineNoise()), spread_of(Uniform(), GeometricNoise())):
            levels = strata(draws, spread)
            assert len(levels) == draws
            assert sum(weight for *_, weight in levels) == pytest.approx(1)
            assert all(0 <= low < high <= 1 for low, high, _ in levels)
    linear, cosine = (spread_of(Absorbing(), noise)(np.array([0.5]))[0] for noise in (LogLinearNoise(), CosineNoise()))
    assert linear == pytest.approx(0.25, abs=0.02)  # what is masked grows with t there, with its square here
    assert cosine == pytest.approx(0.46, abs=0.02)


def test_an_odd_draw_is_left_out_of_the_error() -> None:
    nats = torch.tensor([[1.0, 5.0], [2.0, 5.0], [7.0, 0.0], [4.0, 0.0], [99.0, 9.0]], dtype=torch.float64)
    weighted = nats * torch.tensor([weight for *_, weight in strata(5)], dtype=torch.float64)[:, None]
    # strata of a quarter and three quarters, without the last draw; half of each difference
    expected = math.sqrt((0.25 * (1 - 2) / 2) ** 2 + (0.75 * (7 - 4) / 2) ** 2)
    assert error_of_pairs(weighted).tolist() == pytest.approx([expected, 0])


@pytest.mark.parametrize(
    ("graph", "estimator"), [(Absorbing(), "exact_count"), (Absorbing(), "integral"), (Uniform(), "integral")]
)
@pytest.mark.parametrize("draws", [5, 8])
def test_draws_that_are_computed_together_are_the_same(graph: Graph, estimator: str, draws: int) -> None:
    batch, seen = random_batch([7, 4, 9]), list[int]()
    model = make_model(time_conditioning=True).eval()

    def network(some: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(len(some.tokens))
        with torch.no_grad():
            return model(some, sigma)

    found = [
        nll_bound(
            ScoreFn(network, graph, LogLinearNoise(), "x0"),
            batch,
            draws=draws,
            estimator=estimator,
            generator=torch.Generator().manual_seed(3),
            tokens_at_once=tokens,
        )
        for tokens in (0, 65, 1000)
    ]
    assert set(seen) == {20, 60, *([40] if draws % 3 else []), 20 * draws}
    for other in found[1:]:
        for name in ("nats", "standard_error", "token_nats", "pooled_nats", "pooled"):
            torch.testing.assert_close(getattr(other, name), getattr(found[0], name), rtol=1e-4, atol=1e-5)


def test_one_draw_has_no_standard_error() -> None:
    bound = nll_bound(
        ScoreFn(zeros, Absorbing(), LogLinearNoise(), "x0"), random_batch([9, 4]), generator=torch.Generator(), draws=1
    )
    assert torch.isnan(bound.standard_error).all()
    assert torch.isfinite(bound.nats).all()


def test_the_places_of_the_draws_are_stratified_over_the_batch() -> None:
    """With one draw each, k of 50 sequences of 50 residues takes every value once; the network is shown k/L."""
    seen: list[int] = []

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        seen.extend(int((tokens == 20).sum()) for tokens in batch.unpack(batch.tokens))
        share = (torch.tensor(seen) / 50).clamp(max=0.999)  # all of it, as far as the noise goes
        assert torch.allclose(-torch.expm1(-sigma), share)
        return torch.zeros(len(batch.tokens), 20)

    nll_bound(
        ScoreFn(network, Absorbing(), LogLinearNoise(), "x0"),
        random_batch([50] * 50),
        generator=torch.Generator().manual_seed(0),
        draws=1,
        estimator="exact_count",
    )
    assert sorted(seen) == list(range(1, 51))
    assert seen != sorted(seen)
