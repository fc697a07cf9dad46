"""ALiBi: a bias that is linear in the distance (arXiv 2108.12409) and equal in both directions."""

import torch
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import OffsetBias


class Alibi(PositionEncoding):
    """Adds -m_h |j - i| to the score of query i and key j in head h. This kind has no parameters."""

    backends = ("flash_attn", "flex", "sdpa")
    slopes: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        # the slopes follow from the number of heads, so checkpoints do not store them
        self.register_buffer("slopes", torch.tensor(slopes_of(config.n_heads)), persistent=False)

    def bias(self, batch: PackedBatch) -> tuple[OffsetBias]:
        """Return the bias of every offset in the pack's longest sequence, and the slopes."""
        offsets = torch.arange(1 - batch.max_seqlen, batch.max_seqlen, device=batch.tokens.device)
        return (OffsetBias(torch.outer(-self.slopes, offsets.abs().float()), self.slopes),)


def slopes_of(n_heads: int) -> list[float]:
    """Return the slopes m_h = 2^(-8 h / n_heads), h = 1..n_heads, if n_heads is a power of two.

    Otherwise return the slopes of the next lower power of two, followed by every other slope of the next higher one
    until there are n_heads slopes, as in the paper's code.
    """
    lower = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * head / lower) for head in range(1, lower + 1)]
    return slopes if lower == n_heads else slopes + slopes_of(2 * lower)[::2][: n_heads - lower]
