"""Interface of a block's mixer, the layer in which the tokens of a sequence exchange information."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.mixers.scores import ScoreInputs
from protlig_dd.model.positions.base import PositionEncoding


class Mixer(nn.Module, ABC):
    """Maps (total, hidden_size) to (total, hidden_size). Each token reads only its own sequence.

    A mixer has three steps (`project`, `mix`, `out`), because torch.compile fuses `project` and `out` with the
    block's norms and residual connections. To add a kind, write a subclass in a file of its own and add its name to
    MIXERS. Its weights must belong to child modules: the block registers the child modules, and checkpoints name
    them `blocks.N.NAME`. Linear layers that fine-tuning may adapt are of the class `Linear` (protlig_dd.model.layers).

    Args:
        backend: the resolved attention backend.
    """

    capturable = True
    """Whether CUDA graphs can record `mix`. They cannot if `mix` reads the lengths of a pack on the host."""
    passes = 1
    """How often the mixer applies each of its linear layers to a token."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size

    @abstractmethod
    def project(self, x: Tensor, positions: PositionEncoding, *tables: Tensor) -> Tensor:
        """Compute the input of `mix` from each token separately.

        Args:
            tables: the tables of `positions` for this pack.
        """

    @abstractmethod
    def mix(
        self,
        projected: Tensor,
        batch: PackedBatch,
        positions: PositionEncoding,
        *tables: Tensor,
        scores: ScoreInputs | None = None,
    ) -> Tensor:
        """Combine the tokens of each sequence.

        Args:
            tables: the tables of `positions` for this pack.
            scores: the bias and mask of attention scores; mixers without attention ignore them.
        """

    @abstractmethod
    def out(self, mixed: Tensor) -> Tensor:
        """Map the output of `mix` to (total, hidden_size), each token separately."""

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the multiply-adds of `mix` over sequences of these lengths (tokens).

        `DiT.flops` already counts each linear layer once per token. If `mix` applies a linear layer more than once per
        token, include every time except the first.
        """
        return 0

    def forward(
        self, x: Tensor, batch: PackedBatch, positions: PositionEncoding, scores: ScoreInputs | None = None
    ) -> Tensor:
        """Apply `project`, `mix` and `out`."""
        tables = positions.tables(batch)
        return self.out(self.mix(self.project(x, positions, *tables), batch, positions, *tables, scores=scores))
