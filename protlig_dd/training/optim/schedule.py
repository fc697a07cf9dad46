"""How many steps a run has, and the learning rate over them."""

import math

from protlig_dd.config.train import OptimConfig, TrainConfig
from protlig_dd.data.loader import PackDataset


def count_steps(config: TrainConfig, dataset: PackDataset) -> int:
    """trainer.max_steps, or trainer.epochs turned into steps."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    assert config.trainer.epochs is not None  # one of the two, checked with the config
    return max(1, round(config.trainer.epochs * dataset.packs_per_epoch / config.optim.packs_per_step))


def warmup_of(wanted: int, max_steps: int) -> int:
    """Steps of the warm-up: those that are wanted, or a tenth of a run that would be over by then."""
    return wanted if wanted < max_steps else max_steps // 10


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """Linear warm-up, then down to lr * min_lr_ratio at `max_steps`: `cosine` from the warm-up's end on; `wsd`
    (warm-up, stable, decay; arXiv 2404.06395) stays at lr until the last decay_share of max_steps, and falls linearly.

    Args:
        step: counted from 0; the first step of a warm-up already learns.
    """
    warmup_steps, cosine = warmup_of(optim.warmup_steps, max_steps), optim.schedule == "cosine"
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    start = warmup_steps if cosine else max(warmup_steps, round(max_steps * (1 - optim.decay_share)))
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)
