"""Verdicts on the comparison of samples with natural proteins: one sentence with advice for each group of statistics.

The comparison is a table, which `judge` and the report of a run contain. Each row of the table has one statistic: its
value for the samples, for natural proteins and for shuffled proteins. The difference of a row is the value of the
samples minus the value of the natural proteins, with a 95% interval. The limit of a row is the absolute difference
between the values of the shuffled and the natural proteins. The verdict on a row is:

- *worse*: the interval excludes 0, and lies on a side of 0 that is bad for this row;
- *as natural*: not worse, and the interval stays below the limit on each side that is bad for this row;
- *cannot tell*: otherwise, because there are too few samples.

A group is *worse* if any of its rows is worse. Otherwise it is *as natural* if any of its rows is as natural, else
*cannot tell*. The intervals are widened (Bonferroni), so that all intervals of a group together contain their true
values with a probability of at least 95%. Differences between fractions of proteins have Newcombe's intervals. All
other intervals are those of Student's t with n - 1 degrees of freedom for n samples.

Shuffling does not change some statistics, so the limit has exceptions. For fractions of proteins the limit is at least
0.1. Lengths are as natural if their Kolmogorov-Smirnov distance plus the critical value of this distance is below 0.2.
The limit of the composition is 0, so the composition can be worse but never as natural.

The verdicts make two approximations. Limits are treated as exact. The fractions of different sequences and of clusters
are treated as fractions of independent proteins.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from protlig_dd.data.fasta import read_fasta
from protlig_dd.evaluation.inputs import is_store
from protlig_dd.evaluation.samples.statistics import Figure, Rows, share
from protlig_dd.tokenizer import N_STATES

LEVEL = 0.95
FRACTION_LIMIT, LENGTH_LIMIT = 0.1, 0.2  # minimum limit of fractions of proteins, and limit of lengths
NORMAL = NormalDist()
NATURAL, WORSE, UNKNOWN = "as natural", "worse", "cannot tell"

BETTER_MODEL = "longer training, a larger model, or more sampling steps (steps=)"
MORE_RANDOM = "a higher temperature or top_p, or more sampling steps (steps=)"
LESS_RANDOM = "a lower temperature, more sampling steps (steps=), or longer training"
LESS_OVERFIT = "other training proteins or fewer epochs"
COPIES = f"{LESS_OVERFIT} (the model copies training proteins)"


class Kind(NamedTuple):
    """How to judge one kind of row."""

    prefix: str
    """Prefix of the names of the rows of this kind."""
    group: str
    """Group of rows that get one verdict together."""
    bad: str
    """Which deviation from natural proteins is bad: `more`, `less` or `either`."""
    if_more: str = ""
    if_less: str = ""
    """Advice if the samples' value is higher (`if_more`) or lower (`if_less`) than the natural proteins' value."""
    k: int = 0
    """For a divergence of k-mer frequencies, the length k; else 0. Divergences are biased upwards if there are few
    k-mers, so their intervals are widened."""
    is_fraction: bool = False
    """Whether the value is a fraction of the proteins."""
    averaged_over: str = ""
    """If the value is a mean over only some of the proteins: prefix of the name of the row with their fraction."""


KINDS = (
    Kind("composition", "composition and words", "more", BETTER_MODEL, k=1),
    Kind("2-mers", "composition and words", "more", BETTER_MODEL, k=2),
    Kind("3-mers", "composition and words", "more", BETTER_MODEL, k=3),
    Kind("residues in low complexity", "repeats", "either", MORE_RANDOM, LESS_RANDOM),
    Kind("residues in tandem repeats", "repeats", "either", MORE_RANDOM, LESS_RANDOM),
    Kind("share of different sequences", "variety", "less", if_less=MORE_RANDOM, is_fraction=True),
    Kind("clusters at", "variety", "less", if_less=MORE_RANDOM, is_fraction=True),
    Kind("with another of the set", "variety", "more", MORE_RANDOM, is_fraction=True),
    Kind("with a training protein", "relatives", "either", LESS_OVERFIT, LESS_RANDOM, is_fraction=True),
    Kind("with one at", "relatives", "either", COPIES, LESS_RANDOM, is_fraction=True),
    Kind("identity to the best", "relatives", "either", COPIES, LESS_RANDOM, averaged_over="with a training protein"),
    Kind("with a hit to the HMMs", "families", "less", if_less=LESS_RANDOM, is_fraction=True),
    Kind("pseudo-perplexity", "ESM-2", "more", LESS_RANDOM),
    Kind("pLDDT", "ESMFold", "less", if_less=LESS_RANDOM),
)
DISTANCE = "length, Kolmogorov-Smirnov distance"


class Verdict(NamedTuple):
    """The verdict on a group of rows."""

    group: str
    verdict: str
    """`as natural`, `worse`, `cannot tell`, or `not judged`."""
    told: str
    """A sentence with the verdict, the rows that determine the verdict, and advice."""

    def __str__(self) -> str:
        return f"{self.group}: {self.told}"


class Difference(NamedTuple):
    """The difference, samples minus natural proteins, in one row."""

    low: float
    high: float
    """Ends of the interval of the difference."""
    limit: float
    """Absolute difference between the values of the shuffled and the natural proteins; for fractions at least
    FRACTION_LIMIT. It is 0 if one of these values is unknown."""

    def verdict(self, bad: str) -> str:
        """Return the verdict on the row.

        Args:
            bad: which deviation from natural proteins is bad, see `Kind.bad`.
        """
        more, less = self.low > 0 and bad != "less", self.high < 0 and bad != "more"
        if more or less:
            return WORSE
        above, below = self.high if bad != "less" else 0, -self.low if bad != "more" else 0
        return NATURAL if max(above, below, 0) < self.limit else UNKNOWN


def verdicts(rows: Rows, n_reference: int, lengths_not_judged: str | None = None) -> list[Verdict]:
    """Return verdicts on the number of proteins, on the lengths, and on each group of rows in `rows`.

    Args:
        rows: rows of `cheap_judges` and of any other judges.
        n_reference: number of natural proteins with which the lengths of the samples are compared.
        lengths_not_judged: reason why the lengths of the samples say nothing about the model. None: lengths are judged.
    """
    n = round(rows["proteins"][0].value)
    matched = "the natural proteins were chosen to match the samples in number and, as closely as possible, in length"
    found = [Verdict("proteins and residues", "not judged", f"not judged: {matched}")]
    found += [verdict_on_lengths(rows[DISTANCE][0].value, n, n_reference, lengths_not_judged)]
    for group in dict.fromkeys(kind.group for kind in KINDS):
        kinds = [kind for kind in KINDS if kind.group == group]
        of_group = [(kind, name) for kind in kinds for name in rows if name.startswith(kind.prefix)]
        if of_group:
            level = 1 - (1 - LEVEL) / len(of_group)
            found.append(verdict_on([(kind, name, difference(kind, rows, name, level)) for kind, name in of_group], n))
    return found


def verdict_on(group: list[tuple[Kind, str, Difference]], n: int) -> Verdict:
    """Return the verdict on the rows of one group, computed from n samples."""
    by_verdict: dict[str, list[str]] = {WORSE: [], NATURAL: [], UNKNOWN: []}
    advice, needed = [], []
    for kind, name, row in group:
        verdict, label = row.verdict(kind.bad), f'"{name.partition(",")[0]}"'
        if verdict == WORSE:
            more = row.low > 0
            label += f" ({'higher' if more else 'lower'} than natural)"
            advice.append(kind.if_more if more else kind.if_less)
        if verdict != UNKNOWN or row.limit or math.isnan(row.low):
            by_verdict[verdict].append(label)
        if verdict == UNKNOWN and row.limit:
            needed.append(samples_needed(row, n))
    verdict = next((choice for choice in (WORSE, NATURAL) if by_verdict[choice]), UNKNOWN)
    sentence = f"{verdict}" + (f" in {', '.join(by_verdict[verdict])}" if by_verdict[verdict] else "")
    if verdict != UNKNOWN and by_verdict[UNKNOWN]:
        sentence += f"; too few samples to judge {', '.join(by_verdict[UNKNOWN])}"
    if verdict == WORSE:
        sentence += f"; try {', and '.join(dict.fromkeys(advice))}"
    if verdict == UNKNOWN:
        sentence = too_few(n, min(needed, default=4 * n))
    return Verdict(group[0][0].group, verdict, sentence)


def too_few(n: int, needed: int) -> str:
    return f"{UNKNOWN}: {n} samples are too few; try n={needed} or more, and natural= with twice as many proteins"


def samples_needed(row: Difference, n: int) -> int:
    """Return the number of samples that would make the width of the interval equal to the limit.

    The result is at least 1.5 n and at most 4 n, because the limit is uncertain too.
    """
    half = (row.high - row.low) / 2
    times = (2 * half / row.limit) ** 2 if row.limit and math.isfinite(half) else 4.0
    return math.ceil(n * min(max(times, 1.5), 4.0))


def verdict_on_lengths(distance: float, n: int, n_reference: int, lengths_not_judged: str | None) -> Verdict:
    """Return the verdict on lengths, by the Kolmogorov-Smirnov test of n samples and n_reference natural proteins."""
    if lengths_not_judged:
        return Verdict("lengths", "not judged", f"not judged: {lengths_not_judged}")
    from scipy.stats import kstwobign  # imported here, as it takes a second

    critical = float(kstwobign.ppf(LEVEL)) * math.sqrt((n + n_reference) / (n * n_reference))
    if distance > critical:
        advice = (
            "lengths=empirical, or training on proteins as long as the natural ones, or a larger data.max_len, because "
            "samples cannot be longer"
        )
        return Verdict("lengths", WORSE, f"worse; try {advice}")
    if distance + critical < LENGTH_LIMIT:
        return Verdict("lengths", NATURAL, NATURAL)
    # with n samples and m natural proteins, the critical distance is LENGTH_LIMIT / 2 if n m / (n + m) equals `size`
    size = (2 * critical / LENGTH_LIMIT) ** 2 * n * n_reference / (n + n_reference)
    return Verdict("lengths", UNKNOWN, too_few(n, math.ceil(2 * size)))  # if m = n, this needs n = 2 size


def difference(kind: Kind, rows: Rows, name: str, level: float) -> Difference:
    """Return the difference in one row, samples minus natural proteins, with its interval at this confidence level."""
    from scipy.stats import t  # imported here, as it takes a second

    n = round(rows["proteins"][0].value)
    samples, natural, shuffled = rows[name]
    more, limit = samples.value - natural.value, abs(shuffled.value - natural.value)
    if kind.averaged_over:  # n is the number of proteins in the mean: samples or natural proteins, whichever are fewer
        (fractions,) = (row for other, row in rows.items() if other.startswith(kind.averaged_over))
        n = round(n * min(fractions[0].value, fractions[1].value))
    times = float(t.ppf((1 + level) / 2, n - 1)) if n > 1 else math.nan
    if kind.is_fraction:
        (low, high), (below, above) = (fraction_interval(figure, n) for figure in (samples, natural))
        # Newcombe's interval of the difference, scaled from LEVEL to the requested level
        scale = NORMAL.inv_cdf((1 + level) / 2) / NORMAL.inv_cdf((1 + LEVEL) / 2)
        lower = scale * math.hypot(samples.value - low, above - natural.value)
        upper = scale * math.hypot(high - samples.value, natural.value - below)
        return Difference(more - lower, more + upper, max(FRACTION_LIMIT, limit))
    errors = [figure.error or max(samples.error, natural.error) for figure in (samples, natural)]
    half = times * math.hypot(*errors)
    if kind.k:  # add the difference between the biases of the two divergences (see `kmer_divergence`)
        counts = [rows["residues"][column].value for column in (0, 1)]
        half += (N_STATES**kind.k - 1) / 8 * abs(1 / counts[0] - 1 / counts[1])
    return Difference(more - half, more + half, 0.0 if math.isnan(limit) else limit)


def fraction_interval(figure: Figure, n: int) -> tuple[float, float]:
    """Return the 95% interval of a fraction of n proteins. If the figure has no interval, compute Wilson's interval."""
    if math.isnan(figure.low):
        figure = share(np.arange(n) < round(figure.value * n))
    return figure.low, figure.high


def why_lengths_are_not_judged(path: Path, samples: Sequence[np.ndarray]) -> str | None:
    """Return the reason why the lengths of samples say nothing about the model, or None.

    There are two possible reasons: the FASTA headers show that the user chose the lengths (in `sample` or `infill`), or
    all lengths are equal.
    """
    headers = [] if is_store(path) else [f" {record.description} " for record in read_fasta(path)]
    requested = {match[1] if (match := re.search(r" (lengths=\S+) ", header)) else None for header in headers}
    if requested and None not in requested:
        return f"they were requested ({', '.join(sorted(filter(None, requested)))})"
    if headers and all(" nll_free=" in header for header in headers):
        return "they were given to infill"
    if len(samples) > 1 and len({len(sample) for sample in samples}) == 1:
        return f"all samples have {len(samples[0])} residues"
    return None
