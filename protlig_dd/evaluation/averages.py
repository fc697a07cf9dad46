"""Means over proteins, with standard errors."""

import numpy as np


def per_residue(nats: np.ndarray, residues: np.ndarray) -> tuple[float, float]:
    """Return r = total nats / total residues, and the standard error of r over sequences.

    r is a ratio estimator. For n sequences with nats_i and lengths L_i, its standard error is
    sqrt( n/(n-1) sum (nats_i - r L_i)^2 ) / sum L_i. This error includes both the variation between proteins and the
    Monte Carlo noise. It is NaN for a single sequence.

    Args:
        nats: (n,) nats per sequence, or the difference of two models' nats for each sequence (a paired comparison).
        residues: (n,) length of each sequence in residues.
    """
    if len(nats) != len(residues) or not residues.sum():
        raise ValueError(f"cannot average {len(nats)} values over {len(residues)} lengths with sum {residues.sum()}")
    ratio = nats.sum() / residues.sum()
    n = len(nats)
    variance = ((nats - ratio * residues) ** 2).sum() * n / (n - 1) if n > 1 else float("nan")
    return float(ratio), float(np.sqrt(variance) / residues.sum())
