"""The inner models of test-time training (arXiv 2407.04620), trained on a sequence while the mixer reads it.

Each head has a model f, whose weights are the head's state. A sequence is read in chunks of 16 tokens. Each chunk
updates the state by one step of gradient descent on 1/2 sum_j eta_j || LN(f(k_j)) - (v_j - k_j) ||^2, where j runs over
the chunk's tokens and eta_j is the learning rate of token j. All gradients of a chunk are taken at the state before the
chunk. Then the updated model is applied to the chunk's queries: the output is q + LN(f(q)).

The dual form computes the output without the updated weights. If f is linear, z_j = f(k_j) = k_j W + b, and G_j is the
gradient of 1/2 || LN(z_j) - (v_j - k_j) ||^2 with respect to z_j, then the updated f maps a query q to

    q (W - sum_j eta_j k_j^T G_j) + b - sum_j eta_j G_j = q W + b - sum_j (q . k_j + 1) eta_j G_j,

so a chunk's outputs need the state before the chunk in only one matrix product, [k; q] W + b.

Tensors have the shape (chunks, heads, 16, width). Chunk c of a sequence has its tokens 16 c .. 16 c + 15. The chunks of
a pack are ordered by c. Step c computes chunk c of each sequence that has a chunk c. These chunks are adjacent, and
`counts[c]` is their number. Within a step, longer sequences come first. So the sequences that have a chunk in the next
step are the first rows of the state.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from protlig_dd.model.layers import HeadMatrices

CHUNK = 16  # tokens; each chunk is one step of gradient descent
HIDDEN_RATIO = 4  # width of the inner MLP's hidden layer / width of a head
NORM_EPS = 1e-6
INITIAL_STD = 0.02

ByHead = Float[Tensor, "chunks heads tokens width"]
Rates = Float[Tensor, "chunks heads tokens 1"]


class InnerModel(nn.Module, ABC):
    """One model per head. Its learned weights are the state at the start of each sequence.

    Args:
        width: width of a head, head_dim.
    """

    base_rate: float
    """Learning rate of the inner step; the mixer multiplies it by a gate per token, and divides it by width * CHUNK."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        # stored as vectors, because the optimizer treats parameters of two dimensions as matrices
        self.norm_gain = nn.Parameter(torch.ones(heads * width))
        self.norm_shift = nn.Parameter(torch.zeros(heads * width))

    @abstractmethod
    def forward(self, q: ByHead, k: ByHead, v: ByHead, eta: Rates, counts: Sequence[int]) -> ByHead:
        """Return q + LN(f(q)) for each token, where the weights of f are the state after the token's chunk.

        Args:
            eta: the learning rate of each token; 0 for the unfilled slots in the last chunk of a sequence.
            counts: entry c is the number of sequences that have a chunk c, so the entries never increase.
        """

    @abstractmethod
    def flops(self, chunks: int) -> int:
        """Return the multiply-adds of all heads for a sequence of `chunks` chunks."""

    def vectors(self, parameter: Tensor, like: Tensor) -> Float[Tensor, "heads 1 width"]:
        """Return a parameter that has one vector for each head, in the dtype of `like`."""
        return parameter.view(self.heads, 1, -1).to(like.dtype)

    def gradients(self, z: ByHead, target: ByHead, eta: Rates) -> ByHead:
        """Return eta times the gradient of 1/2 || LN(z) - target ||^2 with respect to z."""
        centred = z - z.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        normed, gain = centred * rstd, self.vectors(self.norm_gain, z)
        d = gain * (gain * normed + (self.vectors(self.norm_shift, z) - target))
        return (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True)) * (rstd * eta)

    def read(self, q: ByHead, z: ByHead) -> ByHead:
        """Return q + LN(z)."""
        normed = F.layer_norm(z, (self.width,), eps=NORM_EPS)
        return q + normed * self.vectors(self.norm_gain, z) + self.vectors(self.norm_shift, z)


