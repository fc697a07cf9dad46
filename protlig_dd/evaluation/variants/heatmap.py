"""A deep mutational scan as a heat map and a table: positions by amino acids."""

from io import BytesIO

import numpy as np

from protlig_dd.evaluation.variants.assays import Assay
from protlig_dd.system.tables import as_csv
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES, ProteinTokenizer

ROW = 100  # positions per row of the picture
MAX_ROWS = 20  # at most this many rows in the picture


def heat_map(assay: Assay, target: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
    """Return the scores of the single substitutions, (length, 20), or None if the assay has no such variant.

    The entries of the wild type's residues are 0. The entries of substitutions that were not scored are NaN.
    """
    table = np.full((len(target), N_STATES), np.nan)
    for variant, score in zip(assay.variants, scores, strict=True):
        if len(variant.substitutions) == 1:
            table[variant.substitutions[0]] = score
    if np.isnan(table).all():
        return None
    known = np.flatnonzero(target < N_STATES)
    table[known, target[known]] = 0.0
    return table


def to_csv(table: np.ndarray, target: np.ndarray) -> str:
    """Return CSV with a line for each position, counted from 1. Cells of substitutions without a score are empty."""
    letters = ProteinTokenizer().decode(target)
    rows = [
        [position, letter, *("" if np.isnan(score) else f"{score:.6f}" for score in row)]
        for position, (letter, row) in enumerate(zip(letters, table, strict=True), start=1)
    ]
    return as_csv([["position", "wild_type", *AMINO_ACIDS], *rows])


def to_png(table: np.ndarray, target: np.ndarray, title: str) -> bytes:
    """Return the heat map as a PNG. Dots mark the wild type's residues.

    White means as fit as the wild type, red less fit, blue fitter, and grey not scored. Each row of the picture shows a
    block of ROW positions. Blocks without scores are left out. The first MAX_ROWS of the other blocks are shown.
    """
    from matplotlib.figure import Figure  # imported here because most commands draw no picture

    scored = np.flatnonzero(np.isnan(table).sum(1) < N_STATES - 1)
    blocks = sorted({int(position) // ROW for position in scored})[:MAX_ROWS]
    limit = float(np.nanquantile(np.abs(table), 0.98)) or 1.0
    figure = Figure(figsize=(16, 0.8 + 3.6 * len(blocks)), layout="constrained")
    axes = figure.subplots(len(blocks), squeeze=False)[:, 0]
    for axis, block in zip(axes, blocks, strict=True):
        start, stop = block * ROW, min(len(table), (block + 1) * ROW)
        axis.set_facecolor("0.8")
        image = axis.imshow(
            table[start:stop].T,
            cmap="RdBu",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            extent=(start + 0.5, stop + 0.5, N_STATES - 0.5, -0.5),
        )
        wild = [position for position in range(start, stop) if target[position] < N_STATES]
        axis.plot([position + 1 for position in wild], target[wild], "k.", markersize=3)
        axis.set_xlim(start + 0.5, start + ROW + 0.5)
        axis.set_yticks(range(N_STATES), list(AMINO_ACIDS), fontsize=7)
        figure.colorbar(image, ax=axis, label="score, nats", pad=0.01)
    axes[0].set_title(title)
    axes[-1].set_xlabel("position")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    return picture.getvalue()
