"""The layers of an exported protlig_dd model, for Hugging Face transformers (see modeling_protlig_dd.py).

Exported models contain a copy of this file, which needs only torch. The names of the modules are those of the tensors
in model.safetensors.

Shape suffixes: n sequences, L tokens of the longest sequence, V tokens of the vocabulary, H hidden_size, C cond_dim.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_STATES, MASK = 20, 20  # ids 0..19 are the amino acids
SINUSOIDS, BASE = 256, 10000.0  # width of the sinusoidal embedding of sigma; base of sinusoids and rotary angles
EMBEDDING_STD, RMS_EPS, LAYER_EPS = 0.02, 1e-6, 1e-5
TRAINED_MASK_RATIO = 0.15 * 0.8  # ESM-2 chose 15% of the tokens for its loss and replaced 80% of these by <mask>

SUPPORTED = {
    "positions": ("rope", "sinusoidal", "none"),
    "mixers": ("attention",),
    "norm": ("layer", "rms"),
    "mlp": ("gelu", "gelu_erf", "geglu", "swiglu", "relu2"),
    "head": ("linear", "lm"),
}
"""The kinds of parts that these layers can compute. The first is that of a network whose config.json lacks the key."""

Rotation = tuple[Tensor, Tensor] | None
"""Cosines and sines of the rotary encoding's angles, each (n, 1, L, head_dim / 2); None for another encoding."""


def unsupported(model: Mapping[str, Any]) -> str | None:
    """Return the part of a network that these layers cannot compute, as `model.positions=t5`; None if there is none.

    Args:
        model: the key `model` of config.json.
    """
    kinds = {key: model.get(key, choices[0]) for key, choices in SUPPORTED.items()}
    return next((f"model.{key}={kind}" for key, kind in kinds.items() if kind not in SUPPORTED[key]), None)


