"""Norms, the MLP and the output head."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from protlig_dd.model.kernels import RMSNormFunction, per_token
from protlig_dd.tokenizer import N_STATES

MLP_RATIO = 4
GATED = ("geglu", "swiglu")
EMBEDDING_STD = 0.02
RMS_EPS, LAYER_EPS = 1e-6, 1e-5


class Linear(nn.Linear):
    """A linear layer of a block. It may have a low-rank adapter, which changes its weight (see lora.py)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.adapter: nn.Module | None = None

    def merged(self) -> Float[Tensor, "rows columns"]:
        """Return the weight that `forward` uses: with an adapter, the sum of the weight and the adapter's product."""
        merged: Tensor = self.weight if self.adapter is None else self.adapter(self.weight)
        return merged

    def forward(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        return F.linear(x, self.merged(), self.bias)


class StackedLinear(Linear):
    """Several linear layers with the same input, computed as one matrix product.

    Muon orthogonalises the matrix of each layer separately.
    """

    def __init__(self, in_features: int, out_features: int, *, stacked: int, bias: bool = False) -> None:
        super().__init__(in_features, stacked * out_features, bias=bias)
        self.stacked = stacked


class HeadMatrices(nn.Module):
    """A learned matrix for each head, (heads, rows, columns), stored as (heads * rows, columns).

    Muon orthogonalises the matrix of each head separately.
    """

    def __init__(self, heads: int, rows: int, columns: int, *, std: float) -> None:
        super().__init__()
        self.stacked = heads
        self.weight = nn.Parameter(torch.empty(heads * rows, columns))
        nn.init.normal_(self.weight, std=std)

    @property
    def matrices(self) -> Float[Tensor, "heads rows columns"]:
        return self.weight.unflatten(0, (self.stacked, -1))


class HeadGates(nn.Linear):
    """Computes one number for each head and token.

    Each row of the weight belongs to one head, so Muon must not orthogonalise the weight as one matrix. AdamW updates
    it even in a run with Muon.
    """


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them.

    For geglu and swiglu (arXiv 2002.05202) the output of the first layer is split into two halves, and the GELU or SiLU
    of the first half multiplies the second. Each half is two thirds as wide as the inner layer of the other kinds, so
    that all kinds have about equally many weights.

    Args:
        kind: gelu (its tanh approximation) | gelu_erf (exact GELU, as in ESM-2) | geglu | swiglu | relu2 (squared
            ReLU).
    """

    def __init__(self, hidden_size: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        gated = kind in GATED
        inner = 8 * round(2 * MLP_RATIO * hidden_size / 3 / 8) if gated else MLP_RATIO * hidden_size
        self.up = Linear(hidden_size, 2 * inner if gated else inner)
        self.down = Linear(inner, hidden_size)

    def forward(self, x: Float[Tensor, "total hidden"]) -> Float[Tensor, "total hidden"]:
        x = self.up(x)
        if self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.kind == "gelu_erf":
            x = F.gelu(x)
        elif self.kind == "relu2":
            x = F.relu(x).square()
        else:
            gate, x = x.chunk(2, dim=-1)
            x = (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * x
        return self.down(x)


class Head(nn.Module):
    """Final adaLN and the projection to the logits of the 20 amino acids.

    Args:
        kind: linear | lm. The head `lm` is that of BERT and ESM-2: a dense layer, an exact GELU and a norm come before
            the projection.
        tied: whether the output projection uses the amino acids' rows of the input embedding instead of its own matrix.
    """

    def __init__(
        self, hidden_size: int, cond_dim: int | None, norm: str, eps: float | None = None, *, kind: str, tied: bool
    ) -> None:
        super().__init__()
        self.adaln = None if cond_dim is None else zero_linear(cond_dim, 2 * hidden_size)
        self.norm = make_norm(norm, hidden_size, eps, modulated=cond_dim is not None)
        lm = kind == "lm"
        self.dense = nn.Linear(hidden_size, hidden_size) if lm else None
        self.dense_norm = make_norm(norm, hidden_size, eps, modulated=False) if lm else None
        self.out: nn.Module = TiedOutput(hidden_size) if tied else zero_linear(hidden_size, N_STATES)

    def forward(
        self,
        x_TH: Float[Tensor, "total hidden"],
        cond_nC: Float[Tensor, "n cond_dim"] | None,
        segment_ids: Int64[Tensor, " total"],
        embedding_VH: Float[Tensor, "vocabulary hidden"],
    ) -> Float[Tensor, "total 20"]:
        x_TH = self.normed(x_TH, cond_nC, segment_ids)
        if self.dense is not None and self.dense_norm is not None:
            x_TH = self.dense_norm(F.gelu(self.dense(x_TH)))
        x_TH = x_TH.to(embedding_VH.dtype)
        # compute the logits in full precision: exp() of bf16 logits is off by 0.2%
        with torch.autocast(x_TH.device.type, enabled=False):
            return self.out(x_TH, embedding_VH) if isinstance(self.out, TiedOutput) else self.out(x_TH)

    def normed(
        self,
        x_TH: Float[Tensor, "total hidden"],
        cond_nC: Float[Tensor, "n cond_dim"] | None,
        segment_ids: Int64[Tensor, " total"],
    ) -> Float[Tensor, "total hidden"]:
        """Return the hidden states after the final norm and its modulation, before the head's dense layer, if any."""
        x_TH = self.norm(x_TH)
        if self.adaln is None:
            return x_TH
        shift, scale = per_token(self.adaln(cond_nC).chunk(2, dim=-1), segment_ids)
        return modulate(x_TH, shift.to(x_TH.dtype), scale.to(x_TH.dtype))  # the logits are not computed in bf16


class TiedOutput(nn.Module):
    """Projection to the logits with the embedding's rows: (gain x) . e_a / EMBEDDING_STD + bias_a.

    e_a is the row of amino acid a in the input embedding. The gain of each dimension starts at zero, so the logits of
    an untrained network are zero, as with untied weights. The division scales the entries of the rows to order 1, so
    that the gain learns as fast as untied weights.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(N_STATES))

    def forward(
        self, x: Float[Tensor, "total hidden"], embedding_VH: Float[Tensor, "vocabulary hidden"]
    ) -> Float[Tensor, "total 20"]:
        return F.linear(x * (self.gain / EMBEDDING_STD), embedding_VH.narrow(0, 0, N_STATES), self.bias)


def make_norm(kind: str, width: int, eps: float | None = None, *, modulated: bool = True) -> nn.Module:
    """Return a norm with a learned gain: RMSNorm for `rms`, otherwise LayerNorm.

    LayerNorm also has a learned bias, unless adaLN supplies the shift (`modulated`).

    Args:
        eps: added to the mean square or the variance; None for RMS_EPS and LAYER_EPS.
    """
    if kind == "rms":
        return RMSNorm(width, eps=RMS_EPS if eps is None else eps)
    return nn.LayerNorm(width, eps=LAYER_EPS if eps is None else eps, bias=not modulated)


class RMSNorm(nn.RMSNorm):
    """Computes x / sqrt(mean x^2 + eps), times a learned gain."""

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return super().forward(x)
        out = RMSNormFunction.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out


def modulate(
    x: Float[Tensor, "total hidden"], shift: Float[Tensor, "total hidden"], scale: Float[Tensor, "total hidden"]
) -> Float[Tensor, "total hidden"]:
    """Return x * (1 + scale) + shift, the modulation of adaLN, in the dtype of `scale`.

    Under autocast, norms return float32 and adaLN returns bf16. On a CPU, computing with both dtypes takes twice as
    long as converting x first.
    """
    return x.to(scale.dtype) * (1 + scale) + shift


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer whose weight and bias start at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
