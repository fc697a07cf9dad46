"""What a block asks of the layer in which tokens see one another."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.base import PositionEncoding


class Mixer(nn.Module, ABC):
    """(total, hidden) -> (total, hidden), each token seeing its own sequence only.

    In three steps, because only the first and the last gain from torch.compile, which fuses them with what lies before
    and after in the block. A new kind is a subclass in a file of its own and a name in MIXERS. Its parts become those
    of the block: their names in a checkpoint are `blocks.N.` and their own, and must differ from the block's.
    """

    @abstractmethod
    def __init__(self, config: ModelConfig, backend: str) -> None:
        """Args: backend: of attention, as resolved for this machine."""
        super().__init__()

    @abstractmethod
    def project(self, x: Tensor, positions: PositionEncoding, *tables: Tensor) -> Tensor:
        """What the tokens show of themselves: of each token alone.

        Args:
            tables: of `positions`, for this pack.
        """

    @abstractmethod
    def mix(self, projected: Tensor, batch: PackedBatch) -> Tensor:
        """The step in which they see one another."""

    @abstractmethod
    def out(self, mixed: Tensor) -> Tensor:
        """Back to (total, hidden): of each token alone."""

    def forward(self, x: Tensor, batch: PackedBatch, positions: PositionEncoding) -> Tensor:
        """All three."""
        return self.out(self.mix(self.project(x, positions, *positions.tables(batch)), batch))