class Block(nn.Module):
    """Pre-norm transformer block: norm, attention, norm, MLP. With time conditioning adaLN modulates both parts.

    Args:
        model: the key `model` of config.json.
        cond_dim: width of the embedding of sigma; None without time conditioning.
    """

    def __init__(self, model: Mapping[str, Any], cond_dim: int | None) -> None:
        super().__init__()
        width, bias, timed = model["hidden_size"], model.get("attention_bias", False), cond_dim is not None
        self.n_heads, self.dropout = model["n_heads"], model["dropout"]
        self.adaln = None if cond_dim is None else nn.Linear(cond_dim, 6 * width)
        self.attention_norm = make_norm(model, modulated=timed)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        head_norms = (RMSNorm(width // self.n_heads, eps=RMS_EPS) if model["qk_norm"] else None for _ in "qk")
        self.q_norm, self.k_norm = head_norms
        self.attention_out = nn.Linear(width, width, bias=bias)
        self.mlp_norm = make_norm(model, modulated=timed)
        self.mlp = MLP(width, model["mlp"])

    def forward(self, x_nLH: Tensor, cond_nC: Tensor | None, read_n11L: Tensor, rotation: Rotation) -> Tensor:
        """Return the residual stream after this block, (n, L, H).

        Args:
            cond_nC: the embedding of each sequence's sigma; None without time conditioning.
            read_n11L: True for tokens, False for padding, which no token attends to.
            rotation: tables of the rotary encoding.
        """
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        if self.adaln is None:
            x_nLH = x_nLH + drop(self.attention(self.attention_norm(x_nLH), read_n11L, rotation))
            return x_nLH + drop(self.mlp(self.mlp_norm(x_nLH)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(cond_nC).unsqueeze(1).chunk(6, dim=-1)
        hidden = self.attention_norm(x_nLH) * (1 + scale_a) + shift_a
        x_nLH = x_nLH + gate_a * drop(self.attention(hidden, read_n11L, rotation))
        hidden = self.mlp_norm(x_nLH) * (1 + scale_m) + shift_m
        return x_nLH + gate_m * drop(self.mlp(hidden))

    def attention(self, x_nLH: Tensor, read_n11L: Tensor, rotation: Rotation) -> Tensor:
        """Return the output of attention. Each token attends to the tokens of its sequence, in both directions."""
        q, k, v = self.qkv(x_nLH).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, L, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=read_n11L)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them. In geglu and swiglu half of the width gates the rest."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind, gated = kind, kind in ("geglu", "swiglu")
        inner = 8 * round(8 * width / 3 / 8) if gated else 4 * width
        self.up = nn.Linear(width, 2 * inner if gated else inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x_nLH: Tensor) -> Tensor:
        x = self.up(x_nLH)
        if self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.kind == "gelu_erf":
            x = F.gelu(x)
        elif self.kind == "relu2":
            x = F.relu(x).square()
        else:
            gate, x = x.chunk(2, dim=-1)
            x = (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * x
        return self.down(x)


class Head(nn.Module):
    """Final norm and the projection to the logits of the 20 amino acids."""

    def __init__(self, model: Mapping[str, Any], cond_dim: int | None) -> None:
        super().__init__()
        width, lm = model["hidden_size"], model.get("head", "linear") == "lm"
        self.adaln = None if cond_dim is None else nn.Linear(cond_dim, 2 * width)
        self.norm = make_norm(model, modulated=cond_dim is not None)
        self.dense = nn.Linear(width, width) if lm else None
        self.dense_norm = make_norm(model, modulated=False) if lm else None
        self.out = TiedOutput(width) if model.get("tie_weights", False) else nn.Linear(width, N_STATES)

    def normed(self, x_nLH: Tensor, cond_nC: Tensor | None) -> Tensor:
        """Return the hidden states after the final norm and its modulation."""
        x_nLH = self.norm(x_nLH)
        if self.adaln is None:
            return x_nLH
        shift, scale = self.adaln(cond_nC).unsqueeze(1).chunk(2, dim=-1)
        return x_nLH * (1 + scale) + shift

    def forward(self, x_nLH: Tensor, embedding_VH: Tensor) -> Tensor:
        """Return the logits of the amino acids, (n, L, 20), in float32 even if the weights are bf16."""
        if self.dense is not None and self.dense_norm is not None:
            x_nLH = self.dense_norm(F.gelu(self.dense(x_nLH)))
        with torch.autocast(x_nLH.device.type, enabled=False):
            wide = widened(x_nLH)
            if isinstance(self.out, TiedOutput):
                return self.out(wide, embedding_VH)
            return F.linear(wide, self.out.weight.to(wide.dtype), self.out.bias.to(wide.dtype))


class TiedOutput(nn.Module):
    """Projection with the embedding's rows: the logit of amino acid a is (gain x) . e_a / EMBEDDING_STD + bias_a."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(N_STATES))

    def forward(self, x: Tensor, embedding_VH: Tensor) -> Tensor:
        gain, rows_aH = self.gain.to(x.dtype), embedding_VH[:N_STATES].to(x.dtype)
        return F.linear(x * (gain / EMBEDDING_STD), rows_aH, self.bias.to(x.dtype))


class SigmaEmbedding(nn.Module):
    """Sinusoidal embedding of sigma, followed by a two-layer MLP: (n,) -> (n, C)."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim), nn.SiLU())

    def forward(self, sigma_n: Tensor) -> Tensor:
        half = SINUSOIDS // 2
        frequency = torch.exp(-math.log(BASE) / half * torch.arange(half, device=sigma_n.device))
        angle = torch.outer(sigma_n, frequency)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(next(self.parameters()).dtype))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps), times a learned gain, computed in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        return F.rms_norm(wide, self.normalized_shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return x as float32 if it has fewer bits, otherwise unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_norm(model: Mapping[str, Any], *, modulated: bool) -> nn.Module:
    """Return the network's kind of norm. LayerNorm has a bias unless adaLN supplies the shift (`modulated`)."""
    eps, width = model.get("norm_eps"), model["hidden_size"]
    if model["norm"] == "rms":
        return RMSNorm(width, eps=RMS_EPS if eps is None else eps)
    return nn.LayerNorm(width, eps=LAYER_EPS if eps is None else eps, bias=not modulated)


def rotary_tables(positions_nL: Tensor, head_dim: int, frequencies: list[float] | None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary encoding's angles, each (n, 1, L, head_dim / 2) float32.

    They are computed at each call, because transformers does not restore buffers that are not in the file of weights.

    Args:
        frequencies: the angle per position of each pair of dimensions, in radians; None for BASE^(-2 j / head_dim).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_nL.device) / head_dim
    frequency = BASE**-exponent if frequencies is None else torch.tensor(frequencies, device=positions_nL.device)
    angle = positions_nL[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries or keys, rotated by their positions. Dimensions j and j + head_dim / 2 form a pair."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def sinusoids(positions_nL: Tensor, width: int) -> Tensor:
    """Return sinusoids of the positions, (n, L, H) float32: sines in even dimensions and cosines in odd dimensions."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions_nL.device) / width
    angle = positions_nL.unsqueeze(-1).float() * BASE**-exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def drop_masked(x_nLH: Tensor, ids_nL: Tensor, read_nL: Tensor) -> Tensor:
    """Return the embeddings with those of <mask> set to zero, and the others of a protein scaled by 0.88 / (1 - r).

    r is the fraction of the protein's tokens, <bos> and <eos> included, that are <mask> (the token dropout of ESM-2).

    Args:
        read_nL: True for tokens, False for padding.
    """
    masked_nL = ids_nL == MASK
    tokens_n, masked_n = read_nL.sum(1), (masked_nL & read_nL).sum(1)
    scale_n = (1 - TRAINED_MASK_RATIO) * tokens_n / (tokens_n - masked_n).clamp(min=1)
    return x_nLH * scale_n.unsqueeze(1).masked_fill(masked_nL, 0).to(x_nLH.dtype).unsqueeze(-1)
