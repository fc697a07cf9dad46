"""Sequence statistics that distinguish generated proteins from natural ones.

A sequence is a (length,) uint8 array of ids: 0..19 are the amino acids, higher ids are the context letters XBZJUO. No
k-mer, low-complexity window or tandem repeat contains a context letter.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from protlig_dd.evaluation.averages import per_residue
from protlig_dd.tokenizer import N_STATES

Sequences = Sequence[np.ndarray]

# low-complexity window: number of residues, maximum entropy in bits; as in SEG (Wootton and Federhen 1993)
WINDOW, MAX_ENTROPY = 12, 2.2
# tandem repeat: maximum number of residues per unit, minimum number of copies, minimum number of residues in all
MAX_UNIT, MIN_COPIES, MIN_RESIDUES = 10, 3, 6


class Figure(NamedTuple):
    """A value with a standard error or a confidence interval. Unknown fields are NaN."""

    value: float
    error: float = math.nan
    """One standard error."""
    low: float = math.nan
    high: float = math.nan
    """Ends of the 95% interval, for a fraction of proteins."""


def shuffled(sequences: Sequences, generator: np.random.Generator) -> list[np.ndarray]:
    """Shuffle the residues within each sequence, which keeps only its composition and length."""
    return [generator.permutation(sequence) for sequence in sequences]


def kmers(sequences: Sequences, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the code (0 to 20^k - 1) of every k-mer of amino acids, and the index of the sequence that contains it.

    Both are arrays (k-mers,).
    """
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
) -> Figure:
    """Return the Jensen-Shannon divergence between the k-mer frequencies of two sets in nats, with its standard error.

    The frequencies are pooled over the sequences of each set. The error comes from a bootstrap over `sequences`. This
    error is too large if the divergence is mostly noise. A set with n k-mers biases the divergence upwards by about
    (20^k - 1) / (8 n), and the biases of the two sets add up. To see how large this bias is, compute the divergence of
    another set of natural proteins.

    Args:
        bootstrap: number of bootstrap draws.
    """
    from scipy.spatial.distance import jensenshannon  # imported here, as it takes half a second

    codes, owners = kmers(sequences, k)
    other = np.bincount(kmers(reference, k)[0], minlength=N_STATES**k)
    if not len(codes) or not other.sum():
        return Figure(math.nan)

    def divergence(weights: np.ndarray) -> float:
        counts = np.bincount(codes, weights[owners], minlength=N_STATES**k)
        return float(jensenshannon(counts, other) ** 2) if counts.sum() else float("nan")

    n = len(sequences)
    resampled = [divergence(generator.multinomial(n, np.full(n, 1 / n)).astype(float)) for _ in range(bootstrap)]
    return Figure(divergence(np.ones(n)), float(np.std(resampled, ddof=1)) if min(bootstrap, n) > 1 else math.nan)


def low_complexity(sequence: np.ndarray) -> np.ndarray:
    """Return (length,) bool: True for residues in low-complexity windows.

    A low-complexity window consists of WINDOW amino acids whose composition has an entropy of at most MAX_ENTROPY bits.
    """
    inside = np.zeros(len(sequence), bool)
    if len(sequence) < WINDOW:
        return inside
    counts = np.zeros((len(sequence) + 1, int(sequence.max()) + 1))
    counts[np.arange(1, len(sequence) + 1), sequence] = 1
    counts = counts.cumsum(0)
    frequencies = (counts[WINDOW:] - counts[:-WINDOW]) / WINDOW
    log2 = np.log2(frequencies, where=frequencies > 0, out=np.zeros_like(frequencies))
    entropy = -(frequencies * log2).sum(1)
    amino_acids_only = frequencies[:, :N_STATES].sum(1) > 1 - 1e-9
    for start in np.flatnonzero((entropy <= MAX_ENTROPY + 1e-9) & amino_acids_only):
        inside[start : start + WINDOW] = True
    return inside


def tandem_repeats(sequence: np.ndarray) -> np.ndarray:
    """Return (length,) bool: True for residues in tandem repeats.

    A tandem repeat is a unit of 1 to 10 residues, repeated at least 3 times in a row, with at least 6 residues in all.
    """
    inside = np.zeros(len(sequence), bool)
    for unit in range(1, min(MAX_UNIT, len(sequence) - 1) + 1):
        repeats = (sequence[unit:] == sequence[:-unit]) & (sequence[unit:] < N_STATES)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], repeats, [False]])))
        for first, last in zip(edges[::2], edges[1::2], strict=True):  # repeat: first .. last + unit - 1
            if last - first + unit >= max(MIN_COPIES * unit, MIN_RESIDUES):
                inside[first : last + unit] = True
    return inside


def share_of_residues(flags: Sequence[np.ndarray]) -> Figure:
    """Return the fraction of all residues that are flagged, with its standard error over sequences (`per_residue`)."""
    hits, lengths = [flag.sum() for flag in flags], [len(flag) for flag in flags]
    return Figure(*per_residue(np.array(hits), np.array(lengths)))


def share(flags: Sequence[float] | np.ndarray) -> Figure:
    """Return the fraction of sequences that are flagged, with Wilson's 95% interval (valid near 0 and 1 too)."""
    from scipy.stats import binomtest  # imported here, as it takes a second

    hits, n = round(float(np.sum(flags))), len(flags)
    low, high = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Figure(hits / n, low=float(low), high=float(high))


def unique_share(sequences: Sequences) -> float:
    """Return the number of different sequences divided by the number of sequences: 0.5 if each occurs twice."""
    return len({sequence.tobytes() for sequence in sequences}) / len(sequences)


def length_distance(sequences: Sequences, reference: Sequences) -> float:
    """Return the Kolmogorov-Smirnov distance of the two length distributions."""
    from scipy.stats import ks_2samp  # imported here, as it takes a second

    return float(ks_2samp([len(ids) for ids in sequences], [len(ids) for ids in reference]).statistic)


