"""Old import path of `protlig_dd.model.positions.rotary`, kept for one release."""

from protlig_dd.model.positions.rotary import apply_rotary_pos_emb, gather_rotary, rotary_cos_sin

__all__ = ["apply_rotary_pos_emb", "gather_rotary", "rotary_cos_sin"]
