"""Statistics that tell generated proteins from natural ones, without a structure: each on lists of id arrays.

A sequence is a uint8 array of residue ids (length,), 0..19 for the amino acids; context letters above are left out.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from protlig_dd.evaluation.averages import per_residue
from protlig_dd.tokenizer import N_STATES

Sequences = Sequence[np.ndarray]

WINDOW, ENTROPY = 12, 2.2  # of SEG (Wootton and Federhen 1993): residues, and bits of a window of low complexity
LONGEST_UNIT, LEAST_COPIES, LEAST_RESIDUES = 10, 3, 6  # of a tandem repeat


class Figure(NamedTuple):
    """A value with what is known of its error; NaN where nothing is."""

    value: float
    error: float = math.nan
    """One standard error."""
    low: float = math.nan
    high: float = math.nan
    """Of a share, the ends of its 95% interval."""


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
) -> Figure:
    """Jensen-Shannon divergence of the pooled k-mer frequencies, nats, and its standard error.

    The error is that of a bootstrap over `sequences`, on the large side where the divergence is mostly noise. Few
    sequences make the divergence larger than it is, by about (20^k - 1) / (8 n) for each of the two sets of n k-mers;
    another set of natural proteins shows by how much.
    """
    from scipy.spatial.distance import jensenshannon  # takes half a second, which most users of this module do not need

    codes, owners = kmers(sequences, k)
    other = np.bincount(kmers(reference, k)[0], minlength=N_STATES**k)
    if not len(codes) or not other.sum():
        return Figure(math.nan)

    def divergence(weights: np.ndarray) -> float:
        counts = np.bincount(codes, weights[owners], minlength=N_STATES**k)
        return float(jensenshannon(counts, other) ** 2) if counts.sum() else float("nan")

    n = len(sequences)
    drawn = [divergence(generator.multinomial(n, np.full(n, 1 / n)).astype(float)) for _ in range(bootstrap)]
    return Figure(divergence(np.ones(n)), float(np.std(drawn, ddof=1)) if min(bootstrap, n) > 1 else math.nan)


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


def share_of_residues(flags: Sequence[np.ndarray]) -> Figure:
    """Share of all residues that are flagged, and its standard error over sequences (a ratio estimator)."""
    hits, lengths = [flag.sum() for flag in flags], [len(flag) for flag in flags]
    return Figure(*per_residue(np.array(hits), np.array(lengths)))


def share(flags: Sequence[float] | np.ndarray) -> Figure:
    """Share of sequences that are flagged, with Wilson's interval, which is right near 0 and 1 too."""
    from scipy.stats import binomtest  # takes a second

    hits, n = round(float(np.sum(flags))), len(flags)
    low, high = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Figure(hits / n, low=float(low), high=float(high))


def unique_share(sequences: Sequences) -> float:
    """How many different sequences there are, as a share of all: a half where each is there twice."""
    return len({sequence.tobytes() for sequence in sequences}) / len(sequences)


def length_distance(sequences: Sequences, reference: Sequences) -> float:
    """Kolmogorov and Smirnov's distance of the two distributions of lengths."""
    from scipy.stats import ks_2samp  # takes a second

    return float(ks_2samp([len(one) for one in sequences], [len(one) for one in reference]).statistic)


def figures(values: Sequence[float]) -> Figure:
    """Mean and its standard error; NaN where there are too few."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    return Figure(mean, float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else math.nan)


def perplexity(values: Sequence[float], lengths: Sequence[int]) -> Figure:
    """The perplexity of a set: e to the mean of -log p over all its residues, not the mean of its perplexities.

    Args:
        values, lengths: of each sequence, its perplexity and how many residues that is over.
    """
    nats, error = per_residue(np.log(values) * lengths, np.array(lengths))
    return Figure(math.exp(nats), math.exp(nats) * error)


SETS = ("samples", "natural", "shuffled")

Rows = dict[str, list[Figure]]
"""By its name, a row's figures of the SETS."""


class Controls(NamedTuple):
    """What samples are judged beside."""

    sets: list[Sequences]
    """The SETS, of one size because divergences and uniqueness depend on it; the natural ones have the lengths of the
    samples, as nearly as there are such."""
    drawn: list[Sequences]
    """The same for judges of lengths, the natural ones drawn at random."""
    reference: Sequences
    """The natural proteins that are not in `sets`, to compare those with."""
    others: Sequences
    """Those that are not in `drawn`."""


