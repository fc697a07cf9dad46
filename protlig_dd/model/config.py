"""What defines a network."""

from dataclasses import dataclass
from typing import Annotated

COMPUTING = "says how the network is computed, not what it is"
LATER = "left out of files where it has its default, so that versions without it read them"
TUNABLE = "may be set anew when the network is fine-tuned"
NORMS = ("layer", "rms")
MLPS = ("gelu", "relu2", "swiglu")


@dataclass
class ModelConfig:
    """The keys of `model`; configs/model/*.yaml say what they mean."""

    hidden_size: int
    n_heads: int
    n_blocks: int
    cond_dim: int
    dropout: Annotated[float, TUNABLE]
    attention_backend: Annotated[str, COMPUTING]
    norm: str
    mlp: str
    qk_norm: bool
    checkpointing: Annotated[bool, COMPUTING]
    positions: Annotated[str, LATER] = "rope"
    mixer: Annotated[str, LATER] = "attention"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads
