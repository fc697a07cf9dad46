"""From a table of judges to what it says: a sentence for each group of rows, and what to try.

A row compares the difference of samples and natural proteins with its error, and with that which shuffling makes:

- *worse*: the 95% interval of the difference leaves out 0, on the side that is bad of this row;
- *as natural*: it holds 0, and reaches as far as the shuffled proteins on neither side;
- *cannot tell*: all else, as there are too few samples.

A group is worse if one of its rows is, else as natural if one is; intervals hold for all rows of a group together
(Bonferroni). Student's t has as many degrees of freedom as there are samples, less one. Where shuffling changes
nothing, other limits stand in its place: a tenth of the proteins for shares of proteins, a fifth for the distance of
lengths with its own uncertainty. Limits are taken as known, and shares of different sequences and of clusters as
those of proteins by themselves; both are approximations. A composition can only say worse.
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
OF_PROTEINS, OF_LENGTHS = 0.1, 0.2  # what stands in the place of the shuffled proteins where shuffling changes nothing
NORMAL = NormalDist()
NATURAL, WORSE, UNKNOWN = "as natural", "worse", "cannot tell"

WEAK = "train longer or a larger model, or more sampling steps (steps=)"
DULL = "a higher temperature or top_p, or more sampling steps (steps=)"
WILD = "a lower temperature, more sampling steps (steps=), or longer training"


class Kind(NamedTuple):
    """What a row's difference means."""

    begins: str
    """How the names of such rows begin."""
    group: str
    bad: str
    """The side that is worse: `more`, `less` or `either`."""
    if_more: str = ""
    if_less: str = ""
    """What to try where samples have more than natural proteins, or less."""
    k: int = 0
    """Residues of a k-mer, where few of them make a figure larger than it is."""
    of_proteins: bool = False
    """Whether the figure is a share of the proteins."""
    of_those: str = ""
    """How the row begins whose share of the proteins the figure is a mean of."""


KINDS = (
    Kind("composition", "composition and words", "more", WEAK, k=1),
    Kind("2-mers", "composition and words", "more", WEAK, k=2),
    Kind("3-mers", "composition and words", "more", WEAK, k=3),
    Kind("residues in low complexity", "repeats", "either", DULL, WILD),
    Kind("residues in tandem repeats", "repeats", "either", DULL, WILD),
    Kind("share of different sequences", "variety", "less", if_less=DULL, of_proteins=True),
    Kind("clusters at", "variety", "less", if_less=DULL, of_proteins=True),
    Kind("with another of the set", "variety", "more", DULL, of_proteins=True),
    Kind(
        "with a training protein",
        "relatives",
        "either",
        "other training proteins or fewer epochs",
        WILD,
        of_proteins=True,
    ),
    Kind(
        "with one at",
        "relatives",
        "either",
        "other training proteins or fewer epochs: it copies",
        WILD,
        of_proteins=True,
    ),
    Kind(
        "identity to the best",
        "relatives",
        "either",
        "other training proteins or fewer epochs: it copies",
        WILD,
        of_those="with a training protein",
    ),
    Kind("with a hit to the HMMs", "families", "less", if_less=WILD, of_proteins=True),
    Kind("pseudo-perplexity", "ESM-2", "more", WILD),
    Kind("pLDDT", "ESMFold", "less", if_less=WILD),
)
DISTANCE = "length, Kolmogorov-Smirnov distance"


class Verdict(NamedTuple):
    """Of a group of rows."""

    group: str
    verdict: str
    """`as natural`, `worse`, `cannot tell`, or `not judged`."""
    told: str
    """The sentence: the verdict, by which rows, and what to try."""

    def __str__(self) -> str:
        return f"{self.group}: {self.told}"


class Difference(NamedTuple):
    """Of samples and natural proteins, in one row."""

    low: float
    high: float
    """Its interval."""
    limit: float
    """How far the shuffled proteins are from the natural ones; 0 where that says nothing."""

    def verdict(self, bad: str) -> str:
        """Of a row of which `more`, `less` or `either` is bad."""
        more, less = self.low > 0 and bad != "less", self.high < 0 and bad != "more"
        if more or less:
            return WORSE
        above, below = self.high if bad != "less" else 0, -self.low if bad != "more" else 0
        return NATURAL if max(above, below, 0) < self.limit else UNKNOWN


def verdicts(rows: Rows, others: int, requested: str | None = None) -> list[Verdict]:
    """What was matched, a verdict on lengths, and one on each group of rows that is there.

    Args:
        rows: of `cheap_judges` and of what else was asked.
        others: natural proteins that lengths are compared with.
        requested: why the samples' lengths say nothing of the model, if they don't.
    """
    n = round(rows["proteins"][0].value)
    matched = "not judged: as many natural proteins were chosen, of the samples' lengths as nearly as there are such"
    found = [Verdict("proteins and residues", "not judged", matched)]
    found += [verdict_on_lengths(rows[DISTANCE][0].value, n, others, requested)]
    for group in dict.fromkeys(kind.group for kind in KINDS):
        kinds = [kind for kind in KINDS if kind.group == group]
        of_group = [(kind, name) for kind in kinds for name in rows if name.startswith(kind.begins)]
        if of_group:
            level = 1 - (1 - LEVEL) / len(of_group)
            found.append(verdict_on([(kind, name, difference(kind, rows, name, level)) for kind, name in of_group], n))
    return found