class InnerLinear(InnerModel):
    """f(k) = k W + b."""

    base_rate = 1.0

    def __init__(self, heads: int, width: int) -> None:
        super().__init__(heads, width)
        self.matrix = HeadMatrices(heads, width, width, std=INITIAL_STD)
        self.bias = nn.Parameter(torch.zeros(heads * width))

    def forward(self, q: ByHead, k: ByHead, v: ByHead, eta: Rates, counts: Sequence[int]) -> ByHead:
        w, b = (first_state(x, counts[0]) for x in (self.matrix.matrices.to(q.dtype), self.vectors(self.bias, q)))
        outputs, steps = [], []
        for kq, target, rate, staying in chunk_steps(q, k, v, eta, counts):
            z_k, z_q = (kq @ w + b).split(CHUNK, dim=-2)
            step = self.gradients(z_k, target, rate)
            outputs.append(z_q)
            steps.append(step)
            if staying:
                keys, step = first(kq, staying).narrow(-2, 0, CHUNK), first(step, staying)
                w, b = first(w, staying) - keys.mT @ step, first(b, staying) - step.sum(-2, keepdim=True)
        return self.read(q, torch.cat(outputs) - (q @ k.mT + 1) @ torch.cat(steps))

    def flops(self, chunks: int) -> int:
        width = self.width
        state, attention = CHUNK * width**2, CHUNK**2 * width
        return self.heads * (chunks * (2 * state + 2 * attention) + (chunks - 1) * state)


class InnerMLP(InnerModel):
    """f(k) = gelu(k W1 + b1) W2 + b2, with a hidden layer of 4 times the width."""

    base_rate = 0.1

    def __init__(self, heads: int, width: int) -> None:
        super().__init__(heads, width)
        hidden = HIDDEN_RATIO * width
        self.matrix_1 = HeadMatrices(heads, width, hidden, std=INITIAL_STD)
        self.bias_1 = nn.Parameter(torch.zeros(heads * hidden))
        self.matrix_2 = HeadMatrices(heads, hidden, width, std=INITIAL_STD)
        self.bias_2 = nn.Parameter(torch.zeros(heads * width))

    def forward(self, q: ByHead, k: ByHead, v: ByHead, eta: Rates, counts: Sequence[int]) -> ByHead:
        learned = (
            self.matrix_1.matrices,
            self.vectors(self.bias_1, q),
            self.matrix_2.matrices,
            self.vectors(self.bias_2, q),
        )
        w1, b1, w2, b2 = (first_state(x.to(q.dtype), counts[0]) for x in learned)
        similarities = (q @ k.mT + 1).split(list(counts))
        outputs = []
        for (kq, target, rate, staying), similarity in zip(
            chunk_steps(q, k, v, eta, counts), similarities, strict=True
        ):
            h_k, h_q = (kq @ w1 + b1).split(CHUNK, dim=-2)
            x_k = F.gelu(h_k, approximate="tanh")
            step_2 = self.gradients(x_k @ w2 + b2, target, rate)
            # step_1 and step_2 both use the weights before the chunk
            step_1 = torch.ops.aten.gelu_backward(step_2 @ w2.mT, h_k, approximate="tanh")
            x_q = F.gelu(h_q - similarity @ step_1, approximate="tanh")
            outputs.append(x_q @ w2 + b2 - (x_q @ x_k.mT + 1) @ step_2)
            if staying:
                keys, x_k = first(kq, staying).narrow(-2, 0, CHUNK), first(x_k, staying)
                step_1, step_2 = first(step_1, staying), first(step_2, staying)
                w1, b1 = first(w1, staying) - keys.mT @ step_1, first(b1, staying) - step_1.sum(-2, keepdim=True)
                w2, b2 = first(w2, staying) - x_k.mT @ step_2, first(b2, staying) - step_2.sum(-2, keepdim=True)
        return self.read(q, torch.cat(outputs))

    def flops(self, chunks: int) -> int:
        width, hidden = self.width, HIDDEN_RATIO * self.width
        state, attention = CHUNK * width * hidden, CHUNK**2 * (width + hidden)
        return self.heads * (chunks * (5 * state + 2 * attention) + (chunks - 1) * 2 * state)


def first_state(learned: Float[Tensor, "heads rows columns"], n: int) -> Float[Tensor, "n heads rows columns"]:
    """Return the state of n sequences at their first token."""
    return learned.expand(n, *learned.shape)


def first(x: Tensor, n: int) -> Tensor:
    """Return the first n rows. If x has n rows, return x itself: the backward pass of a slice would make a copy."""
    return x if len(x) == n else x.narrow(0, 0, n)


def chunk_steps(
    q: ByHead, k: ByHead, v: ByHead, eta: Rates, counts: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Return a tuple for each step: [k; q], the targets v - k, the rates, and how many sequences have another chunk.

    Each tensor is split once, because in the backward pass a slice for each step would allocate a gradient of the full
    size.
    """
    sizes = list(counts)
    parts = (x.split(sizes) for x in (torch.cat([k, q], dim=-2), v - k, eta))
    return list(zip(*parts, [*sizes[1:], 0], strict=True))
