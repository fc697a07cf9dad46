import math

import numpy as np
import pytest
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.substitution import make_substitution_graph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn

from . import brute_force
from .conftest import make_model, random_batch


def zero_logits(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(batch.tokens), 20)


BLOSUM62 = make_substitution_graph("BLOSUM62")


@pytest.mark.parametrize("graph", [Absorbing(), Uniform(), BLOSUM62], ids=["absorbing", "uniform", "blosum62"])
@pytest.mark.parametrize("parametrisation", ["log_score", "x0"])
def test_scores_are_float32_and_zero_at_xt(graph: Graph, parametrisation: str) -> None:
    batch = random_batch([6, 9])
    sigma = torch.tensor([0.3, 2.0])
    xt = graph.sample_transition(batch.tokens, sigma[batch.segment_ids], torch.Generator().manual_seed(0))
    for autocast in (None, torch.bfloat16):
        score_fn = ScoreFn(make_model(), graph, LogLinearNoise(), parametrisation, autocast=autocast)
        log_score = score_fn(batch.with_tokens(xt), sigma)
        assert log_score.dtype == torch.float32
        assert (log_score != log_score.bfloat16().float()).double().mean() > 0.5 * (log_score != 0).double().mean()
        if not isinstance(graph, Absorbing):
            assert log_score.gather(1, xt[:, None]).abs().max() == 0
            continue
        assert log_score[xt < 20].abs().max() == 0
        if parametrisation == "x0":  # the scores of a masked token, kappa p(y), sum to kappa
            total = log_score.exp().sum(-1)
            kappa = 1 / torch.expm1(sigma)[batch.segment_ids]
            assert torch.allclose(total[xt == 20], kappa[xt == 20], rtol=1e-5)


def test_the_network_computes_in_bf16_only_with_autocast() -> None:
    model, batch = make_model(), random_batch([6, 9])
    dtypes: dict[str, torch.dtype] = {}
    model.blocks[0].qkv.register_forward_hook(lambda module, inputs, out: dtypes.update(qkv=out.dtype))
    ScoreFn(model, Absorbing(), LogLinearNoise(), "x0", autocast=torch.bfloat16)(batch, torch.ones(2))
    assert dtypes["qkv"] == torch.bfloat16
    ScoreFn(model, Absorbing(), LogLinearNoise(), "x0")(batch, torch.ones(2))
    assert dtypes["qkv"] == torch.float32


def test_logits_have_float32_precision_under_autocast() -> None:
    model, batch = make_model(), random_batch([60, 90])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch, torch.ones(2))
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any()


def test_sigma_only_scales_the_scores_of_a_time_free_network() -> None:
    batch = random_batch([6, 9])
    masked = batch.with_tokens(torch.where(torch.arange(15) % 2 == 0, 20, batch.tokens))
    time_free = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0", time_conditioning=False)
    low, high = time_free(masked, torch.full((2,), 0.1)), time_free(masked, torch.full((2,), 3.0))
    assert torch.allclose(low.log_softmax(-1), high.log_softmax(-1), atol=1e-6)
    conditioned = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0")
    low, high = conditioned(masked, torch.full((2,), 0.1)), conditioned(masked, torch.full((2,), 3.0))
    assert not torch.allclose(low.log_softmax(-1), high.log_softmax(-1), atol=1e-3)


