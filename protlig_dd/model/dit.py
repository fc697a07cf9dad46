"""The diffusion transformer (DiT, arXiv 2212.09748, as SEDD uses it, arXiv 2310.16834) on packed tokens.

    tokens -> embedding -> n_blocks x [adaLN, fused qkv, rotary, varlen attention, adaLN, MLP] -> adaLN -> 20 logits
    sigma  -> sinusoids -> MLP -> the shift, scale and gate of every adaLN

Without time conditioning there is no sigma, and adaLN is a plain norm: an ordinary pre-norm transformer.

Shape suffixes: T tokens of the pack, n sequences, H hidden_size, C cond_dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from protlig_dd.batch import PackedBatch, StaticShape, check_tokens
from protlig_dd.model.attention import varlen_attention
from protlig_dd.model.rotary import apply_rotary_pos_emb, gather_rotary, rotary_cos_sin
from protlig_dd.tokenizer import N_STATES, PAD, VOCAB_SIZE

SINUSOIDS = 256  # width of the sigma embedding before its MLP, as in DiT
MLP_RATIO = 4
RMS_EPS = 1e-6
NORMS = ("layer", "rms")
MLPS = ("gelu", "relu2", "swiglu")


class DiT(nn.Module):
    """Maps a pack of tokens and one sigma per sequence to 20 logits per token.

    Args:
        time_conditioning: False builds a network that ignores sigma.
        norm: layer | rms (arXiv 1910.07467).
        mlp: gelu | relu2 (squared ReLU, arXiv 2109.08668) | swiglu (arXiv 2002.05202; 8/3 as wide, for the same size).
        qk_norm: RMS-normalise q and k of each head before they are rotated (arXiv 2010.04245).
        checkpointing: keep only each block's input for the backward pass and compute the rest again.

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
        time_conditioning: bool = True,
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_dimensions(hidden_size, n_heads, n_blocks, cond_dim, dropout)
        check_choice("norm", norm, NORMS)
        check_choice("mlp", mlp, MLPS)
        self.head_dim = hidden_size // n_heads
        self.checkpointing = checkpointing
        self.shape: StaticShape | None = None
        self.graphed: Callable[..., Tensor] | None = None
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.sigma_embedding = SigmaEmbedding(cond_dim) if time_conditioning else None
        width = cond_dim if time_conditioning else None
        self.blocks = nn.ModuleList(
            Block(hidden_size, n_heads, width, dropout, attention_backend, norm, mlp, qk_norm) for _ in range(n_blocks)
        )
        self.head = Head(hidden_size, width, norm)
        nn.init.normal_(self.embedding.weight, std=0.02)
        linear = {name: part.weight.numel() for name, part in self.named_modules() if isinstance(part, nn.Linear)}
        self.weights_per_sequence = sum(n for name, n in linear.items() if "adaln" in name or "sigma" in name)
        self.weights_per_token = sum(linear.values()) - self.weights_per_sequence

    def forward(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float[Tensor, "total 20"]:
        """Logits (total, 20) of a pack at noise levels sigma (n,), one per sequence."""
        self.check(batch, sigma)
        if self.shape is None or not self.training or not batch.fits(self.shape):
            return self.network(batch, sigma)
        total, n = len(batch.tokens), len(batch.lengths)
        batch, sigma = batch.filled(self.shape), F.pad(sigma, (0, self.shape.sequences - n))
        if self.graphed is None:
            return self.network(batch, sigma).narrow(0, 0, total)
        logits = self.graphed(batch.tokens, batch.cu_seqlens, batch.segment_ids, batch.positions, sigma)
        return logits.narrow(0, 0, total)

    def hidden_states(
        self, batch: PackedBatch, sigma: Float32[Tensor, " n"], layer: int
    ) -> Float[Tensor, "total hidden"]:
        """What the network makes of each token on its way to the logits.

        Args:
            layer: of n_blocks. 0: the embedding; k: the residual stream after k blocks; n_blocks: what the output
                projection sees, behind the last norm, as ESM-2 has it.

        Raises:
            ValueError: as forward; and a layer outside 0..n_blocks.
        """
        self.check(batch, sigma)
        if not 0 <= layer <= len(self.blocks):
            raise ValueError(f"layer {layer}: this network has 0 (the embedding) to {len(self.blocks)}")
        x_TH, cond_nC = self.trunk(batch, sigma, layer)
        return x_TH if layer < len(self.blocks) else self.head.normed(x_TH, cond_nC, batch.segment_ids)

    def network(self, batch: PackedBatch, sigma: Tensor) -> Tensor:
        """forward, its inputs checked."""
        x_TH, cond_nC = self.trunk(batch, sigma, len(self.blocks))
        return self.head(x_TH, cond_nC, batch.segment_ids)

    def trunk(self, batch: PackedBatch, sigma: Tensor, n_blocks: int) -> tuple[Tensor, Tensor | None]:
        """The residual stream after the first n_blocks, and what conditions the norms."""
        cos, sin = rotary_cos_sin(batch.max_seqlen, self.head_dim, device=sigma.device)
        cos_sin = gather_rotary(cos, sin, batch)
        cond_nC = None if self.sigma_embedding is None else self.sigma_embedding(sigma)
        x_TH = self.embedding(batch.tokens)
        for block in list(self.blocks)[:n_blocks]:
            if self.checkpointing and torch.is_grad_enabled():
                x_TH = checkpoint(block, x_TH, cond_nC, batch, cos_sin, use_reentrant=False)
            else:
                x_TH = block(x_TH, cond_nC, batch, cos_sin)
        return x_TH, cond_nC

    def check(self, batch: PackedBatch, sigma: Tensor) -> None:
        """Raise for a batch that is not packed or not where the weights are, or without one sigma per sequence."""
        if not isinstance(batch, PackedBatch):
            check_tokens(batch)
            raise ValueError(f"the model reads a PackedBatch, got {type(batch).__name__}")
        weight = self.embedding.weight
        for name, tensor in (("tokens", batch.tokens), ("sigma", sigma)):
            if tensor.device != weight.device:
                raise ValueError(f"{name} is on {tensor.device} but the model is on {weight.device}")
        if tuple(sigma.shape) != (len(batch.lengths),):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)} for {len(batch.lengths)} sequences")

    def compile_blocks(self, *, dynamic: bool) -> None:
        """Compile what lies between the attention kernels for training, with torch.compile, once for all blocks.

        Attention stays outside: its kernels gain nothing, and it is checked on the host at each call.

        Args:
            dynamic: packs differ in their number of tokens; False compiles anew for each number.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled = tuple(
                torch.compile(part, dynamic=dynamic) for part in (block.before_attention, block.after_attention)
            )

    def fill_packs(self, shape: StaticShape) -> None:
        """From now on every training pack that fits is filled up to this shape, which its logits do not show."""
        self.shape = shape

    def capture(self, autocast: torch.dtype | None) -> None:
        """Record the forward and the backward pass over a pack of `fill_packs`' shape as two CUDA graphs.

        A replay costs the host one launch instead of a thousand. Gradients then live in fixed memory: they must be
        zeroed, not dropped, between steps (`zero_grad(set_to_none=False)`), as they are accumulated into.

        Args:
            autocast: dtype that the network computes in; None for that of its weights.

        Raises:
            ValueError: a backend whose calls depend on the pack's lengths.
        """
        assert self.shape is not None
        if any(block.attention_backend == "sdpa" for block in self.blocks):
            raise ValueError(
                "attention backend sdpa reads lengths on the host, which a CUDA graph does not; use another"
            )
        device = self.embedding.weight.device
        blank = PackedBatch.pack([torch.full((self.shape.longest,), PAD)]).to(device).filled(self.shape)
        sigma = torch.ones(self.shape.sequences, device=device)
        inputs = (blank.tokens, blank.cu_seqlens, blank.segment_ids, blank.positions, sigma)
        graphed = _OnTensors(self, blank)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            self.__dict__["graphed"] = torch.cuda.make_graphed_callables(graphed, inputs)  # no submodule: it holds us
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def flops(self, lengths: Sequence[int]) -> int:
        """FLOPs of the matrix products of one forward pass over sequences of these lengths (tokens), two for each
        multiply-add; the backward pass takes twice that (arXiv 2204.02311, appendix B).
        """
        products = self.weights_per_token * sum(lengths) + self.weights_per_sequence * len(lengths)
        attention = 2 * len(self.blocks) * self.embedding.embedding_dim * sum(length**2 for length in lengths)
        return 2 * (products + attention)


class _OnTensors(nn.Module):
    """`DiT.network` on the tensors of a pack, as CUDA graphs want it; what lives on the host is that of `geometry`."""

    def __init__(self, model: DiT, geometry: PackedBatch) -> None:
        super().__init__()
        self.model, self.geometry = model, geometry

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, segment_ids: Tensor, positions: Tensor, sigma: Tensor
    ) -> Tensor:
        batch = replace(
            self.geometry, tokens=tokens, cu_seqlens=cu_seqlens, segment_ids=segment_ids, positions=positions
        )
        return self.model.network(batch, sigma)


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


class MLP(nn.Module):
    """Two layers with a nonlinearity between them; for swiglu the first is two, one of which gates the other."""

    def __init__(self, hidden_size: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        inner = MLP_RATIO * hidden_size if kind != "swiglu" else 8 * round(2 * MLP_RATIO * hidden_size / 3 / 8)
        self.up = nn.Linear(hidden_size, inner if kind != "swiglu" else 2 * inner)
        self.down = nn.Linear(inner, hidden_size)

    def forward(self, x: Float[Tensor, "total hidden"]) -> Float[Tensor, "total hidden"]:
        x = self.up(x)
        if self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.kind == "relu2":
            x = F.relu(x).square()
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.down(x)


class Head(nn.Module):
    """Final adaLN and the projection to the 20 amino acids."""

    def __init__(self, hidden_size: int, cond_dim: int | None, norm: str) -> None:
        super().__init__()
        self.adaln = None if cond_dim is None else zero_linear(cond_dim, 2 * hidden_size)
        self.norm = make_norm(norm, hidden_size, modulated=cond_dim is not None)
        self.out = zero_linear(hidden_size, N_STATES)

    def forward(
        self,
        x_TH: Float[Tensor, "total hidden"],
        cond_nC: Float[Tensor, "n cond_dim"] | None,
        segment_ids: Int64[Tensor, " total"],
    ) -> Float[Tensor, "total 20"]:
        x_TH = self.normed(x_TH, cond_nC, segment_ids)
        with torch.autocast(x_TH.device.type, enabled=False):  # logits in full precision, or their exp() is off by 0.2%
            return self.out(x_TH.to(self.out.weight.dtype))

    def normed(
        self,
        x_TH: Float[Tensor, "total hidden"],
        cond_nC: Float[Tensor, "n cond_dim"] | None,
        segment_ids: Int64[Tensor, " total"],
    ) -> Float[Tensor, "total hidden"]:
        """What the projection sees."""
        x_TH = self.norm(x_TH)
        if self.adaln is None:
            return x_TH
        shift, scale = per_token(self.adaln(cond_nC).chunk(2, dim=-1), segment_ids)
        return modulate(x_TH, shift, scale)


def make_norm(kind: str, width: int, *, modulated: bool = True) -> nn.Module:
    """A norm with a gain; a layer norm whose shift is not adaLN's has one of its own."""
    return RMSNorm(width, eps=RMS_EPS) if kind == "rms" else nn.LayerNorm(width, bias=not modulated)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps), times a gain."""

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return super().forward(x)
        out = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out


class _RMSNorm(torch.autograd.Function):
    """In few passes over x, as torch has no fused kernel for the CPU and takes three times as long there.

    With r = 1 / sqrt(mean x^2 + eps) and y = x r gain: dx = r gain dy - x r^3 mean(x gain dy).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return (x * _rms_reciprocal(x, eps)).mul_(gain)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        r = _rms_reciprocal(x, ctx.eps)
        product = grad * x
        rows = product.flatten(0, -2)
        grad_gain = rows.T @ r.flatten()
        along_x = (rows @ gain).view_as(r) * r**3 / x.shape[-1]
        return torch.mul(grad, r, out=product).mul_(gain).addcmul_(x, along_x, value=-1), grad_gain, None


