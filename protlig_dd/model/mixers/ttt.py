"""Test-time training layers (arXiv 2407.04620), in both directions of a sequence as in video diffusion transformers
(arXiv 2504.05298).

    TTT(x) = out(gelu(gate(x)) * LayerNorm(q + LN(f(q)) of all heads))      f: an inner model, see fast_weights.py
    h      = x + tanh(alpha_f) TTT(x)
    mixed  = tanh(alpha_f) TTT(x) + tanh(alpha_b) flip(TTT(flip(h)))

q and k are L2-normalised, then rotated by the position encoding. alpha_f and alpha_b are learned gates of the two
directions. `flip` reverses each sequence of the pack. The time is linear in the number of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.layers import HeadGates, Linear, StackedLinear
from protlig_dd.model.mixers.base import Mixer
from protlig_dd.model.mixers.fast_weights import CHUNK, INITIAL_STD, NORM_EPS, InnerLinear, InnerMLP, InnerModel
from protlig_dd.model.mixers.scores import ScoreInputs
from protlig_dd.model.positions.base import PositionEncoding

INITIAL_ALPHA = 0.1


class Directions(nn.Module):
    """The gates alpha of the two directions, one number per channel."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.forward_alpha = nn.Parameter(torch.full((hidden_size,), INITIAL_ALPHA))
        self.backward_alpha = nn.Parameter(torch.full((hidden_size,), INITIAL_ALPHA))


