"""Texts and tables of a run's page."""

import itertools
import math
from typing import Any

import numpy as np

from protlig_dd.data.fasta import FastaRecord
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.report.curves import NATS
from protlig_dd.evaluation.report.plots import Estimate, dot_plot
from protlig_dd.evaluation.report.run import Run
from protlig_dd.evaluation.samples.statistics import SETS, Figure, format_figure
from protlig_dd.runs.metrics import with_nan

LINE = 60  # residues per line
RESIDUE_CLASSES = (
    ("aliphatic", "AVILM"),
    ("aromatic", "FWY"),
    ("polar", "STNQ"),
    ("positive", "KRH"),
    ("negative", "DE"),
    ("special", "CGP"),
)
CLASS_OF = {letter: name for name, letters in RESIDUE_CLASSES for letter in letters}


def paired(run_nats: list[tuple[str, int, float]], first: list[tuple[str, int, float]]) -> list[str]:
    """Return two table cells: the run's bound minus the first run's bound, and the standard error of this difference.

    Both are in nats/residue. The cells are empty for the first run itself. They are also empty if one of the two runs
    has no bounds per protein, or if the two runs were evaluated on different proteins.

    Args:
        run_nats, first: results of `nats_of_proteins` for the run and for the first run.
    """
    if run_nats is first or not run_nats or [row[:2] for row in run_nats] != [row[:2] for row in first]:
        return ["", ""]
    nats = np.array([row[2] - first_row[2] for row, first_row in zip(run_nats, first, strict=True)])
    difference, error = per_residue(nats, np.array([row[1] for row in run_nats]))
    return with_error({"d": difference, "d_se": error}, "d")


