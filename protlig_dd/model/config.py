"""What defines a network."""

from dataclasses import dataclass

NORMS = ("layer", "rms")
MLPS = ("gelu", "relu2", "swiglu")


@dataclass
class ModelConfig:
    """The keys of `model`; configs/model/*.yaml say what they mean."""

    hidden_size: int
    n_heads: int
    n_blocks: int
    cond_dim: int
    dropout: float
    attention_backend: str
    norm: str
    mlp: str
    qk_norm: bool
    checkpointing: bool
    positions: str = "rope"
    mixer: str = "attention"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads
