"""The training step by itself: that it never waits for the device."""

from itertools import count

import pytest
import torch

from protlig_dd.batch import StaticShape
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.diffusion.graph import Absorbing
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.runtime.distributed import Processes
from protlig_dd.training.optim import OPTIMIZERS, make_optimizer
from protlig_dd.training.trainer import Trainer

from .conftest import make_model

SHAPE = StaticShape(512, 64, 102)


def make_trainer(store: SequenceStore, optimizer: str, device: torch.device, *, fast: bool) -> Trainer:
    backend, autocast = ("torch_varlen", torch.bfloat16) if fast else ("sdpa", None)
    graph, model = Absorbing(), make_model(attention_backend=backend).to(device).train()
    if fast:
        model.compile_blocks(dynamic=False)
        model.fill_packs(SHAPE)
        model.capture(autocast)
    group = StoreGroup([store])
    return Trainer(
        model=model,
        make_score=lambda network: ScoreFn(network, graph, "x0", autocast=autocast),
        graph=graph,
        noise=LogLinearNoise(),
        optimizer=make_optimizer(
            optimizer, model, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, momentum=0.95, precision="fp32"
        ),
        dataset=PackDataset(group, group.split("train"), seed=0, max_len=100, tokens_per_pack=512),
        device=device,
        processes=Processes(0, 1, 0),
        seed=0,
        packs_per_step=2,
        max_steps=100,
        learning_rate=lambda step: 1e-3,
        grad_clip=1.0,
        ema_decay=0.9,
        curriculum_steps=0,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fast", [False, True])
def test_the_step_never_waits_for_a_gpu(store: SequenceStore, optimizer: str, fast: bool) -> None:
    trainer = make_trainer(store, optimizer, torch.device("cuda"), fast=fast)
    assert all(trainer.dataset[i].fits(SHAPE) for i in range(4))  # or what fast means would not be tried
    packs = (trainer.dataset[i].pin_memory() for i in count())
    trainer.step(0, packs, [])  # the first one makes optimizer state
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(1, packs, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
