import math

import pytest
import torch
from torch.nn import functional as F

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.diffusion.noise import CosineNoise, GeometricNoise, LogLinearNoise, Noise, stratified_times
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.tokenizer import ProteinTokenizer

from .conftest import make_model, random_batch


@pytest.mark.parametrize("graph", [Absorbing(), Uniform()], ids=["absorbing", "uniform"])
@pytest.mark.parametrize(
    "noise", [LogLinearNoise(), CosineNoise(), GeometricNoise()], ids=["loglinear", "cosine", "geometric"]
)
def test_the_loss_is_the_weighted_sum_of_its_parts(graph: Graph, noise: Noise) -> None:
    batch = random_batch([6, 11, 3])
    score_fn = ScoreFn(make_model(), graph, noise, "log_score")
    loss_sum, n_residues = score_entropy_loss(score_fn, batch, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    t = stratified_times(3, noise.t_min, generator, "cpu")
    sigma, dsigma = noise(t)
    xt = graph.sample_transition(batch.tokens, sigma[batch.segment_ids], generator)
    log_score = score_fn(batch.with_tokens(xt), sigma)
    parts = graph.score_entropy(log_score, sigma[batch.segment_ids], xt, batch.tokens).split([6, 11, 3])
    expected = sum((1 - noise.t_min) * dsigma[i] * part.sum() for i, part in enumerate(parts))
    assert torch.allclose(loss_sum, torch.as_tensor(expected), rtol=1e-5)
    assert int(n_residues) == 20


def test_the_loss_of_a_time_free_x0_network_is_weighted_cross_entropy() -> None:
    """With log-linear noise the loss is the cross-entropy of masked residues, divided by t.

    The weight of a masked residue is kappa dsigma, where kappa = 1 / (e^sigma - 1) and dsigma is the derivative of
    sigma. With log-linear noise this weight is 1/t, because the factor 1 - eps cancels.
    """
    graph, noise, batch = Absorbing(), LogLinearNoise(), random_batch([40, 25])
    model = make_model()
    score_fn = ScoreFn(model, graph, noise, "x0", time_conditioning=False)
    loss_sum, _ = score_entropy_loss(score_fn, batch, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    t = stratified_times(2, noise.t_min, generator, "cpu")
    xt = graph.sample_transition(batch.tokens, noise(t)[0][batch.segment_ids], generator)
    logits = model(batch.with_tokens(xt), torch.zeros(2))
    nats = F.cross_entropy(logits, batch.tokens, reduction="none") * (xt == 20)
    expected = (1 - noise.t_min) * (nats / t[batch.segment_ids]).sum()
    assert torch.allclose(loss_sum, expected, rtol=1e-4)


def test_the_loss_of_a_curriculum_is_the_integral_up_to_its_cap() -> None:
    """A curriculum draws times t up to a cap, which grows during training.

    With zero logits the integrand is log 20 per residue at all t <= cap, so the integral is (cap - t_min) log 20.
    """
    graph, noise, batch = Absorbing(), LogLinearNoise(), random_batch([60] * 400)
    score_fn = ScoreFn(lambda batch, sigma: torch.zeros(len(batch.tokens), 20), graph, noise, "x0")
    for cap in (0.1, 0.6, 1.0):
        generator = torch.Generator().manual_seed(0)
        losses = [score_entropy_loss(score_fn, batch, generator, cap)[0] / 24_000 for _ in range(20)]
        mean, error = torch.stack(losses).mean(), torch.stack(losses).std() / 20**0.5
        assert abs(mean - (cap - 1e-3) * math.log(20)) < 4 * error + 0.002 * cap
        assert error < 0.05 * cap


def test_context_letters_are_not_counted_as_residues() -> None:
    tokens = torch.from_numpy(ProteinTokenizer().encode("MKXVBZ"))
    batch = PackedBatch.pack([tokens.long()])
    score_fn = ScoreFn(make_model(), Absorbing(), LogLinearNoise(), "x0")
    _, n_residues = score_entropy_loss(score_fn, batch, torch.Generator())
    assert int(n_residues) == 3


def test_gradients_reach_every_parameter() -> None:
    model = make_model()
    score_fn = ScoreFn(model, Absorbing(), LogLinearNoise(), "log_score")
    loss_sum, _ = score_entropy_loss(score_fn, random_batch([30, 20]), torch.Generator().manual_seed(0))
    loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("noise", [LogLinearNoise(), CosineNoise()], ids=["loglinear", "cosine"])
@pytest.mark.parametrize("t_max", [1.0, 0.7])
def test_a_loss_weight_above_the_cap_is_scaled_down_to_the_cap(noise: Noise, t_max: float) -> None:
    graph, cap, scaled = Absorbing(), 5.0, 0
    score_fn = ScoreFn(make_model(), graph, noise, "x0", time_conditioning=False)
    for seed in range(40):
        batch = random_batch([50], seed)
        plain_generator, capped_generator, time_generator = (torch.Generator().manual_seed(seed) for _ in range(3))
        plain_loss, _ = score_entropy_loss(score_fn, batch, plain_generator, t_max)
        capped_loss, _ = score_entropy_loss(score_fn, batch, capped_generator, t_max, cap)
        sigma, dsigma = noise(stratified_times(1, noise.t_min, time_generator, "cpu", t_max))
        weight = float((t_max - noise.t_min) * dsigma / torch.expm1(sigma))
        assert torch.allclose(capped_loss, plain_loss * min(1.0, cap / weight), rtol=1e-4, atol=1e-4)
        scaled += weight > cap
    assert 0 < scaled < 40
