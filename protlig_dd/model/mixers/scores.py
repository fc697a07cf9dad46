"""The inputs of attention other than q, k and v. They are computed once per pack rather than in every block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.model.positions.base import PositionEncoding
from protlig_dd.model.positions.biases import ProductBias, ScoreBias

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class ScoreInputs:
    """The bias and the mask of a block's scores, in the form that the attention backend takes."""

    bias: ScoreBias | None
    matrices: tuple[Tensor, ...] | None = None
    """sdpa: the bias of each sequence, (heads, length_i, length_i). None if blocks have different biases; each block
    then computes its own."""
    columns: Float[Tensor, "total 3 heads rank"] | None = None
    """Other backends: the columns to append to q, k and v for a ProductBias."""
    block_mask: "BlockMask | None" = None
    """flex: the mask that separates the sequences."""


def prepare_scores(
    positions: PositionEncoding, batch: PackedBatch, backend: str, n_blocks: int
) -> Sequence[ScoreInputs | None]:
    """Return each block's ScoreInputs; None where the backend needs only q, k and v.

    Raises:
        ValueError: a sequence is longer than a table of the position encoding.
    """
    biases, block_mask = positions.bias(batch), None
    if backend == "flex":
        from protlig_dd.model.mixers.flex import document_mask  # slow to import

        block_mask = document_mask(batch)
    if not biases:
        return [None if block_mask is None else ScoreInputs(None, block_mask=block_mask)] * n_blocks
    shared = len(biases) == 1
    inputs = [
        ScoreInputs(
            bias,
            matrices=matrices_of(bias, batch) if shared and backend == "sdpa" else None,
            columns=columns_of(bias, batch, positions.head_dim) if backend != "sdpa" else None,
            block_mask=block_mask,
        )
        for bias in biases
    ]
    return inputs * n_blocks if shared else inputs


def matrices_of(bias: ScoreBias, batch: PackedBatch) -> tuple[Tensor, ...]:
    """Return the bias of each sequence that has tokens."""
    return tuple(bias.matrix(length) for length in batch.lengths if length)


def columns_of(bias: ScoreBias, batch: PackedBatch, head_dim: int) -> Tensor | None:
    return bias.columns(batch, head_dim) if isinstance(bias, ProductBias) else None


def with_columns(qkv: Tensor, columns: Tensor | None) -> Tensor:
    """Append columns (total, 3, heads, rank) to the heads of q, k and v."""
    return qkv if columns is None else torch.cat([qkv, columns.to(qkv.dtype)], dim=-1)
