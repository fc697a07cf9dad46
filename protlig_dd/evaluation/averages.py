"""Means over proteins, with standard errors."""

import numpy as np


def per_residue(nats: np.ndarray, residues: np.ndarray) -> tuple[float, float]:
    """Total nats / total residues and its standard error over sequences.

    The error is that of a ratio estimator, sqrt( n/(n-1) sum (nats_i - r L_i)^2 ) / sum L; it holds the spread
    between proteins and the Monte-Carlo noise alike. NaN for a single sequence.

    Args:
        nats, residues: (n,) per sequence; nats may be a difference of two models (a paired comparison).
    """
    if len(nats) != len(residues) or not residues.sum():
        raise ValueError(f"cannot average {len(nats)} sequences over {residues.sum()} residues ({len(residues)} rows)")
    ratio = nats.sum() / residues.sum()
    n = len(nats)
    spread = ((nats - ratio * residues) ** 2).sum() * n / (n - 1) if n > 1 else float("nan")
    return float(ratio), float(np.sqrt(spread) / residues.sum())
