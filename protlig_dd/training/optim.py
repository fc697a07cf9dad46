"""The optimizer and the learning-rate schedule."""

import math
from collections.abc import Sequence

import torch
from torch import nn

OPTIMIZERS = ("adamw",)


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay on matrices only, not on norms, biases or the embedding.

    The fused step reads `optimizer.found_inf`: where that device flag is 1, it changes nothing. The trainer uses this
    to freeze the weights at the first non-finite loss without waiting for the device.

    Raises:
        ValueError: a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optim.name={name}; there are {', '.join(OPTIMIZERS)}")
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not parameter_name.startswith("embedding.")
        (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)


def learning_rate(step: int, *, lr: float, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from lr to lr * min_lr_ratio at `max_steps`.

    Args:
        step: counted from 0; the first step of a warm-up already learns.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
