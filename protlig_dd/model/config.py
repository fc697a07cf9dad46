"""What defines a network, and what its dimensions must satisfy."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class ModelConfig:
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


NORMS = ("layer", "rms")
MLPS = ("gelu", "relu2", "swiglu")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"model.{name}={value}; there are {', '.join(choices)}")


def check_dimensions(hidden_size: int, n_heads: int, n_blocks: int, cond_dim: int, dropout: float) -> None:
    """Raise a ValueError that names the numbers unless a DiT of these dimensions can exist."""
    for name, value in (
        ("hidden_size", hidden_size),
        ("n_heads", n_heads),
        ("n_blocks", n_blocks),
        ("cond_dim", cond_dim),
    ):
        if value < 1:
            raise ValueError(f"model.{name} must be at least 1, got {value}")
    if hidden_size % n_heads:
        raise ValueError(
            f"model.hidden_size={hidden_size} is not divisible by model.n_heads={n_heads} "
            f"({hidden_size} = {n_heads} * {hidden_size // n_heads} + {hidden_size % n_heads})"
        )
    if hidden_size // n_heads % 2:
        raise ValueError(
            f"model.hidden_size={hidden_size} / model.n_heads={n_heads} gives head_dim "
            f"{hidden_size // n_heads}, which rotary needs even"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"model.dropout must lie in [0, 1), got {dropout}")
