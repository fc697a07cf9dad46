"""The optimizer of a run."""

import torch
from torch import nn

from protlig_dd.config.train import OptimConfig
from protlig_dd.model.layers import HeadGates, HeadMatrices, StackedLinear
from protlig_dd.model.lora import LowRank
from protlig_dd.runs.checkpoint import trained_parameters
from protlig_dd.training.optim.muon import Muon


def make_optimizer(model: nn.Module, optim: OptimConfig, precision: str) -> torch.optim.Optimizer:
    """Return fused AdamW for all parameters, or Muon for the matrices of the blocks and fused AdamW for the others.

    There are two exceptions: AdamW, not Muon, updates the matrices of adaLN and of HeadGates in the blocks, and those
    of adapters. Weight decay acts on matrices only, those of adapters included, not on norms, biases or embeddings.
    Weights that adapters leave frozen are not part of the optimizer.

    The optimizer's step reads the flag `optimizer.found_inf` on the device, and changes no weight if the flag is 1. The
    trainer sets the flag after a loss or gradient that is not finite, or a spike of the loss, and never resets it. The
    host reads the flag later and may start more steps before that. These steps do not change the weights either.

    Args:
        precision: bf16 | fp32, the precision in which Muon orthogonalises.
    """
    hidden: dict[nn.Parameter, int] = {}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    stacked = {part.weight: part.stacked for part in model.modules() if isinstance(part, StackedLinear | HeadMatrices)}
    not_orthogonal = {p for part in model.modules() if isinstance(part, HeadGates | LowRank) for p in part.parameters()}
    embeddings = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in trained_parameters(model).items():
        is_matrix = parameter.ndim >= 2 and parameter not in embeddings
        in_block = name.startswith("blocks.") and ".adaln." not in name and parameter not in not_orthogonal
        if is_matrix and in_block and optim.name == "muon":
            hidden[parameter] = stacked.get(parameter, 1)
        else:
            (decayed if is_matrix else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    betas = optim.betas[0], optim.betas[1]
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    if not hidden:
        return adamw
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(hidden, adamw, lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum, dtype=dtype)
