"""What a run folder holds."""

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
from protlig_dd.system.tables import read_json

PAGE, CONFIG, METRICS = "report.html", "config.yaml", "metrics.jsonl"
BOUNDS = ("nll", "unigram_nll", "difference")
WRITTEN = {  # keys that the file has of any run
    "report.json": ("split", "step", "sequences", "residues", *BOUNDS, *(f"{key}_se" for key in BOUNDS)),
    "judges.json": ("samples", "natural", "rows"),
}


@dataclass(frozen=True)
class Run:
    """What a run folder holds; empty where there is nothing."""

    folder: Path
    config: dict[str, Any]
    """Flat: {"optim.lr": 0.001, ...}."""
    environment: dict[str, Any]
    metrics: dict[int, dict[str, Any]]
    report: dict[str, Any]
    samples: list[FastaRecord]
    judges: dict[str, Any]
    """`rows`, and of what: the files of `samples` and of `natural` proteins."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        return max(self.metrics, default=0)

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key, where it has a finite value."""
        found = [(step, row[key]) for step, row in sorted(self.metrics.items()) if row.get(key) is not None]
        return [float(step) for step, _ in found], [float(value) for _, value in found]

    @property
    def bounds(self) -> tuple[str, dict[str, Any]]:
        """Of what proteins, and the figures: of the report, or of the last validation where there is none yet."""
        if self.report:
            return f"{self.report['split']} set", with_nan(self.report)
        steps, _ = self.column("val_nll")
        if not steps:
            return "", {}
        row = self.metrics[int(steps[-1])]
        return "validation set", with_nan({key.removeprefix("val_"): value for key, value in row.items()})


def read_run(folder: Path) -> Run:
    """Read what a run folder holds.

    Raises:
        ValueError: no run folder, or a file in it that cannot be read, named.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no run folder: it has no {CONFIG}")
    report, judges = (read_json(folder / name, keys) for name, keys in WRITTEN.items())
    rows = judges.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise ValueError(f"{folder / 'judges.json'}: want rows with name, {', '.join(SETS)}")
    said = judges.get("verdicts", [])  # earlier versions wrote none
    if not isinstance(said, list) or not all(isinstance(one, dict) and {"group", "told"} <= one.keys() for one in said):
        raise ValueError(f"{folder / 'judges.json'}: want verdicts with group and told")
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
    """(id, residues, nats of its bound) of each protein that the report scored; [] where there is no report.

    Raises:
        ValueError: a file that protlig_dd has not written, named.
    """
    path = run.folder / "report.csv"
    if not run.report or not path.is_file():
        return []
    try:
        rows = csv.DictReader(path.read_text().splitlines())
        return [(row["id"], int(row["residues"]), float(row["nll_nats"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what protlig_dd has written ({error!r})") from error


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Key and values of all config keys that are not the same everywhere; run.name is none of them."""
    keys = sorted({key for config in configs for key in config} - {"run.name"})
    rows = [[key, *(str(config.get(key, "—")) for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
