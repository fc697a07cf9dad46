"""scripts/linear_probe.py: its algebra against brute force, its table and its errors."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from scripts.linear_probe import PENALTIES, area, fit_ridge, probe, read_set

from .conftest import Command, assert_one_line_error

RNG = np.random.default_rng(0)


def solve(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)


@pytest.mark.parametrize("shape", [(30, 4), (12, 20)])
def test_the_penalty_minimises_the_leave_one_out_error(shape: tuple[int, int]) -> None:
    x, noise = RNG.normal(size=shape), RNG.normal(size=shape[0])
    x -= x.mean(0)
    y = x[:, 0] + 0.5 * noise
    y -= y.mean()

    def leave_one_out_error(penalty: float) -> float:
        """Mean squared error; the unpenalised intercept is fitted again for each sample left out."""
        errors = []
        for i in range(len(y)):
            others = np.arange(len(y)) != i
            mean, level = x[others].mean(0), y[others].mean()
            weights = solve(x[others] - mean, y[others] - level, penalty)
            errors.append(y[i] - level - (x[i] - mean) @ weights)
        return float(np.mean(np.square(errors)))

    weights, penalty = fit_ridge(x, y)
    assert penalty == min(PENALTIES, key=leave_one_out_error)
    assert np.allclose(weights, solve(x, y, penalty))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_probability_that_a_positive_scores_above_a_negative(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = (np.array(column) for column in zip(*pairs, strict=True))
    if labels.all() or not labels.any():
        return
    expected = mannwhitneyu(scores[labels], scores[~labels]).statistic / (labels.sum() * (~labels).sum())
    found, error = area(scores.astype(float), labels)
    assert found == pytest.approx(expected)
    assert 0 <= error <= 0.5


def test_a_probe_finds_a_real_signal_and_none_in_shuffled_labels() -> None:
    x = RNG.normal(size=(400, 10)) * np.arange(10) + 3  # the first feature is constant
    labels = x[:, 4] + RNG.normal(size=400) > 4
    fit, test = slice(0, 200), slice(200, 400)
    scores, _ = probe(x[fit], labels[fit], x[test])
    assert area(scores, labels[test])[0] > 0.9
    chance, error = area(probe(x[fit], RNG.permutation(labels[fit]), x[test])[0], labels[test])
    assert abs(chance - 0.5) < 4 * error


def write_set(folder: Path, name: str, positive: int, negative: int, pooling: str = "mean") -> list[str]:
    headers = [f"p{i} X OS=Some virus" for i in range(positive)] + [f"n{i} Y OS=A mouse" for i in range(negative)]
    text = "".join(f">{header}\n{'MKW' if 'virus' in header else 'MKV'}{'A' * i}\n" for i, header in enumerate(headers))
    (folder / f"{name}.fasta").write_text(text)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["ids"] = [header.split()[0] for header in headers]
        file["embeddings"] = RNG.normal(size=(len(headers), 3)).astype(np.float32)
        file.attrs["pooling"] = pooling
    return [str(folder / f"{name}.h5"), str(folder / f"{name}.fasta")]


def test_the_command_prints_a_table_or_a_one_line_error(run_python: Command, tmp_path: Path) -> None:
    fit, test = write_set(tmp_path, "fit", 20, 30), write_set(tmp_path, "test", 10, 15)
    command = ["-m", "scripts.linear_probe", "OS=.*virus"]
    process = run_python(*command, "--fit", *fit, "--test", *test)
    assert process.returncode == 0, process.stderr
    assert "fit on 50 proteins (20 positive), tested on 25 (10 positive)" in process.stdout
    rows = [line for line in process.stdout.splitlines() if line.startswith(("| comp", "| emb", "| both"))]
    assert [row.split(" | ")[1] for row in rows] == ["20", "3", "23"]
    assert float(rows[0].split(" | ")[3].split()[0]) > 0.9  # the positive proteins have W where the others have V
    assert_one_line_error(run_python(*command, "--fit", *fit, "--test", test[0], fit[1]), "does not have the 50 ids of")
    no_match = run_python("-m", "scripts.linear_probe", "nothing", "--fit", *fit, "--test", *test)
    assert_one_line_error(no_match, "fit.fasta: 0 of 50 headers match 'nothing'")
    invalid = run_python(*command[:-1], "OS=(virus", "--fit", *fit, "--test", *test)
    assert_one_line_error(invalid, "'OS=(virus' is not a regular expression")
    with pytest.raises(ValueError, match="pooling=per_residue; the probe needs pooling=mean"):
        read_set(*map(Path, write_set(tmp_path, "residues", 3, 3, "per_residue")), "virus")
