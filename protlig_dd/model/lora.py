"""Low-rank adapters (LoRA, arXiv 2106.09685): train W + (alpha / rank) B A, where the network's weights W stay fixed.

A has the shape (rank, inputs) and B the shape (outputs, rank). If a layer stacks several matrices, such as q, k and v,
each of them has its own A and B. A starts as uniform random numbers and B as zeros, as in the code of the paper. So an
adapted network first computes the same function as the network without adapters.
"""

import math
import re
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.model.block import Block
from protlig_dd.model.config import ADAPTED, LoraConfig, unknown_choice
from protlig_dd.model.dit import DiT
from protlig_dd.model.layers import Linear, StackedLinear


class LowRank(nn.Module):
    """Maps the weights W of a linear layer to W + scale B A, for each of the matrices that the layer stacks.

    Args:
        rows, columns: shape of W.
        stacked: number of the stacked matrices. Each has rows / stacked rows.
    """

    def __init__(self, rows: int, columns: int, *, stacked: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(stacked, rank, columns))
        self.b = nn.Parameter(torch.zeros(stacked, rows // stacked, rank))
        limit = 1 / math.sqrt(columns)  # as in nn.Linear, and as for A in the code of the paper
        nn.init.uniform_(self.a, -limit, limit)

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        # without autocast, so that training uses the same weights as the merged model
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.b @ self.a).flatten(0, 1)


def check_lora(lora: LoraConfig) -> None:
    """Raise a ValueError that names the key and its value if the settings of the adapters cannot work together."""
    default = LoraConfig()
    if lora.rank is None:
        changed = [key for key in ("alpha", "layers", "others") if getattr(lora, key) != getattr(default, key)]
        if changed:
            raise ValueError(f"model.lora.{changed[0]} has no effect without adapters; also give model.lora.rank")
        return
    if lora.rank < 1:
        raise ValueError(f"model.lora.rank must be at least 1, or null for no adapters, got {lora.rank}")
    if lora.alpha is not None and not 0 < lora.alpha < math.inf:
        raise ValueError(
            f"model.lora.alpha must be a finite number above 0, or null for alpha = rank, got {lora.alpha:g}"
        )
    for i, name in enumerate(lora.layers):
        if name not in ADAPTED:
            raise ValueError(unknown_choice(f"model.lora.layers[{i}]", name, ADAPTED))
    if not lora.layers and not lora.others:
        raise ValueError(
            "model.lora.layers=[] and model.lora.others=false leave nothing to train; "
            f"choose layers from {', '.join(ADAPTED)}, or set others=true"
        )


def add_adapters(model: DiT, lora: LoraConfig) -> None:
    """Add adapters to the chosen layers of a network without adapters, and freeze all other weights.

    With `lora.others`, the embedding and the output head are not frozen.

    Raises:
        ValueError: the settings cannot work together, or the rank exceeds a dimension of an adapted matrix. The message
            about the rank names the layer.
    """
    check_lora(lora)
    assert lora.rank is not None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lora.others and name.startswith(("embedding.", "head.")))
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or kind_of(name) not in lora.layers:
            continue
        stacked = layer.stacked if isinstance(layer, StackedLinear) else 1
        rows, columns = layer.weight.shape
        smallest = min(rows // stacked, columns)
        if lora.rank > smallest:
            raise ValueError(
                f"model.lora.rank={lora.rank} is larger than {smallest}, the smallest dimension of a matrix in {name} "
                f"({rows // stacked} x {columns})"
            )
        with layer.weight.device:
            layer.adapter = LowRank(rows, columns, stacked=stacked, rank=lora.rank, scale=lora.scale)
    model.frozen_per_token = sum(
        part.weight.numel() * passes_of(model, name)
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "adaln" not in name and "sigma" not in name
        if not part.weight.requires_grad and not is_adapted(part)
    )


def is_adapted(layer: nn.Module) -> bool:
    return isinstance(layer, Linear) and layer.adapter is not None


def passes_of(model: DiT, name: str) -> int:
    """Return how often the network applies the linear layer of this name to a token."""
    found = re.match(r"blocks\.(\d+)\.(?!mlp\.)", name)
    return 1 if found is None else cast(Block, model.blocks[int(found[1])]).mixer.passes


def merged_numbers(model: DiT, *, once: bool = False) -> int:
    """Return how many numbers the sums of weights and adapters have that one forward pass computes.

    Args:
        once: count a layer once even if a mixer applies it, and computes its sum, more often.
    """
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear) and is_adapted(layer)}
    return sum(layer.weight.numel() * (1 if once else passes_of(model, name)) for name, layer in adapted.items())


def kind_of(name: str) -> str:
    """Return the kind in ADAPTED of a layer with this name: `mlp` for blocks.N.mlp, `attention` for mixers."""
    return "mlp" if ".mlp." in name else "attention"


def base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a network that do not belong to adapters, by name."""
    adapters = {parameter for part in model.modules() if isinstance(part, LowRank) for parameter in part.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if parameter not in adapters}


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the network without adapters that computes the same function, by name."""
    weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in base_weights(model).items()}
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    return weights | {name: layer.merged() for name, layer in layers.items()}