def mean_figure(values: Sequence[float]) -> Figure:
    """Return the mean and its standard error; NaN if there are too few values."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    return Figure(mean, float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else math.nan)


def perplexity(values: Sequence[float], lengths: Sequence[int]) -> Figure:
    """Return the perplexity of a set of sequences, with its standard error.

    The perplexity is exp of the mean of -log p over all residues of the set. It is not the mean of the sequences'
    perplexities.

    Args:
        values: perplexity of each sequence.
        lengths: number of residues of each sequence.
    """
    nats, error = per_residue(np.log(values) * lengths, np.array(lengths))
    return Figure(math.exp(nats), math.exp(nats) * error)


SETS = ("samples", "natural", "shuffled")

Rows = dict[str, list[Figure]]
"""{name of a row: a Figure for each of the SETS}."""


class Controls(NamedTuple):
    """Samples, and the natural and shuffled proteins that they are compared with."""

    sets: list[Sequences]
    """The SETS, each with the same number of proteins, because divergences and uniqueness depend on this number. The
    natural proteins match the lengths of the samples as closely as possible."""
    length_sets: list[Sequences]
    """The SETS for the rows about lengths. Here the natural proteins are drawn at random, so their lengths do not match
    those of the samples. They also stand for the shuffled proteins, because shuffling keeps lengths."""
    reference: Sequences
    """The natural proteins that are not in `sets`. Divergences are between one of the SETS and these proteins."""
    length_reference: Sequences
    """The natural proteins that are not in `length_sets`."""


def with_controls(samples: Sequences, pool: Sequences, seed: int) -> Controls:
    """Choose the natural proteins with which the samples are compared, and shuffle a copy of them.

    Args:
        samples: generated proteins.
        pool: natural held-out proteins, at least twice as many as samples.

    Raises:
        ValueError: the pool is too small.
    """
    n = len(samples)
    if len(pool) < 2 * n:
        raise ValueError(
            f"{len(pool)} natural proteins are too few: {n} samples need {2 * n}, of which {n} are compared with the "
            f"samples and {n} are the reference"
        )
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(pool)).tolist()
    matched = match_lengths([len(ids) for ids in samples], [len(pool[i]) for i in order], generator)
    chosen = [order[index] for index in matched]
    natural, remaining = [pool[i] for i in chosen], set(order) - set(chosen)
    mixed, drawn = shuffled(natural, generator), [pool[i] for i in order[:n]]
    return Controls(
        sets=[samples, natural, mixed],
        length_sets=[samples, drawn, drawn],
        reference=[pool[i] for i in order if i in remaining],
        length_reference=[pool[i] for i in order[n:]],
    )


def match_lengths(wanted: Sequence[int], available: Sequence[int], generator: np.random.Generator) -> list[int]:
    """Return the index of an available length for each wanted length.

    The wanted lengths are processed in random order. Each gets the nearest available length that is not taken yet.
    """
    left = sorted((length, index) for index, length in enumerate(available))
    matched = [0] * len(wanted)
    for i in generator.permutation(len(wanted)).tolist():
        after = bisect.bisect_left(left, (wanted[i], 0))
        nearest = min((k for k in (after - 1, after) if 0 <= k < len(left)), key=lambda k: abs(left[k][0] - wanted[i]))
        matched[i] = left.pop(nearest)[1]
    return matched


Judge = Callable[[Sequences], Figure]
"""A statistic: proteins of a set -> Figure of the set."""


def cheap_judges(controls: Controls, *, bootstrap: int, seed: int) -> dict[str, tuple[Judge, list[Sequences]]]:
    """Return {row name: (judge, the sets to judge)} for the judges that need no other programs or models.

    Args:
        bootstrap: number of bootstrap draws for the standard errors of divergences.
    """
    reference = controls.reference

    def quantile(q: float) -> Judge:
        return lambda proteins: Figure(float(np.quantile([len(ids) for ids in proteins], q)))

    def divergence(k: int) -> Judge:
        return lambda proteins: kmer_divergence(
            proteins, reference, k, bootstrap=bootstrap, generator=np.random.default_rng([seed, k])
        )

    of_lengths: dict[str, Judge] = {
        "length, lower quartile": quantile(0.25),
        "length, median": quantile(0.5),
        "length, upper quartile": quantile(0.75),
        "length, Kolmogorov-Smirnov distance": lambda proteins: Figure(
            length_distance(proteins, controls.length_reference)
        ),
    }
    others: dict[str, Judge] = {
        "composition, divergence in nats": divergence(1),
        "2-mers, divergence in nats": divergence(2),
        "3-mers, divergence in nats": divergence(3),
        "share of different sequences": lambda proteins: Figure(unique_share(proteins)),
        "residues in low complexity": lambda proteins: share_of_residues([low_complexity(ids) for ids in proteins]),
        "residues in tandem repeats": lambda proteins: share_of_residues([tandem_repeats(ids) for ids in proteins]),
    }
    counts: dict[str, Judge] = {
        "proteins": lambda proteins: Figure(float(len(proteins))),
        "residues": lambda proteins: Figure(float(sum(map(len, proteins)))),
    }
    return {
        **{name: (judge, controls.sets) for name, judge in counts.items()},
        **{name: (judge, controls.length_sets) for name, judge in of_lengths.items()},
        **{name: (judge, controls.sets) for name, judge in others.items()},
    }


COLUMNS = tuple(f"{name}{ending}" for name in SETS for ending in ("", "_se", "_low", "_high"))
"""Columns of judges.csv and judges.json: value, standard error and 95% interval for each of the SETS."""


def for_json(rows: Rows) -> list[dict[str, str | float | None]]:
    """Return the rows as JSON objects, with null for NaN."""
    objects = []
    for name, row in rows.items():
        values = [value for figure in row for value in figure]
        cells = {key: None if np.isnan(value) else value for key, value in zip(COLUMNS, values, strict=True)}
        objects.append({"name": name, **cells})
    return objects


def format_figure(figure: Figure) -> str:
    """Format a figure; NaN gives an empty string.

    The value is rounded to the second significant digit of its standard error, or of a quarter of the interval width.
    """
    value, error, low, high = figure
    if math.isnan(value):
        return ""
    if not math.isnan(low):
        decimals = max(0, 1 - math.floor(math.log10((high - low) / 4)))
        return f"{value:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"
    if math.isnan(error):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error))) if error else 0 if value.is_integer() else 4
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
