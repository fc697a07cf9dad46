"""The configuration of a network."""

from dataclasses import dataclass
from typing import Annotated

COMPUTE_ONLY = "affects how the network is computed, not which function it computes"
ADDED_LATER = "omitted from files where it has its default, so that versions without this key can read them"
TUNABLE = "may be changed when the network is fine-tuned"
NORMS = ("layer", "rms")
MLPS = ("gelu", "relu2", "swiglu")


@dataclass
class ModelConfig:
    """The keys of `model`, which are documented in configs/model/*.yaml."""

    hidden_size: int
    n_heads: int
    n_blocks: int
    cond_dim: int
    dropout: Annotated[float, TUNABLE]
    attention_backend: Annotated[str, COMPUTE_ONLY]
    norm: str
    mlp: str
    qk_norm: bool
    checkpointing: Annotated[bool, COMPUTE_ONLY]
    positions: Annotated[str, ADDED_LATER] = "rope"
    mixer: Annotated[str, ADDED_LATER] = "attention"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads
