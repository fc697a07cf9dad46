"""The parts of a run's page that are words and tables."""

import itertools
import math
from typing import Any

import numpy as np

from protlig_dd.data.fasta import FastaRecord
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.report.curves import NATS
from protlig_dd.evaluation.report.plots import Estimate, dot_plot
from protlig_dd.evaluation.report.run import Run
from protlig_dd.evaluation.samples.statistics import SETS, Figure, written
from protlig_dd.runs.metrics import with_nan

LINE = 60  # residues
RESIDUE_CLASSES = (
    ("aliphatic", "AVILM"),
    ("aromatic", "FWY"),
    ("polar", "STNQ"),
    ("positive", "KRH"),
    ("negative", "DE"),
    ("special", "CGP"),
)
CLASS_OF = {letter: name for name, letters in RESIDUE_CLASSES for letter in letters}


def paired(own: list[tuple[str, int, float]], first: list[tuple[str, int, float]]) -> list[str]:
    """The difference to the first run a residue and its standard error; empty cells where the proteins differ."""
    if own is first or not own or [row[:2] for row in own] != [row[:2] for row in first]:
        return ["", ""]
    nats = np.array([mine[2] - other[2] for mine, other in zip(own, first, strict=True)])
    difference, error = per_residue(nats, np.array([row[1] for row in own]))
    return with_error({"d": difference, "d_se": error}, "d")


def headline(run: Run, what: str, bounds: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, note) of the figures that matter most."""
    found = []
    if bounds:
        found = [
            (f"Bound, {what}", f"{bounds['nll']:.4f}", f"{plus_minus(bounds['nll_se'])} {NATS}"),
            (
                "Against the unigram model",
                f"{bounds['difference']:+.4f}".replace("-", "−"),
                f"{plus_minus(bounds['difference_se'])} {NATS}, paired",
            ),
        ]
    if run.metrics:
        _, residues = run.column("residues")
        found.append(("Steps", f"{run.last_step:,}", f"{max(residues, default=0):,.0f} residues seen"))
    _, rates = run.column("residues_per_s")
    if rates:
        found.append(("Speed", f"{np.median(rates):,.0f}", "residues/s, median"))
    if "parameters" in run.report:
        shape = f"{run.config['model.n_blocks']} blocks of width {run.config['model.hidden_size']}"
        found.append(("Parameters", f"{run.report['parameters'] / 1e6:,.1f} M", shape))
    return found


def bounds_section(what: str, bounds: dict[str, Any], data: str | None) -> dict[str, Any] | None:
    """Dots and a table of the model's bound and every baseline that the figures have, `NAME_nll` with `NAME_nll_se`."""
    if not bounds:
        return None
    of_what = f" of {data}" if data else ""
    precision = f", {bounds['precision']}" if "precision" in bounds else ""
    baselines = [key for key in bounds if key.endswith("_nll") and f"{key}_se" in bounds]
    kept = [("this model, bound", "nll"), *((f"{key.removesuffix('_nll')} model", key) for key in baselines)]
    estimates = [Estimate(name, bounds[key], bounds[f"{key}_se"], i and 7) for i, (name, key) in enumerate(kept)]
    rows = [[name, *with_error(bounds, key), f"{math.exp(bounds[key]):.3f}"] for name, key in kept]
    rows.append(["bound − unigram, paired", *with_error(bounds, "difference"), ""])
    return {
        "plot": dot_plot("Negative log-likelihood", NATS, estimates),
        "head": ["", NATS, "± SE", "perplexity"],
        "rows": rows,
        "note": f"The {what}: {bounds['sequences']:,} proteins, {bounds['residues']:,} residues, step "
        f"{bounds['step']:,}, averaged weights{precision}. "
        f"The unigram model is that of the training split{of_what}. "
        "Lower is better; bars are two standard errors each way.",
    }


def with_error(bounds: dict[str, Any], key: str) -> list[str]:
    return [f"{bounds[key]:.4f}".replace("-", "−"), plus_minus(bounds[f"{key}_se"]).removeprefix("± ")]


def plus_minus(error: float) -> str:
    """A standard error, which one protein alone does not have."""
    return f"± {error:.4f}" if math.isfinite(error) else "± ?"


def judges_section(run: Run) -> dict[str, Any] | None:
    """The table of judges.json, or that of the report in its place, and the report's other figures of the samples."""

    def figure(row: dict[str, Any], column: str) -> str:
        value, *errors = (with_nan(row).get(f"{column}{end}", math.nan) for end in ("", "_se", "_low", "_high"))
        return written(Figure(float(value), *map(float, errors))) if isinstance(value, int | float) else str(value)

    if run.judges:
        judged, note = run.judges["rows"], f"{run.judges['samples']} beside natural proteins of {run.judges['natural']}"
        if train := run.judges.get("train"):
            note += f" (relatives searched in {train})"
    else:
        judged, note = run.report.get("judges", []), f"The samples beside proteins of the {run.report.get('split')} set"
    rows = [[row["name"], *(figure(row, column) for column in SETS)] for row in judged]
    named = (
        ("composition, KL to the training split, nats", "composition_kl"),
        ("the same of the untrained network's samples", "untrained_composition_kl"),
        ("share of draws clamped", "clamped_draws"),
    )
    if not run.judges:  # which may be of other samples
        rows += [[name, told(run.report[key]), "", ""] for name, key in named if key in run.report]
    if not rows:
        return None
    verdicts = [f"{one['group']}: {one['told']}" for one in (run.judges or run.report).get("verdicts", [])]
    return {
        "title": "What judges say",
        "note": f"{note}, and those shuffled.",
        "verdicts": verdicts,
        "head": ["judge", *SETS],
        "rows": rows,
    }


def told(value: Any) -> str:
    """A cell: numbers to four digits, nothing for what is missing."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return "" if value is None else str(value)


def protein(record: FastaRecord) -> dict[str, Any]:
    """One sample of the gallery: lines of (position of its first residue, runs of one class)."""
    sequence = record.sequence
    lines = []
    for start in range(0, len(sequence), LINE):
        groups = itertools.groupby(sequence[start : start + LINE], key=lambda letter: CLASS_OF.get(letter, ""))
        lines.append((start + 1, [(name, "".join(letters)) for name, letters in groups]))
    return {"id": record.id, "note": f"{len(sequence)} residues", "lines": lines}
