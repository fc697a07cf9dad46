"""Attention within each sequence of a pack. All backends share one check of their input.

flash_attn     the flash-attn package's varlen kernel; CUDA, bf16/fp16
torch_varlen   torch.nn.attention.varlen, the same kernel as shipped with torch; CUDA, bf16/fp16
sdpa           one scaled_dot_product_attention call per sequence; any device, any float dtype, no padding
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.layers import StackedLinear, make_norm
from protlig_dd.model.mixers.base import Mixer
from protlig_dd.model.positions.base import PositionEncoding

HALF_DTYPES = (torch.bfloat16, torch.float16)
FLASH_INSTALL = "pip install 'protlig_dd[flash]' (needs a CUDA toolkit), or use model.attention_backend=torch_varlen"


class Attention(Mixer):
    """Multi-head attention with a fused qkv projection. q and k may be RMS-normalised (arXiv 2010.04245)."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__(config, backend)
        self.n_heads, self.backend = config.n_heads, backend
        self.qkv = StackedLinear(config.hidden_size, config.hidden_size, stacked=3)
        self.q_norm, self.k_norm = (make_norm("rms", config.head_dim) if config.qk_norm else None for _ in "qk")
        self.attention_out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def project(
        self, x: Float[Tensor, "total hidden"], positions: PositionEncoding, *tables: Tensor
    ) -> Float[Tensor, "total 3 heads head_dim"]:
        """Return queries and keys, rotated by their positions, and values."""
        qkv = rearrange(self.qkv(x), "t (three h d) -> t three h d", three=3, h=self.n_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype), v], dim=1)
        return positions.rotate(qkv, *tables)

    def mix(
        self,
        projected: Float[Tensor, "total 3 heads head_dim"],
        batch: PackedBatch,
        positions: PositionEncoding,
        *tables: Tensor,
    ) -> Float[Tensor, "total heads head_dim"]:
        """Attend within each sequence."""
        return varlen_attention(projected, batch, self.backend)

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the multiply-adds of q k^T and of the weighted sum of v."""
        return 2 * self.hidden_size * sum(length**2 for length in lengths)

    def out(self, mixed: Float[Tensor, "total heads head_dim"]) -> Float[Tensor, "total hidden"]:
        """Apply the output projection."""
        return self.attention_out(rearrange(mixed, "t h d -> t (h d)"))


def varlen_attention(
    qkv: Float[Tensor, "..."], batch: PackedBatch, backend: str
) -> Float[Tensor, "total heads head_dim"]:
    """Return softmax(q k^T / sqrt(head_dim)) v. Each token attends to its own sequence only, in both directions.

    Args:
        qkv: (total, 3, heads, head_dim), packed like `batch`.
        batch: the pack's geometry: cu_seqlens, lengths, max_seqlen.
        backend: flash_attn | torch_varlen | sdpa.

    Returns:
        (total, heads, head_dim) in qkv's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that the backend does not support. This is checked before any kernel is
            called, because the kernels accept some invalid input.
    """
    check_attention_input(qkv, batch, backend)
    return _BACKENDS[backend](qkv, batch)


def check_attention_input(qkv: Tensor, batch: PackedBatch, backend: str) -> None:
    """Raise a ValueError unless `backend` supports this input. The check runs before every backend."""
    if backend not in _BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose from {', '.join(_BACKENDS)}")
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (total, 3, heads, head_dim), got {tuple(qkv.shape)}")
    total = sum(batch.lengths)
    if qkv.shape[0] != total:
        raise ValueError(f"qkv has {qkv.shape[0]} tokens but the pack's lengths sum to {total}")
    if batch.cu_seqlens.dtype != torch.int32 or tuple(batch.cu_seqlens.shape) != (len(batch.lengths) + 1,):
        raise ValueError(
            f"cu_seqlens must be ({len(batch.lengths) + 1},) torch.int32, "
            f"got {tuple(batch.cu_seqlens.shape)} {batch.cu_seqlens.dtype}"
        )
    if batch.cu_seqlens.device != qkv.device:
        raise ValueError(f"qkv is on {qkv.device} but cu_seqlens is on {batch.cu_seqlens.device}")
    if backend == "sdpa":
        return
    if qkv.device.type != "cuda":
        raise ValueError(f"attention backend {backend} runs on CUDA, but qkv is on {qkv.device}; use sdpa")
    if qkv.dtype not in HALF_DTYPES:
        raise ValueError(f"attention backend {backend} needs bfloat16 or float16, but qkv is {qkv.dtype}; use sdpa")
    if not flash_supports(qkv.shape[3]):
        raise ValueError(
            f"attention backend {backend} needs a head_dim of 8, 16, ... or 256, got {qkv.shape[3]}; use sdpa"
        )


def flash_supports(head_dim: int) -> bool:
    """Whether the flash kernels support this head_dim."""
    return head_dim % 8 == 0 and head_dim <= 256


def has_flash_attn() -> bool:
    """Whether flash-attn's kernel can be imported.

    Version 4 has a package flash_attn without this kernel, and a build for another torch version cannot be loaded.
    """
    try:
        from flash_attn import flash_attn_varlen_qkvpacked_func
    except ImportError:
        return False
    return callable(flash_attn_varlen_qkvpacked_func)


def resolve_attention_backend(name: str, device: torch.device, precision: str, head_dim: int) -> str:
    """Choose the backend for `auto`. Return an explicit backend unchanged if it can run here.

    Args:
        name: auto | flash_attn | torch_varlen | sdpa.
        precision: the resolved precision, bf16 | fp32.

    Raises:
        ValueError: an unknown backend, or one that the device, precision, head_dim or installation does not allow.
    """
    if name == "auto":
        if device.type != "cuda" or precision != "bf16" or not flash_supports(head_dim):
            return "sdpa"
        return "flash_attn" if has_flash_attn() else "torch_varlen"
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose from auto, {', '.join(_BACKENDS)}")
    if name == "flash_attn" and not has_flash_attn():
        raise ValueError(f"model.attention_backend=flash_attn, but flash-attn is not installed: {FLASH_INSTALL}")
    if name != "sdpa" and device.type != "cuda":
        raise ValueError(f"model.attention_backend={name} runs on CUDA, but the device is {device}; use sdpa or auto")
    if name != "sdpa" and precision != "bf16":
        raise ValueError(
            f"model.attention_backend={name} needs bf16, but the precision is {precision}; use sdpa or auto"
        )
    if name != "sdpa" and not flash_supports(head_dim):
        raise ValueError(
            f"model.attention_backend={name} needs a head_dim of 8, 16, ... or 256, got {head_dim}; use sdpa or auto"
        )
    return name


def _flash_attn(qkv: Tensor, batch: PackedBatch) -> Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv, batch.cu_seqlens, batch.max_seqlen)


def _torch_varlen(qkv: Tensor, batch: PackedBatch) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(out, Tensor)
    return out


def _sdpa(qkv: Tensor, batch: PackedBatch) -> Tensor:
    # one split instead of n slices: in the backward pass each slice would allocate a gradient of the full size
    parts = qkv.split([length for length in batch.lengths if length])
    heads_first = (part.permute(1, 2, 0, 3).unsqueeze(1) for part in parts)  # each (3, 1, heads, length, head_dim)
    return torch.cat([F.scaled_dot_product_attention(*part).squeeze(0).transpose(0, 1) for part in heads_first])


_BACKENDS: dict[str, Callable[[Tensor, PackedBatch], Tensor]] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "sdpa": _sdpa,
}
