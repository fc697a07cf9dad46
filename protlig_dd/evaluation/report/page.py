"""The HTML page of one run (bounds, curves, samples, config), and the HTML page that compares several runs.

A page is one self-contained file. It is built from the files in the run folders, and any of these files except
config.yaml may be missing. For example, a run that was stopped early has no report.json yet.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from protlig_dd.config.read import defaults_of, flatten
from protlig_dd.config.train import TrainConfig
from protlig_dd.evaluation.report.curves import NATS, curves, labels_of, shapes
from protlig_dd.evaluation.report.plots import Estimate, dot_plot
from protlig_dd.evaluation.report.run import PAGE, Run, differing_keys, nats_of_proteins, read_run
from protlig_dd.evaluation.report.sections import (
    RESIDUE_CLASSES,
    bounds_section,
    headline,
    judges_section,
    paired,
    plus_minus,
    protein,
    with_error,
)
from protlig_dd.runs.metrics import with_nan
from protlig_dd.system.files import write_atomic
from protlig_dd.system.tables import as_written

MAX_PROTEINS = 12


def write_run_page(folder: Path) -> Path:
    """Write a run's report.html, replacing an earlier one, and return its path."""
    path = folder / PAGE
    write_atomic(path, run_page(read_run(folder)))
    return path


def run_page(run: Run) -> str:
    """Return the HTML page of one run."""
    protein_set, bounds = run.bounds
    max_steps, device = run.config.get("trainer.max_steps"), run.environment.get("device", "")
    progress = f"{run.last_step:,} of {max_steps:,} steps" if max_steps else f"{run.last_step:,} steps"
    notices = []
    if not run.report:
        notices = [f"This run has completed {progress} and has no report yet."]
    elif run.metrics and run.report["step"] != run.last_step:
        notices = [
            f"This run has completed {progress}. Its report (the bound and the samples) is from step "
            f"{run.report['step']:,}."
        ]
    leaks = run.report.get("in_training") or {}
    if copies := leaks.get("copies"):
        notice = (
            f"{copies:,} of {run.report['sequences']:,} proteins of the {run.report['split']} set are exact copies of "
            "proteins the model was trained on. The bound includes them."
        )
        if leaks.get("others"):
            others = with_nan(leaks["others"])
            difference = f"{others['difference']:+.4f}".replace("-", "−")
            notice += (
                f" Over the other {others['sequences']:,} proteins the bound is {others['nll']:.4f} "
                f"{plus_minus(others['nll_se'])}, and its difference to the unigram model is "
                f"{difference} {plus_minus(others['difference_se'])}."
            )
        notices.append(notice)
    sources = {"config.yaml": run.config, "environment.json": flatten(run.environment)}
    records = [(name, [(key, as_written(value)) for key, value in found.items()]) for name, found in sources.items()]
    return render(
        title=run.name,
        subtitle=" · ".join(
            f"{run.config[key]} {name}"
            for key, name in (("graph.name", "diffusion"), ("noise.name", "noise"), ("optim.name", "optimizer"))
            if key in run.config
        )
        + (f" · {device}, {run.environment.get('precision')}" if device else ""),
        notices=notices,
        figures=headline(run, protein_set, bounds),
        bounds=bounds_section(protein_set, bounds, run.environment.get("data_path")),
        curves=curves([run]),
        shapes=shapes(run),
        judges=judges_section(run),
        proteins=[protein(record) for record in run.samples[:MAX_PROTEINS]],
        more=f"{len(run.samples) - MAX_PROTEINS} more in {run.report['samples']}"
        if len(run.samples) > MAX_PROTEINS
        else "",
        records=[(name, rows) for name, rows in records if rows],
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the HTML page that compares several runs."""
    names = labels_of(runs)
    defaults = defaults_of(TrainConfig)  # config.yaml may leave out the keys that have a default
    all_bounds = [run.bounds for run in runs]
    protein_sets = {
        (
            protein_set,
            bounds["sequences"],
            bounds["residues"],
            run.environment.get("data_fingerprint"),
            bounds.get("context"),
        )
        for run, (protein_set, bounds) in zip(runs, all_bounds, strict=True)
        if bounds
    }
    estimates = [
        Estimate(name, bounds["nll"], bounds["nll_se"], i)
        for i, (name, (_, bounds)) in enumerate(zip(names, all_bounds, strict=True))
        if bounds
    ]
    first_context = all_bounds[0][1].get("context")
    nats = [
        nats_of_proteins(run) if bounds.get("context") == first_context else []
        for run, (_, bounds) in zip(runs, all_bounds, strict=True)
    ]
    rows = [
        [
            name,
            protein_set + (f", given the {bounds['context']}-case residues" if "context" in bounds else ""),
            *with_error(bounds, "nll"),
            *paired(run_nats, nats[0]),
            *with_error(bounds, "unigram_nll"),
            *with_error(bounds, "difference"),
            f"{bounds['step']:,}",
            f"{bounds['sequences']:,}",
        ]
        for name, run_nats, (protein_set, bounds) in zip(names, nats, all_bounds, strict=True)
        if bounds
    ]
    head = [
        "run",
        "protein set",
        "bound",
        "± SE",
        "bound − first run",
        "± SE",
        "unigram",
        "± SE",
        "bound − unigram",
        "± SE",
        "step",
        "proteins",
    ]
    return render(
        title="Comparison of runs" if len(runs) > 1 else runs[0].name,
        subtitle=", ".join(names),
        notices=notices_of_comparison(protein_sets, {bounds.get("context") for _, bounds in all_bounds if bounds}),
        bounds={
            "plot": dot_plot("Bound", NATS, estimates),
            "head": head,
            "rows": rows,
            "wide": True,
            "note": "Bounds are in nats per residue, computed with the moving average of the network's weights. "
            "Lower is better. Bars extend two standard errors to each side. "
            "The difference to the first run is paired, protein by protein, so it is more precise than the bars "
            "suggest. It is blank for a run that was evaluated on other proteins or with another data.context. "
            "Each unigram model has the amino-acid frequencies of its run's training split. Data of the runs: "
            + "; ".join(
                f"{name}: {run.environment.get('data_path', 'unknown')}" for name, run in zip(names, runs, strict=True)
            )
            + ".",
        }
        if rows
        else None,
        curves=curves(runs, names),
        differing={"head": ["key", *names], "rows": differing_keys([defaults | run.config for run in runs])},
    )


def notices_of_comparison(protein_sets: Collection[object], contexts: Collection[str | None]) -> list[str]:
    """Return the notices for the reader if the bounds of the runs cannot be compared with each other; else []."""
    notices = []
    if len(contexts) > 1:
        notices.append(
            "The runs differ in data.context, so their bounds count different residues and cannot be compared. With "
            "data.context=lower or upper, a bound counts only the residues that are not context."
        )
    elif len(protein_sets) > 1:
        notices.append(
            "The runs were evaluated on different proteins: compare each bound with the unigram model of the same run."
        )
    return notices


def render(**content: Any) -> str:
    """Fill the page template. Jinja escapes every string that is not Markup."""
    import jinja2  # imported here, as most commands write no page

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    return environment.get_template("page.html.jinja").render(classes=RESIDUE_CLASSES, **content)
