"""The figures of an evaluation as tables."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.likelihood.scoring import COLUMNS, MASKED_SHARE, Scored, column
from protlig_dd.runs.metrics import with_nan
from protlig_dd.system.tables import csv_text
from protlig_dd.tokenizer import AMINO_ACIDS

LENGTH_BINS = (0, 50, 100, 200, 300, 400, 500, 750, 1000)  # residues; a bin ends with the number that the next follows


NAMES = {
    "bound": "model, NLL bound",
    "compared": "model compared with, NLL bound",
    "unigram": "unigram model, NLL",
    "bigram": "bigram model, NLL",
    "oadm": "order-agnostic (OADM) NLL",
    "evodiff": "EvoDiff's test convention, all masked pooled",
    "masked": f"cross-entropy of {MASKED_SHARE:.0%} masked",
}


def report_table(report: dict[str, Any]) -> str:
    """Markdown of the figures of the whole set."""
    lines = [
        f"{report['sequences']:,} proteins, {report['residues']:,} residues; {report['run']}, step {report['step']}; "
        f"{report['estimator']} estimator, {report['draws']} draws",
        "",
        "| | nats/residue | perplexity | to the unigram model |",
        "| --- | --- | --- | --- |",
    ]
    for name in COLUMNS:
        if name not in report:
            continue
        nats, error = report[name], report[f"{name}_se"]
        perplexity = report[f"{name}_perplexity"]
        difference = ""
        if f"{name}_to_unigram" in report:
            difference = told(report[f"{name}_to_unigram"], report[f"{name}_to_unigram_se"], "+.4f")
        figures = told(nats, error, ".4f"), told(perplexity, perplexity * error, ".3f")
        lines.append(f"| {NAMES[name]} | {' | '.join(figures)} | {difference} |")
    if "unigram" in report:
        of_what = f"{report['baseline_sequences']:,} training proteins of {report['baseline_store']}"
        lines += ["", f"The unigram and bigram models are those of {of_what}."]
    if "compared" in report:
        other = report["compared_with"]
        difference = told(report["bound_to_compared"], report["bound_to_compared_se"], "+.4f")
        models = f"{report['run']}, step {report['step']}, minus {other['run']}, step {other['step']}"
        lines += [
            "",
            f"{models} ({other['checkpoint']}), paired: {difference} nats/residue; below zero the first is better.",
        ]
        if report["estimator"] != other["estimator"]:
            lines += [f"Their estimators differ: {report['estimator']}, and {other['estimator']} of the second."]
    if (leaks := report["in_training"])["copies"] or leaks["near"]:
        near = f" and {leaks['near']:,} near ones" if leaks["near"] else ""
        line = f"{leaks['copies']:,} are exact copies{near} of proteins that trained a model named above"
        others = leaks["others"]
        if others is None:
            lines += ["", f"{line}, and no others, or too few, are left: these are no held-out figures."]
        else:
            others = with_nan(others)
            parts = [f"an NLL bound of {told(others['bound'], others['bound_se'], '.4f')}"]
            for key, to in (
                ("bound_to_unigram", "the unigram model"),
                ("bound_to_compared", "the model compared with"),
            ):
                if key in others:
                    parts.append(f"{told(others[key], others[f'{key}_se'], '+.4f')} to {to}")
            lines += ["", f"{line}; the {others['sequences']:,} others have {', '.join(parts)} (nats/residue)."]
    if report["sequences"] == 1:
        lines += ["", "Of a single protein: the standard error is that of the bound's own draws; others are not known."]
    return "\n".join(lines) + "\n"


def told(value: float, error: float, digits: str) -> str:
    """A figure with its standard error, where that is known."""
    return f"{value:{digits}}" + ("" if math.isnan(error) else f" ± {error:{digits.lstrip('+')}}")


def sequence_csv(ids: Sequence[str], scored: Sequence[Scored], trained_by: Sequence[str]) -> str:
    """A row for each protein: whole nats, so that two models can be compared protein by protein.

    Args:
        trained_by: of each, whether it has trained the model.
    """
    names = [name for name in COLUMNS if name in scored[0].nats]
    masked = list(scored[0].masked)
    header = ["id", "residues", *(f"{name}_nats" for name in names), "bound_nats_se"]
    return csv_text(
        [*header, *(f"{name}_tokens" for name in masked), "in_training"],
        [
            [id_, one.residues, *(one.nats[name] for name in names), one.bound_se, *one.masked.values(), cell]
            for id_, one, cell in zip(ids, scored, trained_by, strict=True)
        ],
    )


def length_csv(scored: Sequence[Scored]) -> str:
    """The figures of proteins of similar length; `to` is empty for the longest."""
    names = [name for name in ("bound", "unigram", "bigram") if name in scored[0].nats]
    rows = []
    for low, high in pairwise([*LENGTH_BINS, math.inf]):
        some = [one for one in scored if low < one.residues <= high]
        if some:
            residues = np.array([one.residues for one in some])
            figures = [value for name in names for value in per_residue(column(some, name), residues)]
            rows.append([low + 1, "" if high == math.inf else high, len(some), residues.sum(), *figures])
    return csv_text(["from", "to", "sequences", "residues", *with_errors(names)], rows)


def letter_csv(scored: Sequence[Scored]) -> str:
    """What each amino acid costs, in nats each time that it occurs, with standard errors over proteins."""
    names, rows = list(scored[0].by_letter), []
    for i, letter in enumerate(AMINO_ACIDS):
        having = [one for one in scored if one.counts[i]]  # of a letter that one protein has, no error is known
        counts = np.array([one.counts[i] for one in having])
        if having:
            totals = {name: np.array([one.by_letter[name][i] for one in having]) for name in names}
            rows.append([letter, counts.sum(), *(v for name in names for v in per_residue(totals[name], counts))])
    return csv_text(["amino_acid", "residues", *with_errors(names)], rows)


def with_errors(names: Sequence[str]) -> list[str]:
    return [column for name in names for column in (name, f"{name}_se")]
