"""A run as one page of HTML that needs nothing else: bounds, curves, samples, config; and several runs compared.

A page is made from the run folder alone, of whatever is there: a run that was stopped has no report.json yet.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protlig_dd.config.read import flatten
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

MOST_PROTEINS = 12


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
        )
        + (f" · {device} in {run.environment.get('precision')}" if device else ""),
        notices=notices,
        figures=headline(run, what, bounds),
        bounds=bounds_section(what, bounds, run.environment.get("data_path")),
        curves=curves([run]),
        shapes=shapes(run),
        judges=judges_section(run),
        proteins=[protein(record) for record in run.samples[:MOST_PROTEINS]],
        more=f"{len(run.samples) - MOST_PROTEINS} more in {run.report['samples']}"
        if len(run.samples) > MOST_PROTEINS
        else "",
        records=[(name, rows) for name, rows in records if rows],
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """The page that sets runs side by side."""
    names = labels_of(runs)
    found = [run.bounds for run in runs]
    scored = {
        (what, bounds["sequences"], bounds["residues"], run.environment.get("data_fingerprint"))
        for run, (what, bounds) in zip(runs, found, strict=True)
        if bounds
    }
    estimates = [
        Estimate(name, bounds["nll"], bounds["nll_se"], i)
        for i, (name, (_, bounds)) in enumerate(zip(names, found, strict=True))
        if bounds
    ]
    nats = [nats_of_proteins(run) for run in runs]
    rows = [
        [
            name,
            what,
            *with_error(bounds, "nll"),
            *paired(own, nats[0]),
            *with_error(bounds, "unigram_nll"),
            *with_error(bounds, "difference"),
            f"{bounds['step']:,}",
            f"{bounds['sequences']:,}",
        ]
        for name, own, (what, bounds) in zip(names, nats, found, strict=True)
        if bounds
    ]
    head = [
        "run",
        "on",
        "bound",
        "± SE",
        "minus the first",
        "± SE",
        "unigram",
        "± SE",
        "minus unigram",
        "± SE",
        "step",
        "proteins",
    ]
    return render(
        title="Comparison of runs" if len(runs) > 1 else runs[0].name,
        subtitle=", ".join(names),
        notices=["The bounds are not of the same proteins: compare each with its own unigram model."]
        if len(scored) > 1
        else [],
        bounds={
            "plot": dot_plot("Bound", NATS, estimates),
            "head": head,
            "rows": rows,
            "wide": True,
            "note": "Nats per residue, averaged weights. Bars are two standard errors each way; the difference to "
            "the first run is paired, protein by protein, and more certain than the bars say. It is left out where "
            "the proteins are not the same. Each unigram model is that of its run's own training split: "
            + "; ".join(
                f"{name}: {run.environment.get('data_path', 'unknown')}" for name, run in zip(names, runs, strict=True)
            )
            + ".",
        }
        if rows
        else None,
        curves=curves(runs, names),
        differing={"head": ["key", *names], "rows": differing_keys([run.config for run in runs])},
    )


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