def _rms_reciprocal(x: Float[Tensor, "... width"], eps: float) -> Float[Tensor, "... 1"]:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(x.shape[-1]).add(eps).rsqrt()


def per_token(
    modulations_nH: Sequence[Float[Tensor, "n hidden"]], segment_ids: Int64[Tensor, " total"]
) -> list[Float[Tensor, "total hidden"]]:
    """Spread each sequence's shift, scale or gate over its tokens.

    One tensor at a time: cutting a spread (total, 6 hidden) up puts its gradient together again, in one more pass.
    """
    return [_Spread.apply(one, segment_ids) for one in modulations_nH]  # type: ignore[no-untyped-call]


class _Spread(torch.autograd.Function):
    """index_select whose gradient is a matrix product with the one-hot segments: faster than adding rows up one by one
    (atomically, on a GPU), and always in the same order.
    """

    @staticmethod
    def forward(ctx: Any, modulation_nH: Tensor, segment_ids: Tensor) -> Tensor:
        ctx.n = modulation_nH.shape[0]
        ctx.save_for_backward(segment_ids)
        return F.embedding(segment_ids, modulation_nH)  # index_select reads rows that are apart twice as slowly

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None]:
        (segment_ids,) = ctx.saved_tensors
        one_hot_nT = segment_ids == torch.arange(ctx.n, device=segment_ids.device)[:, None]
        return one_hot_nT.to(grad_TH.dtype) @ grad_TH, None


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
