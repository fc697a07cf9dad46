"""The forward and the backward pass as CUDA graphs."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from protlig_dd.batch import PackedBatch


class NetworkOnTensors(nn.Module):
    """A network on the tensors of a pack, as CUDA graphs take it; what lives on the host is that of `geometry`.

    Args:
        model: whose parameters get gradients.
        network: its (batch, sigma) -> logits, without checks that wait for the device.
        geometry: a pack of the shape that is captured.
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
