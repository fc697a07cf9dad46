"""Statistics that tell generated proteins from natural ones, without a structure: each on lists of id arrays.

A sequence is a uint8 array of residue ids (length,), 0..19 for the amino acids; context letters above are left out.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from protlig_dd.tokenizer import N_STATES

Sequences = Sequence[np.ndarray]

WINDOW, ENTROPY = 12, 2.2  # of SEG (Wootton and Federhen 1993): residues, and bits of a window of low complexity
LONGEST_UNIT, LEAST_COPIES, LEAST_RESIDUES = 10, 3, 6  # of a tandem repeat


def shuffled(sequences: Sequences, generator: np.random.Generator) -> list[np.ndarray]:
    """The same residues of each sequence in random order: composition and length stay, all else goes."""
    return [generator.permutation(sequence) for sequence in sequences]


def kmers(sequences: Sequences, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every k-mer of amino acids as a number below 20^k, and which sequence it is in; both (k-mers,)."""
    codes, owners = [], []
    for i, sequence in enumerate(sequences):
        if len(sequence) < k:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(sequence.astype(np.int64), k)
        windows = windows[(windows < N_STATES).all(1)]
        codes.append(windows @ N_STATES ** np.arange(k - 1, -1, -1))
        owners.append(np.full(len(windows), i))
    if not codes:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(codes), np.concatenate(owners)


def kmer_divergence(
    sequences: Sequences, reference: Sequences, k: int, *, bootstrap: int, generator: np.random.Generator
) -> tuple[float, float]:
    """Jensen-Shannon divergence of the pooled k-mer frequencies, nats, and its standard error.

    The error is that of a bootstrap over `sequences`, on the large side where the divergence is mostly noise. Few
    sequences make the divergence larger than it is, by about (20^k - 1) / (8 n) for each of the two sets of n k-mers;
    another set of natural proteins shows by how much.
    """
    from scipy.spatial.distance import jensenshannon  # takes half a second, which most users of this module do not need

    codes, owners = kmers(sequences, k)
    other = np.bincount(kmers(reference, k)[0], minlength=N_STATES**k)
    if not len(codes) or not other.sum():
        return float("nan"), float("nan")

    def divergence(weights: np.ndarray) -> float:
        counts = np.bincount(codes, weights[owners], minlength=N_STATES**k)
        return float(jensenshannon(counts, other) ** 2) if counts.sum() else float("nan")

    n = len(sequences)
    drawn = [divergence(generator.multinomial(n, np.full(n, 1 / n)).astype(float)) for _ in range(bootstrap)]
    return divergence(np.ones(n)), float(np.std(drawn, ddof=1)) if bootstrap > 1 else float("nan")


def low_complexity(sequence: np.ndarray) -> np.ndarray:
    """(length,) bool: residues in some window of WINDOW amino acids whose composition has at most ENTROPY bits."""
    inside = np.zeros(len(sequence), bool)
    if len(sequence) < WINDOW:
        return inside
    counts = np.zeros((len(sequence) + 1, int(sequence.max()) + 1))
    counts[np.arange(1, len(sequence) + 1), sequence] = 1
    counts = counts.cumsum(0)
    shares = (counts[WINDOW:] - counts[:-WINDOW]) / WINDOW
    entropy = -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(1)
    amino_acids = shares[:, :N_STATES].sum(1) > 1 - 1e-9
    for start in np.flatnonzero((entropy <= ENTROPY + 1e-9) & amino_acids):
        inside[start : start + WINDOW] = True
    return inside


def tandem_repeats(sequence: np.ndarray) -> np.ndarray:
    """(length,) bool: residues in a unit of 1 to 10 residues that stands at least three times in a row, 6 in all."""
    inside = np.zeros(len(sequence), bool)
    for unit in range(1, min(LONGEST_UNIT, len(sequence) - 1) + 1):
        again = (sequence[unit:] == sequence[:-unit]) & (sequence[unit:] < N_STATES)
        same = np.concatenate([[False], again, [False]])
        edges = np.flatnonzero(np.diff(same))
        for first, last in zip(edges[::2], edges[1::2], strict=True):  # residues first .. last + unit - 1 repeat
            if last - first + unit >= max(LEAST_COPIES * unit, LEAST_RESIDUES):
                inside[first : last + unit] = True
    return inside


