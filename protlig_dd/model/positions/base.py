"""Interface of a position encoding. The base class itself encodes nothing."""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.biases import ScoreBias


class PositionEncoding(nn.Module):
    """Gives the network each token's position in its sequence. The methods of this base class add no positions.

    To add a kind, write a subclass in a file of its own and add its name to POSITIONS. Learned tables must be
    nn.Embedding, which the optimizers neither decay nor orthogonalise.

    Raises:
        ValueError: dimensions that this kind cannot encode.
    """

    backends: ClassVar[tuple[str, ...]] = ("flash_attn", "torch_varlen", "flex", "matmul", "sdpa")
    """The attention backends that can compute this kind."""
    limited: ClassVar[bool] = False
    """Whether sequences may have at most model.max_positions tokens. Otherwise they may have any length."""
    scaled: ClassVar[bool] = False
    """Whether this kind multiplies sinusoids by model.sinusoid_scale."""
    columns: ClassVar[int] = 0
    """Number of dimensions that are appended to each head of q, k and v for a kernel that does not accept a bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim

    @classmethod
    def is_biased(cls) -> bool:
        """Whether this kind adds a bias to the attention scores."""
        return cls.bias is not PositionEncoding.bias

    def add(self, x: Float[Tensor, "total hidden"], batch: PackedBatch) -> Float[Tensor, "total hidden"]:
        """Return the embeddings with position information added."""
        return x

    def tables(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Return the tensors that `rotate` needs for this pack, on the pack's device. All blocks share the tensors."""
        return ()

    def rotate(
        self, qkv: Float[Tensor, "total 3 heads head_dim"], *tables: Tensor
    ) -> Float[Tensor, "total 3 heads head_dim"]:
        """Return qkv. A rotary kind rotates queries and keys by angles that depend on their positions."""
        return qkv

    def bias(self, batch: PackedBatch) -> tuple[ScoreBias, ...]:
        """Return the biases of the scores: no bias, one bias for all attention blocks, or one bias per attention block.

        Raises:
            ValueError: a sequence is longer than a table. The host checks the lengths before anything is computed.
        """
        return ()

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the multiply-adds of `bias` over sequences of these lengths (tokens)."""
        return 0
