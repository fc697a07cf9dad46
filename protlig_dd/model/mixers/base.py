"""What a block asks of the layer in which tokens see one another."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.base import PositionEncoding


class Mixer(nn.Module, ABC):
    """(total, hidden) -> (total, hidden), each token seeing its own sequence only.

    In three steps, because torch.compile fuses the first and the last with the block's norms and residuals. A new kind
    is a subclass in a file of its own and a name in MIXERS. Its weights belong to child modules: the block takes these
    over, and a checkpoint calls them `blocks.N.NAME`.

    Args:
        backend: of attention, as resolved for this machine.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()

    @abstractmethod
    def project(self, x: Tensor, positions: PositionEncoding, *tables: Tensor) -> Tensor:
        """What is mixed: computed from each token alone.

        Args:
            tables: of `positions`, for this pack.
        """

    @abstractmethod
    def mix(self, projected: Tensor, batch: PackedBatch) -> Tensor:
        """The step in which they see one another."""

    @abstractmethod
    def out(self, mixed: Tensor) -> Tensor:
        """Back to (total, hidden): computed from each token alone."""

    def flops(self, lengths: Sequence[int]) -> int:
        """Multiply-adds of `mix` over sequences of these lengths (tokens); those of the linear layers are counted."""
        return 0

    def forward(self, x: Tensor, batch: PackedBatch, positions: PositionEncoding) -> Tensor:
        """All three."""
        return self.out(self.mix(self.project(x, positions, *positions.tables(batch)), batch))
