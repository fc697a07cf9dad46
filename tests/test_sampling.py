from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graph import Absorbing, Graph, Uniform
from protlig_dd.diffusion.noise import GeometricNoise, LogLinearNoise, Noise
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn, make_score_fn

from . import brute_force
from .conftest import make_model

CHAINS = 8_000


def exact_score(toy: brute_force.Toy) -> ScoreFn:
    """Exact scores of sequences <bos> site site <eos>; all have the same sigma while sampling."""

    def score_fn(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        tokens = batch.tokens.view(-1, toy.sites + 2)
        inner = toy.log_score(tokens[:, 1:-1], float(sigma[0]))
        edge = torch.zeros(len(tokens), 1, toy.n, dtype=torch.float64)
        return torch.cat([edge, inner, edge], dim=1).view(-1, toy.n).float()

    return score_fn


@pytest.mark.parametrize("predictor", ["analytic", "euler"])
@pytest.mark.parametrize(
    ("name", "graph", "noise"),
    [
        ("absorbing", Absorbing(3), LogLinearNoise(1e-4, 1e-4)),
        ("uniform", Uniform(3), GeometricNoise(1e-3, 8.0, 1e-3)),
    ],
)
def test_samples_have_the_distribution_of_the_exact_scores(
    name: str, graph: Graph, noise: Noise, predictor: str
) -> None:
    toy = brute_force.random_toy(name, n=3, sites=2, seed=2)
    steps = 300 if (name, predictor) == ("uniform", "euler") else 100
    samples = sample(exact_score(toy), graph, noise, [2] * CHAINS, steps, predictor, torch.Generator().manual_seed(0))
    index = np.stack(samples).astype(int) @ np.array([3, 1])
    seen = np.bincount(index, minlength=9)
    assert chisquare(seen, CHAINS * toy.p0.flatten().numpy()).pvalue > 1e-3


def test_a_wrong_distribution_fails_the_same_test() -> None:
    toy = brute_force.random_toy("absorbing", n=3, sites=2, seed=2)
    flat = brute_force.Toy("absorbing", 3, 2, torch.full((3, 3), 1 / 9, dtype=torch.float64))
    samples = sample(
        exact_score(flat), Absorbing(3), LogLinearNoise(), [2] * 2000, 20, "analytic", torch.Generator().manual_seed(0)
    )
    seen = np.bincount(np.stack(samples).astype(int) @ np.array([3, 1]), minlength=9)
    assert chisquare(seen, 2000 * toy.p0.flatten().numpy()).pvalue < 1e-3


@pytest.mark.parametrize(
    ("graph", "parametrisation"), [(Absorbing(), "x0"), (Absorbing(), "log_score"), (Uniform(), "log_score")]
)
@pytest.mark.parametrize("predictor", ["analytic", "euler"])
def test_only_amino_acids_come_out_at_the_lengths_asked_for(graph: Graph, parametrisation: str, predictor: str) -> None:
    score_fn = make_score_fn(make_model(), graph, parametrisation)
    counts: Counter[str] = Counter()
    ticks: list[int] = []
    lengths = [1, 30, 7]
    samples = sample(
        score_fn,
        graph,
        LogLinearNoise(),
        lengths,
        5,
        predictor,
        torch.Generator().manual_seed(0),
        on_step=lambda: ticks.append(1),
        counts=counts,
    )
    assert [len(ids) for ids in samples] == lengths
    assert all(ids.dtype == np.uint8 and ids.max() < 20 for ids in samples)
    assert len(ticks) == 6
    assert counts["draws"] == 38 * 6
    again = sample(score_fn, graph, LogLinearNoise(), lengths, 5, predictor, torch.Generator().manual_seed(0))
    assert all(np.array_equal(a, b) for a, b in zip(samples, again, strict=True))


def test_projected_residues_stay() -> None:
    def project(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.clone()
        tokens[1:6] = torch.arange(5)
        return tokens

    for graph in (Absorbing(), Uniform()):
        score_fn = make_score_fn(make_model(), graph, "log_score")
        (ids,) = sample(
            score_fn, graph, LogLinearNoise(), [20], 5, "analytic", torch.Generator().manual_seed(0), project
        )
        assert ids[:5].tolist() == [0, 1, 2, 3, 4]


def test_infilling_is_exact_for_the_absorbing_graph() -> None:
    """Fix the first of two sites: the second follows its conditional distribution."""
    toy = brute_force.random_toy("absorbing", n=3, sites=2, seed=4)
    chains = 6000

    def project(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.view(-1, 4).clone()
        tokens[:, 1] = 1
        return tokens.view(-1)

    samples = sample(
        exact_score(toy),
        Absorbing(3),
        LogLinearNoise(1e-4, 1e-4),
        [2] * chains,
        60,
        "analytic",
        torch.Generator().manual_seed(0),
        project,
    )
    stacked = np.stack(samples)
    assert (stacked[:, 0] == 1).all()
    expected = chains * (toy.p0[1] / toy.p0[1].sum()).numpy()
    assert chisquare(np.bincount(stacked[:, 1], minlength=3), expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("lengths", "steps", "predictor", "message"),
    [
        ([5], 0, "analytic", "at least 1 step"),
        ([], 4, "analytic", "lengths of at least 1"),
        ([5, 0], 4, "analytic", r"\[5, 0\]"),
        ([5], 4, "ddim", "no predictor 'ddim'"),
    ],
)
def test_requests_that_cannot_work_are_refused(lengths: list[int], steps: int, predictor: str, message: str) -> None:
    score_fn = make_score_fn(make_model(), Absorbing(), "x0")
    with pytest.raises(ValueError, match=message):
        sample(score_fn, Absorbing(), LogLinearNoise(), lengths, steps, predictor, torch.Generator())
