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
from protlig_dd.diffusion.strata import error_of_pairs, strata, time_warp
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.inference.model import load_trained
from protlig_dd.tokenizer import ProteinTokenizer

from . import brute_force
from .conftest import exact_score_fn, graph_of, make_model, raises_value_error, random_batch, thorough

GRAPHS = ["absorbing", "uniform", "substitution"]
NOISE = LogLinearNoise(eps=1e-7, t_min=1e-5)

Scores = Callable[[Tensor, float], Tensor]
"""(batch, sites) states, sigma -> (batch, sites, n) log-scores."""


def zero_logits(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
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


class UnconvertedScores(ScoreFn):
    """A ScoreFn that returns the log-scores of its model unchanged, in the model's precision."""

    def __call__(self, batch: PackedBatch, sigma: Tensor) -> Tensor:
        return self.model(batch, sigma)


def all_states(graph: Graph, sites: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(graph.n_reverse_states)] * sites).view(-1, sites)


def exact_noise(graph: Graph) -> LogLinearNoise:
    return LogLinearNoise(eps=1e-7, t_min=1e-5, rate=-graph.lambda_2)


def quadrature_nodes(noise: LogLinearNoise) -> list[tuple[Tensor, float]]:
    """Return times and weights that approximate the mean over t in [t_min, 1].

    The rule is Gauss-Legendre quadrature in log sigma. The times are float64.
    """
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
    """Return, in float64, the bound on x0 that `nll_bound` estimates. Enumeration and quadrature replace the draws."""
    graph = graph_of(toy.graph, toy.n)
    noise, xt = noise or exact_noise(graph), all_states(graph, toy.sites)
    clean = torch.tensor(x0).expand_as(xt)
    batch = PackedBatch.pack(list(clean))  # one copy for each x_t

    def network(noised: PackedBatch, sigma: Tensor) -> Tensor:
        return scores(noised.tokens.view_as(xt), float(sigma[0])).view(-1, toy.n)

    score_fn = UnconvertedScores(network, graph, noise, "log_score")

    def probability(sigma: float) -> Tensor:
        """Return the probability of each x_t given x0."""
        return brute_force.transition(toy.graph, toy.n, sigma)[clean, xt].prod(1)

    total = 0.0
    for t, weight in quadrature_nodes(noise):
        nats = integrand(score_fn, batch, t.expand(len(xt)), xt.reshape(-1)).view_as(xt).sum(1)
        total += weight * float(probability(float(noise(t)[0])) @ nats)
    lowest, highest = (noise(torch.tensor(t, dtype=torch.float64))[0] for t in (noise.t_min, 1.0))
    total += float(graph.prior_kl(torch.tensor(x0), highest.expand(toy.sites)).sum())
    nats = reconstruction(score_fn, batch, lowest.expand(len(xt)), xt.reshape(-1)).view_as(xt).sum(1)
    return total + float(probability(float(lowest)) @ nats)


