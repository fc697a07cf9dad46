"""Sinusoids of the position, added to the embedding (arXiv 1706.03762, section 3.5)."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.layers import EMBEDDING_STD
from protlig_dd.model.positions.base import PositionEncoding

BASE = 10000.0


class Sinusoidal(PositionEncoding):
    """Adds sinusoids of the position i to the embedding, whose width is D.

    Dimension 2 k receives c sin(i / 10000^(2 k / D)), and dimension 2 k + 1 the same with the cosine. The factor c is
    `model.sinusoid_scale`. A new run sets c to the standard deviation of the initial embeddings. The embeddings and
    sinusoids then have the same proportions as in arXiv 1706.03762 (section 3.4), where c is 1 and the embeddings are
    multiplied by sqrt(D).

    Raises:
        ValueError: an odd hidden_size, or no sinusoid_scale. Configs of the first versions with this encoding do not
            contain the scale that their networks were trained with.
    """

    scaled = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.hidden_size % 2:
            raise ValueError(
                f"model.positions={config.positions} pairs sines with cosines, so model.hidden_size must be even, got "
                f"{config.hidden_size}"
            )
        if config.sinusoid_scale is None:
            raise ValueError(
                f"model.positions={config.positions} needs model.sinusoid_scale, the factor of the sinusoids; a new "
                f"run sets it to {EMBEDDING_STD:g}, and a network without this key must be trained again"
            )
        self.hidden_size, self.scale = config.hidden_size, config.sinusoid_scale

    def add(self, x: Float[Tensor, "total hidden"], batch: PackedBatch) -> Float[Tensor, "total hidden"]:
        """Return the embeddings plus the sinusoids of each token's position."""
        sin, cos = sinusoids(batch.positions.float(), self.hidden_size)
        return x + self.scale * torch.stack([sin, cos], dim=-1).flatten(1).to(x.dtype)


def sinusoids(
    positions: Float32[Tensor, " total"], width: int
) -> tuple[Float32[Tensor, "total half"], Float32[Tensor, "total half"]]:
    """Return sines and cosines of position / 10000^(2 k / width), each (total, width / 2)."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angle = torch.outer(positions, BASE**-exponent)
    return angle.sin(), angle.cos()
