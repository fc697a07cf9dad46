"""One block of the transformer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.kernels import per_token
from protlig_dd.model.layers import MLP, make_norm, modulate, zero_linear
from protlig_dd.model.mixers.attention import varlen_attention
from protlig_dd.model.positions.rotary import apply_rotary_pos_emb


class Block(nn.Module):
    """Pre-norm transformer block whose norms and residual gates are set by sigma."""

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        cond_dim: int | None,
        dropout: float,
        attention_backend: str,
        norm: str,
        mlp: str,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.attention_backend = n_heads, dropout, attention_backend
        self.compiled: tuple[Callable[..., Tensor], ...] | None = None
        self.adaln = None if cond_dim is None else zero_linear(cond_dim, 6 * hidden_size)
        if self.adaln is not None:
            # residual gates start open: behind a zero output layer, closed ones would leave it nothing to learn from
            nn.init.ones_(self.adaln.bias.view(6, hidden_size)[2])
            nn.init.ones_(self.adaln.bias.view(6, hidden_size)[5])
        self.attention_norm = make_norm(norm, hidden_size, modulated=cond_dim is not None)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        head_dim = hidden_size // n_heads
        self.q_norm, self.k_norm = (make_norm("rms", head_dim) if qk_norm else None for _ in "qk")
        self.attention_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = make_norm(norm, hidden_size, modulated=cond_dim is not None)
        self.mlp = MLP(hidden_size, mlp)

    def forward(
        self,
        x_TH: Float[Tensor, "total hidden"],
        cond_nC: Float[Tensor, "n cond_dim"] | None,
        batch: PackedBatch,
        cos_sin: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "total hidden"]:
        modulation_nK = None if self.adaln is None else self.adaln(cond_nC)
        before, after = self.before_attention, self.after_attention
        if self.compiled is not None and self.training:
            before, after = self.compiled
        qkv = before(x_TH, modulation_nK, batch.segment_ids, *cos_sin)
        attended = varlen_attention(qkv, batch, self.attention_backend)
        return after(x_TH, attended, modulation_nK, batch.segment_ids)

    def before_attention(
        self,
        x_TH: Float[Tensor, "total hidden"],
        modulation_nK: Float[Tensor, "n width"] | None,
        segment_ids: Int64[Tensor, " total"],
        cos: Float32[Tensor, "1 total 1 1 head_dim"],
        sin: Float32[Tensor, "1 total 1 1 head_dim"],
    ) -> Float[Tensor, "total 3 heads head_dim"]:
        """Norm, fused qkv, rotary."""
        h = self.attention_norm(x_TH)
        if modulation_nK is not None:
            shift, scale = per_token(modulation_nK.chunk(6, dim=-1)[:2], segment_ids)
            h = modulate(h, shift, scale)
        qkv = rearrange(self.qkv(h), "t (three h d) -> 1 t three h d", three=3, h=self.n_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.unbind(2)
            qkv = torch.stack([self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype), v], dim=2)
        return apply_rotary_pos_emb(qkv, cos, sin).squeeze(0)

    def after_attention(
        self,
        x_TH: Float[Tensor, "total hidden"],
        attended: Float[Tensor, "total heads head_dim"],
        modulation_nK: Float[Tensor, "n width"] | None,
        segment_ids: Int64[Tensor, " total"],
    ) -> Float[Tensor, "total hidden"]:
        """Output projection, residual, norm, MLP, residual."""
        attended = F.dropout(self.attention_out(rearrange(attended, "t h d -> t (h d)")), self.dropout, self.training)
        if modulation_nK is None:
            x_TH = x_TH + attended
            return x_TH + F.dropout(self.mlp(self.mlp_norm(x_TH)), self.dropout, self.training)
        gate_a, shift, scale, gate_m = per_token(modulation_nK.chunk(6, dim=-1)[2:], segment_ids)
        x_TH = x_TH + gate_a * attended
        hidden = self.mlp(modulate(self.mlp_norm(x_TH), shift, scale))
        return x_TH + gate_m * F.dropout(hidden, self.dropout, self.training)
