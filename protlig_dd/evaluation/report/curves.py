"""The curves and histograms of runs."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from protlig_dd.evaluation.report.plots import Series, plot, smooth, thin
from protlig_dd.evaluation.report.run import Run
from protlig_dd.tokenizer import AMINO_ACIDS

SMOOTHED = 12.0  # points of a curve that its mean spans
CURVES = (  # of metrics.jsonl: key, title, unit, factor
    ("lr", "Learning rate", "", 1.0),
    ("residues_per_s", "Speed", "residues/s", 1.0),
    ("grad_norm", "Gradient norm", "", 1.0),
    ("mfu", "Model FLOPs utilisation", "%", 100.0),
)
NATS = "nats/residue"


def labels_of(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or their paths where names repeat."""
    seen = Counter(run.name for run in runs)
    return [run.name if seen[run.name] == 1 else str(run.folder) for run in runs]


def curves(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Markup]:
    """The plots of metrics.jsonl: of one run with its raw values, of several (given names) with smoothed ones alone."""

    def raw_and_smooth(run: Run, key: str, name: str, colour: int, factor: float = 1.0) -> list[Series]:
        x, y = thin(*run.column(key))
        y = [value * factor for value in y]
        if names:
            return [Series(name, x, smooth(y, SMOOTHED), colour)]
        return [
            Series(f"{name}each step", x, y, colour, "faint"),
            Series(f"{name}smoothed", x, smooth(y, SMOOTHED), colour),
        ]

    def validation(run: Run, name: str, colour: int) -> Series:
        x, y = run.column("val_nll")
        errors = [run.metrics[int(step)].get("val_nll_se") or 0.0 for step in x]  # null of a single protein
        return Series(name, x, y, colour, errors=errors)

    if names is None:
        (run,) = runs
        loss = "loss, weights capped, " if has_capped_weights(run) else "loss, "  # which is no bound
        plots = [
            plot(
                "Loss and validation bound",
                NATS,
                [*raw_and_smooth(run, "loss", loss, 0), validation(run, "validation bound", 1)],
            )
        ]
    else:
        named = list(enumerate(zip(runs, names, strict=True)))
        losses = [one for i, (run, name) in named for one in raw_and_smooth(run, "loss", name, i)]
        plots = [
            plot("Loss, smoothed", NATS, losses),
            plot("Validation bound", NATS, [validation(run, name, i) for i, (run, name) in named]),
        ]
    for key, title, unit, factor in CURVES:
        if key in ("lr", "residues_per_s"):
            lines = [Series((names or [title])[i], *thin(*run.column(key)), i) for i, run in enumerate(runs)]
        else:
            lines = [
                one for i, run in enumerate(runs) for one in raw_and_smooth(run, key, (names or [""])[i], i, factor)
            ]
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