def headline(run: Run, protein_set: str, bounds: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of the run's main figures."""
    boxes = []
    if bounds:
        boxes = [
            (f"NLL bound, {protein_set}", f"{bounds['nll']:.4f}", f"{plus_minus(bounds['nll_se'])} {NATS}"),
            (
                "Difference to the unigram model",
                f"{bounds['difference']:+.4f}".replace("-", "−"),
                f"{plus_minus(bounds['difference_se'])} {NATS}, paired",
            ),
        ]
    if run.metrics:
        _, residues = run.column("residues")
        boxes.append(("Steps", f"{run.last_step:,}", f"trained on {max(residues, default=0):,.0f} residues"))
    _, rates = run.column("residues_per_s")
    if rates:
        boxes.append(("Speed", f"{np.median(rates):,.0f}", "residues/s, median"))
    if "parameters" in run.report:
        shape = f"{run.config['model.n_blocks']} blocks of width {run.config['model.hidden_size']}"
        if (rank := run.config.get("model.lora.rank")) is not None:
            shape += f", fine-tuned by LoRA of rank {rank}"
        boxes.append(("Parameters", f"{run.report['parameters'] / 1e6:,.1f} M", shape))
    return boxes


def bounds_section(protein_set: str, bounds: dict[str, Any], data: str | None) -> dict[str, Any] | None:
    """Return a plot and a table of the model's bound and of the baselines' NLL; None without `bounds`.

    Args:
        bounds: figures from `Run.bounds`: those of the model (`nll`, `nll_se`, ...), and for each baseline NAME its NLL
            `NAME_nll` with the standard error `NAME_nll_se`.
        data: path of the training data.
    """
    if not bounds:
        return None
    of_data = f" of {data}" if data else ""
    precision = f", {bounds['precision']}" if "precision" in bounds else ""
    given, of_split = "", "the training split"
    if context := bounds.get("context"):
        given = f"Only designed residues are counted, and the {context}-case residues are given to the model. "
        of_split = "the designed residues of the training split"
    baselines = [key for key in bounds if key.endswith("_nll") and f"{key}_se" in bounds]
    models = [("this model, upper bound", "nll"), *((f"{key.removesuffix('_nll')} model", key) for key in baselines)]
    estimates = [Estimate(name, bounds[key], bounds[f"{key}_se"], i and 7) for i, (name, key) in enumerate(models)]
    rows = [[name, *with_error(bounds, key), f"{math.exp(bounds[key]):.3f}"] for name, key in models]
    rows.append(["this model − unigram, paired", *with_error(bounds, "difference"), ""])
    return {
        "plot": dot_plot("Negative log-likelihood", NATS, estimates),
        "head": ["", NATS, "± SE", "perplexity"],
        "rows": rows,
        "note": f"The {protein_set}: {bounds['sequences']:,} proteins, {bounds['residues']:,} residues, step "
        f"{bounds['step']:,}, averaged weights{precision}. "
        f"{given}The unigram model has the amino-acid frequencies of {of_split}{of_data}. "
        "Lower is better. Bars extend two standard errors to each side.",
    }


def with_error(bounds: dict[str, Any], key: str) -> list[str]:
    return [f"{bounds[key]:.4f}".replace("-", "−"), plus_minus(bounds[f"{key}_se"]).removeprefix("± ")]


def plus_minus(error: float) -> str:
    """Format a standard error; '± ?' if it is unknown, as for a single protein."""
    return f"± {error:.4f}" if math.isfinite(error) else "± ?"


def judges_section(run: Run) -> dict[str, Any] | None:
    """Return the comparison of samples with natural proteins; None if there are no figures.

    The comparison is in judges.json if this file exists, else in report.json. In the second case, the section also has
    the other figures of report.json about the run's samples. In the first case it does not, because judges.json may be
    about other samples.
    """

    def figure(row: dict[str, Any], column: str) -> str:
        value, *errors = (with_nan(row).get(f"{column}{end}", math.nan) for end in ("", "_se", "_low", "_high"))
        if isinstance(value, int | float):
            return format_figure(Figure(float(value), *map(float, errors)))
        return str(value)

    if run.judges:
        judged = run.judges["rows"]
        note = f"{run.judges['samples']} compared with natural proteins of {run.judges['natural']}"
        train = run.judges.get("train")
    else:
        judged, train = run.report.get("judges", []), None
        note = f"The samples compared with proteins of the {run.report.get('split')} set"
    note += ", and with the same proteins after shuffling their residues."
    if train:
        note += f" Related training proteins were searched for in {train}."
    rows = [[row["name"], *(figure(row, column) for column in SETS)] for row in judged]
    named = (
        ("composition, KL divergence to the training split in nats", "composition_kl"),
        ("composition, KL divergence, samples of the untrained network", "untrained_composition_kl"),
        ("fraction of residue draws with a negative probability, clamped to 0", "clamped_draws"),
    )
    if not run.judges:
        rows += [[name, format_cell(run.report[key]), "", ""] for name, key in named if key in run.report]
    if not rows:
        return None
    verdicts = [f"{verdict['group']}: {verdict['told']}" for verdict in (run.judges or run.report).get("verdicts", [])]
    return {
        "title": "Samples compared with natural proteins",
        "note": note,
        "verdicts": verdicts,
        "head": ["statistic", *SETS],
        "rows": rows,
    }


def format_cell(value: Any) -> str:
    """Format a table cell: floats to four significant digits, None as an empty cell."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return "" if value is None else str(value)


def protein(record: FastaRecord) -> dict[str, Any]:
    """Return the values with which the page's template shows one sample.

    Each of its `lines` is (1-based position of the first residue, [(residue class, residues), ...]).
    """
    sequence = record.sequence
    lines = []
    for start in range(0, len(sequence), LINE):
        groups = itertools.groupby(sequence[start : start + LINE], key=lambda letter: CLASS_OF.get(letter, ""))
        lines.append((start + 1, [(name, "".join(letters)) for name, letters in groups]))
    return {"id": record.id, "note": f"{len(sequence)} residues", "lines": lines}
