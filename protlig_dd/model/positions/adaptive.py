"""Sinusoids with learned weights, added to the embedding. Before training they equal the unweighted sinusoids."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.sinusoidal import Sinusoidal, sinusoids
from protlig_dd.tokenizer import VOCAB_SIZE


class Adaptive(Sinusoidal):
    """Adds c g_token g_k sin(s i / 10000^(2 k / D)) to the embedding, and the same with the cosine.

    Here i is the position and D the width of the embedding. The factor s of the position, the gain g_k of each
    frequency and the gain g_token of each token id are learned. All of them start at 1. The factor c is
    `model.sinusoid_scale`, as in `Sinusoidal`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.position_scale = nn.Parameter(torch.ones(1))
        self.frequency_gain = nn.Parameter(torch.ones(config.hidden_size // 2))
        self.token_gain = nn.Embedding(VOCAB_SIZE, 1)
        nn.init.ones_(self.token_gain.weight)

    def add(self, x: Float[Tensor, "total hidden"], batch: PackedBatch) -> Float[Tensor, "total hidden"]:
        """Return the embeddings plus the weighted sinusoids of each token's position."""
        sin, cos = sinusoids(batch.positions.float() * self.position_scale, self.hidden_size)
        waves_TH = torch.stack([sin * self.frequency_gain, cos * self.frequency_gain], dim=-1).flatten(1)
        return x + self.scale * (self.token_gain(batch.tokens) * waves_TH).to(x.dtype)
