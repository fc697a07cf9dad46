"""Biases of attention scores. A bias is added to q k^T / sqrt(head_dim) before the softmax.

Shape suffixes: H heads, L tokens of one sequence, P positions, O offsets, R rank, T tokens of the pack.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from protlig_dd.batch import PackedBatch


class ScoreBias(ABC):
    """A bias of the scores that depends on the positions of query and key only."""

    @abstractmethod
    def matrix(self, length: int) -> Float[Tensor, "heads length length"]:
        """Return the bias of a sequence of this length; row i is the query at position i."""


@dataclass(frozen=True)
class OffsetBias(ScoreBias):
    """A bias that depends on the signed offset j - i of key j from query i.

    Args:
        values_HO: (heads, 2 longest - 1), where no sequence has more than `longest` tokens. Column j - i + longest - 1
            has the bias of offset j - i.
        slopes_H: the slope of each head if the bias is -slope |j - i|, for kernels that compute it from the slopes;
            None for other biases.
    """

    values_HO: Float[Tensor, "heads offsets"]
    slopes_H: Float[Tensor, " heads"] | None = None

    def matrix(self, length: int) -> Float[Tensor, "heads length length"]:
        at = torch.arange(length, device=self.values_HO.device)
        column_LL = at - at.unsqueeze(1) + self.values_HO.shape[1] // 2
        # index_select is four times as fast as indexing with column_LL
        return self.values_HO.index_select(1, column_LL.flatten()).view(-1, length, length)


@dataclass(frozen=True)
class ProductBias(ScoreBias):
    """The bias q_i . k_j of query i and key j, where q_i and k_j are rows of two tables for positions i and j.

    A kernel that does not accept a bias still adds this bias if the rows are appended to the queries and keys.

    Args:
        q_PHR, k_PHR: (positions, heads, rank), one row for each position.
    """

    q_PHR: Float[Tensor, "positions heads rank"]
    k_PHR: Float[Tensor, "positions heads rank"]

    def matrix(self, length: int) -> Float[Tensor, "heads length length"]:
        return torch.einsum("ihr,jhr->hij", self.q_PHR.narrow(0, 0, length), self.k_PHR.narrow(0, 0, length))

    def columns(self, batch: PackedBatch, head_dim: int) -> Float[Tensor, "total 3 heads rank"]:
        """Return the columns to append to the heads of q, k and v, so that q k^T / sqrt(head_dim) contains the bias.

        The kernel must divide by sqrt(head_dim), not by the root of the enlarged head_dim. The last `rank` columns of
        its output are zeros.
        """
        q_THR, k_THR = (table.index_select(0, batch.positions) for table in (self.q_PHR, self.k_PHR))
        return torch.stack([q_THR * head_dim**0.5, k_THR, torch.zeros_like(k_THR)], dim=1)
