"""Tests of a single training step: what it computes, and that it never waits for the device."""

import copy
import math
from itertools import count
from pathlib import Path

import pytest
import torch

from protlig_dd.batch import StaticShape
from protlig_dd.config.train import OPTIMIZERS
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.system.distributed import ALONE
from protlig_dd.system.random import keyed_generator
from protlig_dd.system.signals import StopRequests
from protlig_dd.training.context import RunContext, Start
from protlig_dd.training.objective import Objective
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.trainer import SPIKE_STEPS, Trainer

from .conftest import make_model, train_config

SHAPE = StaticShape(512, 64, 102)
OVERRIDES = (
    "optim.lr=0.09",
    "optim.betas=[0.9,0.99]",
    "optim.weight_decay=0.1",
    "optim.grad_clip=0.5",
    "optim.ema_decay=0.9",
    "optim.warmup_steps=90",
    "optim.packs_per_step=2",
    "trainer.max_steps=100",
    "trainer.loss_spike=3.0",
    "seed=0",
)


def rate(step: int) -> float:
    return 0.09 * (step + 1) / 90


def make_trainer(store: SequenceStore, optimizer: str, device: torch.device, *, fast: bool) -> Trainer:
    backend, precision = ("torch_varlen", "bf16") if fast else ("sdpa", "fp32")
    context = RunContext(
        folder=Path(),
        attempt=1,
        start=Start(),
        device=device,
        precision=precision,
        attention_backend=backend,
        compiled=fast,
        processes=ALONE,
        stop=StopRequests(),
        deadline=None,
    )
    model = make_model(attention_backend=backend).to(device).train()
    if fast:
        model.compile_blocks(dynamic=False)
        model.pad_packs(SHAPE)
        model.capture(context.autocast)
    group = StoreGroup([store])
    dataset = PackDataset(group, group.split("train"), seed=0, max_len=100, tokens_per_pack=512)
    objective = Objective(Absorbing(), LogLinearNoise(), "x0", True, context.autocast)
    return Trainer(model, objective, dataset, train_config(f"optim={optimizer}", *OVERRIDES), context)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_uses_the_gradient_of_all_its_packs(store: SequenceStore, optimizer: str) -> None:
    """Compare three steps with formulas: loss per residue of both packs, clipping, learning rate, averaged weights."""
    trainer = make_trainer(store, optimizer, torch.device("cpu"), fast=False)
    model = copy.deepcopy(trainer.model)
    score_fn = trainer.objective.score_fn(model)
    reference_optimizer = make_optimizer(model, trainer.config.optim, "fp32")
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    residues_seen = 0
    for step in range(3):
        packs = [trainer.dataset[2 * step], trainer.dataset[2 * step + 1]]
        residues = sum(int((pack.tokens < 20).sum()) for pack in packs)
        losses = [
            score_entropy_loss(score_fn, pack, keyed_generator(0, "noise", 2 * step + i, torch.device("cpu")))[0]
            for i, pack in enumerate(packs)
        ]
        (sum(losses) / residues).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        assert norm > 0.5  # otherwise clipping would not be tested
        for gradient in gradients:
            gradient *= 0.5 / norm
        for group in reference_optimizer.param_groups:
            group["lr"] = rate(step)
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        decay = min(0.9, (2 + step) / (11 + step))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        residues_seen += residues

        record = trainer.step(step, iter(packs), [])
        assert record["pack_loss"].tolist() == pytest.approx(
            [float(loss.detach()) / residues for loss in losses], rel=1e-4
        )
        assert float(record["grad_norm"]) == pytest.approx(norm, rel=1e-4)
        assert (record["lr"], record["residues"], trainer.residues_seen) == (rate(step), residues, residues_seen)
        assert record["rows"] == [row for pack in packs for row in pack.rows.tolist()]
        assert record["flops"] == sum(3 * model.flops(pack.lengths) for pack in packs)
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(trainer.ema.weights[name], average[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_or_a_spike_freezes_the_weights(store: SequenceStore) -> None:
    trainer = make_trainer(store, "adamw", torch.device("cpu"), fast=False)
    usual = torch.tensor(2.0)
    assert not trainer.freeze_if_bad(0, usual, torch.tensor(1.0))
    # before step SPIKE_STEPS no loss counts as a spike
    assert not trainer.freeze_if_bad(SPIKE_STEPS - 1, torch.tensor(100.0), torch.tensor(1.0))
    expected = 2.0 + (100.0 - 2.0) / SPIKE_STEPS
    assert float(trainer.usual_loss) == pytest.approx(expected)
    assert not trainer.freeze_if_bad(SPIKE_STEPS, torch.tensor(2.99 * expected), torch.tensor(1.0))
    expected += (2.99 * expected - expected) / SPIKE_STEPS
    assert trainer.freeze_if_bad(SPIKE_STEPS + 1, torch.tensor(3.01 * expected), torch.tensor(1.0))
    assert float(trainer.usual_loss) == pytest.approx(expected)  # a spike does not change the usual loss
    assert float(trainer.frozen) == 1
    assert not trainer.freeze_if_bad(SPIKE_STEPS + 2, torch.tensor(2.0), torch.tensor(1.0))
    assert float(trainer.frozen) == 1  # the weights stay frozen
    for loss, norm in ((math.nan, 1.0), (2.0, math.inf)):
        trainer.frozen.zero_()
        assert trainer.freeze_if_bad(1, torch.tensor(loss), torch.tensor(norm))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fast", [False, True])
def test_the_step_never_waits_for_a_gpu(store: SequenceStore, optimizer: str, fast: bool) -> None:
    trainer = make_trainer(store, optimizer, torch.device("cuda"), fast=fast)
    # padding and CUDA graphs are used only for packs that fit into SHAPE
    assert all(trainer.dataset[i].fits(SHAPE) for i in range(4))
    packs = (trainer.dataset[i].pin_memory() for i in count())
    trainer.step(0, packs, [])  # the first step creates the optimizer state
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(1, packs, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
