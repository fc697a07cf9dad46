from pathlib import Path

import numpy as np
import pytest
import torch

from protlig_dd.diffusion.graphs.rates import SWISS_PROT, read_matrix, substitution_rates
from protlig_dd.diffusion.graphs.substitution import SubstitutionGraph, make_substitution_graph
from protlig_dd.tokenizer import AMINO_ACIDS

from .conftest import refuses


def write_matrix(path: Path, values: np.ndarray, letters: str = AMINO_ACIDS, comment: str = "") -> str:
    lines = [f"# {comment}"] if comment else []
    lines.append("   " + " ".join(letters))
    lines += [f"{letter} " + " ".join(f"{v:.10g}" for v in row) for letter, row in zip(letters, values, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_blosum62_by_hand() -> None:
    """The joint distribution of aligned pairs that the scores stand for, and the process that has it."""
    scores, _ = read_matrix("BLOSUM62")
    assert scores[AMINO_ACIDS.index("W"), AMINO_ACIDS.index("W")] == 11
    assert scores[AMINO_ACIDS.index("A"), AMINO_ACIDS.index("S")] == 1
    graph = make_substitution_graph("BLOSUM62")
    pi = graph.pi.numpy()
    assert np.abs(pi - SWISS_PROT / SWISS_PROT.sum()).max() < 0.01  # scores are rounded: nearly the background
    # one unit of P - I in the graph's time reproduces the odds, P_ij / pi_j = 2^(S_ij / 2) / Z
    p = substitution_rates("BLOSUM62")
    odds = p / pi
    i, j = AMINO_ACIDS.index("L"), AMINO_ACIDS.index("I")
    k, m = AMINO_ACIDS.index("D"), AMINO_ACIDS.index("W")
    f = SWISS_PROT / SWISS_PROT.sum()
    share = odds * np.outer(pi, pi) / np.outer(f, f)
    assert share[i, j] / share[k, m] == pytest.approx(2 ** ((2 - -4) / 2), rel=1e-9)
    assert -0.66 < graph.lambda_2 < -0.63
    assert 10 < graph.sigma_max < 11
    assert float((graph.pi * graph.rates.diag()).sum()) == pytest.approx(-1)
    assert graph.rates.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["BLOSUM45", "BLOSUM80", "BLOSUM90", "PAM30", "PAM70", "PAM250"])
def test_the_units_are_read_from_the_matrix(name: str) -> None:
    graph = make_substitution_graph(name)
    assert graph.n_states == 20
    other = 1 / 2 if name in ("PAM30", "PAM70", "BLOSUM90") else 1 / 3
    assert torch.allclose(graph.rates, make_substitution_graph(name, scale=other).rates)


@pytest.mark.parametrize(("comment", "scale"), [("in 1/12 Bit Units", 1 / 12), ("scale = ln(2)/10", 1 / 10)])
def test_units_of_several_digits_are_read(tmp_path: Path, comment: str, scale: float) -> None:
    scores, _ = read_matrix("BLOSUM62")
    path = write_matrix(tmp_path / "scores", scores, comment=comment)
    assert np.array_equal(substitution_rates(path), substitution_rates(path, scale=scale))


def test_files_of_scores_and_of_rates(tmp_path: Path) -> None:
    scores, _ = read_matrix("BLOSUM62")
    turned = AMINO_ACIDS[::-1]
    path = write_matrix(tmp_path / "scores", scores[::-1, ::-1], letters=turned, comment="in 1/2 Bit Units")
    blosum = make_substitution_graph("BLOSUM62")
    assert torch.allclose(make_substitution_graph(path).rates, blosum.rates)
    rates = write_matrix(tmp_path / "rates", 5 * blosum.rates.numpy())
    assert torch.allclose(make_substitution_graph(rates, kind="rates").rates, blosum.rates, atol=1e-8)


def test_what_is_no_substitution_matrix_is_refused(tmp_path: Path) -> None:
    scores, _ = read_matrix("BLOSUM62")
    with refuses("graph.matrix=BLOSUM61 is no file and no matrix of Biopython's; .*BLOSUM62.*PAM250"):
        substitution_rates("BLOSUM61")
    with refuses("GONNET1992 does not state its units; give graph.scale"):
        substitution_rates("GONNET1992")
    assert make_substitution_graph("GONNET1992", scale=1 / 3).lambda_2 < -0.5
    with refuses("NUC.4.4 has no row for E, F, I, L, P, Q"):
        substitution_rates("NUC.4.4")
    with refuses("graph.kind=odds: there are log_odds, rates"):
        substitution_rates("BLOSUM62", kind="odds")
    lopsided = scores.copy()
    lopsided[0, 1] += 1
    with refuses("must be symmetric, but AC is 1 and CA is 0"):
        substitution_rates(write_matrix(tmp_path / "lopsided", lopsided, comment="1/2 bit"))
    for text in ("these are\nnot numbers at all\n", ""):
        (tmp_path / "words").write_text(text)
        with refuses("words is not a substitution matrix"):
            substitution_rates(str(tmp_path / "words"))
    with refuses("graph.scale must be above 0, in bits per unit of score, got -1"):
        substitution_rates("BLOSUM62", scale=-1)
    with refuses("graph.rates has 3 states; there are 20 amino acids"):
        make_substitution_graph("mine", rates=[[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


def test_rates_of_a_file_that_do_not_balance_are_named_by_letter(tmp_path: Path) -> None:
    rates = make_substitution_graph("BLOSUM62").rates.numpy().copy()
    rates[0, 19] *= 3
    path = write_matrix(tmp_path / "rates", rates)
    with refuses("not reversible: .* flows from A to Y"):
        SubstitutionGraph(substitution_rates(path, kind="rates"))
