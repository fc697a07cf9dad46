"""Recording of the forward and backward pass as CUDA graphs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch


class NetworkOnTensors(nn.Module):
    """Computes a network from a pack's tensors only, as CUDA graphs require.

    All other values of the pack, such as `lengths` on the host, are taken from `geometry`.

    Args:
        model: the module whose parameters get gradients.
        network: the model's function (batch, sigma) -> logits that does not check its inputs.
        geometry: a pack of the captured shape.
    """

    def __init__(
        self, model: nn.Module, network: Callable[[PackedBatch, Tensor], Tensor], geometry: PackedBatch
    ) -> None:
        super().__init__()
        self.model, self.network, self.geometry = model, network, geometry

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, segment_ids: Tensor, positions: Tensor, sigma: Tensor
    ) -> Tensor:
        batch = replace(
            self.geometry, tokens=tokens, cu_seqlens=cu_seqlens, segment_ids=segment_ids, positions=positions
        )
        return self.network(batch, sigma)


def capture(
    model: nn.Module,
    network: Callable[[PackedBatch, Tensor], Tensor],
    blank: PackedBatch,
    autocast: torch.dtype | None,
) -> Callable[..., Tensor]:
    """Record the forward and backward pass for packs of the shape of `blank`.

    Afterwards, the gradients of the model's trained parameters stay in fixed memory, and each backward pass adds to
    them.

    Args:
        model, network: see NetworkOnTensors.
        autocast: dtype in which the network computes; None for the dtype of its weights.

    Returns:
        (tokens, cu_seqlens, segment_ids, positions, sigma) -> logits.
    """
    sigma = torch.ones(len(blank.lengths), device=blank.tokens.device)
    inputs = (blank.tokens, blank.cu_seqlens, blank.segment_ids, blank.positions, sigma)
    graphed = NetworkOnTensors(model, network, blank)
    with torch.autocast(sigma.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
        recorded: Any = torch.cuda.make_graphed_callables(graphed, inputs)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    replay: Callable[..., Tensor] = recorded
    return replay