def with_controls(samples: Sequences, pool: Sequences, seed: int) -> Controls:
    """Samples beside natural proteins and the same ones shuffled.

    Args:
        samples: generated proteins, at most half as many as `pool` has.
        pool: natural held-out ones.

    Raises:
        ValueError: the pool is smaller.
    """
    n = len(samples)
    if len(pool) < 2 * n:
        raise ValueError(f"{len(pool)} natural proteins; {n} samples need {2 * n}, half of them as reference")
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(pool)).tolist()
    matched = match_lengths([len(one) for one in samples], [len(pool[i]) for i in order], generator)
    chosen = [order[place] for place in matched]
    natural, left = [pool[i] for i in chosen], set(order) - set(chosen)
    mixed, drawn = shuffled(natural, generator), [pool[i] for i in order[:n]]
    return Controls(
        sets=[samples, natural, mixed],
        drawn=[samples, drawn, drawn],
        reference=[pool[i] for i in order if i in left],
        others=[pool[i] for i in order[n:]],
    )


def match_lengths(wanted: Sequence[int], there: Sequence[int], generator: np.random.Generator) -> list[int]:
    """For each wanted length, in random order, the place of the nearest that is left of those there."""
    left = sorted((length, place) for place, length in enumerate(there))
    found = [0] * len(wanted)
    for i in generator.permutation(len(wanted)).tolist():
        after = bisect.bisect_left(left, (wanted[i], 0))
        nearest = min((k for k in (after - 1, after) if 0 <= k < len(left)), key=lambda k: abs(left[k][0] - wanted[i]))
        found[i] = left.pop(nearest)[1]
    return found


Judge = Callable[[Sequences], Figure]


def cheap_judges(controls: Controls, *, bootstrap: int, seed: int) -> dict[str, tuple[Judge, list[Sequences]]]:
    """Every judge that needs nothing but the sequences, and the sets that it is asked about, by the name of its row.

    Args:
        bootstrap: draws for the standard errors of divergences.
    """
    reference = controls.reference

    def quantile(q: float) -> Judge:
        return lambda some: Figure(float(np.quantile([len(one) for one in some], q)))

    def divergence(k: int) -> Judge:
        return lambda some: kmer_divergence(
            some, reference, k, bootstrap=bootstrap, generator=np.random.default_rng([seed, k])
        )

    of_lengths: dict[str, Judge] = {
        "length, lower quartile": quantile(0.25),
        "length, median": quantile(0.5),
        "length, upper quartile": quantile(0.75),
        "length, Kolmogorov-Smirnov distance": lambda some: Figure(length_distance(some, controls.others)),
    }
    others: dict[str, Judge] = {
        "composition, divergence in nats": divergence(1),
        "2-mers, divergence in nats": divergence(2),
        "3-mers, divergence in nats": divergence(3),
        "share of different sequences": lambda some: Figure(unique_share(some)),
        "residues in low complexity": lambda some: share_of_residues([low_complexity(one) for one in some]),
        "residues in tandem repeats": lambda some: share_of_residues([tandem_repeats(one) for one in some]),
    }
    counts: dict[str, Judge] = {
        "proteins": lambda some: Figure(float(len(some))),
        "residues": lambda some: Figure(float(sum(map(len, some)))),
    }
    return {
        **{name: (ask, controls.sets) for name, ask in counts.items()},
        **{name: (ask, controls.drawn) for name, ask in of_lengths.items()},
        **{name: (ask, controls.sets) for name, ask in others.items()},
    }


COLUMNS = tuple(f"{name}{ending}" for name in SETS for ending in ("", "_se", "_low", "_high"))
"""Of a table of figures: the value, its standard error, the ends of a share's 95% interval."""


def for_json(rows: Rows) -> list[dict[str, str | float | None]]:
    """For JSON, which has no NaN: an object for each row."""
    objects = []
    for name, row in rows.items():
        values = [value for figure in row for value in figure]
        known = {key: None if np.isnan(value) else value for key, value in zip(COLUMNS, values, strict=True)}
        objects.append({"name": name, **known})
    return objects


def written(figure: Figure) -> str:
    """A figure as text: to the second digit of its error where it has one, nothing for NaN."""
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