def sampled_distribution(toy: brute_force.Toy, scores: Scores) -> Tensor:
    """Return the distribution that a model with these scores samples in infinitely many steps, as a (n, ..., n) tensor.

    Start from the prior, integrate the master equation of the reverse process (rates Q[z, x] s_z), and denoise.
    """
    graph = graph_of(toy.graph, toy.n)
    noise = exact_noise(graph)
    xt, q = all_states(graph, toy.sites), brute_force.rate_matrix(toy.graph, toy.n)
    strides = graph.n_reverse_states ** torch.arange(toy.sites - 1, -1, -1)
    index = torch.arange(len(xt))
    lowest, highest = (float(noise(torch.tensor(t, dtype=torch.float64))[0]) for t in (noise.t_min, 1.0))

    def change(log_sigma: float, p: np.ndarray) -> np.ndarray:
        """Return dp / d log sigma; the integration runs from high to low sigma."""
        sigma = math.exp(log_sigma)
        score, rates = scores(xt, sigma).exp(), torch.zeros(len(xt), len(xt), dtype=torch.float64)
        for site, z in itertools.product(range(toy.sites), range(toy.n)):
            x = xt[:, site]
            target = index + (z - x) * strides[site]
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
def test_with_wrong_scores_the_bound_is_above_the_models_negative_log_likelihood(name: str) -> None:
    """Scores with a random error in every state do not belong to any distribution.

    Each sequence's bound is above its -log p under the model that samples with these scores. The average bound exceeds
    the entropy of the toy's p0 by more than KL(p0 || model).
    """
    toy = brute_force.random_toy(name)
    graph = graph_of(name, toy.n)
    noise = torch.randn((graph.n_reverse_states,) * 2 + (2, 3), generator=torch.Generator().manual_seed(1)).double()

    def wrong(xt: Tensor, sigma: float) -> Tensor:
        exact = toy.log_score(xt, sigma)
        return torch.where(exact == 0, 0.0, exact + 0.5 * math.exp(-sigma) * noise[tuple(xt.T)])

    # sampling with exact scores gives the distribution of the toy
    assert torch.allclose(sampled_distribution(toy, toy.log_score), toy.p0, rtol=1e-5)
    model_p = sampled_distribution(toy, wrong)
    assert float(model_p.sum()) == pytest.approx(1, abs=1e-6)
    bound = torch.zeros_like(toy.p0)
    for x0 in itertools.product(range(3), repeat=2):
        bound[x0] = exact_bound(toy, wrong, x0)
    assert (bound > -model_p.log()).all()
    entropy, cross = (-float((toy.p0 * p.log()).sum()) for p in (toy.p0, model_p))
    assert float((toy.p0 * bound).sum()) > cross > entropy + 1e-3
    assert ((bound + model_p.log()) < 1).all()  # the bound exceeds -log p by less than 1 nat


def test_the_exact_count_bound_is_the_average_over_decoding_orders() -> None:
    """A network without time conditioning decodes in a random order.

    The bound is the average of -log p over the orders. By Jensen's inequality it is above -log of the average of p.
    """
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


def test_zero_logits_have_a_bound_of_log_20_per_residue() -> None:
    batch = random_batch([50] * 40)

    score_fn = ScoreFn(zero_logits, Absorbing(), LogLinearNoise(), "x0")
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
    for i in range(40):  # the standard error of each single sequence is large enough too
        assert abs(float(integral.nats[i]) - 50 * math.log(20)) < 6 * float(integral.standard_error[i])


@pytest.mark.slow
@pytest.mark.parametrize(
    "graph", [Absorbing(), Uniform(), make_substitution_graph("BLOSUM62")], ids=["absorbing", "uniform", "blosum62"]
)
def test_the_bound_contains_prior_integral_and_reconstruction(graph: Graph) -> None:
    """With eps = t_min = 0.1 all three terms of the bound are large, and for zero logits their sum is still -log pi.

    Zero logits predict the equilibrium distribution pi: uniform, or the equilibrium of the substitution matrix.
    """
    noise, batch = LogLinearNoise(eps=0.1, t_min=0.1), random_batch([80] * 40)
    pi = graph.pi if isinstance(graph, SubstitutionGraph) else torch.full((20,), 0.05).double()
    score_fn = ScoreFn(zero_logits, graph, noise, "log_score")
    bound = nll_bound(score_fn, batch, generator=torch.Generator().manual_seed(0), draws=32)
    expected = -pi.log()[batch.tokens].view(40, 80).sum(1)
    excess, error = per_residue((bound.nats - expected).numpy(), bound.residues.numpy())
    assert error < 0.02
    assert abs(excess) < 4 * error


