"""The attention backend matmul: matrix products of whole sequences, in bf16 on a CPU.

Forward and backward pass together take less than half the time of torch's kernel for CPUs, which multiplies small
blocks. The attention weights, (heads, length, length) numbers, are kept for the backward pass.

Shape suffixes: T tokens of the pack, H heads, D head_dim, W tokens of a sequence, padded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 1280  # tokens; for longer sequences torch's kernel, which keeps no attention weights, is as fast
MULTIPLE = 16  # sequences are padded to a multiple: oneDNN compiles code for each size, which takes time and memory


def matmul_attention(
    qkv_T3HD: BFloat16[Tensor, "total 3 heads head_dim"], lengths: Sequence[int]
) -> BFloat16[Tensor, "total heads head_dim"]:
    """Return softmax(q k^T / sqrt(head_dim)) v within each sequence. The scores q k^T are rounded to bf16.

    Args:
        lengths: tokens of each sequence. They sum to `total`, and none is 0.
    """
    out = _Attention.apply(qkv_T3HD, lengths)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


class _Attention(torch.autograd.Function):
    """With the weights P = softmax(S) of the scores S and dP = dO v^T, dS = P * (dP - rowsum(P * dP))."""

    @staticmethod
    def forward(ctx: Any, qkv_T3HD: Tensor, lengths: Sequence[int]) -> Tensor:
        out_THD = torch.empty_like(qkv_T3HD[:, 0], memory_format=torch.contiguous_format)
        scale, zero = qkv_T3HD.shape[-1] ** -0.5, qkv_T3HD.new_zeros(())
        kept = []
        for part, out in zip(qkv_T3HD.split(lengths), out_THD.split(lengths), strict=True):
            qkv_3HWD = padded(part.permute(1, 2, 0, 3))
            q, k, v = qkv_3HWD
            scores = torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=scale)
            scores[:, :, len(part) :] = -torch.inf
            weights = scores.softmax(-1)
            out.copy_(torch.bmm(weights, v)[:, : len(part)].transpose(0, 1))
            if ctx.needs_input_grad[0]:
                kept += [qkv_3HWD, weights]
        ctx.lengths, ctx.scale = lengths, scale
        ctx.save_for_backward(*kept)
        return out_THD

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None]:
        grad_qkv_T3HD = grad_THD.new_empty((len(grad_THD), 3, *grad_THD.shape[1:]))
        kept, zero = ctx.saved_tensors, grad_THD.new_zeros(())
        parts = zip(grad_THD.split(ctx.lengths), grad_qkv_T3HD.split(ctx.lengths), kept[::2], kept[1::2], strict=True)
        for part, grad_part, qkv_3HWD, weights in parts:
            q, k, v = qkv_3HWD
            grad_out = padded(part.transpose(0, 1))
            grad_weights = torch.bmm(grad_out, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grads = torch.empty_like(qkv_3HWD)
            torch.baddbmm(zero, grad_scores, k, beta=0, alpha=ctx.scale, out=grads[0])
            torch.baddbmm(zero, grad_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale, out=grads[1])
            torch.bmm(weights.transpose(1, 2), grad_out, out=grads[2])
            grad_part.copy_(grads[:, :, : len(part)].permute(2, 0, 1, 3))
        return grad_qkv_T3HD, None


def padded(x: Tensor) -> Tensor:
    """Return a contiguous copy of x (..., length, head_dim), with rows of zeros up to a multiple of MULTIPLE rows."""
    *outer, length, head_dim = x.shape
    size = -(-length // MULTIPLE) * MULTIPLE
    copy = x.new_empty((*outer, size, head_dim))
    copy[..., :length, :] = x
    copy[..., length:, :] = 0
    return copy
