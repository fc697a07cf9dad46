"""Attention within each sequence of a pack. All backends share one check of their input.

flash_attn     the flash-attn package's varlen kernel; CUDA, bf16/fp16
torch_varlen   torch.nn.attention.varlen, the same kernel, which torch includes; CUDA, bf16/fp16
flex           torch's FlexAttention with a mask that separates the sequences, for any bias; CUDA, bf16/fp16
matmul         matrix products of each sequence; CPU, bf16, no bias
sdpa           one scaled_dot_product_attention call per sequence; any device, any float dtype, any bias, no padding
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.layers import Linear, StackedLinear, make_norm
from protlig_dd.model.mixers.base import Mixer
from protlig_dd.model.mixers.matmul import LONGEST, matmul_attention
from protlig_dd.model.mixers.scores import ScoreInputs, matrices_of, scores_problem, with_columns
from protlig_dd.model.positions import POSITIONS
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import OffsetBias
from protlig_dd.system.device import missing_to_compile

HALF_DTYPES = (torch.bfloat16, torch.float16)
GRAPHABLE = ("flash_attn", "torch_varlen")  # backends that CUDA graphs can record
FLEX_HEAD_DIM = 16  # the smallest head_dim that FlexAttention supports
FLASH_INSTALL = "pip install 'protlig_dd[flash]' (needs a CUDA toolkit), or use model.attention_backend=torch_varlen"


class Attention(Mixer):
    """Multi-head attention with a fused qkv projection. q and k may be RMS-normalised (arXiv 2010.04245)."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__(config, backend)
        check_positions(backend, config.positions)
        self.n_heads, self.backend = config.n_heads, backend
        self.qkv = StackedLinear(config.hidden_size, config.hidden_size, stacked=3, bias=config.attention_bias)
        self.q_norm, self.k_norm = (make_norm("rms", config.head_dim) if config.qk_norm else None for _ in "qk")
        self.attention_out = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def project(
        self, x: Float[Tensor, "total hidden"], positions: PositionEncoding, *tables: Tensor
    ) -> Float[Tensor, "total 3 heads head_dim"]:
        """Return queries, keys and values. `positions` may rotate the queries and keys."""
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
        scores: ScoreInputs | None = None,
    ) -> Float[Tensor, "total heads head_dim"]:
        """Return the output of attention within each sequence."""
        return varlen_attention(projected, batch, self.backend, scores)

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the multiply-adds of q k^T and of the weighted sum of v."""
        return 2 * self.hidden_size * sum(length**2 for length in lengths)

    def out(self, mixed: Float[Tensor, "total heads head_dim"]) -> Float[Tensor, "total hidden"]:
        """Apply the output projection."""
        return self.attention_out(rearrange(mixed, "t h d -> t (h d)"))


def varlen_attention(
    qkv: Float[Tensor, "..."], batch: PackedBatch, backend: str, scores: ScoreInputs | None = None
) -> Float[Tensor, "total heads head_dim"]:
    """Return softmax(q k^T / sqrt(head_dim) + bias) v. Each token attends to its own sequence, in both directions.

    Args:
        qkv: (total, 3, heads, head_dim), packed like `batch`.
        batch: the pack's geometry: cu_seqlens, lengths, max_seqlen.
        backend: flash_attn | torch_varlen | flex | matmul | sdpa.
        scores: the bias, from `prepare_scores`; None for no bias.

    Returns:
        (total, heads, head_dim) in qkv's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that the backend does not support. This is checked before any kernel is
            called, because the kernels accept some invalid input.
    """
    check_attention_input(qkv, batch, backend, scores)
    return _BACKENDS[backend](qkv, batch, scores)


def check_attention_input(qkv: Tensor, batch: PackedBatch, backend: str, scores: ScoreInputs | None = None) -> None:
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
    if problem := scores_problem(scores, backend):
        raise ValueError(f"attention backend {backend} {problem}")
    if backend == "sdpa":
        return
    if backend == "matmul":
        if qkv.device.type != "cpu" or qkv.dtype != torch.bfloat16:
            raise ValueError(
                f"attention backend matmul needs bfloat16 on the CPU, but qkv is {qkv.dtype} on {qkv.device}; use sdpa"
            )
        return
    if qkv.device.type != "cuda":
        raise ValueError(f"attention backend {backend} runs on CUDA, but qkv is on {qkv.device}; use sdpa")
    if qkv.dtype not in HALF_DTYPES:
        raise ValueError(f"attention backend {backend} needs bfloat16 or float16, but qkv is {qkv.dtype}; use sdpa")
    columns = 0 if scores is None or scores.columns is None else scores.columns.shape[-1]
    if problem := head_dim_problem(backend, qkv.shape[3], columns):
        raise ValueError(f"attention backend {backend} {problem}; use sdpa")


def head_dim_problem(backend: str, head_dim: int, columns: int) -> str | None:
    """Return None if this backend supports the head_dim, else the reason, worded to follow the backend's name.

    Args:
        columns: dimensions that the position encoding appends to each head.
    """
    if backend in ("matmul", "sdpa"):
        return None
    if backend == "flex":
        return None if head_dim >= FLEX_HEAD_DIM else f"needs a head_dim of at least {FLEX_HEAD_DIM}, got {head_dim}"
    if flash_supports(head_dim + columns):
        return None
    width = (
        f"{head_dim + columns} ({head_dim} and the {columns} dimensions of the position encoding)"
        if columns
        else head_dim
    )
    return f"needs a head_dim that is a multiple of 8 and at most 256, got {width}"


def check_positions(backend: str, positions: str) -> None:
    """Raise a ValueError if the attention backend is unknown, or cannot compute this position encoding."""
    if backend not in _BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose from auto, {', '.join(_BACKENDS)}")
    able = POSITIONS[positions].backends if positions in POSITIONS else _BACKENDS  # DiT reports an unknown encoding
    if backend not in able:
        raise ValueError(
            f"model.attention_backend={backend} cannot add the bias of model.positions={positions} to the scores; "
            f"use {', '.join(able)} or auto"
        )


def check_backend(name: str, head_dim: int, positions: str) -> None:
    """Raise a ValueError if this backend cannot compute the network on any machine. `auto` is always accepted."""
    if name == "auto":
        return
    check_positions(name, positions)
    columns = POSITIONS[positions].columns if positions in POSITIONS else 0
    if problem := head_dim_problem(name, head_dim, columns):
        raise ValueError(f"model.attention_backend={name} {problem}; use sdpa or auto")


def flash_supports(head_dim: int) -> bool:
    """Whether the flash kernels support this head_dim."""
    return head_dim % 8 == 0 and head_dim <= 256


def has_flash_attn() -> bool:
    """Whether flash-attn's kernel can be imported.

    Version 4 of flash-attn does not have this kernel, and flash-attn built for another version of torch cannot be
    imported.
    """
    try:
        from flash_attn import flash_attn_varlen_qkvpacked_func
    except ImportError:
        return False
    return callable(flash_attn_varlen_qkvpacked_func)


def resolve_attention_backend(
    name: str, device: torch.device, precision: str, head_dim: int, positions: str = "rope"
) -> str:
    """Choose the backend for `auto`. Return an explicit backend unchanged if it can run here.

    Args:
        name: auto | flash_attn | torch_varlen | flex | matmul | sdpa.
        precision: the resolved precision, bf16 | fp32.
        positions: the position encoding; some backends cannot add its bias to the scores.

    Raises:
        ValueError: an unknown backend, or one that the device, precision, head_dim, position encoding or installation
            does not allow.
    """
    kind = POSITIONS.get(positions, PositionEncoding)  # an unknown name raises an error when the network is built
    if name == "auto":
        if device.type == "cpu" and precision == "bf16" and "matmul" in kind.backends:
            return "matmul"
        if device.type != "cuda" or precision != "bf16":
            return "sdpa"
        # choose flex only for encodings that torch_varlen cannot compute
        candidates = [backend for backend in kind.backends if backend != "flex" or "torch_varlen" not in kind.backends]
        runs = (backend for backend in candidates if not backend_problem(backend, device, precision, head_dim, kind))
        return next(runs)
    check_positions(name, positions)
    if problem := backend_problem(name, device, precision, head_dim, kind):
        raise ValueError(f"model.attention_backend={name}{problem}")
    return name


def backend_problem(
    backend: str, device: torch.device, precision: str, head_dim: int, kind: type[PositionEncoding]
) -> str | None:
    """Return None if a backend can run here, else the reason, worded to follow the backend's name."""
    if backend == "sdpa":
        return None
    runs_on = "cpu" if backend == "matmul" else "cuda"
    if device.type != runs_on:
        return f" runs on {runs_on.upper()}, but the device is {device}; use sdpa or auto"
    if backend == "flash_attn" and not has_flash_attn():
        return f", but flash-attn is not installed: {FLASH_INSTALL}"
    if precision != "bf16":
        return f" needs bf16, but the precision is {precision}; use sdpa or auto"
    if problem := head_dim_problem(backend, head_dim, kind.columns):
        return f" {problem}; use sdpa or auto"
    if backend == "flex" and (missing := missing_to_compile(device)):
        return f" is compiled by torch, which needs {missing}; install it, or use sdpa or auto"
    return None