class TTT(Mixer):
    """A bidirectional test-time training layer; both directions have the same weights, except alpha.

    The inner model's state is reset at the start of each sequence. The state is float32, or float64 if x is float64.
    """

    inner_model: type[InnerModel]
    capturable = False
    passes = 2

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__(config, backend)
        hidden_size, self.n_heads = config.hidden_size, config.n_heads
        self.qkv = StackedLinear(hidden_size, hidden_size, stacked=3)
        self.rate = HeadGates(hidden_size, config.n_heads)
        nn.init.normal_(self.rate.weight, std=INITIAL_STD)
        nn.init.zeros_(self.rate.bias)
        self.inner = self.inner_model(config.n_heads, config.head_dim)
        self.heads_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.gate = Linear(hidden_size, hidden_size, bias=False)
        self.ttt_out = Linear(hidden_size, hidden_size, bias=False)
        self.directions = Directions(hidden_size)

    def project(
        self, x: Float[Tensor, "total hidden"], positions: PositionEncoding, *tables: Tensor
    ) -> Float[Tensor, "total hidden"]:
        """Return x. `mix` computes all projections, because the second direction projects the result of the first."""
        return x

    def mix(
        self,
        projected: Float[Tensor, "total hidden"],
        batch: PackedBatch,
        positions: PositionEncoding,
        *tables: Tensor,
        scores: ScoreInputs | None = None,
    ) -> Float[Tensor, "total hidden"]:
        """Read each sequence from its first token to its last, then from its last to its first. Ignore `scores`."""
        chunks, flipped = chunks_of(batch), flip_of(batch)
        forward, backward = self.directions.forward_alpha.tanh(), self.directions.backward_alpha.tanh()
        mixed = forward * self.read(projected, chunks, positions, *tables)
        h = (projected + mixed).index_select(0, flipped)
        return mixed + backward * self.read(h, chunks, positions, *tables).index_select(0, flipped)

    def read(
        self, x: Float[Tensor, "total hidden"], chunks: "Chunks", positions: PositionEncoding, *tables: Tensor
    ) -> Float[Tensor, "total hidden"]:
        """Return TTT(x), reading each sequence from its first token to its last."""
        state_dtype = torch.promote_types(x.dtype, torch.float32)
        qkv, gate, rate = self.qkv(x), self.gate(x), self.rate(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = rearrange(qkv.to(state_dtype), "t (three h d) -> t three h d", three=3, h=self.n_heads).unbind(1)
            turned = positions.rotate(torch.stack([F.normalize(q, dim=-1), F.normalize(k, dim=-1), v], 1), *tables)
            in_chunks = rearrange(turned.index_select(0, chunks.token), "(n t) three h d -> three n h t d", t=CHUNK)
            q, k, v = in_chunks.clone(memory_format=torch.contiguous_format).unbind()
            eta = rate.to(state_dtype).sigmoid().index_select(0, chunks.token) * chunks.filled.unsqueeze(1)
            eta = rearrange(eta, "(n t) h -> n h t 1", t=CHUNK) * (self.inner.base_rate / (q.shape[-1] * CHUNK))
            found = rearrange(self.inner(q, k, v, eta, chunks.counts), "n h t d -> (n t) (h d)")
            normed = F.layer_norm(
                found.index_select(0, chunks.slot),
                (self.hidden_size,),
                self.heads_norm.weight.to(state_dtype),
                self.heads_norm.bias.to(state_dtype),
                NORM_EPS,
            )
        return self.ttt_out(F.gelu(gate, approximate="tanh") * normed.to(gate.dtype))

    def out(self, mixed: Float[Tensor, "total hidden"]) -> Float[Tensor, "total hidden"]:
        """Return `mixed`, because `mix` applies the output projection in each direction."""
        return mixed

    def flops(self, lengths: Sequence[int]) -> int:
        """Return the multiply-adds of the inner models, and of the linear layers in the second direction.

        `DiT.flops` counts the linear layers of the first direction.
        """
        linear = (self.qkv, self.gate, self.rate, self.ttt_out)
        inner = sum(self.inner.flops(-(-length // CHUNK)) for length in lengths if length)
        return 2 * inner + sum(layer.weight.numel() for layer in linear) * sum(lengths)


class TTTLinear(TTT):
    """The inner model is a linear layer."""

    inner_model = InnerLinear


class TTTMLP(TTT):
    """The inner model is an MLP with one hidden layer."""

    inner_model = InnerMLP


class Chunks(NamedTuple):
    """The division of a pack's tokens into chunks. Each chunk has 16 slots for tokens of one sequence.

    The last chunk of a sequence may have unfilled slots. Chunks are ordered by their number within the sequence, then
    by the length of the sequence, longest first.
    """

    token: Int64[Tensor, " slots"]
    """The index in the pack of each slot's token. Unfilled slots have the index of their sequence's last token."""
    filled: Bool[Tensor, " slots"]
    slot: Int64[Tensor, " total"]
    """The slot of each token."""
    counts: list[int]
    """Entry c is the number of sequences that have a chunk c."""


def chunks_of(batch: PackedBatch) -> Chunks:
    """Divide each sequence into chunks. The pack's device computes the tensors, and the host does not wait for it."""
    device, lengths = batch.tokens.device, np.array(batch.lengths)
    counts = (lengths > np.arange(0, lengths.max(), CHUNK)[:, None]).sum(1).tolist()
    begin_n, length_n = starts_of(batch), batch.cu_seqlens.diff().long()
    order = length_n.argsort(descending=True, stable=True)  # the sequences, longest first
    number = torch.arange(len(counts), device=device)
    counts_on_device = (length_n > CHUNK * number.unsqueeze(1)).sum(1)
    first_row = counts_on_device.cumsum(0) - counts_on_device
    number_of_row = number.repeat_interleave(counts_on_device, output_size=sum(counts))
    rank_of_row = torch.arange(sum(counts), device=device) - first_row.take(number_of_row)
    sequence = order.take(rank_of_row).unsqueeze(1)
    position = CHUNK * number_of_row.unsqueeze(1) + torch.arange(CHUNK, device=device)
    row = first_row.take(batch.positions // CHUNK) + order.argsort().take(batch.segment_ids)
    return Chunks(
        token=(begin_n.take(sequence) + torch.minimum(position, length_n.take(sequence) - 1)).flatten(),
        filled=(position < length_n.take(sequence)).flatten(),
        slot=CHUNK * row + batch.positions % CHUNK,
        counts=counts,
    )


def starts_of(batch: PackedBatch) -> Int64[Tensor, " n"]:
    """Return the index of the first token of each sequence."""
    return batch.cu_seqlens.narrow(0, 0, len(batch.lengths)).long()


def flip_of(batch: PackedBatch) -> Int64[Tensor, " total"]:
    """Return the index that reverses each sequence of a pack."""
    ends = starts_of(batch) + batch.cu_seqlens.diff() - 1
    return ends.take(batch.segment_ids) - batch.positions