@pytest.mark.parametrize("matrix", ["BLOSUM62", "PAM30"])
def test_the_bound_includes_the_error_of_the_scores_at_high_noise(matrix: str) -> None:
    """Scores of a wrong equilibrium distribution are equally wrong at every noise level.

    The bound contains their error at high noise only if sigma is drawn up to sigma_max.
    """
    graph = make_substitution_graph(matrix)
    noise = build_noise({"name": "loglinear", "eps": None, "rate": None, "t_min": 1e-3}, graph)
    v = torch.randn(20, generator=torch.Generator().manual_seed(0)) / 2

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        return v - v[batch.tokens][:, None]

    score_fn, batch = ScoreFn(network, graph, noise, "log_score"), random_batch([80] * 40)
    bound = nll_bound(score_fn, batch, generator=torch.Generator().manual_seed(0), draws=32)
    excess, error = per_residue(bound.nats.numpy(), bound.residues.numpy())
    expected, all_pairs = 0.0, PackedBatch.pack(list(torch.arange(20).repeat_interleave(20)[:, None]))
    xt, counts = torch.arange(20).repeat(20), torch.bincount(batch.tokens, minlength=20) / 3200

    def mean_over_x(nats: Tensor, sigma: float) -> float:
        p = graph.transition_probs(all_pairs.tokens, torch.full((400,), sigma, dtype=torch.float64))
        return float((counts[all_pairs.tokens] * p.gather(1, xt[:, None])[:, 0] * nats).sum())

    def exact(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        return score_fn.log_score(network(batch, sigma).double(), batch.tokens, sigma)

    exact_fn = UnconvertedScores(exact, graph, noise, "log_score")
    for t, weight in quadrature_nodes(noise):
        nats = integrand(exact_fn, all_pairs, t.expand(400), xt)
        expected += weight * mean_over_x(nats, float(noise(t)[0]))
    lowest, highest = (noise(torch.tensor(t, dtype=torch.float64))[0] for t in (noise.t_min, 1.0))
    expected += float((counts * graph.prior_kl(torch.arange(20), highest.expand(20))).sum())
    expected += mean_over_x(reconstruction(exact_fn, all_pairs, lowest.expand(400), xt), float(lowest))
    assert abs(excess - expected) < 4 * error
    assert error < 0.1 * expected


def test_both_estimators_agree_and_exact_count_has_less_variance() -> None:
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


def test_context_letters_are_not_scored() -> None:
    tokens = torch.from_numpy(ProteinTokenizer().encode("MKXVBZJUOA")).long()
    only_context = torch.from_numpy(ProteinTokenizer().encode("XX")).long()
    score_fn = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0", time_conditioning=False)
    bound = nll_bound(
        score_fn,
        PackedBatch.pack([tokens, only_context]),
        generator=torch.Generator().manual_seed(1),
        draws=4,
        estimator="exact_count",
    )
    assert bound.residues.tolist() == [4, 0]
    assert float(bound.nats[0]) > 0
    assert float(bound.nats[1]) == 0


def test_invalid_options_of_the_bound_are_rejected() -> None:
    batch = random_batch([5])
    score_fn = ScoreFn(make_model(), Uniform(), LogLinearNoise(), "log_score")
    generator = torch.Generator()
    with raises_value_error("exact_count is for the absorbing graph"):
        nll_bound(score_fn, batch, generator=generator, estimator="exact_count")
    with raises_value_error("unknown estimator 'elbo'; choose from integral, exact_count"):
        nll_bound(score_fn, batch, generator=generator, estimator="elbo")
    with raises_value_error("draws must be at least 1, got 0"):
        nll_bound(score_fn, batch, generator=generator, draws=0)
    with raises_value_error("cannot average"):
        per_residue(np.zeros(2), np.zeros(2))


@given(st.integers(2, 30), st.integers(0, 999))
def test_the_corpus_average_is_total_nats_over_total_residues(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    residues = rng.integers(1, 500, n)
    nats = residues * rng.normal(2.9, 0.1, n)
    mean, error = per_residue(nats, residues)
    assert mean == pytest.approx(nats.sum() / residues.sum())
    deviations = [float(x - mean * r) for x, r in zip(nats, residues, strict=True)]
    assert error == pytest.approx((sum(d * d for d in deviations) * n / (n - 1)) ** 0.5 / residues.sum())
    shifted, shifted_error = per_residue(nats + residues, residues)
    assert shifted == pytest.approx(mean + 1)
    assert shifted_error == pytest.approx(error, abs=1e-9)


def test_the_standard_error_covers_the_population_average() -> None:
    """In about 95% of 400 random corpora, the average is within 1.96 standard errors of the population's average."""
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
def test_a_proteins_standard_error_is_the_standard_deviation_of_its_bounds(
    estimator: str, draws: int, covered: float, trained_run: Path, store: SequenceStore
) -> None:
    """Compute one protein's bound many times. With a trained network the bound depends on which residues are noised."""
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
    nats, errors = (torch.cat([getattr(bound, name) for bound in found]) for name in ("nats", "standard_error"))
    assert 1 - margin < float(errors.square().mean().sqrt() / nats.std()) < 1 + margin
    assert float(((nats - nats.mean()).abs() < 1.96 * errors).double().mean()) > covered


def test_strata_of_times_are_narrower_where_fewer_residues_are_masked() -> None:
    assert strata(8) == [
        (low, high, (high - low) / 2)
        for low, high in ((0, 1 / 16), (1 / 16, 1 / 4), (1 / 4, 9 / 16), (9 / 16, 1))
        for _ in range(2)
    ]
    assert strata(1) == [(0, 1, 1)]
    for draws in range(1, 20):
        for warp in (np.square, time_warp(Absorbing(), CosineNoise()), time_warp(Uniform(), GeometricNoise())):
            levels = strata(draws, warp)
            assert len(levels) == draws
            assert sum(weight for *_, weight in levels) == pytest.approx(1)
            assert all(0 <= low < high <= 1 for low, high, _ in levels)
    linear, cosine = (time_warp(Absorbing(), noise)(np.array([0.5]))[0] for noise in (LogLinearNoise(), CosineNoise()))
    # the masked fraction grows with t for log-linear noise, and with the square of t for cosine noise
    assert linear == pytest.approx(0.25, abs=0.02)
    assert cosine == pytest.approx(0.46, abs=0.02)


def test_an_odd_draw_is_left_out_of_the_standard_error() -> None:
    nats = torch.tensor([[1.0, 5.0], [2.0, 5.0], [7.0, 0.0], [4.0, 0.0], [99.0, 9.0]], dtype=torch.float64)
    weighted = nats * torch.tensor([weight for *_, weight in strata(5)], dtype=torch.float64)[:, None]
    # The last draw is left out. Two strata of widths 1/4 and 3/4 remain. Each contributes its width times half the
    # difference of its two draws.
    expected = math.sqrt((0.25 * (1 - 2) / 2) ** 2 + (0.75 * (7 - 4) / 2) ** 2)
    assert error_of_pairs(weighted).tolist() == pytest.approx([expected, 0])


@pytest.mark.parametrize(
    ("graph", "estimator"), [(Absorbing(), "exact_count"), (Absorbing(), "integral"), (Uniform(), "integral")]
)
@pytest.mark.parametrize("draws", [5, 8])
def test_draws_computed_together_equal_draws_computed_one_at_a_time(graph: Graph, estimator: str, draws: int) -> None:
    batch, token_counts = random_batch([7, 4, 9]), list[int]()
    model = make_model(time_conditioning=True).eval()

    def network(noised: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        token_counts.append(len(noised.tokens))
        with torch.no_grad():
            return model(noised, sigma)

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
    assert set(token_counts) == {20, 60, *([40] if draws % 3 else []), 20 * draws}
    for other in found[1:]:
        for name in ("nats", "standard_error", "token_nats", "pooled_nats", "pooled"):
            torch.testing.assert_close(getattr(other, name), getattr(found[0], name), rtol=1e-4, atol=1e-5)


def test_one_draw_has_no_standard_error() -> None:
    bound = nll_bound(
        ScoreFn(zero_logits, Absorbing(), LogLinearNoise(), "x0"),
        random_batch([9, 4]),
        generator=torch.Generator(),
        draws=1,
    )
    assert torch.isnan(bound.standard_error).all()
    assert torch.isfinite(bound.nats).all()


def test_the_numbers_of_masks_are_stratified_over_the_batch() -> None:
    """In one draw, 50 sequences of 50 residues have 1 to 50 masks, each number once.

    Each sigma matches the masked fraction of its sequence.
    """
    mask_counts: list[int] = []

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        mask_counts.extend(int((tokens == 20).sum()) for tokens in batch.unpack(batch.tokens))
        fraction = (torch.tensor(mask_counts) / 50).clamp(max=0.999)  # fully masked sequences get the largest sigma
        assert torch.allclose(-torch.expm1(-sigma), fraction)
        return torch.zeros(len(batch.tokens), 20)

    nll_bound(
        ScoreFn(network, Absorbing(), LogLinearNoise(), "x0"),
        random_batch([50] * 50),
        generator=torch.Generator().manual_seed(0),
        draws=1,
        estimator="exact_count",
    )
    assert sorted(mask_counts) == list(range(1, 51))
    assert mask_counts != sorted(mask_counts)
