from pathlib import Path

import numpy as np
import pytest
import torch

from protlig_dd.diffusion.graphs.rates import SWISS_PROT, read_matrix, substitution_rates
from protlig_dd.diffusion.graphs.substitution import SubstitutionGraph, make_substitution_graph
from protlig_dd.tokenizer import AMINO_ACIDS

from .conftest import raises_value_error


def write_matrix(path: Path, values: np.ndarray, letters: str = AMINO_ACIDS, comment: str = "") -> str:
    lines = [f"# {comment}"] if comment else []
    lines.append("   " + " ".join(letters))
    lines += [f"{letter} " + " ".join(f"{v:.10g}" for v in row) for letter, row in zip(letters, values, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_rates_of_blosum62_give_the_odds_that_its_scores_encode() -> None:
    """Compare the process with the joint distribution of aligned residues that the scores encode."""
    scores, _ = read_matrix("BLOSUM62")
    assert scores[AMINO_ACIDS.index("W"), AMINO_ACIDS.index("W")] == 11
    assert scores[AMINO_ACIDS.index("A"), AMINO_ACIDS.index("S")] == 1
    graph = make_substitution_graph("BLOSUM62")
    pi = graph.pi.numpy()
    # pi is not exactly the background frequencies, because the scores are rounded
    assert np.abs(pi - SWISS_PROT / SWISS_PROT.sum()).max() < 0.01
    # The rates are proportional to P - I, where P_ij = J_ij / pi_i. J is the joint distribution of aligned residues:
    # J_ij / (f_i f_j) = 2^(S_ij / 2) / Z, with the background frequencies f, the scores S and a constant Z.
    p = substitution_rates("BLOSUM62")
    odds = p / pi
    i, j = AMINO_ACIDS.index("L"), AMINO_ACIDS.index("I")
    k, m = AMINO_ACIDS.index("D"), AMINO_ACIDS.index("W")
    f = SWISS_PROT / SWISS_PROT.sum()
    joint_odds = odds * np.outer(pi, pi) / np.outer(f, f)
    assert joint_odds[i, j] / joint_odds[k, m] == pytest.approx(2 ** ((2 - -4) / 2), rel=1e-9)
    assert -0.66 < graph.lambda_2 < -0.63
    assert 10 < graph.sigma_max < 11
    assert float((graph.pi * graph.rates.diag()).sum()) == pytest.approx(-1)
    assert graph.rates.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["BLOSUM45", "BLOSUM80", "BLOSUM90", "PAM30", "PAM70", "PAM250"])
def test_the_units_of_scores_are_read_from_the_matrix(name: str) -> None:
    graph = make_substitution_graph(name)
    assert graph.n_states == 20
    stated_scale = 1 / 2 if name in ("PAM30", "PAM70", "BLOSUM90") else 1 / 3
    assert torch.allclose(graph.rates, make_substitution_graph(name, scale=stated_scale).rates)


@pytest.mark.parametrize(("comment", "scale"), [("in 1/12 Bit Units", 1 / 12), ("scale = ln(2)/10", 1 / 10)])
def test_units_of_several_digits_are_read(tmp_path: Path, comment: str, scale: float) -> None:
    scores, _ = read_matrix("BLOSUM62")
    path = write_matrix(tmp_path / "scores", scores, comment=comment)
    assert np.array_equal(substitution_rates(path), substitution_rates(path, scale=scale))


def test_files_of_scores_and_of_rates_give_the_same_graph(tmp_path: Path) -> None:
    scores, _ = read_matrix("BLOSUM62")
    reversed_letters = AMINO_ACIDS[::-1]
    path = write_matrix(tmp_path / "scores", scores[::-1, ::-1], letters=reversed_letters, comment="in 1/2 Bit Units")
    blosum = make_substitution_graph("BLOSUM62")
    assert torch.allclose(make_substitution_graph(path).rates, blosum.rates)
    rates = write_matrix(tmp_path / "rates", 5 * blosum.rates.numpy())
    assert torch.allclose(make_substitution_graph(rates, kind="rates").rates, blosum.rates, atol=1e-8)


def test_invalid_substitution_matrices_are_rejected(tmp_path: Path) -> None:
    scores, _ = read_matrix("BLOSUM62")
    with raises_value_error(
        "graph.matrix=BLOSUM61 is neither a file nor a Biopython matrix; choose from .*BLOSUM62.*PAM250"
    ):
        substitution_rates("BLOSUM61")
    with raises_value_error("GONNET1992 does not state its units; set graph.scale"):
        substitution_rates("GONNET1992")
    assert make_substitution_graph("GONNET1992", scale=1 / 3).lambda_2 < -0.5
    with raises_value_error("NUC.4.4 has no row for E, F, I, L, P, Q"):
        substitution_rates("NUC.4.4")
    with raises_value_error("graph.kind=odds: choose from log_odds, rates"):
        substitution_rates("BLOSUM62", kind="odds")
    asymmetric = scores.copy()
    asymmetric[0, 1] += 1
    with raises_value_error("must be symmetric, but AC is 1 and CA is 0"):
        substitution_rates(write_matrix(tmp_path / "lopsided", asymmetric, comment="1/2 bit"))
    for text in ("these are\nnot numbers at all\n", ""):
        (tmp_path / "words").write_text(text)
        with raises_value_error("words is not a substitution matrix"):
            substitution_rates(str(tmp_path / "words"))
    with raises_value_error("graph.scale must be above 0, in bits per unit of score, got -1"):
        substitution_rates("BLOSUM62", scale=-1)
    with raises_value_error("graph.rates must have 20 rows, one per amino acid, got 3"):
        make_substitution_graph("mine", rates=[[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


def test_irreversible_rates_are_reported_by_letter(tmp_path: Path) -> None:
    rates = make_substitution_graph("BLOSUM62").rates.numpy().copy()
    rates[0, 19] *= 3
    path = write_matrix(tmp_path / "rates", rates)
    with raises_value_error("not reversible: .* the flux from A to Y is"):
        SubstitutionGraph(substitution_rates(path, kind="rates"))
