from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion import sampling
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.substitution import make_substitution_graph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.noise import GeometricNoise, LogLinearNoise, Noise
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.generate import generate
from protlig_dd.inference.lengths import Lengths, choose_lengths
from protlig_dd.inference.sharing import Work
from protlig_dd.tokenizer import LETTERS

from . import brute_force
from .conftest import exact_score_fn, graph_of, make_model, raises_value_error, thorough

SAMPLERS = [
    ("absorbing", "analytic"),
    ("absorbing", "euler"),
    ("absorbing", "ancestral"),
    ("uniform", "analytic"),
    ("uniform", "euler"),
    ("substitution", "analytic"),
    ("substitution", "euler"),
]
X = LETTERS.index("X")
NOISES: dict[str, Noise] = {
    "absorbing": LogLinearNoise(1e-5, 1e-5),
    "uniform": GeometricNoise(1e-3, 8.0, 1e-3),
    "substitution": GeometricNoise(1e-3, 11.0, 1e-3),
}


def sampled(
    score_fn: ScoreFn,
    lengths: list[int],
    steps: int,
    predictor: str,
    generator: torch.Generator,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **options: Any,
) -> list[np.ndarray]:
    """Call `sample`; options may also contain `temperature` and `top_p`, which belong to SamplerOptions."""
    sharpening = {name: options.pop(name) for name in ("temperature", "top_p") if name in options}
    return sample(score_fn, lengths, SamplerOptions(steps, predictor, **sharpening), generator, project, **options)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(samples: list[np.ndarray], n: int) -> np.ndarray:
    """Return how often each joint state of the toy was sampled."""
    stacked = np.stack(samples).astype(int)
    strides = n ** np.arange(stacked.shape[1] - 1, -1, -1)
    return np.bincount(stacked @ strides, minlength=n ** stacked.shape[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "predictor", "steps", "parametrisation"),
    [
        ("absorbing", "analytic", 500, "x0"),
        ("absorbing", "euler", 500, "log_score"),
        ("absorbing", "ancestral", 60, "x0"),
        ("uniform", "analytic", 300, "log_score"),
        ("uniform", "analytic", 300, "x0"),
        ("uniform", "euler", 200, "log_score"),
        ("substitution", "analytic", 300, "log_score"),
        ("substitution", "analytic", 300, "x0"),
        ("substitution", "euler", 200, "log_score"),
    ],
)
def test_samples_from_exact_scores_have_the_exact_distribution(
    name: str, predictor: str, steps: int, parametrisation: str
) -> None:
    chains = 20_000 if thorough() else 4_000
    steps //= 2 if thorough() else 4  # with fewer chains, larger discretisation errors pass the test
    toy = brute_force.random_toy(name, n=3, sites=2, seed=2)
    samples = sampled(
        replace(exact_score_fn(toy, parametrisation), noise=NOISES[name]), [2] * chains, steps, predictor, seeded(0)
    )
    assert chisquare(frequencies(samples, 3), chains * toy.p0.flatten().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("parametrisation", ["log_score", "x0"])
def test_euler_and_analytic_samples_are_equal_for_absorbing_and_loglinear(parametrisation: str) -> None:
    noise = LogLinearNoise(eps=0.1, t_min=0.1)
    score_fn = ScoreFn(make_model(), Absorbing(), noise, parametrisation)
    if parametrisation == "log_score":  # exact scores; random scores give negative probabilities, which are clamped
        score_fn = replace(exact_score_fn(brute_force.random_toy("absorbing", n=20, sites=2, seed=3)), noise=noise)
    lengths = [2] * 400 if parametrisation == "log_score" else [300, 100]
    euler, analytic = (sampled(score_fn, lengths, 7, name, seeded(0)) for name in ("euler", "analytic"))
    assert [ids.tolist() for ids in euler] == [ids.tolist() for ids in analytic]


def test_a_forbidden_residue_of_the_prior_is_redrawn_by_the_network() -> None:
    """The network predicts only tryptophan; lysine is allowed too, but appears only where the prior has drawn it."""
    logits = torch.where(torch.arange(20) == LETTERS.index("W"), 50.0, 0.0)
    bias = torch.full((20,), -torch.inf).scatter(0, torch.tensor([LETTERS.index(a) for a in "WK"]), 0.0)
    noise = LogLinearNoise(eps=0.5)  # half of the residues are unmasked at t = 1, and 1 in 20 of these is lysine
    score_fn = ScoreFn(lambda batch, sigma: logits.expand(len(batch.tokens), -1), Absorbing(), noise, "x0")
    (ids,) = sampled(score_fn, [4000], 5, "analytic", seeded(0), log_bias=bias)
    assert set(np.unique(ids)) == {LETTERS.index("W"), LETTERS.index("K")}
    assert 0.015 < (ids == LETTERS.index("K")).mean() < 0.035


@pytest.mark.parametrize("predictor", ["analytic", "euler"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_time_free_model_samples_every_residue_with_the_network(predictor: str, conditioned: bool) -> None:
    """Sampling a model without time conditioning starts from masks only, as the bound of the model assumes.

    A time-conditioned model starts from the prior at t = 1, which has unmasked residues.
    """
    logits = torch.where(torch.arange(20) == LETTERS.index("W"), 50.0, 0.0)
    score_fn = ScoreFn(
        lambda batch, sigma: logits.repeat(len(batch.tokens), 1),
        Absorbing(),
        LogLinearNoise(eps=0.5),
        "x0",
        time_conditioning=conditioned,
    )
    (ids,) = sampled(score_fn, [4000], 5, predictor, seeded(0))
    prior_share = (ids != LETTERS.index("W")).mean()
    assert 0.4 < prior_share / 0.95 < 0.6 if conditioned else prior_share == 0


def test_two_steps_are_exact_for_a_single_absorbing_site() -> None:
    """A step changes sites independently of each other, which is exact for a single site."""
    toy = brute_force.random_toy("absorbing", n=4, sites=1, seed=1)
    samples = sampled(
        replace(exact_score_fn(toy), noise=LogLinearNoise(1e-5, 1e-5)), [1] * 20_000, 2, "analytic", seeded(0)
    )
    assert chisquare(frequencies(samples, 4), 20_000 * toy.p0.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("parametrisation", ["x0", "log_score"])
@pytest.mark.parametrize(("name", "predictor"), SAMPLERS)
def test_samples_are_amino_acids_of_the_requested_lengths(name: str, predictor: str, parametrisation: str) -> None:
    graph = graph_of(name, 20)
    score_fn = ScoreFn(make_model(), graph, LogLinearNoise(), parametrisation)
    counts: Counter[str] = Counter()
    ticks: list[int] = []
    lengths = [1, 30, 7]
    samples = sampled(score_fn, lengths, 5, predictor, seeded(0), on_step=lambda: ticks.append(1), counts=counts)
    assert [len(ids) for ids in samples] == lengths
    assert all(ids.dtype == np.uint8 and ids.max() < 20 for ids in samples)
    assert len(ticks) == 6
    assert counts["draws"] == 38 * 6
    if parametrisation == "x0" and predictor != "euler":
        assert counts["clamped"] == 0  # the posterior's probabilities are never negative, even by rounding
    again = sampled(score_fn, lengths, 5, predictor, seeded(0))
    assert all(np.array_equal(a, b) for a, b in zip(samples, again, strict=True))


@pytest.mark.parametrize(("name", "predictor"), SAMPLERS)
def test_a_sampled_sequence_does_not_depend_on_its_pack(name: str, predictor: str) -> None:
    """Sequence i is the same among 8 sequences as among 5. It depends neither on the others nor on their number."""
    score_fn = ScoreFn(make_model(), graph_of(name, 20), LogLinearNoise(), "x0")

    def draw(n: int, tokens_per_pack: int, lengths: str) -> list[list[int]]:
        chosen = choose_lengths(lengths, n, 7, Lengths([0] * 5 + [1] * 26, ""))
        samples, _ = generate(score_fn, chosen, SamplerOptions(4, predictor), Work(tokens_per_pack), seed=7)
        return [ids.tolist() for ids in samples]

    for lengths in ("empirical", "3-20", "9") if thorough() else ("empirical",):
        together = draw(8, 1000, lengths)
        assert draw(5, 1000, lengths) == together[:5]
        assert draw(8, 30, lengths) == together
        assert len({tuple(ids) for ids in together}) == 8


def test_the_number_of_masks_in_ancestral_sampling_follows_the_noise() -> None:
    mask_counts: list[list[int]] = []

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        mask_counts.append([int((tokens == 20).sum()) for tokens in batch.unpack(batch.tokens)])
        return torch.randn(len(batch.tokens), 20, generator=seeded(1))

    score_fn = ScoreFn(network, Absorbing(), LogLinearNoise(1e-9, 1e-9), "x0")
    sampled(score_fn, [40, 7], 10, "ancestral", seeded(0))
    assert [masked for masked, _ in mask_counts] == [40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0]
    assert [masked for _, masked in mask_counts] == [round(7 * (1 - i / 10)) for i in range(11)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "log_bias": torch.arange(20) / 10}], ids=["", "steered"])
@pytest.mark.parametrize("predictor", ["analytic", "ancestral"])
def test_a_time_free_network_does_not_evaluate_unchanged_sequences_again(
    predictor: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    model = make_model()

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(batch.lengths))
        return model(batch, torch.zeros_like(sigma))

    def draw_samples() -> tuple[list[list[int]], Counter[str]]:
        evaluated.clear()
        counts: Counter[str] = Counter()
        score_fn = ScoreFn(network, Absorbing(), LogLinearNoise(), "x0", time_conditioning=False)
        samples = sampled(
            score_fn,
            [3, 9, 5],
            60,
            predictor,
            seeded(3),
            counts=counts,
            **options,  # type: ignore[arg-type]
        )
        assert sum(evaluated) == counts["evaluated"]
        assert counts["evaluated"] + counts["skipped"] == 3 * 61
        return [ids.tolist() for ids in samples], counts

    cached, cached_logits = draw_samples(), sampling.CachedLogits
    monkeypatch.setattr(
        sampling, "CachedLogits", lambda logits, counts, time_free: cached_logits(logits, counts, time_free=False)
    )
    plain = draw_samples()
    assert plain[0] == cached[0]
    assert plain[1]["skipped"] == 0
    # after the first evaluation of each of the 3 sequences, an evaluation needs a newly unmasked residue; there are 17
    assert 3 + 3 <= cached[1]["evaluated"] <= 3 + 17


def independent_toy(n: int, graph: str = "absorbing") -> brute_force.Toy:
    p = torch.rand(2, n, generator=seeded(8), dtype=torch.float64) + 0.1
    p = p / p.sum(1, keepdim=True)
    return brute_force.Toy(graph, n, 2, p[0][:, None] * p[1])


@pytest.mark.slow
@pytest.mark.parametrize("parametrisation", ["log_score", "x0"])
@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
def test_temperature_and_top_p_sharpen_every_position(name: str, parametrisation: str) -> None:
    toy, chains = independent_toy(4, name), 10_000 if thorough() else 3_000
    steps = 20 if name == "absorbing" else 60
    score_fn = exact_score_fn(toy, parametrisation)

    def draw(**options: float) -> np.ndarray:
        samples = sampled(replace(score_fn, noise=NOISES[name]), [2] * chains, steps, "analytic", seeded(0), **options)
        return frequencies(samples, 4)

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


def test_a_temperature_and_top_p_of_1_do_not_change_the_samples() -> None:
    score_fn = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0")
    plain, same, cold = (
        sampled(score_fn, [200], 10, "analytic", seeded(0), **options)[0]
        for options in ({}, {"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.2})
    )
    assert np.array_equal(plain, same)
    assert not np.array_equal(plain, cold)
    assert len(np.unique(cold)) < len(np.unique(plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "predictor", "parametrisation"),
    [
        ("absorbing", "analytic", "log_score"),
        ("absorbing", "ancestral", "x0"),
        ("uniform", "analytic", "log_score"),
        ("uniform", "euler", "x0"),
        ("substitution", "analytic", "log_score"),
        ("substitution", "analytic", "x0"),
    ],
)
def test_a_bias_tilts_independent_positions_exactly(name: str, predictor: str, parametrisation: str) -> None:
    toy, chains = independent_toy(4, name), 10_000 if thorough() else 3_000
    bias = torch.randn(2, 4, generator=seeded(2), dtype=torch.float64)
    bias[1, 2] = -torch.inf
    tilted = (toy.p0 * bias[0].exp()[:, None] * bias[1].exp()).flatten().numpy()
    steps = 20 if name == "absorbing" else 60
    samples = sampled(
        replace(exact_score_fn(toy, parametrisation), noise=NOISES[name]),
        [2] * chains,
        steps,
        predictor,
        seeded(1),
        log_bias=bias.repeat(chains, 1),
    )
    seen = frequencies(samples, 4)
    assert seen[tilted == 0].sum() == 0
    assert chisquare(seen[tilted > 0], chains * tilted[tilted > 0] / tilted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
@pytest.mark.parametrize("steps", [1, 12])
def test_a_forbidden_residue_is_never_sampled(name: str, steps: int) -> None:
    graph = graph_of(name, 20)
    bias = torch.zeros(20)
    bias[1] = -torch.inf  # cysteine is forbidden
    noise = LogLinearNoise(0.2, 1e-3)  # a fifth of the residues are not noised at t = 1
    for predictor in ("analytic", "euler") + (("ancestral",) if name == "absorbing" else ()):
        for options in ({}, {"temperature": 0.5, "top_p": 0.9}):
            score_fn = ScoreFn(make_model(), graph, noise, "x0")
            samples = sampled(score_fn, [200, 100], steps, predictor, seeded(0), log_bias=bias, **options)
            assert all(1 not in ids for ids in samples)
            assert len(np.unique(np.concatenate(samples))) > 5


BLOSUM62 = make_substitution_graph("BLOSUM62")


@pytest.mark.parametrize("parametrisation", ["log_score", "x0"])
@pytest.mark.parametrize("graph", [Absorbing(), Uniform(), BLOSUM62], ids=["absorbing", "uniform", "blosum62"])
@given(sigma=st.floats(1e-4, 10.6), size=st.sampled_from([0.0, 1e-6, 0.1, 3.0]), seed=st.integers(0, 99))
def test_no_score_changes_by_more_than_the_bias(
    graph: Graph, parametrisation: str, sigma: float, size: float, seed: int
) -> None:
    """The limit also holds at noise levels at which random logits do not imply a meaningful distribution of x0."""
    logits, bias = (torch.randn(30, 20, generator=seeded(seed + i), dtype=torch.float64) for i in range(2))
    bias = size * (bias - bias.amin(-1, keepdim=True)) / (bias.amax(-1, keepdim=True) - bias.amin(-1, keepdim=True))
    xt = torch.full((30,), 20) if isinstance(graph, Absorbing) else torch.arange(30) % 20
    sigma_T = torch.full((30,), sigma, dtype=torch.float64)
    score_fn = ScoreFn(lambda batch, sigma: logits, graph, LogLinearNoise(), parametrisation)
    plain = score_fn.log_score(logits, xt, sigma_T)
    steered = score_fn.log_score(logits, xt, sigma_T, lambda log_q: log_q + bias)
    assert (steered - plain).abs().max() <= size + 1e-9
    assert size < 3 or sigma > 1 or (steered - plain).abs().max() > 0.5


def test_one_step_with_slow_mixing_rates_has_no_rounding_error() -> None:
    """The noise of PAM30 ends at sigma = 24.9, where inverting P(sigma) would multiply rounding errors by e^48."""
    graph, counts = make_substitution_graph("PAM30"), Counter[str]()
    q = torch.rand(20, generator=seeded(0)).log()
    noise = LogLinearNoise(eps=float(np.exp(-graph.sigma_max)))
    score_fn = ScoreFn(lambda batch, sigma: q.expand(len(batch.tokens), -1), graph, noise, "x0")
    samples = sampled(score_fn, [20_000], 1, "analytic", seeded(1), counts=counts)
    assert counts["clamped"] == 0
    seen = np.bincount(samples[0], minlength=20)
    assert chisquare(seen, 20_000 * q.double().softmax(0).numpy()).pvalue > 1e-3


def test_logits_that_are_not_finite_are_an_error() -> None:
    for graph in (Absorbing(), Uniform(), BLOSUM62):
        for parametrisation in ("log_score", "x0"):
            score_fn = ScoreFn(
                lambda batch, sigma: torch.full((len(batch.tokens), 20), torch.nan),
                graph,
                LogLinearNoise(),
                parametrisation,
            )
            with raises_value_error(r"scores are not finite in sampling step 1, at sigma = 6.91"):
                sampled(score_fn, [5], 3, "analytic", seeded(0))


@pytest.mark.parametrize("name", ["absorbing", "uniform", "substitution"])
def test_each_position_can_have_its_own_bias(name: str) -> None:
    """Each position of each protein allows one random amino acid. The proteins are in several packs."""
    lengths, generator = [4, 9, 2, 30], torch.Generator().manual_seed(3)
    allowed = [torch.randint(20, (length,), generator=generator) for length in lengths]
    bias = [torch.full((len(ids), 20), -torch.inf).scatter(1, ids[:, None], 0.0) for ids in allowed]
    score_fn = ScoreFn(make_model(), graph_of(name, 20), LogLinearNoise(), "x0")
    samples, _ = generate(score_fn, lengths, SamplerOptions(3), Work(20), seed=0, log_bias=bias)
    assert [ids.tolist() for ids in samples] == [ids.tolist() for ids in allowed]


def test_project_can_fix_context_letters() -> None:
    def project(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.clone().index_copy(0, torch.tensor([3, 4, 8]), torch.tensor([X, 7, X]))

    for name, predictor in SAMPLERS:
        for options in ({}, {"log_bias": torch.zeros(20), "top_p": 0.9}):
            score_fn = ScoreFn(make_model(), graph_of(name, 20), LogLinearNoise(), "x0")
            (ids,) = sampled(score_fn, [12], 5, predictor, seeded(0), project, **options)
            assert ids[[2, 3, 7]].tolist() == [X, 7, X]
            assert np.delete(ids, [2, 3, 7]).max() < 20


def test_projected_residues_are_kept() -> None:
    def project(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.clone()
        tokens[1:6] = torch.arange(5)
        return tokens

    forbidding = torch.tensor([-torch.inf] * 3 + [0.0] * 17)  # project has priority over the bias
    for name, predictor in SAMPLERS:
        for bias in (None, forbidding):
            graph = graph_of(name, 20)
            score_fn = ScoreFn(make_model(), graph, LogLinearNoise(), "log_score")
            (ids,) = sampled(score_fn, [20], 5, predictor, seeded(0), project, log_bias=bias)
            assert ids[:5].tolist() == [0, 1, 2, 3, 4]
            assert bias is None or ids[5:].min() > 2


def infilled(name: str, chains: int, steps: int, parametrisation: str = "log_score") -> tuple[np.ndarray, np.ndarray]:
    """Fix the first of two sites of a toy, and sample the second.

    Return how often each state of the second site was sampled, and the exact distribution of these states.
    """
    toy = brute_force.random_toy(name, n=3, sites=2, seed=2)

    def project(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.view(-1, 4).clone()
        tokens[:, 1] = 1
        return tokens.view(-1)

    samples = np.stack(
        sampled(
            replace(exact_score_fn(toy, parametrisation), noise=NOISES[name]),
            [2] * chains,
            steps,
            "analytic",
            seeded(0),
            project,
        )
    )
    assert (samples[:, 0] == 1).all()
    return np.bincount(samples[:, 1], minlength=3), (toy.p0[1] / toy.p0[1].sum()).numpy()


def test_infilling_uses_the_sigma_that_matches_the_masked_fraction() -> None:
    calls: list[tuple[torch.Tensor, list[float]]] = []

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        fractions = [float((tokens == 20).sum()) / (len(tokens) - 2) for tokens in batch.unpack(batch.tokens)]
        calls.append((sigma, fractions))
        return torch.randn(len(batch.tokens), 20, generator=seeded(1))

    def project(tokens: torch.Tensor) -> torch.Tensor:
        """Fix 195 of the 200 residues of the first sequence and 10 of the 20 of the second."""
        tokens = tokens.clone()
        tokens[6:201] = 3
        tokens[203:213] = 4
        return tokens

    noise = LogLinearNoise()
    score_fn = ScoreFn(network, Absorbing(), noise, "log_score")
    times = torch.linspace(1, noise.t_min, 5, dtype=torch.float64)
    lowest, highest = noise(times)[0].float()[[-1, 0]]
    for projection in (project, None):
        calls.clear()
        sampled(score_fn, [200, 20], 4, "analytic", seeded(0), projection)
        for step, (sigma, fractions) in enumerate(calls):
            assert sigma.dtype == torch.float32
            sigma_of_fraction = -torch.log1p(-torch.tensor(fractions))
            sigma_of_time = noise(times)[0][[step, step]].float()
            expected = sigma_of_time if projection is None else sigma_of_fraction.clamp(lowest, highest)
            torch.testing.assert_close(sigma, expected, rtol=1e-5, atol=0)
        assert len(calls) == 5


@pytest.mark.slow
@pytest.mark.parametrize("parametrisation", ["x0", "log_score"])
def test_infilling_is_exact_for_the_absorbing_graph(parametrisation: str) -> None:
    seen, expected = infilled("absorbing", 20_000, 60, parametrisation)
    assert chisquare(seen, 20_000 * expected).pvalue > 1e-3


@pytest.mark.parametrize("name", ["uniform", "substitution"])
def test_infilling_is_only_approximate_for_the_other_graphs(name: str) -> None:
    seen, expected = infilled(name, 5000, 100)
    assert 0.05 < np.abs(seen / 5000 - expected).sum() / 2 < 0.15
    assert chisquare(seen, 5000 * expected).pvalue < 1e-6


@pytest.mark.parametrize(
    ("lengths", "steps", "predictor", "options", "message"),
    [
        ([5], 0, "analytic", {}, "at least 1 step"),
        ([], 4, "analytic", {}, "lengths of at least 1"),
        ([5, 0], 4, "analytic", {}, r"\[5, 0\]"),
        ([5], 4, "ddim", {}, "unknown predictor 'ddim'; choose from analytic, euler"),
        ([5], 4, "analytic", {"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ([5], 4, "analytic", {"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ([5], 4, "analytic", {"log_bias": torch.zeros(4, 20)}, r"shape \(20,\) or \(5, 20\), got \(4, 20\)"),
        ([5], 4, "analytic", {"log_bias": torch.full((20,), torch.nan)}, "finite or -inf"),
        ([5], 4, "analytic", {"log_bias": torch.full((20,), -torch.inf)}, "forbids every amino acid at residue 0"),
    ],
)
def test_invalid_sampling_options_are_rejected(
    lengths: list[int], steps: int, predictor: str, options: dict[str, object], message: str
) -> None:
    score_fn = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0")
    with raises_value_error(message):
        sampled(score_fn, lengths, steps, predictor, torch.Generator(), **options)


def test_ancestral_sampling_requires_the_absorbing_graph() -> None:
    score_fn = ScoreFn(make_model(), Uniform(), LogLinearNoise(), "x0")
    with raises_value_error("ancestral is for the absorbing graph"):
        sampled(score_fn, [5], 4, "ancestral", torch.Generator())
