"""DIET with absolute positions: a low-rank bias of the scores (arXiv 2104.08698, DIET-ABS)."""

from collections.abc import Sequence

from torch import nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import ProductBias

RANK = 32  # rank of the bias of each head
INIT_STD = 0.02


class Diet(PositionEncoding):
    """Adds p_i . p'_j to the score of query i and key j.

    p_i and p'_j are rows of two learned tables for each head. All blocks share the tables.

    Raises:
        ValueError: model.max_positions is not given. From `bias`: a sequence has more tokens than the tables have rows.
    """

    limited = True
    columns = RANK
    backends = ("flash_attn", "torch_varlen", "flex", "sdpa")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.max_positions is None:
            raise ValueError(
                "model.positions=diet needs model.max_positions, the length of its table in tokens (<bos> and <eos> "
                "included); training sets it to data.max_len + 2"
            )
        self.n_heads = config.n_heads
        self.queries, self.keys = (nn.Embedding(config.max_positions, config.n_heads * RANK) for _ in "qk")
        for table in (self.queries, self.keys):
            nn.init.normal_(table.weight, std=INIT_STD)

    def bias(self, batch: PackedBatch) -> tuple[ProductBias]:
        """Return the bias, which is the product of both tables."""
        if batch.max_seqlen > (rows := self.queries.num_embeddings):
            raise ValueError(
                f"model.positions=diet has a table of {rows} positions (model.max_positions), but a sequence has "
                f"{batch.max_seqlen} tokens (<bos> and <eos> included); use shorter sequences, or train with a larger "
                "model.max_positions"
            )
        return (ProductBias(*(table.weight.view(-1, self.n_heads, RANK) for table in (self.queries, self.keys))),)

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the multiply-adds of the bias itself. A kernel that reads it from appended columns computes more."""
        return self.n_heads * RANK * sum(length**2 for length in lengths)
