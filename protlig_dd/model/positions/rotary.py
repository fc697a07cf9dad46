"""Rotary position embedding (RoFormer, arXiv 2104.09864) in plain torch.

Let d be head_dim. Dimensions j < d/2 and j + d/2 form a pair, which is rotated by the angle position * base^(-2 j / d).
The float32 tables of cosines and sines that are applied to the queries and keys must have exactly one row for each
token of the pack. Another number of rows is an error; tables are never tiled or cut.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.positions.base import PositionEncoding

CACHED_NUMBERS = 1 << 17  # float32 numbers of a thread's second-level cache (512 KiB)


class Rotary(PositionEncoding):
    """Rotates queries and keys by angles proportional to position, so that q k^T depends on relative positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        try:
            check_head_dim(config.head_dim)
        except ValueError as error:
            sizes = f"model.hidden_size={config.hidden_size} / model.n_heads={config.n_heads}"
            other = "choose sizes with an even head_dim, or an encoding without rotation, such as model.positions=alibi"
            raise ValueError(f"{sizes} gives head_dim {config.head_dim}: {error}; {other}") from error
        frequencies = config.rotary_frequencies
        if frequencies is not None and len(frequencies) != config.head_dim // 2:
            raise ValueError(
                f"model.rotary_frequencies has {len(frequencies)} frequencies, but head_dim {config.head_dim} has "
                f"{config.head_dim // 2} pairs of dimensions"
            )
        if frequencies is not None and not all(map(math.isfinite, frequencies)):
            raise ValueError(f"model.rotary_frequencies must be finite numbers, got {frequencies}")
        self.listed = frequencies
        # a buffer, because copying a list to a GPU at each forward pass would make the host wait
        self.frequencies: Tensor | None
        self.register_buffer(
            "frequencies", None if frequencies is None else torch.tensor(frequencies), persistent=False
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """Move the frequencies with the network, but keep them in float32: in bf16 the angles would be wrong."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frequencies is not None:
            self.frequencies = torch.tensor(self.listed, device=self.frequencies.device)
        return self

    def tables(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Return cos and sin for each token, each (1, total, 1, 1, head_dim) float32."""
        cos, sin = rotary_cos_sin(
            batch.max_seqlen, self.head_dim, frequencies=self.frequencies, device=batch.tokens.device
        )
        return gather_rotary(cos, sin, batch)

    def rotate(
        self, qkv: Float[Tensor, "total 3 heads head_dim"], *tables: Tensor
    ) -> Float[Tensor, "total 3 heads head_dim"]:
        """Return qkv with queries and keys rotated by their positions."""
        cos, sin = tables
        return apply_rotary_pos_emb(qkv.unsqueeze(0), cos, sin).squeeze(0)


def check_head_dim(head_dim: int) -> None:
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"rotary encoding rotates pairs of dimensions, so head_dim must be even, got {head_dim}")


def rotary_cos_sin(
    seq_len: int,
    head_dim: int,
    base: float = 10000.0,
    *,
    frequencies: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Float32[Tensor, "1 {seq_len} 1 1 {head_dim}"], Float32[Tensor, "1 {seq_len} 1 1 {head_dim}"]]:
    """Return cos and sin of the angles at positions 0 .. seq_len - 1, each (1, seq_len, 1, 1, head_dim) float32.

    Args:
        frequencies: (head_dim / 2,), the angle per position of each pair of dimensions, in radians; None for
            base^(-2 j / head_dim).

    Raises:
        ValueError: an odd head_dim, another number of frequencies, or a seq_len below 1.
    """
    check_head_dim(head_dim)
    if seq_len < 1:
        raise ValueError(f"rotary tables need a seq_len of at least 1, got {seq_len}")
    if frequencies is None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequencies = base**-exponent
    if tuple(frequencies.shape) != (head_dim // 2,):
        raise ValueError(f"head_dim {head_dim} needs {head_dim // 2} frequencies, got {tuple(frequencies.shape)}")
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies.float())
    angle = torch.cat([angle, angle], dim=-1).view(1, seq_len, 1, 1, head_dim)
    return angle.cos(), angle.sin()


