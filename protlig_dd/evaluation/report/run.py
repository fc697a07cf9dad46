"""Read the files of a run folder."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from protlig_dd.config.read import flatten
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.evaluation.samples.statistics import SETS
from protlig_dd.runs.metrics import read_metrics, with_nan
from protlig_dd.system.tables import as_written, read_json

PAGE, CONFIG, METRICS = "report.html", "config.yaml", "metrics.jsonl"
BOUNDS = ("nll", "unigram_nll", "difference")
REQUIRED_KEYS = {  # every version of protlig_dd writes these keys
    "report.json": ("split", "step", "sequences", "residues", *BOUNDS, *(f"{key}_se" for key in BOUNDS)),
    "judges.json": ("samples", "natural", "rows"),
}


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; a value is empty if its file does not exist."""

    folder: Path
    config: dict[str, Any]
    """With dotted keys: {"optim.lr": 0.001, ...}."""
    environment: dict[str, Any]
    metrics: dict[int, dict[str, Any]]
    report: dict[str, Any]
    samples: list[FastaRecord]
    judges: dict[str, Any]
    """Contents of judges.json: `rows`, and the paths of the `samples` and the `natural` proteins."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        return max(self.metrics, default=0)

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps at which a key of metrics.jsonl has a finite value, and the values at these steps."""
        points = [(step, row[key]) for step, row in sorted(self.metrics.items()) if row.get(key) is not None]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    @property
    def bounds(self) -> tuple[str, dict[str, Any]]:
        """Return the name of the protein set, and the bounds on it.

        The bounds come from the report, or from the last validation if there is no report yet.
        """
        if self.report:
            return f"{self.report['split']} set", with_nan(self.report)
        steps, _ = self.column("val_nll")
        if not steps:
            return "", {}
        row = self.metrics[int(steps[-1])]
        return "validation set", with_nan({key.removeprefix("val_"): value for key, value in row.items()})


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: `folder` is not a run folder, or one of its files is malformed.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: not a run folder; expected {CONFIG} in it")
    report, judges = (read_json(folder / name, keys) for name, keys in REQUIRED_KEYS.items())
    rows = judges.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError(f"{folder / 'judges.json'}: each of its rows must be an object with name, {', '.join(SETS)}")
    verdicts = judges.get("verdicts", [])  # earlier versions wrote no verdicts
    if not isinstance(verdicts, list) or not all(
        isinstance(verdict, dict) and {"group", "told"} <= verdict.keys() for verdict in verdicts
    ):
        raise ValueError(f"{folder / 'judges.json'}: each of its verdicts must be an object with group and told")
    metrics = folder / METRICS
    fasta = folder / str(report.get("samples"))
    return Run(
        folder=folder,
        config=flatten(OmegaConf.load(folder / CONFIG)),
        environment=read_json(folder / "environment.json"),
        metrics=read_metrics(metrics) if metrics.is_file() else {},
        report=report,
        samples=list(read_fasta(fasta)) if fasta.is_file() else [],
        judges=judges,
    )


def nats_of_proteins(run: Run) -> list[tuple[str, int, float]]:
    """Return (id, residues, bound in nats) of each protein in report.csv; [] if there is no report.

    Raises:
        ValueError: report.csv is malformed.
    """
    path = run.folder / "report.csv"
    if not run.report or not path.is_file():
        return []
    try:
        rows = csv.DictReader(path.read_text().splitlines())
        return [(row["id"], int(row["residues"]), float(row["nll_nats"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not written by protlig_dd ({error!r})") from error


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a row (key, value in each config) for each config key that differs, except run.name."""
    keys = sorted({key for config in configs for key in config} - {"run.name"})
    rows = [[key, *(as_written(config.get(key, "—")) for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