def share_of_residues(flags: Sequence[np.ndarray]) -> tuple[float, float]:
    """Share of all residues that are flagged, and its standard error over sequences (a ratio estimator)."""
    hits = np.array([flag.sum() for flag in flags], float)
    lengths = np.array([len(flag) for flag in flags], float)
    ratio, n = hits.sum() / lengths.sum(), len(flags)
    spread = ((hits - ratio * lengths) ** 2).sum() * n / (n - 1) if n > 1 else float("nan")
    return float(ratio), float(np.sqrt(spread) / lengths.sum())


def share(flags: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Share of sequences that are flagged, and its binomial standard error."""
    p, n = float(np.mean(flags)), len(flags)
    return p, float(np.sqrt(p * (1 - p) / n))


def unique_share(sequences: Sequences) -> float:
    """How many different sequences there are, as a share."""
    return len({sequence.tobytes() for sequence in sequences}) / len(sequences)


def length_distance(sequences: Sequences, reference: Sequences) -> float:
    """Kolmogorov and Smirnov's distance of the two distributions of lengths."""
    from scipy.stats import ks_2samp  # takes a second

    return float(ks_2samp([len(one) for one in sequences], [len(one) for one in reference]).statistic)


def figures(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN where there are too few."""
    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    return mean, float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


Figure = tuple[float, float]
"""With its standard error, which is NaN where there is none."""

SETS = ("samples", "natural", "shuffled")

Rows = dict[str, list[Figure]]
"""By its name, a row's figures of the SETS."""


def with_controls(samples: Sequences, pool: Sequences, seed: int) -> tuple[list[Sequences], Sequences]:
    """The SETS, of one size because divergences and uniqueness depend on it, and a reference to compare them with.

    Args:
        samples: generated proteins, at most half as many as `pool` has.
        pool: natural held-out ones, which are cut to the length of the longest sample.

    Raises:
        ValueError: the pool is smaller.
    """
    n = len(samples)
    if len(pool) < 2 * n:
        raise ValueError(f"{len(pool)} natural proteins; {n} samples need {2 * n}, half of them as reference")
    generator = np.random.default_rng([seed, 1])
    longest = max(map(len, samples))
    drawn = [pool[i][:longest] for i in generator.permutation(len(pool))]
    return [samples, drawn[:n], shuffled(drawn[:n], generator)], drawn[n:]


def cheap_judges(reference: Sequences, *, bootstrap: int, seed: int) -> dict[str, Callable[[Sequences], Figure]]:
    """Every judge that needs nothing but the sequences, by the name of its row.

    Args:
        reference: natural proteins that are in no set that is judged, which divergences and distances are taken to.
        bootstrap: draws for the standard errors of divergences.
    """
    nan = float("nan")

    def quantile(q: float) -> Callable[[Sequences], Figure]:
        return lambda some: (float(np.quantile([len(one) for one in some], q)), nan)

    def divergence(k: int) -> Callable[[Sequences], Figure]:
        return lambda some: kmer_divergence(
            some, reference, k, bootstrap=bootstrap, generator=np.random.default_rng([seed, k])
        )

    return {
        "proteins": lambda some: (float(len(some)), nan),
        "residues": lambda some: (float(sum(map(len, some))), nan),
        "length, lower quartile": quantile(0.25),
        "length, median": quantile(0.5),
        "length, upper quartile": quantile(0.75),
        "length, Kolmogorov-Smirnov distance": lambda some: (length_distance(some, reference), nan),
        "composition, divergence in nats": divergence(1),
        "2-mers, divergence in nats": divergence(2),
        "3-mers, divergence in nats": divergence(3),
        "different sequences": lambda some: (unique_share(some), nan),
        "residues in low complexity": lambda some: share_of_residues([low_complexity(one) for one in some]),
        "residues in tandem repeats": lambda some: share_of_residues([tandem_repeats(one) for one in some]),
    }


def for_json(rows: Rows) -> list[dict[str, str | float | None]]:
    """For JSON, which has no NaN: an object for each row."""
    objects = []
    for name, row in rows.items():
        found: dict[str, str | float | None] = {"name": name}
        for column, figure in zip(SETS, row, strict=True):
            for key, value in zip((column, f"{column}_se"), figure, strict=True):
                found[key] = None if np.isnan(value) else value
        objects.append(found)
    return objects


def written(value: float, error: float) -> str:
    """A figure as text: to the second digit of its standard error where it has one, nothing for NaN."""
    if math.isnan(value):
        return ""
    if math.isnan(error):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 0 if value.is_integer() else 4
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
