import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protlig_dd.diffusion.graphs import absorbing, uniform
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.substitution import SubstitutionGraph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.numerics import categorical, clamp_negative, log_expm1, uniform_draws

from . import brute_force
from .conftest import graph_of, raises_value_error

GRAPHS = ["absorbing", "uniform", "substitution"]
SIGMAS = [1e-6, 1e-5, 1e-3, 0.1, 1.0, 5.0, 15.0]


def state_count(name: str, n: int) -> int:
    return n + 1 if name == "absorbing" else n


def masked_score(name: str, n: int, xt: torch.Tensor, seed: int) -> torch.Tensor:
    """Return random log-scores.

    As in score functions, the log-score of x_t itself is 0. On the absorbing graph all log-scores of unmasked tokens
    are 0.
    """
    log_score = torch.randn(len(xt), n, generator=torch.Generator().manual_seed(seed))
    if name == "absorbing":
        return torch.where((xt == n)[:, None], log_score, 0.0)
    return log_score.scatter(1, xt[:, None], 0.0)


def pairs_of(name: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x0 and x_t of all pairs in which x_t has a positive probability given x0."""
    x0 = torch.arange(n).repeat_interleave(state_count(name, n))
    xt = torch.arange(state_count(name, n)).repeat(n)
    possible = (x0 == xt) | (xt == n) if name == "absorbing" else x0 >= 0
    return x0[possible], xt[possible]


def reference(
    name: str, n: int, sigma: float, log_score: torch.Tensor, xt: torch.Tensor, x0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each pair (x0, x_t) by brute force.

    Also return the largest absolute term of the sum that gives the loss; rounding errors are proportional to it.
    """
    rows = [
        brute_force.score_entropy(name, n, sigma, log_score[i].double(), int(xt[i]), int(x0[i])) for i in range(len(x0))
    ]
    loss, largest = torch.tensor(rows, dtype=torch.float64).T
    return loss, largest


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_score_entropy_equals_brute_force(name: str, n: int, sigma: float) -> None:
    graph, (x0, xt) = graph_of(name, n), pairs_of(name, n)
    log_score = masked_score(name, n, xt, 0)
    loss = graph.score_entropy(log_score, torch.full((len(x0),), sigma), xt, x0)
    assert loss.dtype == torch.float32
    expected, largest = reference(name, n, sigma, log_score, xt, x0)
    assert ((loss - expected).abs() <= 1e-5 * largest + 1e-30).all()


@pytest.mark.parametrize("name", GRAPHS)
@settings(max_examples=50)
@given(sigma=st.floats(1e-4, 8.0), seed=st.integers(0, 999))
def test_score_entropy_is_never_negative_and_zero_at_the_true_ratios(name: str, sigma: float, seed: int) -> None:
    n = 5
    sigma = float(np.float32(sigma))
    graph, (x0, xt) = graph_of(name, n), pairs_of(name, n)
    sigma_T = torch.full((len(x0),), sigma)
    log_score = masked_score(name, n, xt, seed)
    _, largest = reference(name, n, sigma, log_score, xt, x0)
    assert (graph.score_entropy(log_score, sigma_T, xt, x0) >= -1e-5 * largest).all()
    p = brute_force.transition(name, n, sigma)
    ratio = (p[x0, :n] / p[x0, xt][:, None]).clamp(min=1e-30).log().float()
    exact = torch.where((xt == n)[:, None], ratio, 0.0) if name == "absorbing" else ratio
    _, largest = reference(name, n, sigma, exact, xt, x0)
    assert (graph.score_entropy(exact, sigma_T, xt, x0).abs() <= 1e-5 * largest).all()


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("sigma", [*SIGMAS, 6.9])
def test_transitions_have_the_probabilities_of_the_matrix_exponential(
    name: str, n: int, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the uniform draws by a grid on [0, grid_end].

    The end of the grid is twice the probability of leaving the state, so small probabilities are resolved. Draws above
    the end of the grid keep the state.
    """
    points, expected = 400_000, brute_force.transition(name, n, sigma)[2]
    grid_end = min(1.0, 2 * float(1 - expected[2]))
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points * grid_end
    for module in (absorbing, uniform):
        monkeypatch.setattr(module, "uniform_draws", lambda length, generator: grid)
    xt = graph_of(name, n).sample_transition(
        torch.full((points,), 2), torch.full((points,), sigma, dtype=torch.float64), torch.Generator()
    )
    frequencies = torch.bincount(xt, minlength=len(expected)).double() / points * grid_end
    frequencies[2] += 1 - grid_end
    assert ((frequencies - expected).abs() <= 1e-5 * (1 - expected[2])).all()


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0])
def test_random_transitions_have_the_frequencies_of_the_matrix_exponential(name: str, sigma: float) -> None:
    n, draws = 20, 40_000
    x0 = torch.full((draws,), 2)
    xt = graph_of(name, n).sample_transition(x0, torch.full((draws,), sigma), torch.Generator().manual_seed(1))
    expected = brute_force.transition(name, n, sigma)[2]
    frequencies = torch.bincount(xt, minlength=len(expected)).double() / draws
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-12).all()


@pytest.mark.parametrize("graph", [graph_of(name, 20) for name in GRAPHS], ids=GRAPHS)
def test_context_tokens_are_never_noised_and_have_no_loss(graph: Graph) -> None:
    context = torch.arange(21, 30)
    sigma = torch.full((9,), 9.0)
    assert torch.equal(graph.sample_transition(context, sigma, torch.Generator().manual_seed(0)), context)
    assert graph.score_entropy(torch.randn(9, 20), sigma, context, context).abs().max() == 0
    assert graph.prior_kl(context, sigma).abs().max() == 0


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 1.0, 6.9])
def test_prior_samples_and_prior_kl_equal_brute_force(name: str, n: int, sigma: float) -> None:
    draws, graph = 40_000, graph_of(name, n)
    p, prior = brute_force.transition(name, n, sigma)[0], brute_force.prior(name, n, sigma)
    kl = (p * (p / prior).clamp(min=1e-300).log()).sum()
    assert graph.prior_kl(torch.tensor([0]), torch.tensor([sigma])).item() == pytest.approx(kl.item(), rel=1e-5)
    limit = graph.sample_limit(draws, torch.Generator().manual_seed(0), sigma)
    frequencies = torch.bincount(limit, minlength=len(prior)).double() / draws
    assert ((frequencies - prior).abs() <= 5 * (prior * (1 - prior) / draws).sqrt() + 1e-12).all()


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("share", [1e-3, 0.3, 1.0])
def test_reverse_steps_equal_the_dense_formulas(name: str, n: int, sigma: float, share: float) -> None:
    """After an analytic step from state x, state z has the probability [s^T exp(-delta Q)]_z P(delta)[z, x].

    After an Euler step, a state z other than x has the probability delta s_z Q[z, x]. Here s_z is the score of state z.
    The scores are float32, and the probabilities are float64.
    """
    graph, delta = graph_of(name, n), share * min(sigma, graph_of(name, n).sigma_max)
    toy = brute_force.random_toy(name, n, sites=2, seed=3)
    xt = torch.tensor([[n, 0], [n, n]]) if name == "absorbing" else torch.tensor([[1, 0], [3, 3]])
    log_score = toy.log_score(xt, sigma).reshape(4, n).float()
    flat = xt.reshape(4)
    q, p = brute_force.rate_matrix(name, n), brute_force.transition(name, n, delta)
    undo = brute_force.transition(name, n, -delta)
    step = torch.full((4,), delta, dtype=torch.float64)
    analytic, euler = graph.analytic_probs(log_score, flat, step), graph.euler_probs(log_score, flat, step)
    assert analytic.dtype == euler.dtype == torch.float64
    for i, x in enumerate(flat.tolist()):
        s = torch.zeros(state_count(name, n), dtype=torch.float64)
        if name == "absorbing" and x < n:
            s[x] = 1.0  # an unmasked token was never in another state
        else:
            s[:n] = log_score[i].double().exp()
            s[x] = 1.0
        assert torch.allclose(analytic[i], (s @ undo) * p[:, x], rtol=1e-9, atol=1e-12 * float(undo.abs().max()))
        rate = s * q[:, x]
        rate[x] = 0
        expected = delta * rate
        expected[x] = 1 - expected.sum()
        assert torch.allclose(euler[i], expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(analytic.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-12 * float(undo.abs().max()))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("sigma", [*SIGMAS, 40.0])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.999])
def test_the_posterior_step_equals_bayes_rule(name: str, n: int, sigma: float, share: float) -> None:
    """The probability of state z after the step from x_t is proportional to a sum over x0.

    The terms are q(x0) P(sigma_next)[x0, z] P(sigma - sigma_next)[z, x_t], where q is the given distribution of x0.
    """
    sigma_next = share * sigma
    xt = torch.arange(state_count(name, n))
    if name == "absorbing":
        xt = torch.tensor([n])
    log_q = torch.randn(len(xt), n, generator=torch.Generator().manual_seed(7))
    sigma_T, sigma_next_T = (torch.full((len(xt),), value, dtype=torch.float64) for value in (sigma, sigma_next))
    probs, clamped = clamp_negative(graph_of(name, n).posterior_probs(log_q, xt, sigma_T, sigma_next_T))
    to_z, to_xt = (brute_force.transition(name, n, s) for s in (sigma_next, sigma - sigma_next))
    expected = (log_q.double().softmax(-1) @ to_z[:n]) * to_xt[:, xt].T
    assert torch.allclose(probs, expected / expected.sum(-1, keepdim=True), rtol=1e-8, atol=1e-12)
    assert not clamped.any()
    if name == "absorbing":
        final = graph_of(name, n).posterior_probs(
            torch.zeros(2, n), torch.tensor([0, n]), torch.ones(2), torch.zeros(2)
        )
        assert final[:, n].tolist() == [0.0, 0.0]
        assert final[0].tolist() == [1.0] + [0.0] * n


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.3, 2.0, 6.9])
def test_the_posterior_of_x0_gives_the_scores(name: str, n: int, sigma: float) -> None:
    """log_score_from_x0 turns p(x0 | the other tokens) into the score, and x0_probs is its inverse."""
    toy = brute_force.random_toy(name, n=n, sites=2, seed=5)
    xt = torch.cartesian_prod(*[torch.arange(state_count(name, n))] * 2)
    if name == "absorbing":
        xt = xt[(xt == n).any(1)]
    graph, flat = graph_of(name, n), xt.reshape(-1)
    q = toy.posterior(xt, sigma).reshape(-1, n)
    logits = q.log() + 0.7  # adding a constant to the logits does not change their softmax
    expected = toy.log_score(xt, sigma).reshape(-1, n)
    sigma_T = torch.full((len(flat),), sigma, dtype=torch.float64)
    found = graph.log_score_from_x0(logits, flat, sigma_T)
    assert torch.allclose(found, expected, atol=1e-8)
    found32 = graph.log_score_from_x0(logits.float(), flat, sigma_T.float())
    assert found32.dtype == torch.float32
    assert torch.allclose(found32.double(), expected, rtol=1e-5, atol=1e-5)
    recovered = graph.x0_probs(found, flat, sigma_T)
    masked = flat == n if name == "absorbing" else flat >= 0
    assert recovered.dtype == torch.float64
    assert torch.allclose(recovered[masked], q[masked], atol=1e-9 * math.exp(2 * sigma))


@pytest.mark.parametrize("name", GRAPHS)
def test_zero_logits_give_the_exact_score_at_large_sigma(name: str) -> None:
    toy = brute_force.random_toy(name, n=4, sites=2, seed=5)
    graph, sigma = graph_of(name, 4), 60.0
    xt = torch.tensor([[0, 3], [2, 2]]) if name != "absorbing" else torch.tensor([[4, 4]])
    flat, sigma_T = xt.reshape(-1), torch.full((xt.numel(),), sigma)
    found = graph.log_score(torch.zeros(len(flat), 4), flat, sigma_T).double()
    if name == "absorbing":  # zero logits predict a uniform distribution over the amino acids
        assert torch.allclose(found, torch.tensor(-math.log(math.expm1(sigma)) - math.log(4)).double(), rtol=1e-6)
    else:
        assert torch.allclose(found, toy.log_score(xt, sigma).reshape(-1, 4), atol=1e-5)


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_substitution_probabilities_equal_the_matrix_exponential(n: int, sigma: float) -> None:
    graph = graph_of("substitution", n)
    assert isinstance(graph, SubstitutionGraph)
    p = graph.transition_probs(torch.arange(n), torch.full((n,), sigma, dtype=torch.float64))
    assert torch.allclose(p, brute_force.transition("substitution", n, sigma), rtol=1e-9, atol=1e-15)
    assert torch.allclose(graph.pi, brute_force.equilibrium("substitution", n), rtol=1e-9)
    assert torch.allclose(graph.rates, brute_force.rate_matrix("substitution", n), atol=1e-12)
    remaining = math.exp(graph.sigma_max * graph.lambda_2)
    assert 0.99e-3 < remaining < 1e-3
    slowest = torch.linalg.eigvals(brute_force.rate_matrix("substitution", n)).real.sort().values[-2]
    assert graph.lambda_2 == pytest.approx(float(slowest), rel=1e-9)


def cyclic_rates() -> np.ndarray:
    return np.array([[0.0, 3.0, 1.0], [1.0, 0.0, 3.0], [3.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (np.ones((3, 4)), r"square matrix, got shape \(3, 4\)"),
        (-np.ones((3, 3)), "at least 0 off the diagonal, got -1"),
        (np.full((3, 3), np.nan), "must be finite"),
        (cyclic_rates(), r"not reversible: .* the flux from state 0 to state 2 is 0.333333, and the flux back is 1"),
        (np.kron(np.eye(2), np.ones((2, 2))) + 1e-4, "mix too slowly: lambda_2 = -0.000"),
        (
            np.array([[0.0, 1.0], [0.0, 0.0]]),
            "do not mix: the equilibrium frequency of state 0 is .* but must be above 0",
        ),
    ],
)
def test_invalid_rates_are_rejected(rates: np.ndarray, message: str) -> None:
    with raises_value_error(message):
        SubstitutionGraph(rates)


def test_absorbing_euler_and_analytic_steps_coincide_for_loglinear_noise() -> None:
    from protlig_dd.diffusion.noise import LogLinearNoise

    t = torch.tensor([0.8, 0.7], dtype=torch.float64)
    sigma, dsigma = LogLinearNoise()(t)
    log_score = torch.randn(1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 4
    xt = torch.tensor([20])
    analytic = Absorbing().analytic_probs(log_score, xt, (sigma[:1] - sigma[1:]))
    euler = Absorbing().euler_probs(log_score, xt, dsigma[:1] * 0.1)
    assert torch.allclose(analytic, euler, atol=1e-12)


def test_after_the_last_step_no_residue_is_masked() -> None:
    log_score = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    probs = Absorbing().denoise_probs(log_score, torch.tensor([20, 20, 3]), torch.full((3,), 1e-3))
    assert probs[:, 20].abs().max() == 0
    assert torch.allclose(probs[0, :20], log_score[0].double().softmax(-1))
    assert probs[2].argmax() == 3
    assert torch.allclose(probs.sum(-1), torch.ones(3, dtype=torch.float64))


def test_log_expm1_is_accurate_for_small_and_large_sigma() -> None:
    sigma = torch.tensor([1e-6, 1e-3, 1.0, 20.0, 200.0])
    expected = [math.log(math.expm1(float(s))) if s < 100 else float(s) for s in sigma]
    assert torch.allclose(log_expm1(sigma), torch.tensor(expected), rtol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda p: sum(p) > 1e-6), st.floats(0, 1))
def test_categorical_is_the_inverse_cdf(weights: list[float], u: float) -> None:
    u = min(u, math.nextafter(1.0, 0.0))
    probs = torch.tensor([weights], dtype=torch.float64)
    index = int(categorical(probs, torch.tensor([u], dtype=torch.float64)))
    assert weights[index] > 0
    cdf = (probs / probs.sum()).cumsum(-1)[0]
    assert (float(cdf[index - 1]) if index else 0.0) <= u + 1e-9
    assert u < float(cdf[index]) + 1e-9


def test_rare_events_keep_their_probability() -> None:
    """An event of probability 1e-9 is drawn exactly if u is in the interval of this event.

    The interval is so short that float32 cannot resolve it.
    """
    probs = torch.tensor([[1 - 1e-9, 1e-9]], dtype=torch.float64)
    edges = torch.tensor([1 - 1.001e-9, 1 - 0.999e-9, 1 - 1e-12], dtype=torch.float64)
    assert categorical(probs.expand(3, 2), edges).tolist() == [0, 1, 1]


def test_uniform_draws_have_float64_precision() -> None:
    u = uniform_draws(1000, torch.Generator().manual_seed(0))
    assert u.dtype == torch.float64
    assert ((u * 2.0**30) % 1 != 0).double().mean() > 0.99


def test_the_loss_of_the_uniform_graph_is_finite_at_large_sigma() -> None:
    graph = Uniform()
    xt, x0 = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64)
    loss = graph.score_entropy(torch.zeros(2, 20), torch.full((2,), 80.0), xt, x0)
    assert torch.isfinite(loss).all()
    assert loss.abs().max() < 1e-6  # all probability ratios are 1


def test_negative_probabilities_are_clamped_and_flagged() -> None:
    probs, clamped = clamp_negative(torch.tensor([[0.5, 0.7, -0.2], [0.5, 0.25, 0.25]], dtype=torch.float64))
    assert clamped.tolist() == [True, False]
    assert probs[0].tolist() == pytest.approx([0.5 / 1.2, 0.7 / 1.2, 0.0])
    assert probs[1].tolist() == [0.5, 0.25, 0.25]
