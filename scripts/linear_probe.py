"""Predict a property of proteins from their embeddings and from their amino-acid composition, with a linear model.

    python -m protlig_dd.embed from=runs/demo input=fit.fasta output=fit.h5
    python -m protlig_dd.embed from=runs/demo input=test.fasta output=test.h5
    python -m scripts.linear_probe 'OS=.*virus' --fit fit.h5 fit.fasta --test test.h5 test.fasta

Proteins whose FASTA header matches the pattern are positive. The model is ridge regression on the labels -1 and +1. The
features are standardised with the mean and the standard deviation of the fit set. The penalty has the smallest
leave-one-out error on the fit set. Prints a Markdown table with the area under the ROC curve on the test set and its
standard error (Hanley and McNeil, Radiology 143:29, 1982).
"""

import argparse
import re
import sys
from pathlib import Path

import h5py
import numpy as np

from protlig_dd.data.fasta import read_fasta
from protlig_dd.tokenizer import AMINO_ACIDS

PENALTIES = 10.0 ** np.arange(-2, 6)


def read_set(embeddings: Path, fasta: Path, pattern: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return features {name: (n, d)} and labels (n,) of the proteins of a FASTA file.

    Raises:
        ValueError: the embeddings are not those of these proteins, or have one row per residue; the pattern is invalid;
            all labels are equal.
    """
    records = list(read_fasta(fasta))
    with h5py.File(embeddings) as file:
        ids, pooling = file["ids"].asstr()[:].tolist(), file.attrs["pooling"]
        embedded = file["embeddings"][:]
    if pooling != "mean":
        raise ValueError(f"{embeddings} has pooling={pooling}; the probe needs pooling=mean")
    if ids != [record.id for record in records]:
        raise ValueError(f"{embeddings} does not have the {len(records)} ids of {fasta}, in the same order")
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    labels = np.array([regex.search(record.description) is not None for record in records])
    if labels.all() or not labels.any():
        raise ValueError(
            f"{fasta}: {labels.sum()} of {len(labels)} headers match {pattern!r}; the probe needs both kinds"
        )
    composition = np.array([[record.sequence.upper().count(letter) for letter in AMINO_ACIDS] for record in records])
    composition = composition / composition.sum(1, keepdims=True)
    features = {"composition": composition, "embedding": embedded, "both": np.hstack([composition, embedded])}
    return features, labels


def fit_ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the ridge weights (d,) and the penalty with the smallest leave-one-out squared error.

    With x = U S V^T the fitted values are U S^2/(S^2 + penalty) U^T y. The leave-one-out error of sample i is its
    residual / (1 - h_i), where h_i is its leverage (Golub, Heath and Wahba, Technometrics 21:215, 1979).

    Args:
        x, y: features (n, d) and labels (n,); the mean of each column of x and of y is zero.
    """
    u, s, vt = np.linalg.svd(x, full_matrices=False)

    def leave_one_out_error(penalty: float) -> float:
        shrunk = u * (s**2 / (s**2 + penalty))
        leverage = (shrunk * u).sum(1) + 1 / len(y)  # 1 / n is the leverage of the mean of y (intercept)
        return float((((y - shrunk @ (u.T @ y)) / (1 - leverage)) ** 2).mean())

    penalty = min(PENALTIES, key=leave_one_out_error)
    return vt.T @ (s / (s**2 + penalty) * (u.T @ y)), float(penalty)


def area(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve and its standard error."""
    positive, negative = scores[labels], scores[~labels]
    a = float(np.mean(np.sign(positive[:, None] - negative) + 1) / 2)
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    variance = a * (1 - a) + (len(positive) - 1) * (q1 - a**2) + (len(negative) - 1) * (q2 - a**2)
    return a, float(np.sqrt(variance / (len(positive) * len(negative))))


def probe(fit: np.ndarray, fit_labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit ridge regression to the fit set. Return the scores (n,) of the test set and the chosen penalty."""
    mean, scale = fit.mean(0), fit.std(0)
    scale = np.where(scale > 0, scale, 1)
    y = np.where(fit_labels, 1.0, -1.0)
    weights, penalty = fit_ridge((fit - mean) / scale, y - y.mean())
    return (test - mean) / scale @ weights, penalty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", help="regular expression for the headers of positive proteins")
    for name in ("fit", "test"):
        parser.add_argument(f"--{name}", nargs=2, type=Path, required=True, metavar=("EMBEDDINGS", "FASTA"))
    options = parser.parse_args()
    try:
        (fit, fit_labels), (test, test_labels) = (
            read_set(*paths, options.pattern) for paths in (options.fit, options.test)
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.pattern!r}: fit on {len(fit_labels)} proteins ({fit_labels.sum()} positive), ", end="")
    print(f"tested on {len(test_labels)} ({test_labels.sum()} positive)\n")
    print("| features | dimension | penalty | test AUC |\n| --- | --: | --: | --- |")
    for name, x in fit.items():
        scores, penalty = probe(x, fit_labels, test[name])
        auc, error = area(scores, test_labels)
        print(f"| {name} | {x.shape[1]} | {penalty:g} | {auc:.3f} ± {error:.3f} |")


if __name__ == "__main__":
    main()