def _flash_attn(qkv: Tensor, batch: PackedBatch, scores: ScoreInputs | None) -> Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    if scores is None:
        return flash_attn_varlen_qkvpacked_func(qkv, batch.cu_seqlens, batch.max_seqlen)
    head_dim, slopes = qkv.shape[-1], scores.bias.slopes_H if isinstance(scores.bias, OffsetBias) else None
    qkv = with_columns(qkv, scores.columns)
    out = flash_attn_varlen_qkvpacked_func(
        qkv, batch.cu_seqlens, batch.max_seqlen, softmax_scale=head_dim**-0.5, alibi_slopes=slopes
    )
    return out.narrow(-1, 0, head_dim)


def _torch_varlen(qkv: Tensor, batch: PackedBatch, scores: ScoreInputs | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    head_dim, columns = qkv.shape[-1], None if scores is None else scores.columns
    q, k, v = with_columns(qkv, columns).unbind(1)
    cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
    scale = None if columns is None else head_dim**-0.5  # the default would use the enlarged head_dim
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
    assert isinstance(out, Tensor)
    return out if columns is None else out.narrow(-1, 0, head_dim)


def _flex(qkv: Tensor, batch: PackedBatch, scores: ScoreInputs | None) -> Tensor:
    from protlig_dd.model.mixers.flex import flex  # slow to import

    return flex(qkv, batch, scores)


def _matmul(qkv: Tensor, batch: PackedBatch, scores: ScoreInputs | None) -> Tensor:
    lengths = [length for length in batch.lengths if length]
    if batch.max_seqlen <= LONGEST:
        return matmul_attention(qkv, lengths)
    # a sequence's own length chooses its kernel, so that its result does not depend on its neighbours
    parts = zip(qkv.split(lengths), lengths, strict=True)
    return torch.cat([matmul_attention(part, [n]) if n <= LONGEST else _sdpa_part(part) for part, n in parts])


def _sdpa_part(part: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = part.permute(1, 2, 0, 3).unsqueeze(1)  # each (1, heads, length, head_dim)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).squeeze(0).transpose(0, 1)


def _sdpa(qkv: Tensor, batch: PackedBatch, scores: ScoreInputs | None) -> Tensor:
    # one split instead of n slices: in the backward pass each slice would allocate a gradient of the full size
    parts = qkv.split([length for length in batch.lengths if length])
    biases: Sequence[Tensor | None] = [None] * len(parts)
    if scores is not None and scores.bias is not None:
        matrices = matrices_of(scores.bias, batch, qkv.dtype) if scores.matrices is None else scores.matrices
        biases = [matrix.to(qkv.dtype).unsqueeze(0) for matrix in matrices]  # no copy if the dtype is the same
    return torch.cat([_sdpa_part(part, bias) for part, bias in zip(parts, biases, strict=True)])


_BACKENDS: dict[str, Callable[[Tensor, PackedBatch, ScoreInputs | None], Tensor]] = {
    "flash_attn": _flash_attn,
    "torch_varlen": _torch_varlen,
    "flex": _flex,
    "matmul": _matmul,
    "sdpa": _sdpa,
}
