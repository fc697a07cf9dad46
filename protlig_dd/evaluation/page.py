"""A run as one page of HTML that needs nothing else: bounds, curves, samples, config; and several runs compared.

A page is made from the run folder alone, of whatever is there: a run that was stopped has no report.json yet.
"""

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from omegaconf import OmegaConf

from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.diffusion.likelihood import per_residue
from protlig_dd.evaluation.judges import SETS, Figure, written
from protlig_dd.evaluation.plots import Estimate, Series, dot_plot, plot, smooth, thin
from protlig_dd.runtime.config import flatten
from protlig_dd.runtime.files import write_atomic
from protlig_dd.runtime.metrics import read_metrics, with_nan
from protlig_dd.tokenizer import AMINO_ACIDS

PAGE, CONFIG, METRICS = "report.html", "config.yaml", "metrics.jsonl"
LINE = 60  # residues
MOST_PROTEINS = 12
SMOOTHED = 12.0  # points of a curve that its mean spans
RESIDUE_CLASSES = (
    ("aliphatic", "AVILM"),
    ("aromatic", "FWY"),
    ("polar", "STNQ"),
    ("positive", "KRH"),
    ("negative", "DE"),
    ("special", "CGP"),
)
CLASS_OF = {letter: name for name, letters in RESIDUE_CLASSES for letter in letters}
CURVES = (  # of metrics.jsonl: key, title, unit, factor
    ("lr", "Learning rate", "", 1.0),
    ("residues_per_s", "Speed", "residues/s", 1.0),
    ("grad_norm", "Gradient norm", "", 1.0),
    ("mfu", "Model FLOPs utilisation", "%", 100.0),
)
NATS = "nats/residue"
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


