"""Average attention weights into a map of residue pairs, correct it as is usual for contact maps, and draw it.

This module does not use Hydra.
"""

from io import BytesIO
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LETTERS_SHOWN = 130  # maximum length of a sequence whose letters are shown along the axes; others have only numbers


def contact_map(weights: Float[Tensor, "*chosen tokens tokens"]) -> Float[Tensor, "residues residues"]:
    """Return the mean of attention weights over blocks and heads, symmetrised and corrected, (residues, residues).

    <bos> and <eos> are left out. The correction is `average_product_correction`. Rao et al. 2020 (doi
    10.1101/2020.12.15.422761) correct the map of each head, and fit a weight for each head on known structures. Here
    all heads have the same weight, so no structures are needed.

    Args:
        weights: one tensor of the list that `attention` returns, or a part of the tensor, such as one head.

    Raises:
        ValueError: `weights` is not a tensor (..., tokens, tokens) with at least three tokens, or its rows do not
            sum to 1.
    """
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else None
    if shape is None or len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 3:
        found = type(weights).__name__ if shape is None else f"shape {shape}"
        raise ValueError(f"contact_map takes the weights of one protein, a tensor (..., tokens, tokens), got {found}")
    if not torch.allclose(weights.double().sum(-1), torch.ones(()).double(), atol=1e-2) or not weights.numel():
        raise ValueError(
            "contact_map takes attention weights, whose rows sum to 1; give the weights of all tokens, <bos> and <eos> "
            "included, of at least one block and head"
        )
    mean = weights.double().reshape(-1, *shape[-2:]).mean(0)[1:-1, 1:-1]
    return average_product_correction((mean + mean.T) / 2).to(weights.dtype)


def average_product_correction(a: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return a_ij - a_i a_j / a, where a_i, a_j and a are the sums of row i, of column j and of all entries.

    This correction removes from each entry what the averages of its row and its column predict (APC, Dunn et al. 2008,
    doi 10.1093/bioinformatics/btm604).
    """
    return a - a.sum(1, keepdim=True) * a.sum(0, keepdim=True) / a.sum()


def to_png(contacts: Float[Tensor, "residues residues"], sequence: str, title: str) -> bytes:
    """Return a PNG of a contact map with the sequence along both axes.

    Positive entries (attention above the product that `average_product_correction` subtracts) are red. Negative entries
    are blue, and the diagonal is grey. The scale ends at the 99th percentile of the off-diagonal entries' absolute
    values.

    Raises:
        ValueError: the sequence does not have the map's length.
    """
    from matplotlib.figure import Figure  # imported here because most commands draw no picture

    length = len(sequence)
    shown = np.array(contacts.tolist(), dtype=np.float64)
    if shown.shape != (length, length):
        raise ValueError(f"the map has shape {shown.shape}, but the sequence has {length} residues")
    np.fill_diagonal(shown, np.nan)
    limit = float(np.nanquantile(np.abs(shown), 0.99)) if length > 1 else 1.0
    figure = Figure(figsize=(9.5, 8.5), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor("0.8")
    extent = (0.5, length + 0.5, length + 0.5, 0.5)  # residues are numbered from 1, as on the command line
    image = axis.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, interpolation="nearest")
    if length <= LETTERS_SHOWN:
        font: dict[str, Any] = {"fontsize": min(9.0, 520 / length), "family": "monospace"}
        axis.set_xticks(range(1, length + 1), list(sequence), **font)
        axis.set_yticks(range(1, length + 1), list(sequence), **font)
        axis.tick_params(length=0, pad=1)
        for numbers in (axis.secondary_xaxis("top"), axis.secondary_yaxis("right")):
            numbers.set_ticks(range(10, length + 1, 10))
    axis.set_title(title)
    figure.colorbar(image, ax=axis, label="attention, minus the product of averages", shrink=0.8)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    return picture.getvalue()
