"""T5's relative position bias (arXiv 1910.10683, section 2.1), bidirectional."""

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import OffsetBias

BUCKETS = 32
EXACT = 8  # distances below this value have a bucket each
INIT_STD = 0.02


class T5Relative(PositionEncoding):
    """Adds a learned bias for each head and bucket of the offset j - i. All blocks share the biases."""

    backends = ("flex", "sdpa")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.buckets = nn.Embedding(BUCKETS, config.n_heads)
        nn.init.normal_(self.buckets.weight, std=INIT_STD)

    def bias(self, batch: PackedBatch) -> tuple[OffsetBias]:
        """Return the bias of every offset in the pack's longest sequence."""
        offsets = torch.arange(1 - batch.max_seqlen, batch.max_seqlen, device=batch.tokens.device)
        return (OffsetBias(self.buckets.weight.T.index_select(1, bucket_of(offsets))),)


def bucket_of(offsets: Int64[Tensor, " offsets"]) -> Int64[Tensor, " offsets"]:
    """Return the bucket, 0..31, of each offset j - i of key j from query i.

    Keys after the query have buckets 16..31. Each distance n below 8 has its own bucket. Larger distances share eight
    buckets, which begin at 8 * 2^(k / 2), k = 0..7, so the last bucket contains all distances of at least 91. The
    bounds are compared in whole numbers (n^2 >= 64 * 2^k), because a rounded logarithm may be on the wrong side.
    """
    n = offsets.abs()
    bounds = EXACT**2 * 2 ** torch.arange(1, BUCKETS // 2 - EXACT, device=offsets.device)
    shared = EXACT + (n.square().unsqueeze(1) >= bounds).sum(-1)
    return BUCKETS // 2 * (offsets > 0) + torch.where(n < EXACT, n, shared)