def verdict_on(group: list[tuple[Kind, str, Difference]], n: int) -> Verdict:
    """Of the rows of one group, of n samples."""
    by_verdict: dict[str, list[str]] = {WORSE: [], NATURAL: [], UNKNOWN: []}
    tries, wanted = [], []
    for kind, name, row in group:
        verdict, short = row.verdict(kind.bad), name.partition(",")[0]
        if verdict == WORSE:
            more = row.low > 0
            short += f" ({'more' if more else 'less'} than natural)"
            tries.append(kind.if_more if more else kind.if_less)
        if verdict != UNKNOWN or row.limit or math.isnan(row.low):
            by_verdict[verdict].append(short)
        if verdict == UNKNOWN and row.limit:
            wanted.append(samples_wanted(row, n))
    verdict = next((one for one in (WORSE, NATURAL) if by_verdict[one]), UNKNOWN)
    told = f"{verdict}" + (f" in {', '.join(by_verdict[verdict])}" if by_verdict[verdict] else "")
    if verdict != UNKNOWN and by_verdict[UNKNOWN]:
        told += f"; too few samples to tell in {', '.join(by_verdict[UNKNOWN])}"
    if verdict == WORSE:
        told += f"; try {', and '.join(dict.fromkeys(tries))}"
    if verdict == UNKNOWN:
        least = min(wanted, default=4 * n)
        told = too_few(n, least)
    return Verdict(group[0][0].group, verdict, told)


def too_few(n: int, wanted: int) -> str:
    return f"{UNKNOWN}: {n} samples are too few; try n={wanted} or more, and natural= with twice as many proteins"


def samples_wanted(row: Difference, n: int) -> int:
    """How many samples would make an interval half as wide as the limit; at most four times as many as there are, as
    the limit itself is uncertain.
    """
    half = (row.high - row.low) / 2
    times = (2 * half / row.limit) ** 2 if row.limit and math.isfinite(half) else 4.0
    return math.ceil(n * min(max(times, 1.5), 4.0))


def verdict_on_lengths(distance: float, n: int, others: int, requested: str | None) -> Verdict:
    """By Kolmogorov and Smirnov's test: of n samples and so many natural proteins."""
    if requested:
        return Verdict("lengths", "not judged", f"not judged: {requested}")
    from scipy.stats import kstwobign  # takes a second

    limit = float(kstwobign.ppf(LEVEL)) * math.sqrt((n + others) / (n * others))
    if distance > limit:
        remedy = "lengths=empirical, training proteins like the natural ones, or a larger data.max_len, which ends them"
        return Verdict("lengths", WORSE, f"worse; try {remedy}")
    if distance + limit < OF_LENGTHS:
        return Verdict("lengths", NATURAL, NATURAL)
    alike = (2 * limit / OF_LENGTHS) ** 2 * n * others / (n + others)  # n m / (n + m) that halves OF_LENGTHS
    wanted = math.ceil(2 * alike)  # of as many in the reference
    return Verdict("lengths", UNKNOWN, too_few(n, wanted))


def difference(kind: Kind, rows: Rows, name: str, level: float) -> Difference:
    """The interval, at this level, of how much more the samples have than the natural proteins."""
    from scipy.stats import t  # takes a second

    n = round(rows["proteins"][0].value)
    samples, natural, shuffled = rows[name]
    more, away = samples.value - natural.value, abs(shuffled.value - natural.value)
    if kind.of_those:  # of the set that has fewer of them
        (shares,) = (row for other, row in rows.items() if other.startswith(kind.of_those))
        n = round(n * min(shares[0].value, shares[1].value))
    times = float(t.ppf((1 + level) / 2, n - 1)) if n > 1 else math.nan
    if kind.of_proteins:
        (low, high), (below, above) = (ends(figure, n) for figure in (samples, natural))
        scale = NORMAL.inv_cdf((1 + level) / 2) / NORMAL.inv_cdf((1 + LEVEL) / 2)  # Newcombe's interval, of that level
        lower = scale * math.hypot(samples.value - low, above - natural.value)
        upper = scale * math.hypot(high - samples.value, natural.value - below)
        return Difference(more - lower, more + upper, max(OF_PROTEINS, away))
    errors = [figure.error or max(samples.error, natural.error) for figure in (samples, natural)]
    half = times * math.hypot(*errors)
    if kind.k:  # few k-mers alone make a divergence larger, by about this much
        counts = [rows["residues"][column].value for column in (0, 1)]
        half += (N_STATES**kind.k - 1) / 8 * abs(1 / counts[0] - 1 / counts[1])
    return Difference(more - half, more + half, 0.0 if math.isnan(away) else away)


def ends(figure: Figure, n: int) -> tuple[float, float]:
    """The interval of a share of n proteins, also where the table gives none."""
    if math.isnan(figure.low):
        figure = share(np.arange(n) < round(figure.value * n))
    return figure.low, figure.high


def requested_lengths(path: Path, samples: Sequence[np.ndarray]) -> str | None:
    """Why the lengths of samples say nothing of the model that made them, where that is so: by their headers, which
    `sample` and `infill` write, or as all are alike.
    """
    told = [] if is_store(path) else [f" {record.description} " for record in read_fasta(path)]
    asked = {match[1] if (match := re.search(r" (lengths=\S+) ", one)) else None for one in told}
    if asked and None not in asked:
        return f"they were asked for ({', '.join(sorted(filter(None, asked)))})"
    if told and all(" nll_free=" in one for one in told):
        return "infill was given them"
    if len(samples) > 1 and len({len(one) for one in samples}) == 1:
        return f"all have {len(samples[0])} residues"
    return None
