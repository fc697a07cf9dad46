"""What a kind of position encoding may do. The kind that does nothing is the base class itself."""

from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig


class PositionEncoding(nn.Module):
    """How the network is told where a token stands in its sequence; each method may be left as it is.

    A new kind is a subclass in a file of its own and a name in POSITIONS. It must take sequences of any length.

    Raises:
        ValueError: a head_dim that this kind cannot encode.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim

    def add(self, x: Float[Tensor, "total hidden"], batch: PackedBatch) -> Float[Tensor, "total hidden"]:
        """The embeddings, with what tells them their positions."""
        return x

    def tables(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """What `rotate` needs of a pack, computed once for all blocks, on the pack's device."""
        return ()

    def rotate(
        self, qkv: Float[Tensor, "total 3 heads head_dim"], *tables: Tensor
    ) -> Float[Tensor, "total 3 heads head_dim"]:
        """Queries and keys turned by their positions."""
        return qkv