def read_json(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object in a file; {} where there is no file.

    Raises:
        ValueError: something else, or one without one of these keys; names the file.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        wanted = f"an object with {', '.join(keys)}" if keys else "an object"
        raise ValueError(f"{path}: not what protlig_dd has written, {wanted}")
    return found


def write_run_page(folder: Path) -> Path:
    """Make a run's report.html, or make it again."""
    path = folder / PAGE
    write_atomic(path, run_page(read_run(folder)))
    return path


def run_page(run: Run) -> str:
    """The page of one run."""
    what, bounds = run.bounds
    wanted, device = run.config.get("trainer.max_steps"), run.environment.get("device", "")
    made, notices = f"This run has made {run.last_step:,} steps{f' of {wanted:,}' if wanted else ''}", []
    if not run.report:
        notices = [f"{made} and has no report yet."]
    elif run.metrics and run.report["step"] != run.last_step:
        notices = [f"{made}; its report, the bound and the samples, is of step {run.report['step']:,}."]
    leaks = run.report.get("in_training") or {}
    if copies := leaks.get("copies"):
        many = f"{copies:,} of {run.report['sequences']:,} proteins of the {run.report['split']} set"
        notice = f"{many} are exact copies of proteins that trained the model, and are in its bound."
        if leaks.get("others"):
            clean = with_nan(leaks["others"])
            difference = f"{clean['difference']:+.4f}".replace("-", "−")
            notice += (
                f" Over the {clean['sequences']:,} others it is {clean['nll']:.4f} {plus_minus(clean['nll_se'])}, and "
                f"{difference} {plus_minus(clean['difference_se'])} against the unigram model."
            )
        notices.append(notice)
    records = [("config.yaml", [*run.config.items()]), ("environment.json", [*flatten(run.environment).items()])]
    return render(
        title=run.name,
        subtitle=" · ".join(
            f"{run.config[key]} {name}"
            for key, name in (("graph.name", "diffusion"), ("noise.name", "noise"), ("optim.name", "optimizer"))
            if key in run.config
        ) + (f" · {device} in {run.environment.get('precision')}" if device else ""),
        notices=notices,
        figures=headline(run, what, bounds),
        bounds=bounds_section(what, bounds, run.environment.get("data_path")),
        curves=curves([run]),
        shapes=shapes(run),
        judges=judges_section(run),
        proteins=[protein(record) for record in run.samples[:MOST_PROTEINS]],
        more=f"{len(run.samples) - MOST_PROTEINS} more in {run.report['samples']}"
        if len(run.samples) > MOST_PROTEINS else "",
        records=[(name, rows) for name, rows in records if rows],
    )  # fmt: skip


def comparison_page(runs: Sequence[Run]) -> str:
    """The page that sets runs side by side."""
    names = labels_of(runs)
    found = [run.bounds for run in runs]
    scored = {
        (what, bounds["sequences"], bounds["residues"], run.environment.get("data_fingerprint"))
        for run, (what, bounds) in zip(runs, found, strict=True)
        if bounds
    }
    estimates = [Estimate(name, bounds["nll"], bounds["nll_se"], i)
                 for i, (name, (_, bounds)) in enumerate(zip(names, found, strict=True)) if bounds]  # fmt: skip
    nats = [nats_of_proteins(run) for run in runs]
    rows = [
        [name, what, *with_error(bounds, "nll"), *paired(own, nats[0]), *with_error(bounds, "unigram_nll"),
         *with_error(bounds, "difference"), f"{bounds['step']:,}", f"{bounds['sequences']:,}"]
        for name, own, (what, bounds) in zip(names, nats, found, strict=True) if bounds
    ]  # fmt: skip
    head = ["run", "on", "bound", "± SE", "minus the first", "± SE", "unigram", "± SE", "minus unigram", "± SE",
            "step", "proteins"]  # fmt: skip
    return render(
        title="Comparison of runs" if len(runs) > 1 else runs[0].name,
        subtitle=", ".join(names),
        notices=["The bounds are not of the same proteins: compare each with its own unigram model."]
        if len(scored) > 1 else [],
        bounds={"plot": dot_plot("Bound", NATS, estimates), "head": head, "rows": rows, "wide": True,
                "note": "Nats per residue, averaged weights. Bars are two standard errors each way; the difference to "
                "the first run is paired, protein by protein, and more certain than the bars say. It is left out where "
                "the proteins are not the same. Each unigram model is that of its run's own training split: "
                + "; ".join(f"{name}: {run.environment.get('data_path', 'unknown')}"
                            for name, run in zip(names, runs, strict=True)) + "."}
        if rows else None,
        curves=curves(runs, names),
        differing={"head": ["key", *names], "rows": differing_keys([run.config for run in runs])},
    )  # fmt: skip


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


def paired(own: list[tuple[str, int, float]], first: list[tuple[str, int, float]]) -> list[str]:
    """The difference to the first run a residue and its standard error; empty cells where the proteins differ."""
    if own is first or not own or [row[:2] for row in own] != [row[:2] for row in first]:
        return ["", ""]
    nats = np.array([mine[2] - other[2] for mine, other in zip(own, first, strict=True)])
    difference, error = per_residue(nats, np.array([row[1] for row in own]))
    return with_error({"d": difference, "d_se": error}, "d")


def render(**content: Any) -> str:
    """Fill the template; everything but what this package wrote as Markup is escaped."""
    import jinja2  # only where a page is written

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    return environment.get_template("page.html.jinja").render(classes=RESIDUE_CLASSES, **content)


def labels_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or their paths where names repeat."""
    seen = Counter(run.name for run in runs)
    return [run.name if seen[run.name] == 1 else str(run.folder) for run in runs]


def headline(run: Run, what: str, bounds: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, note) of the figures that matter most."""
    found = []
    if bounds:
        found = [
            (f"Bound, {what}", f"{bounds['nll']:.4f}", f"{plus_minus(bounds['nll_se'])} {NATS}"),
            ("Against the unigram model", f"{bounds['difference']:+.4f}".replace("-", "−"),
             f"{plus_minus(bounds['difference_se'])} {NATS}, paired"),
        ]  # fmt: skip
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


def curves(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Markup]:
    """The plots of metrics.jsonl: of one run with its raw values, of several (given names) with smoothed ones alone."""

    def raw_and_smooth(run: Run, key: str, name: str, colour: int, factor: float = 1.0) -> list[Series]:
        x, y = thin(*run.column(key))
        y = [value * factor for value in y]
        if names:
            return [Series(name, x, smooth(y, SMOOTHED), colour)]
        return [Series(f"{name}each step", x, y, colour, "faint"),
                Series(f"{name}smoothed", x, smooth(y, SMOOTHED), colour)]  # fmt: skip

    def validation(run: Run, name: str, colour: int) -> Series:
        x, y = run.column("val_nll")
        errors = [run.metrics[int(step)].get("val_nll_se") or 0.0 for step in x]  # null of a single protein
        return Series(name, x, y, colour, errors=errors)

    if names is None:
        (run,) = runs
        loss = "loss, weights capped, " if has_capped_weights(run) else "loss, "  # which is no bound
        plots = [plot("Loss and validation bound", NATS, [*raw_and_smooth(run, "loss", loss, 0),
                                                          validation(run, "validation bound", 1)])]  # fmt: skip
    else:
        named = list(enumerate(zip(runs, names, strict=True)))
        losses = [one for i, (run, name) in named for one in raw_and_smooth(run, "loss", name, i)]
        plots = [plot("Loss, smoothed", NATS, losses),
                 plot("Validation bound", NATS, [validation(run, name, i) for i, (run, name) in named])]  # fmt: skip
    for key, title, unit, factor in CURVES:
        if key in ("lr", "residues_per_s"):
            lines = [Series((names or [title])[i], *thin(*run.column(key)), i) for i, run in enumerate(runs)]
        else:
            lines = [one for i, run in enumerate(runs)
                     for one in raw_and_smooth(run, key, (names or [""])[i], i, factor)]  # fmt: skip
        plots.append(plot(title, unit, lines, from_zero=key != "grad_norm"))
    return [one for one in plots if one]


def has_capped_weights(run: Run) -> bool:
    """Whether the training loss has other weights than the bound (noise.max_weight)."""
    wanted = run.config.get("noise.max_weight")
    return wanted is not None and (wanted != "auto" or run.config.get("graph.name") == "absorbing")


def shapes(run: Run) -> list[Markup]:
    """Lengths and composition of the training split beside the samples'."""
    training = run.report.get("training")
    if not training:
        return []
    width, counts = training["length_bin"], np.array(training["length_counts"])
    middles = [width * (i + 0.5) for i in range(len(counts))]
    lengths = [Series("training split", middles, (100 * counts / counts.sum()).tolist(), 7, "bars")]
    shares = [training["composition"][letter] * 100 for letter in AMINO_ACIDS]
    places = np.arange(float(len(AMINO_ACIDS))).tolist()
    composition = [Series("training split", places, shares, 7, "bars")]
    if run.samples:
        name = f"{len(run.samples)} samples"
        bins = np.bincount([len(one.sequence) // width for one in run.samples], minlength=len(counts))[: len(counts)]
        lengths.append(Series(name, middles, (100 * bins / len(run.samples)).tolist(), 0, "steps"))
        letters = Counter("".join(one.sequence for one in run.samples))
        total = sum(letters[letter] for letter in AMINO_ACIDS)
        drawn = [100 * letters[letter] / total for letter in AMINO_ACIDS]
        composition.append(Series(name, places, drawn, 0, "dots"))
    x_name = f"residues, at most {run.report['max_len']}"
    if training.get("cropped"):
        x_name += f"; {training['cropped']:,} longer proteins are left out"
    return [
        plot("Length", "% of proteins", lengths, x_name=x_name, from_zero=True),
        plot("Composition", "% of residues", composition, labels=list(AMINO_ACIDS), from_zero=True),
    ]


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
        "title": "What judges say", "note": f"{note}, and those shuffled.", "verdicts": verdicts,
        "head": ["judge", *SETS], "rows": rows,
    }  # fmt: skip


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


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Key and values of all config keys that are not the same everywhere; run.name is none of them."""
    keys = sorted({key for config in configs for key in config} - {"run.name"})
    rows = [[key, *(str(config.get(key, "—")) for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
