"""The optimizer of a run."""

from collections.abc import Sequence

import torch
from torch import nn

from protlig_dd.config.train import OPTIMIZERS
from protlig_dd.training.optim.muon import Muon


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    momentum: float = 0.95,
    precision: str = "fp32",
) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

    Weight decay acts on matrices only, not on norms, biases or the embedding. The step reads `optimizer.found_inf`:
    where that device flag is 1, it changes no weight. The trainer uses this to freeze the weights at the first
    non-finite loss without waiting for the device.

    Args:
        momentum: Muon's.
        precision: bf16 | fp32, in which Muon orthogonalises.

    Raises:
        ValueError: a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optim.name={name}; there are {', '.join(OPTIMIZERS)}")
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not parameter_name.startswith("embedding.")
        in_block = parameter_name.startswith("blocks.") and ".adaln." not in parameter_name
        (hidden if matrix and in_block and name == "muon" else decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "adamw":
        return adamw
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(hidden, adamw, lr=lr, weight_decay=weight_decay, momentum=momentum, dtype=dtype)
