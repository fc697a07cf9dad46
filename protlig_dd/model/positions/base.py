"""Interface of a position encoding. The base class itself encodes nothing."""

from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig


class PositionEncoding(nn.Module):
    """Gives the network each token's position in its sequence. By default every method does nothing.

    To add a kind, write a subclass in a file of its own and add its name to POSITIONS. It must accept sequences of any
    length.

    Raises:
        ValueError: a head_dim that this kind cannot encode.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim

    def add(self, x: Float[Tensor, "total hidden"], batch: PackedBatch) -> Float[Tensor, "total hidden"]:
        """Return the embeddings with position information added."""
        return x

    def tables(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Return the tensors that `rotate` needs for this pack, on its device. Computed once for all blocks."""
        return ()

    def rotate(
        self, qkv: Float[Tensor, "total 3 heads head_dim"], *tables: Tensor
    ) -> Float[Tensor, "total 3 heads head_dim"]:
        """Return qkv with queries and keys rotated by their positions."""
        return qkv
