"""Old import path of `protlig_dd.model.mixers.attention`, kept for one release."""

from protlig_dd.model.mixers.attention import resolve_attention_backend, varlen_attention

__all__ = ["resolve_attention_backend", "varlen_attention"]
