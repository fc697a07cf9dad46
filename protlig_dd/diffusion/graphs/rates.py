"""Rates of the substitution graph between the 20 amino acids, computed from substitution matrices."""

import io
import math
import re
from pathlib import Path

import numpy as np

from protlig_dd.tokenizer import AMINO_ACIDS

KINDS = ("log_odds", "rates")

# Background frequencies: amino-acid composition of UniProtKB/Swiss-Prot in percent, in the order of AMINO_ACIDS.
# Source: the statistics of Swiss-Prot's 2023 releases (https://web.expasy.org/docs/relnotes/relstat.html).
SWISS_PROT = np.array(
    [
        [8.25, 1.38, 5.46, 6.71, 3.86, 7.07, 2.27, 5.91, 5.80, 9.64],
        [2.41, 4.06, 4.74, 3.93, 5.52, 6.65, 5.36, 6.86, 1.10, 2.92],
    ]
).ravel()


def substitution_rates(matrix: str, kind: str = "log_odds", scale: float | None = None) -> np.ndarray:
    """Return the rates Q[i, j] (i -> j) of a substitution matrix.

    Log-odds scores S and the background frequencies f of Swiss-Prot give the joint distribution J, with J_ij
    proportional to f_i f_j 2^(scale S_ij). Its marginals pi give the conditional distribution P_ij = J_ij / pi_i. Q is
    proportional to P - I. Q is reversible, because S and therefore J are symmetric. The diagonal and the overall
    factor of the result have no meaning: `SubstitutionGraph` sets the diagonal and scales the rates.

    Args:
        matrix: the name of a Biopython matrix (BLOSUM62, PAM250, ...), or a file in NCBI's format: a line of column
            letters, then one line per row; `#` starts a comment.
        kind: `log_odds` for scores, or `rates` for a rate matrix.
        scale: bits per unit of score. None: read it from the comments in the matrix ("1/2 Bit", "scale = ln(2)/3").

    Returns:
        (20, 20) float64 in the order of AMINO_ACIDS; the off-diagonal entries are the rates.

    Raises:
        ValueError: an unknown kind or matrix, an invalid file, missing letters, asymmetric scores, or a scale that is
            missing or not above 0.
    """
    if kind not in KINDS:
        raise ValueError(f"graph.kind={kind}: choose from {', '.join(KINDS)}")
    values, comments = read_matrix(matrix)
    if kind == "rates":
        return values
    asymmetry = np.abs(values - values.T)
    if asymmetry.max() > 0:
        i, j = np.unravel_index(asymmetry.argmax(), asymmetry.shape)
        raise ValueError(
            f"{matrix}: log-odds scores must be symmetric, but {AMINO_ACIDS[i]}{AMINO_ACIDS[j]} is {values[i, j]:g} "
            f"and {AMINO_ACIDS[j]}{AMINO_ACIDS[i]} is {values[j, i]:g}"
        )
    if scale is None:
        stated = re.search(r"1/(\d+) bit|ln\(2\)/(\d+)", comments, flags=re.IGNORECASE)
        if stated is None:
            raise ValueError(f"{matrix} does not state its units; set graph.scale, in bits per unit of score")
        scale = 1 / int(stated.group(1) or stated.group(2))
    if not 0 < scale < math.inf:
        raise ValueError(f"graph.scale must be above 0, in bits per unit of score, got {scale}")
    frequencies = SWISS_PROT / SWISS_PROT.sum()
    joint = np.outer(frequencies, frequencies) * 2.0 ** (scale * values)
    joint /= joint.sum()
    return joint / joint.sum(1, keepdims=True)


def read_matrix(matrix: str) -> tuple[np.ndarray, str]:
    """Return a (20, 20) matrix in the order of AMINO_ACIDS, and the comments of its file."""
    from Bio.Align import substitution_matrices  # imported here because exported models run without Biopython

    path = Path(matrix)
    try:
        if path.is_file():
            table = substitution_matrices.read(io.StringIO(path.read_text(encoding="utf-8-sig")))
        else:
            table = substitution_matrices.load(matrix)
    except UnicodeDecodeError as error:
        raise ValueError(f"{matrix} is not text in UTF-8: {error.reason}") from error
    except FileNotFoundError as error:
        known = ", ".join(
            name
            for name in substitution_matrices.load()
            if set(AMINO_ACIDS) <= set(substitution_matrices.load(name).alphabet)
        )
        raise ValueError(
            f"graph.matrix={matrix} is neither a file nor a Biopython matrix; choose from {known}"
        ) from error
    # Biopython raises UnboundLocalError for an empty file
    except (ValueError, IndexError, KeyError, AssertionError, UnboundLocalError) as error:
        raise ValueError(
            f"{matrix} is not a substitution matrix: expected a line of column letters, then one line per row"
        ) from error
    if missing := [letter for letter in AMINO_ACIDS if letter not in table.alphabet]:
        raise ValueError(f"{matrix} has no row for {', '.join(missing)}")
    order = [table.alphabet.index(letter) for letter in AMINO_ACIDS]
    return np.asarray(table, dtype=np.float64)[np.ix_(order, order)], "\n".join(table.header)
