"""Format the figures of an evaluation as Markdown and CSV tables."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.likelihood.scoring import COLUMNS, MASKED_FRACTION, Scored, column
from protlig_dd.runs.metrics import with_nan
from protlig_dd.system.tables import csv_text
from protlig_dd.tokenizer import AMINO_ACIDS

LENGTH_BINS = (0, 50, 100, 200, 300, 400, 500, 750, 1000)  # bounds in residues; the bins are 1-50, 51-100, ...


NAMES = {
    "bound": "model, NLL bound",
    "compared": "compared model, NLL bound",
    "unigram": "unigram model, NLL",
    "bigram": "bigram model, NLL",
    "oadm": "order-agnostic (OADM) NLL",
    "evodiff": "EvoDiff's test convention, mean over all masked residues",
    "masked": f"cross-entropy of masked residues ({MASKED_FRACTION:.0%})",
}


def report_table(report: dict[str, Any]) -> str:
    """Return Markdown with the figures of all proteins."""
    lines = [
        f"{report['sequences']:,} proteins, {report['residues']:,} {'' if report['context'] == 'none' else 'designed '}"
        f"residues; {report['run']}, step {report['step']}; {report['estimator']} estimator, {report['draws']} draws",
        *(
            ["", f"Nats are per designed residue, given the {report['context']}-case residues (the context)."]
            if report["context"] != "none"
            else []
        ),
        "",
        "| | nats/residue | perplexity | minus the unigram model |",
        "| --- | --- | --- | --- |",
    ]
    for name in COLUMNS:
        if name not in report:
            continue
        nats, error = report[name], report[f"{name}_se"]
        perplexity = report[f"{name}_perplexity"]
        difference = ""
        if f"{name}_to_unigram" in report:
            difference = format_figure(report[f"{name}_to_unigram"], report[f"{name}_to_unigram_se"], "+.4f")
        figures = format_figure(nats, error, ".4f"), format_figure(perplexity, perplexity * error, ".3f")
        lines.append(f"| {NAMES[name]} | {' | '.join(figures)} | {difference} |")
    if "unigram" in report:
        all_residues = "all residues of " if report["baseline_context"] != report["context"] else ""
        data = f"{all_residues}{report['baseline_sequences']:,} training proteins of {report['baseline_store']}"
        lines += ["", f"The unigram and bigram models were fitted to {data}."]
    if "compared" in report:
        other = report["compared_with"]
        difference = format_figure(report["bound_to_compared"], report["bound_to_compared_se"], "+.4f")
        models = f"{report['run']}, step {report['step']}, minus {other['run']}, step {other['step']}"
        lines += [
            "",
            f"{models} ({other['checkpoint']}), paired difference: {difference} nats/residue; "
            "if it is negative, the first model is better.",
        ]
        if report["estimator"] != other["estimator"]:
            lines += [f"Their estimators differ: {report['estimator']} and {other['estimator']}."]
    if (leaks := report["in_training"])["copies"] or leaks["near"]:
        similar = f", and {leaks['near']:,} are similar to a training protein" if leaks["near"] else ""
        line = f"{leaks['copies']:,} proteins are exact copies of training proteins of a model named above{similar}"
        others = leaks["others"]
        if others is None:
            lines += ["", f"{line}. Too few other proteins are left for held-out figures."]
        else:
            others = with_nan(others)
            parts = [f"an NLL bound of {format_figure(others['bound'], others['bound_se'], '.4f')}"]
            for key, to in (
                ("bound_to_unigram", "the unigram model"),
                ("bound_to_compared", "the compared model"),
            ):
                if key in others:
                    difference = format_figure(others[key], others[f"{key}_se"], "+.4f")
                    parts.append(f"a difference of {difference} to {to}")
            lines += ["", f"{line}; the other {others['sequences']:,} proteins have {', '.join(parts)} (nats/residue)."]
    if report["sequences"] == 1:
        lines += [
            "",
            "With a single protein, the standard error of the bound is its Monte Carlo error, and all other standard "
            "errors are unknown.",
        ]
    return "\n".join(lines) + "\n"


def format_figure(value: float, error: float, digits: str) -> str:
    """Return a figure as text, with its standard error unless the error is NaN."""
    return f"{value:{digits}}" + ("" if math.isnan(error) else f" ± {error:{digits.lstrip('+')}}")


def sequence_csv(ids: Sequence[str], scored: Sequence[Scored], in_training: Sequence[str]) -> str:
    """Return CSV with a row of total nats for each protein, so that two models can be compared protein by protein.

    Args:
        in_training: see `Leaks.cells`.
    """
    names = [name for name in COLUMNS if name in scored[0].nats]
    masked = list(scored[0].masked)
    header = ["id", "residues", *(f"{name}_nats" for name in names), "bound_nats_se"]
    return csv_text(
        [*header, *(f"{name}_tokens" for name in masked), "in_training"],
        [
            [id_, protein.residues, *(protein.nats[n] for n in names), protein.bound_se, *protein.masked.values(), cell]
            for id_, protein, cell in zip(ids, scored, in_training, strict=True)
        ],
    )


def length_csv(scored: Sequence[Scored]) -> str:
    """Return CSV with a row for each range of lengths; the column `to` is empty for lengths above 1000."""
    names = [name for name in ("bound", "unigram", "bigram") if name in scored[0].nats]
    rows = []
    for low, high in pairwise([*LENGTH_BINS, math.inf]):
        in_bin = [protein for protein in scored if low < protein.residues <= high]
        if in_bin:
            residues = np.array([protein.residues for protein in in_bin])
            figures = [value for name in names for value in per_residue(column(in_bin, name), residues)]
            rows.append([low + 1, "" if high == math.inf else high, len(in_bin), residues.sum(), *figures])
    return csv_text(["from", "to", "sequences", "residues", *with_errors(names)], rows)


def letter_csv(scored: Sequence[Scored]) -> str:
    """Return CSV with the nats of each amino acid per occurrence, with standard errors over proteins."""
    names, rows = list(scored[0].by_letter), []
    for i, letter in enumerate(AMINO_ACIDS):
        # proteins without the letter are left out, so that the error is NaN if only one protein has the letter
        having = [protein for protein in scored if protein.counts[i]]
        counts = np.array([protein.counts[i] for protein in having])
        if having:
            totals = {name: np.array([protein.by_letter[name][i] for protein in having]) for name in names}
            rows.append([letter, counts.sum(), *(v for name in names for v in per_residue(totals[name], counts))])
    return csv_text(["amino_acid", "residues", *with_errors(names)], rows)


def with_errors(names: Sequence[str]) -> list[str]:
    return [label for name in names for label in (name, f"{name}_se")]
