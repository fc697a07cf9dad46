import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.config.components import build_noise
from protlig_dd.diffusion.graphs.substitution import make_substitution_graph
from protlig_dd.diffusion.noise import (
    CosineNoise,
    GeometricNoise,
    LogLinearNoise,
    Noise,
    curriculum_t_max,
    stratified_times,
)


def describe(value: object) -> str:
    return f"{type(value).__name__}({vars(value)})" if hasattr(value, "t_min") else str(value)


SCHEDULES = [
    LogLinearNoise(),
    LogLinearNoise(eps=1e-5),
    CosineNoise(),
    CosineNoise(eps=1e-5),
    LogLinearNoise(rate=0.28),
    CosineNoise(rate=0.65),
    GeometricNoise(),
    GeometricNoise(1e-3, 5.0),
]


@pytest.mark.parametrize("noise", SCHEDULES, ids=describe)
def test_dsigma_is_the_derivative_of_sigma(noise: Noise) -> None:
    t = torch.linspace(noise.t_min, 1, 101, dtype=torch.float64, requires_grad=True)
    sigma, dsigma = noise(t)
    (derivative,) = torch.autograd.grad(sigma.sum(), t)
    assert torch.allclose(dsigma, derivative, rtol=1e-12, atol=0)
    assert (sigma.diff() > 0).all()
    # at both ends of [t_min, 1], float32 differs from float64 only by rounding
    sigma32, dsigma32 = noise(t.detach().float())
    assert sigma32.dtype == torch.float32
    expected, dexpected = noise(t.detach().float().double())
    assert torch.allclose(sigma32.double(), expected, rtol=1e-5, atol=0)
    assert torch.allclose(dsigma32.double(), dexpected, rtol=1e-5, atol=0)


def test_sigma_equals_its_closed_form() -> None:
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert torch.allclose(LogLinearNoise(1e-3)(t)[0], -torch.log(1 - 0.999 * t))
    assert torch.allclose(CosineNoise(1e-3)(t)[0], -torch.log(1 - 0.999 * (1 - torch.cos(math.pi / 2 * t))))
    assert torch.allclose(GeometricNoise(1e-4, 20.0)(t)[0], 1e-4 ** (1 - t) * 20.0**t)


@pytest.mark.parametrize("matrix", ["BLOSUM62", "PAM30"])
@pytest.mark.parametrize("name", ["loglinear", "cosine"])
def test_noise_of_a_slow_graph_reaches_sigma_max_without_a_jump_at_t_1(matrix: str, name: str) -> None:
    graph = make_substitution_graph(matrix)
    noise = build_noise({"name": name, "eps": None, "rate": None, "t_min": 1e-3}, graph)
    assert vars(build_noise({"name": name}, graph)) == vars(noise)
    assert float(noise(torch.ones(1))[0]) == pytest.approx(graph.sigma_max, rel=1e-5)
    before = noise(torch.tensor([math.nextafter(1.0, 0.0)]).float() - 6e-8)[0]
    assert float(before) > 0.999 * graph.sigma_max
    assert float(noise(torch.ones(1))[1]) < 1.6e3 / -graph.lambda_2


@pytest.mark.parametrize(
    ("noise", "second_moment"), [(CosineNoise(1e-9), 4.04), (LogLinearNoise(1e-9), 6.91)], ids=describe
)
def test_the_loss_weights_have_the_documented_second_moment(noise: Noise, second_moment: float) -> None:
    """The expected values are those in the docstring of CosineNoise.

    A masked residue has the weight dsigma / (e^sigma - 1), and a residue is masked with probability 1 - e^-sigma.
    """
    edges = torch.logspace(math.log10(noise.t_min), 0, 20001, dtype=torch.float64)
    sigma, dsigma = noise((edges[1:] + edges[:-1]) / 2)
    weight = dsigma / torch.expm1(sigma)
    assert float((weight**2 * -torch.expm1(-sigma) * edges.diff()).sum()) == pytest.approx(second_moment, abs=0.01)


@given(st.integers(1, 64), st.floats(1e-5, 0.5), st.integers(0, 999))
def test_times_are_stratified(n: int, t_min: float, seed: int) -> None:
    t = stratified_times(n, t_min, torch.Generator().manual_seed(seed), "cpu")
    assert t_min <= float(t.min())
    assert float(t.max()) <= 1
    strata = ((t.sort().values.double() - t_min) / (1 - t_min) * n + 1e-4).floor()
    assert (strata - torch.arange(n)).abs().max() <= 1  # each stratum has one time, up to rounding at its ends
    assert (t.sort().values.diff() - (1 - t_min) / n).abs().max() < 1e-5 if n > 1 else True


@given(st.integers(1, 50), st.floats(1e-5, 0.5))
def test_the_largest_time_of_a_curriculum_grows_to_1(steps: int, t_min: float) -> None:
    caps = [curriculum_t_max(step, steps, t_min) for step in range(2 * steps)]
    assert caps[0] > t_min
    assert caps == sorted(caps)
    assert caps[steps - 1 :] == [1.0] * (steps + 1)
    assert curriculum_t_max(0, 0, t_min) == 1.0
    t = stratified_times(8, t_min, torch.Generator().manual_seed(0), "cpu", caps[0])
    assert t_min * (1 - 1e-6) <= float(t.min()) <= float(t.max()) <= caps[0] * (1 + 1e-6)


def test_times_have_the_mean_of_a_uniform_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([stratified_times(3, 1e-3, generator, "cpu") for _ in range(4000)])
    expected = (1 + 1e-3) / 2
    assert abs(float(t[:, 0].mean()) - expected) < 4 * math.sqrt(1 / 12 / 4000)
    assert abs(float(t.mean()) - expected) < 4 * math.sqrt(1 / 12 / 9 / 4000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogLinearNoise(eps=0.0), r"eps must lie in \(0, 1\), got 0.0"),
        (lambda: CosineNoise(eps=1.0), r"eps must lie in \(0, 1\), got 1.0"),
        (lambda: LogLinearNoise(t_min=1.0), r"t_min must lie in \(0, 1\), got 1.0"),
        (lambda: GeometricNoise(2.0, 1.0), "got 2.0 and 1.0"),
    ],
)
def test_invalid_noise_schedules_are_rejected(make: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
