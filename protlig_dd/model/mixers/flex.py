"""FlexAttention with a mask that separates the sequences, for biases that the flash kernels do not take.

torch compiles FlexAttention to one Triton kernel (arXiv 2412.05496), so training needs a GPU. On a CPU, only the
forward pass can run, uncompiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from protlig_dd.batch import PackedBatch
from protlig_dd.model.mixers.scores import ScoreInputs, with_columns
from protlig_dd.model.positions.biases import OffsetBias

VARIANTS: dict[str, Any] = {"recompile_limit": 256}  # a dict, as torch.compile's annotations lack this argument
BLOCK = 128  # scores are computed or skipped in blocks of 128 queries and 128 keys


def flex(qkv: Tensor, batch: PackedBatch, scores: ScoreInputs | None) -> Tensor:
    """Return the attention output (total, heads, head_dim) of qkv (total, 3, heads, head_dim)."""
    scores = scores or ScoreInputs(None, block_mask=document_mask(batch))
    head_dim = qkv.shape[-1]
    q, k, v = with_columns(qkv, scores.columns).permute(1, 2, 0, 3).unsqueeze(1)  # each (1, heads, total, head_dim)
    attend: Any = compiled() if qkv.device.type == "cuda" else flex_attention
    modify = bias_of(scores.bias, batch.positions) if isinstance(scores.bias, OffsetBias) else None
    out = attend(q, k, v, score_mod=modify, block_mask=scores.block_mask, scale=head_dim**-0.5)
    return out.squeeze(0).transpose(0, 1).narrow(-1, 0, head_dim)


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """Return flex_attention, compiled by torch.

    torch compiles a variant of the function at the first call, and another variant whenever the number of heads, the
    head_dim, the dtype, the kind of bias or the gradient mode differs. For all further shapes of packs, torch compiles
    only one more variant. All networks of a process share the variants.

    With `fullgraph`, torch raises an error where it would otherwise continue with the uncompiled function, which stores
    all scores of the pack. One such case is more than `recompile_limit` variants (256 here, by default 8).
    """
    return torch.compile(flex_attention, fullgraph=True, **VARIANTS)


def bias_of(bias: OffsetBias, positions: Tensor) -> Callable[..., Tensor]:
    """Return the function that adds the bias to the score of one query and one key."""
    values_HO = bias.values_HO
    # the function reads only tensors: for each new Python number in it, torch would compile again
    column_of_key = positions + values_HO.shape[1] // 2
    # a lambda, because torch cannot trace a function that jaxtyping checks (PROTLIG_TYPECHECK)
    return lambda score, _, head, query, key: score + values_HO[head, column_of_key[key] - positions[query]]


def document_mask(batch: PackedBatch) -> BlockMask:
    """Return the mask that lets each query attend to the keys of its own sequence only.

    The mask consists of blocks of 128 queries and 128 keys. In each row of blocks, the blocks to compute are adjacent.
    The bounds of the sequences give the first and the last of these blocks. So the (total, total) mask is never
    computed, and the host does not wait for the device.
    """
    segment_ids, cu_seqlens, total = batch.segment_ids, batch.cu_seqlens, len(batch.tokens)
    starts = torch.arange(0, total, BLOCK, device=segment_ids.device)
    ends = (starts + BLOCK - 1).clamp(max=total - 1)
    first = cu_seqlens.take(segment_ids.take(starts)) // BLOCK
    last = (cu_seqlens.take(segment_ids.take(ends) + 1) - 1) // BLOCK
    columns = torch.arange(len(starts), device=segment_ids.device, dtype=torch.int32)
    indices = (first.unsqueeze(1) + columns).clamp(max=len(starts) - 1)
    counts, indices = (last - first + 1).view(1, 1, -1), indices.view(1, 1, *indices.shape)
    return BlockMask(
        seq_lengths=(total, total),
        kv_num_blocks=counts,
        kv_indices=indices,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=counts,  # the mask is symmetric
        q_indices=indices,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda _, head, query, key: segment_ids[query] == segment_ids[key],
    )
