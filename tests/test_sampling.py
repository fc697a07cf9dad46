from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graph import Absorbing, Uniform
from protlig_dd.diffusion.noise import GeometricNoise, LogLinearNoise, Noise
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn, make_score_fn
from protlig_dd.runtime.random import keyed_generator

from . import brute_force
from .conftest import graph_of, make_model, refuses

CHAINS = 100_000
NOISES: dict[str, Noise] = {
    "absorbing": LogLinearNoise(1e-5, 1e-5),
    "uniform": GeometricNoise(1e-4, 12.0, 1e-3),
    "substitution": GeometricNoise(1e-4, 16.0, 1e-3),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_score(toy: brute_force.Toy) -> ScoreFn:
    """Exact scores of sequences <bos> sites <eos>; all have the same sigma while sampling."""
    s = toy.n + 1 if toy.graph == "absorbing" else toy.n
    states = torch.cartesian_prod(*[torch.arange(s)] * toy.sites).view(-1, toy.sites)
    place = s ** torch.arange(toy.sites - 1, -1, -1)

    def score_fn(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        inner = batch.tokens.view(-1, toy.sites + 2)[:, 1:-1]
        table = toy.log_score(states, float(sigma[0])).float()
        edge = torch.zeros(len(inner), 1, toy.n)
        return torch.cat([edge, table[(inner * place).sum(1)], edge], dim=1).view(-1, toy.n)

    return score_fn


def frequencies(samples: list[np.ndarray], n: int) -> np.ndarray:
    """How often each state of the toy came out."""
    stacked = np.stack(samples).astype(int)
    place = n ** np.arange(stacked.shape[1] - 1, -1, -1)
    return np.bincount(stacked @ place, minlength=n ** stacked.shape[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "predictor", "steps"),
    [
        ("absorbing", "analytic", 100),
        ("absorbing", "euler", 100),
        ("absorbing", "ancestral", 60),
        ("uniform", "analytic", 300),
        ("uniform", "euler", 300),
        ("substitution", "analytic", 300),
        ("substitution", "euler", 300),
    ],
)
def test_samples_have_the_distribution_of_the_exact_scores(name: str, predictor: str, steps: int) -> None:
    toy = brute_force.random_toy(name, n=3, sites=2, seed=2)
    samples = sample(exact_score(toy), graph_of(name, 3), NOISES[name], [2] * CHAINS, steps, predictor, seeded(0))
    assert chisquare(frequencies(samples, 3), CHAINS * toy.p0.flatten().numpy()).pvalue > 1e-3


def test_absorbing_samples_match_in_one_step_at_a_time_even_with_few_steps() -> None:
    """With a single site there is nothing to be wrong about: two steps are exact."""
    toy = brute_force.random_toy("absorbing", n=4, sites=1, seed=1)
    samples = sample(exact_score(toy), Absorbing(4), LogLinearNoise(1e-5, 1e-5), [1] * 20_000, 2, "analytic", seeded(0))
    assert chisquare(frequencies(samples, 4), 20_000 * toy.p0.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("parametrisation", ["x0", "log_score"])
@pytest.mark.parametrize(
    ("name", "predictor"),
    [
        ("absorbing", "analytic"),
        ("absorbing", "euler"),
        ("absorbing", "ancestral"),
        ("uniform", "analytic"),
        ("uniform", "euler"),
        ("substitution", "analytic"),
        ("substitution", "euler"),
    ],
)
def test_only_amino_acids_come_out_at_the_lengths_asked_for(name: str, predictor: str, parametrisation: str) -> None:
    graph = graph_of(name, 20)
    score_fn = make_score_fn(make_model(), graph, parametrisation)
    counts: Counter[str] = Counter()
    ticks: list[int] = []
    lengths = [1, 30, 7]
    samples = sample(
        score_fn, graph, LogLinearNoise(), lengths, 5, predictor, seeded(0),
        on_step=lambda: ticks.append(1), counts=counts,
    )  # fmt: skip
    assert [len(ids) for ids in samples] == lengths
    assert all(ids.dtype == np.uint8 and ids.max() < 20 for ids in samples)
    assert len(ticks) == 6
    assert counts["draws"] == 38 * 6
    again = sample(score_fn, graph, LogLinearNoise(), lengths, 5, predictor, seeded(0))
    assert all(np.array_equal(a, b) for a, b in zip(samples, again, strict=True))


@pytest.mark.parametrize("predictor", ["analytic", "ancestral"])
def test_what_a_sequence_draws_does_not_depend_on_its_pack(predictor: str) -> None:
    toy = brute_force.random_toy("absorbing", n=20, sites=2, seed=3)

    def draw(indices: list[int]) -> list[list[int]]:
        generators = [keyed_generator(7, "sample", i, torch.device("cpu")) for i in indices]
        noise = LogLinearNoise()
        samples = sample(exact_score(toy), Absorbing(), noise, [2] * len(indices), 10, predictor, generators)
        return [ids.tolist() for ids in samples]

    together = draw(list(range(12)))
    assert draw([5, 2]) == [together[5], together[2]]
    assert [draw([i])[0] for i in range(12)] == together
    assert len({tuple(ids) for ids in together}) > 6


def test_ancestral_numbers_of_masks_follow_the_noise() -> None:
    seen: list[list[int]] = []

    def score_fn(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        seen.append([int((tokens == 20).sum()) for tokens in batch.unpack(batch.tokens)])
        return torch.randn(len(batch.tokens), 20, generator=seeded(1))

    sample(score_fn, Absorbing(), LogLinearNoise(1e-9, 1e-9), [40, 7], 10, "ancestral", seeded(0))
    assert [masked for masked, _ in seen] == [40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0]
    assert [masked for _, masked in seen] == [round(7 * (1 - i / 10)) for i in range(11)]


def test_a_time_free_network_is_not_asked_again_about_what_has_not_changed() -> None:
    asked: list[int] = []
    network = make_score_fn(make_model(), Absorbing(), "x0", time_conditioning=False)

    def score_fn(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        asked.append(len(batch.lengths))
        return network(batch, sigma)

    for predictor in ("analytic", "ancestral"):
        plain = sample(network, Absorbing(), LogLinearNoise(), [3, 9, 5], 60, predictor, seeded(3))
        asked.clear()
        counts: Counter[str] = Counter()
        cached = sample(
            score_fn, Absorbing(), LogLinearNoise(), [3, 9, 5], 60, predictor, seeded(3), time_free=True, counts=counts
        )
        assert all(np.array_equal(a, b) for a, b in zip(plain, cached, strict=True))
        assert sum(asked) == counts["evaluated"]
        assert counts["evaluated"] + counts["skipped"] == 3 * 61
        assert counts["evaluated"] <= 3 + 17  # every residue moves once
        assert counts["evaluated"] >= 3 + 3


def independent_toy(n: int, graph: str = "absorbing") -> brute_force.Toy:
    p = torch.rand(2, n, generator=seeded(8), dtype=torch.float64) + 0.1
    p = p / p.sum(1, keepdim=True)
    return brute_force.Toy(graph, n, 2, p[0][:, None] * p[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
def test_temperature_and_top_p_sharpen_every_position(name: str) -> None:
    toy, chains = independent_toy(4, name), 10_000

    steps = 40 if name == "absorbing" else 200

    def draw(**options: float) -> np.ndarray:
        return frequencies(
            sample(
                exact_score(toy), graph_of(name, 4), NOISES[name], [2] * chains, steps, "analytic", seeded(0), **options
            ),
            4,
        )

    cold = toy.p0 ** (1 / 0.6)
    assert chisquare(draw(temperature=0.6), (chains * cold / cold.sum()).flatten().numpy()).pvalue > 1e-3
    kept = []
    for p in (toy.p0.sum(1), toy.p0.sum(0)):
        ranked = p.sort(descending=True)
        inside = ranked.values.cumsum(0) - ranked.values < 0.6
        kept.append(torch.zeros(4).double().scatter(0, ranked.indices, ranked.values * inside))
    nucleus = (kept[0][:, None] * kept[1]).flatten().numpy()
    seen = draw(top_p=0.6)
    assert 1 < (nucleus > 0).sum() < 16
    assert seen[nucleus == 0].sum() < 1e-3 * chains
    assert chisquare(seen[nucleus > 0], seen[nucleus > 0].sum() * nucleus[nucleus > 0] / nucleus.sum()).pvalue > 1e-3


def test_without_sharpening_the_model_itself_is_sampled() -> None:
    score_fn = make_score_fn(make_model(), Absorbing(), "x0")
    plain, same, cold = (
        sample(score_fn, Absorbing(), LogLinearNoise(), [200], 10, "analytic", seeded(0), **options)[0]
        for options in ({}, {"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.2})
    )
    assert np.array_equal(plain, same)
    assert not np.array_equal(plain, cold)
    assert len(np.unique(cold)) < len(np.unique(plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "predictor"),
    [("absorbing", "analytic"), ("absorbing", "ancestral"), ("uniform", "analytic"), ("substitution", "analytic")],
)
def test_a_bias_tilts_independent_positions_exactly(name: str, predictor: str) -> None:
    toy, chains = independent_toy(4, name), 10_000
    bias = torch.randn(2, 4, generator=seeded(2), dtype=torch.float64)
    bias[1, 2] = -torch.inf
    tilted = (toy.p0 * bias[0].exp()[:, None] * bias[1].exp()).flatten().numpy()
    steps = 40 if name == "absorbing" else 200
    samples = sample(
        exact_score(toy), graph_of(name, 4), NOISES[name], [2] * chains, steps, predictor, seeded(1),
        log_bias=bias.repeat(chains, 1),
    )  # fmt: skip
    seen = frequencies(samples, 4)
    assert seen[tilted == 0].sum() == 0
    assert chisquare(seen[tilted > 0], chains * tilted[tilted > 0] / tilted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
@pytest.mark.parametrize("steps", [1, 12])
def test_a_forbidden_residue_never_comes(name: str, steps: int) -> None:
    graph = graph_of(name, 20)
    bias = torch.zeros(20)
    bias[1] = -torch.inf  # cysteine
    noise = LogLinearNoise(0.2, 1e-3)  # leaves a fifth of the residues unmoved at t = 1
    for predictor in ("analytic", "euler") + (("ancestral",) if name == "absorbing" else ()):
        for options in ({}, {"temperature": 0.5, "top_p": 0.9}):
            score_fn = make_score_fn(make_model(), graph, "x0")
            samples = sample(score_fn, graph, noise, [200, 100], steps, predictor, seeded(0), log_bias=bias, **options)
            assert all(1 not in ids for ids in samples)
            assert len(np.unique(np.concatenate(samples))) > 5


def test_projected_residues_stay() -> None:
    def project(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.clone()
        tokens[1:6] = torch.arange(5)
        return tokens

    barred = torch.tensor([-torch.inf] * 3 + [0.0] * 17)  # even of what the bias forbids
    for name, predictor in (("absorbing", "analytic"), ("absorbing", "ancestral"), ("uniform", "analytic"),
                            ("substitution", "euler")):  # fmt: skip
        for bias in (None, barred):
            graph = graph_of(name, 20)
            score_fn = make_score_fn(make_model(), graph, "log_score")
            (ids,) = sample(score_fn, graph, LogLinearNoise(), [20], 5, predictor, seeded(0), project, log_bias=bias)
            assert ids[:5].tolist() == [0, 1, 2, 3, 4]
            assert bias is None or ids[5:].min() > 2


def infilled(name: str, chains: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Fix the first of two sites of a toy: what the second was, and what it should be."""
    toy = brute_force.random_toy(name, n=3, sites=2, seed=4)

    def project(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.view(-1, 4).clone()
        tokens[:, 1] = 1
        return tokens.view(-1)

    samples = np.stack(
        sample(exact_score(toy), graph_of(name, 3), NOISES[name], [2] * chains, steps, "analytic", seeded(0), project)
    )
    assert (samples[:, 0] == 1).all()
    return np.bincount(samples[:, 1], minlength=3), (toy.p0[1] / toy.p0[1].sum()).numpy()


@pytest.mark.slow
def test_infilling_is_exact_for_the_absorbing_graph() -> None:
    seen, expected = infilled("absorbing", CHAINS, 60)
    assert chisquare(seen, CHAINS * expected).pvalue > 1e-3


@pytest.mark.parametrize("name", ["uniform", "substitution"])
def test_infilling_is_near_for_the_others(name: str) -> None:
    seen, expected = infilled(name, 5000, 100)
    distance = np.abs(seen / 5000 - expected).sum() / 2
    assert distance < 0.15


@pytest.mark.parametrize(
    ("lengths", "steps", "predictor", "options", "message"),
    [
        ([5], 0, "analytic", {}, "at least 1 step"),
        ([], 4, "analytic", {}, "lengths of at least 1"),
        ([5, 0], 4, "analytic", {}, r"\[5, 0\]"),
        ([5], 4, "ddim", {}, "no predictor 'ddim'"),
        ([5], 4, "analytic", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ([5], 4, "analytic", {"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ([5], 4, "analytic", {"log_bias": torch.zeros(4, 20)}, r"shape \(20,\) or \(5, 20\), got \(4, 20\)"),
        ([5], 4, "analytic", {"log_bias": torch.full((20,), torch.nan)}, "finite or -inf"),
        ([5], 4, "analytic", {"log_bias": torch.full((20,), -torch.inf)}, "forbids every amino acid at residue 0"),
    ],
)
def test_requests_that_cannot_work_are_refused(
    lengths: list[int], steps: int, predictor: str, options: dict[str, object], message: str
) -> None:
    score_fn = make_score_fn(make_model(), Absorbing(), "x0")
    with refuses(message):
        sample(score_fn, Absorbing(), LogLinearNoise(), lengths, steps, predictor, torch.Generator(), **options)


def test_ancestral_sampling_is_for_the_absorbing_graph() -> None:
    score_fn = make_score_fn(make_model(), Uniform(), "x0")
    with refuses("ancestral is for the absorbing graph"):
        sample(score_fn, Uniform(), LogLinearNoise(), [5], 4, "ancestral", torch.Generator())
