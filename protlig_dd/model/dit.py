"""The diffusion transformer (DiT, arXiv 2212.09748, as SEDD uses it, arXiv 2310.16834) on packed tokens.

    tokens -> embedding -> n_blocks x [adaLN, fused qkv, rotary, varlen attention, adaLN, MLP] -> adaLN -> 20 logits
    sigma  -> sinusoids -> MLP -> the shift, scale and gate of every adaLN

Shape suffixes: T tokens of the pack, n sequences, H hidden_size, C cond_dim.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch, check_tokens
from protlig_dd.model.attention import varlen_attention
from protlig_dd.model.rotary import apply_rotary_pos_emb, gather_rotary, rotary_cos_sin
from protlig_dd.tokenizer import N_STATES, VOCAB_SIZE

SINUSOIDS = 256  # width of the sigma embedding before its MLP, as in DiT
MLP_RATIO = 4


class DiT(nn.Module):
    """Maps a pack of tokens and one sigma per sequence to 20 logits per token.

    The output layer, every shift and every scale start at zero, so a new model returns zeros; the residual gates start
    at one (docs/decisions.md).

    Raises:
        ValueError: dimensions that do not fit one another (at construction); a batch that is not packed, or lies on
            another device than the weights (at the first line of forward).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        n_heads: int,
        n_blocks: int,
        cond_dim: int,
        dropout: float,
        attention_backend: str,
    ) -> None:
        super().__init__()
        check_dimensions(hidden_size, n_heads, n_blocks, cond_dim, dropout)
        self.head_dim = hidden_size // n_heads
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.sigma_embedding = SigmaEmbedding(cond_dim)
        self.blocks = nn.ModuleList(
            Block(hidden_size, n_heads, cond_dim, dropout, attention_backend) for _ in range(n_blocks)
        )
        self.head = Head(hidden_size, cond_dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        linear = {name: part.weight.numel() for name, part in self.named_modules() if isinstance(part, nn.Linear)}
        self.weights_per_sequence = sum(n for name, n in linear.items() if "adaln" in name or "sigma" in name)
        self.weights_per_token = sum(linear.values()) - self.weights_per_sequence

    def forward(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float[Tensor, "total 20"]:
        """Logits (total, 20) of a pack at noise levels sigma (n,), one per sequence."""
        if not isinstance(batch, PackedBatch):
            check_tokens(batch)
            raise ValueError(f"the model reads a PackedBatch, got {type(batch).__name__}")
        weight = self.embedding.weight
        for name, tensor in (("tokens", batch.tokens), ("sigma", sigma)):
            if tensor.device != weight.device:
                raise ValueError(f"{name} is on {tensor.device} but the model is on {weight.device}")
        if tuple(sigma.shape) != (len(batch.lengths),):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)} for {len(batch.lengths)} sequences")
        cos, sin = rotary_cos_sin(batch.max_seqlen, self.head_dim, device=weight.device)
        cos_sin = gather_rotary(cos, sin, batch)
        cond_nC = self.sigma_embedding(sigma)
        x_TH = self.embedding(batch.tokens)
        for block in self.blocks:
            x_TH = block(x_TH, cond_nC, batch, cos_sin)
        return self.head(x_TH, cond_nC, batch)

    def flops(self, lengths: Sequence[int]) -> int:
        """FLOPs of the matrix products of one forward pass over sequences of these lengths (tokens), two for each
        multiply-add; the backward pass takes twice that (arXiv 2204.02311, appendix B).
        """
        products = self.weights_per_token * sum(lengths) + self.weights_per_sequence * len(lengths)
        attention = 2 * len(self.blocks) * self.embedding.embedding_dim * sum(length**2 for length in lengths)
        return 2 * (products + attention)


class SigmaEmbedding(nn.Module):
    """Sinusoids of sigma through a two-layer MLP: (n,) -> (n, cond_dim)."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim), nn.SiLU())

    def forward(self, sigma: Float32[Tensor, " n"]) -> Float[Tensor, "n cond_dim"]:
        half = SINUSOIDS // 2
        frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=sigma.device))
        angle = torch.outer(sigma, frequency)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class Block(nn.Module):
    """Pre-norm transformer block whose norms and residual gates are set by sigma."""

    def __init__(self, hidden_size: int, n_heads: int, cond_dim: int, dropout: float, attention_backend: str) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.attention_backend = n_heads, dropout, attention_backend
        self.adaln = zero_linear(cond_dim, 6 * hidden_size)
        # residual gates start open: behind a zero output layer, closed ones would leave it nothing to learn from
        nn.init.ones_(self.adaln.bias.view(6, hidden_size)[2])
        nn.init.ones_(self.adaln.bias.view(6, hidden_size)[5])
        self.attention_norm = nn.LayerNorm(hidden_size, bias=False)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attention_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = nn.LayerNorm(hidden_size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, MLP_RATIO * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(MLP_RATIO * hidden_size, hidden_size),
        )

    def forward(
        self,
        x_TH: Float[Tensor, "total hidden"],
        cond_nC: Float[Tensor, "n cond_dim"],
        batch: PackedBatch,
        cos_sin: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "total hidden"]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = per_token(self.adaln(cond_nC), batch, 6)
        attended = self.attend(modulate(self.attention_norm(x_TH), shift_a, scale_a), batch, cos_sin)
        x_TH = x_TH + gate_a * F.dropout(attended, self.dropout, self.training)
        hidden = self.mlp(modulate(self.mlp_norm(x_TH), shift_m, scale_m))
        return x_TH + gate_m * F.dropout(hidden, self.dropout, self.training)

    def attend(
        self, x_TH: Float[Tensor, "total hidden"], batch: PackedBatch, cos_sin: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "total hidden"]:
        qkv = rearrange(self.qkv(x_TH), "t (three h d) -> 1 t three h d", three=3, h=self.n_heads)
        qkv = apply_rotary_pos_emb(qkv, *cos_sin).squeeze(0)
        out = varlen_attention(qkv, batch, self.attention_backend)
        return self.attention_out(rearrange(out, "t h d -> t (h d)"))


class Head(nn.Module):
    """Final adaLN and the projection to the 20 amino acids."""

    def __init__(self, hidden_size: int, cond_dim: int) -> None:
        super().__init__()
        self.adaln = zero_linear(cond_dim, 2 * hidden_size)
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.out = zero_linear(hidden_size, N_STATES)

    def forward(
        self, x_TH: Float[Tensor, "total hidden"], cond_nC: Float[Tensor, "n cond_dim"], batch: PackedBatch
    ) -> Float[Tensor, "total 20"]:
        shift, scale = per_token(self.adaln(cond_nC), batch, 2)
        x_TH = modulate(self.norm(x_TH), shift, scale)
        with torch.autocast(x_TH.device.type, enabled=False):  # logits in full precision, or their exp() is off by 0.2%
            return self.out(x_TH.to(self.out.weight.dtype))


def per_token(
    modulation_nK: Float[Tensor, "n width"], batch: PackedBatch, chunks: int
) -> tuple[Float[Tensor, "total hidden"], ...]:
    """Spread each sequence's modulation over its tokens and cut it into `chunks` tensors (total, hidden)."""
    return modulation_nK.index_select(0, batch.segment_ids).chunk(chunks, dim=-1)


def modulate(
    x: Float[Tensor, "total hidden"], shift: Float[Tensor, "total hidden"], scale: Float[Tensor, "total hidden"]
) -> Float[Tensor, "total hidden"]:
    """adaLN: x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


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
