"""The inputs of attention other than q, k and v. They are computed once per pack rather than in every block."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import OffsetBias, ProductBias, ScoreBias

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class ScoreInputs:
    """The bias and the mask of a block's scores, in the form that the attention backend takes."""

    bias: ScoreBias | None
    matrices: tuple[Tensor, ...] | None = None
    """sdpa: the bias of each sequence, (heads, length_i, length_i) in the dtype of q. None if blocks have different
    biases; each block then computes its own matrices."""
    columns: Float[Tensor, "total 3 heads rank"] | None = None
    """Other backends: the columns to append to q, k and v for a ProductBias."""
    block_mask: "BlockMask | None" = None
    """flex: the mask that separates the sequences."""


def prepare_scores(
    positions: PositionEncoding, batch: PackedBatch, backend: str, attends: Sequence[bool], dtype: torch.dtype
) -> Sequence[ScoreInputs | None]:
    """Return the ScoreInputs of the first len(attends) blocks; None for a block that needs only q, k and v.

    Args:
        attends: for each of these blocks, whether its mixer is attention. Blocks with other mixers get None.
        dtype: the dtype of q, k and v. With sdpa, a bias that blocks share is cast to this dtype once.

    Raises:
        ValueError: a sequence is longer than the position encoding's table, and at least one of these blocks has
                attention.
    """
    if not any(attends):
        return [None] * len(attends)
    biases, block_mask = positions.bias(batch), None
    if backend == "flex":
        from protlig_dd.model.mixers.flex import document_mask  # slow to import

        block_mask = document_mask(batch)
    if not biases:
        plain = None if block_mask is None else ScoreInputs(None, block_mask=block_mask)
        return [plain if attending else None for attending in attends]
    shared = len(biases) == 1
    inputs = [
        ScoreInputs(
            bias,
            matrices=matrices_of(bias, batch, dtype) if shared and backend == "sdpa" else None,
            columns=columns_of(bias, batch, positions.head_dim) if backend != "sdpa" else None,
            block_mask=block_mask,
        )
        for bias in biases
    ]
    numbers = itertools.count()  # counts the blocks with attention
    return [inputs[0 if shared else next(numbers)] if attending else None for attending in attends]


def matrices_of(bias: ScoreBias, batch: PackedBatch, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the bias of each sequence that has tokens.

    Sequences of equal length share a matrix, unless the matrix needs a gradient. Autograd would sum the gradients of a
    shared matrix in `dtype`, which may be less precise than the dtype of the parameters.
    """
    matrices: list[Tensor] = []
    shared: dict[int, Tensor] = {}
    for length in filter(None, batch.lengths):
        matrix = shared[length] if length in shared else bias.matrix(length).to(dtype)
        matrices.append(matrix)
        if not matrix.requires_grad:
            shared[length] = matrix
    return tuple(matrices)


def scores_problem(scores: ScoreInputs | None, backend: str) -> str | None:
    """Return None if a backend can use these inputs, else the reason, worded to follow the backend's name.

    Inputs from `prepare_scores` for the same backend are always valid. From invalid inputs, the backend would compute
    wrong attention.
    """
    if scores is None:
        return None
    if scores.bias is None and not (scores.matrices is None and scores.columns is None):
        return "got the matrices or columns of a bias without the bias itself; use prepare_scores with this backend"
    if backend == "sdpa":
        return None
    if isinstance(scores.bias, OffsetBias) and (
        backend == "torch_varlen" or (backend == "flash_attn" and scores.bias.slopes_H is None)
    ):
        return "cannot add this bias to the scores; use flex or sdpa"
    if isinstance(scores.bias, ProductBias) and scores.columns is None:
        return "needs the columns of a ProductBias, but got none; use prepare_scores with this backend"
    if backend == "flex" and scores.block_mask is None:
        return "needs a mask that separates the sequences, but got none; use prepare_scores with this backend"
    return None


def columns_of(bias: ScoreBias, batch: PackedBatch, head_dim: int) -> Tensor | None:
    return bias.columns(batch, head_dim) if isinstance(bias, ProductBias) else None


def with_columns(qkv: Tensor, columns: Tensor | None) -> Tensor:
    """Append columns (total, 3, heads, rank) to the heads of q, k and v."""
    return qkv if columns is None else torch.cat([qkv, columns.to(qkv.dtype)], dim=-1)
