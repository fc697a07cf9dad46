"""The number of steps of a run, and its learning-rate schedule."""

import math

from protlig_dd.config.train import OptimConfig, TrainConfig
from protlig_dd.data.loader import PackDataset


def count_steps(config: TrainConfig, dataset: PackDataset) -> int:
    """Return the number of steps of the run: trainer.max_steps, or the number of steps in trainer.epochs."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    assert config.trainer.epochs is not None  # check_train_config requires exactly one of the two
    return max(1, round(config.trainer.epochs * dataset.packs_per_epoch / config.optim.packs_per_step))


def resolve_warmup_steps(configured: int, max_steps: int) -> int:
    """Return the configured warm-up steps, or max_steps // 10 if the warm-up would not be shorter than the run."""
    return configured if configured < max_steps else max_steps // 10


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up to optim.lr, then decay to lr * min_lr_ratio at `max_steps`.

    With the schedule `cosine`, the rate decays as a cosine from the end of the warm-up. With `wsd` (warm-up, stable,
    decay; arXiv 2404.06395), it stays at optim.lr and then decays linearly. decay_share is the fraction of max_steps
    over which it decays.

    Args:
        step: counted from 0. The first warm-up step already has a positive rate.
    """
    warmup_steps, cosine = resolve_warmup_steps(optim.warmup_steps, max_steps), optim.schedule == "cosine"
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    decay_start = warmup_steps if cosine else max(warmup_steps, round(max_steps * (1 - optim.decay_share)))
    progress = min(1.0, max(0, step - decay_start) / max(1, max_steps - decay_start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * remaining)