@pytest.mark.parametrize("parametrisation", ["log_score", "x0"])
def test_zero_logits_on_the_absorbing_graph_have_a_loss_of_log_20_per_residue(parametrisation: str) -> None:
    """Zero logits predict a uniform distribution, so each masked residue has the loss kappa log 20.

    Here kappa = 1 / (e^sigma - 1), and the scores are kappa / 20. The loss at time t is weighted with dsigma, the
    derivative of sigma. For log-linear noise dsigma kappa = 1/t, and a residue is masked with probability (1 - eps) t.
    The expected loss is therefore (1 - t_min)(1 - eps) log 20 nats per residue. With stratified times, 20 batches are
    enough to estimate it.
    """
    noise, graph = LogLinearNoise(), Absorbing()
    batch = random_batch([60] * 500)
    weight = torch.zeros(())

    def network(noised: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal weight
        t = -torch.expm1(-sigma.double()) / (1 - 1e-3)
        weight = ((noised.tokens == 20) / t[noised.segment_ids]).sum()
        return zero_logits(noised, sigma)

    score_fn = ScoreFn(network, graph, noise, parametrisation)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(20):
        loss_sum, n_residues = score_entropy_loss(score_fn, batch, generator)
        assert int(n_residues) == 30_000
        assert float(loss_sum) == pytest.approx(float((1 - 1e-3) * math.log(20) * weight), rel=1e-5)
        estimates.append(float(loss_sum) / 30_000)
    mean, error = torch.tensor(estimates).mean(), torch.tensor(estimates).std() / 20**0.5
    expected = (1 - 1e-3) * (1 - 1e-3) * torch.log(torch.tensor(20.0))
    assert abs(mean - expected) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("graph", [Uniform(), BLOSUM62], ids=["uniform", "blosum62"])
def test_zero_logits_on_other_graphs_have_the_loss_of_the_equilibrium(graph: Graph) -> None:
    """Zero logits give the scores of the equilibrium pi.

    The loss, integrated over sigma in [low, high], is therefore the decrease of KL(P || pi).
    """
    x0 = torch.arange(20).repeat_interleave(20)
    xt = torch.arange(20).repeat(20)
    log_score = graph.log_score(torch.zeros(400, 20, dtype=torch.float64), xt, torch.ones(400))
    low, high = 1e-3, 6.0
    total = torch.zeros(20, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for node, weight in zip(nodes, weights, strict=True):
        sigma = math.exp(math.log(low) + (math.log(high) - math.log(low)) * (node + 1) / 2)
        if isinstance(graph, Uniform):
            p = brute_force.transition("uniform", 20, sigma)
        else:
            p = torch.linalg.matrix_exp(sigma * graph.rates)
        loss = graph.score_entropy(log_score, torch.full((400,), sigma, dtype=torch.float64), xt, x0)
        total += weight * (math.log(high) - math.log(low)) / 2 * sigma * (p.flatten() * loss).view(20, 20).sum(1)
    ends = [graph.prior_kl(torch.arange(20), torch.full((20,), s, dtype=torch.float64)) for s in (low, high)]
    assert torch.allclose(total, ends[0] - ends[1], rtol=1e-6)
    assert float(total.min()) > 1.5


@pytest.mark.parametrize("graph", [Absorbing(), Uniform(), BLOSUM62], ids=["absorbing", "uniform", "blosum62"])
@pytest.mark.parametrize("parametrisation", ["log_score", "x0"])
def test_bf16_changes_the_loss_at_the_smallest_time_by_less_than_half_a_percent(
    graph: Graph, parametrisation: str
) -> None:
    batch = random_batch([200] * 20)
    model = make_model()
    t = torch.full((20,), 1e-3)
    sigma = LogLinearNoise(eps=math.exp(-graph.sigma_max))(t)[0]
    sigma_T = sigma[batch.segment_ids]
    xt = graph.sample_transition(batch.tokens, sigma_T, torch.Generator().manual_seed(0))
    with torch.no_grad():
        score_fn = ScoreFn(model, graph, LogLinearNoise(), parametrisation, autocast=torch.bfloat16)
        loss = graph.score_entropy(score_fn(batch.with_tokens(xt), sigma), sigma_T, xt, batch.tokens).double().sum()
        model.sigma_embedding.mlp.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        logits = model.double()(batch.with_tokens(xt), sigma)
        to_score = graph.log_score if parametrisation == "log_score" else graph.log_score_from_x0
        log_score = to_score(logits.double(), xt, sigma_T.double())
        expected = graph.score_entropy(log_score, sigma_T.double(), xt, batch.tokens).sum()
    assert float(loss) == pytest.approx(float(expected), rel=5e-3)
    assert float(loss) != float(expected)


@pytest.mark.parametrize(
    ("graph", "parametrisation", "time", "message"),
    [
        (Uniform(), "x0", False, "time_conditioning=false is valid only with"),
        (Absorbing(), "eps", True, "unknown parametrisation 'eps'; choose from log_score, x0"),
        (Absorbing(), "log_score", False, "time_conditioning=false is valid only with"),
    ],
)
def test_invalid_combinations_of_graph_and_parametrisation_are_rejected(
    graph: Graph, parametrisation: str, time: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreFn(zero_logits, graph, LogLinearNoise(), parametrisation, time_conditioning=time)
