"""DIET with relative positions: a bias of the scores for each offset (arXiv 2104.08698, DIET-REL)."""

import torch
from torch import nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import OffsetBias

CLIP = 128  # larger distances have the bias of this distance; the clipping is this project's addition
INIT_STD = 0.02


class DietRelative(PositionEncoding):
    """Adds a learned bias for each block, head and signed offset j - i of key j from query i, clipped to -128 .. 128.

    Only blocks with attention have a table, whose name is the block's number.
    """

    backends = ("flex", "sdpa")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        tables = {str(block): nn.Embedding(2 * CLIP + 1, config.n_heads) for block in config.attention_blocks}
        for table in tables.values():
            nn.init.normal_(table.weight, std=INIT_STD)
        self.offsets = nn.ModuleDict(tables)

    def bias(self, batch: PackedBatch) -> tuple[OffsetBias, ...]:
        """Return the bias of every offset in the pack's longest sequence, for each block with attention."""
        offsets = torch.arange(1 - batch.max_seqlen, batch.max_seqlen, device=batch.tokens.device)
        rows = offsets.clamp(-CLIP, CLIP) + CLIP
        return tuple(OffsetBias(weight.T.index_select(1, rows)) for weight in self.offsets.parameters())