def gather_rotary(
    cos: Float32[Tensor, "1 table 1 1 head_dim"], sin: Float32[Tensor, "1 table 1 1 head_dim"], batch: PackedBatch
) -> tuple[Float32[Tensor, "1 total 1 1 head_dim"], Float32[Tensor, "1 total 1 1 head_dim"]]:
    """Return the tables' rows at each packed token's position, each (1, total, 1, 1, head_dim).

    Raises:
        ValueError: a sequence is longer than the table. This is checked on the host, without waiting for the device.
    """
    if batch.max_seqlen > cos.shape[1]:
        raise ValueError(f"the rotary table has {cos.shape[1]} positions but a sequence has {batch.max_seqlen} tokens")
    return cos.index_select(1, batch.positions), sin.index_select(1, batch.positions)


def apply_rotary_pos_emb(
    qkv: Float[Tensor, "..."], cos: Float32[Tensor, "..."], sin: Float32[Tensor, "..."]
) -> Float[Tensor, "batch seq_len 3 heads head_dim"]:
    """Rotate q and k of a fused qkv tensor; v is unchanged.

    Args:
        qkv: (batch, seq_len, 3, heads, head_dim), any float dtype.
        cos, sin: (1, seq_len, 1, 1, head_dim) float32, with exactly qkv's length.

    Returns:
        A new tensor of qkv's shape and dtype. The rotation is computed in float32.

    Raises:
        ValueError: a qkv of another shape, or a table whose length or head_dim is larger or smaller than qkv's.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (batch, seq_len, 3, heads, head_dim), got {tuple(qkv.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        expected = (1, qkv.shape[1], 1, 1, qkv.shape[4])
        if tuple(table.shape) != expected:
            raise ValueError(
                f"rotary {name} has shape {tuple(table.shape)} but qkv {tuple(qkv.shape)} needs {expected}: "
                f"length {table.shape[1] if table.ndim == 5 else '?'} against {qkv.shape[1]}, "
                f"head_dim {table.shape[-1]} against {qkv.shape[4]}"
            )
    rotated = _Rotate.apply(qkv, cos, sin)  # type: ignore[no-untyped-call]
    assert isinstance(rotated, Tensor)
    return rotated


class _Rotate(torch.autograd.Function):
    """Rotates q and k. The backward pass rotates by the opposite angle.

    The forward and the backward pass each allocate one tensor of qkv's size.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # do not define setup_context: with it, torch would inspect this signature at every call (0.1 ms)
        ctx.save_for_backward(cos, sin)
        return _rotated(qkv, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and qkv.device.type == "cpu":
        return _rotated_in_parts(qkv, cos, sin)
    (cos, _), (sin, _) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)  # both halves of a table are equal
    qk, v = qkv.split([2, 1], dim=2)
    first, second = qk.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(qkv.dtype), v], dim=2)


def _rotated_in_parts(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate some positions at a time, so that their float32 values stay in the CPU's caches."""
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    batch, _, _, heads, head_dim = qkv.shape
    at_once = max(1, CACHED_NUMBERS * torch.get_num_threads() // (2 * batch * heads * head_dim))
    for part, out_part, cos_part, sin_part in zip(*(x.split(at_once, 1) for x in (qkv, out, cos, sin)), strict=True):
        qk = part[:, :, :2].to(torch.promote_types(qkv.dtype, cos.dtype))
        rotated = qk * cos_part
        for half, other, sign in ((0, 1, -1), (1, 0, 1)):
            rotated.chunk(2, -1)[half].addcmul_(qk.chunk(2, -1)[other], sin_part.chunk(2, -1)[0], value=sign)
        out_part[:, :, :2] = rotated
        out_part[:, :, 2] = part[:, :, 2]
    return out
