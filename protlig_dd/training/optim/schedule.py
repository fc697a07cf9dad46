"""The learning rate over a run."""

import math

from protlig_dd.config.train import SCHEDULES


def warmup_of(wanted: int, max_steps: int) -> int:
    """Steps of the warm-up: those that are wanted, or a tenth of a run that would be over by then."""
    return wanted if wanted < max_steps else max_steps // 10


def learning_rate(
    step: int,
    *,
    schedule: str,
    lr: float,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
    decay_share: float,
) -> float:
    """Linear warm-up over `warmup_steps`, then down to lr * min_lr_ratio at `max_steps`.

    Args:
        step: counted from 0; the first step of a warm-up already learns.
        schedule: `cosine` from the warm-up's end on; `wsd` (warm-up, stable, decay; arXiv 2404.06395) stays at lr until
            the last decay_share of max_steps, and falls linearly.

    Raises:
        ValueError: a schedule that is not in SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={schedule}; there are {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    start = warmup_steps if schedule == "cosine" else max(warmup_steps, round(max_steps * (1 - decay_share)))
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * left)
