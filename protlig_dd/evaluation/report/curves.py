"""Training curves, and histograms of lengths and composition."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from protlig_dd.evaluation.report.plots import Series, plot, smooth, thin
from protlig_dd.evaluation.report.run import Run
from protlig_dd.tokenizer import AMINO_ACIDS

SMOOTHED = 12.0  # a smoothed curve is a moving average over about this many points
CURVES = (  # key of metrics.jsonl, title, unit, factor that converts the value to the unit
    ("lr", "Learning rate", "", 1.0),
    ("residues_per_s", "Speed", "residues/s", 1.0),
    ("grad_norm", "Gradient norm", "", 1.0),
    ("mfu", "Model FLOPs utilisation", "%", 100.0),
)
NATS = "nats/residue"


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return a label for each run: the name of its folder, or the path of the folder if several runs have this name."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]


def curves(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Markup]:
    """Return the plots of the values in metrics.jsonl.

    Noisy values, such as the loss, are smoothed. The page of one run also shows the values before smoothing.

    Args:
        names: labels of the runs, for the page that compares runs. None: the page of one run.
    """

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
        errors = [run.metrics[int(step)].get("val_nll_se") or 0.0 for step in x]  # val_nll_se is null for one protein
        return Series(name, x, y, colour, errors=errors)

    if names is None:
        (run,) = runs
        # a loss with capped weights is not a bound, so its label must mention the cap
        loss = "loss, weights capped, " if has_capped_weights(run) else "loss, "
        plots = [
            plot(
                "Loss and validation bound",
                NATS,
                [*raw_and_smooth(run, "loss", loss, 0), validation(run, "validation bound", 1)],
            )
        ]
    else:
        named = list(enumerate(zip(runs, names, strict=True)))
        losses = [curve for i, (run, name) in named for curve in raw_and_smooth(run, "loss", name, i)]
        plots = [
            plot("Loss, smoothed", NATS, losses),
            plot("Validation bound", NATS, [validation(run, name, i) for i, (run, name) in named]),
        ]
    for key, title, unit, factor in CURVES:
        if key in ("lr", "residues_per_s"):
            lines = [Series((names or [title])[i], *thin(*run.column(key)), i) for i, run in enumerate(runs)]
        else:
            lines = [
                curve for i, run in enumerate(runs) for curve in raw_and_smooth(run, key, (names or [""])[i], i, factor)
            ]
        plots.append(plot(title, unit, lines, from_zero=key != "grad_norm"))
    return [figure for figure in plots if figure]


def has_capped_weights(run: Run) -> bool:
    """Whether noise.max_weight caps the weights of the training loss, so that the loss differs from the bound."""
    max_weight = run.config.get("noise.max_weight")
    return max_weight is not None and (max_weight != "auto" or run.config.get("graph.name") == "absorbing")


def shapes(run: Run) -> list[Markup]:
    """Return plots that compare the lengths and the composition of the training split and the samples."""
    training = run.report.get("training")
    if not training:
        return []
    width, counts = training["length_bin"], np.array(training["length_counts"])
    middles = [width * (i + 0.5) for i in range(len(counts))]
    lengths = [Series("training split", middles, (100 * counts / counts.sum()).tolist(), 7, "bars")]
    percentages = [training["composition"][letter] * 100 for letter in AMINO_ACIDS]
    positions = np.arange(float(len(AMINO_ACIDS))).tolist()
    composition = [Series("training split", positions, percentages, 7, "bars")]
    if run.samples:
        name = f"{len(run.samples)} samples"
        binned = [len(record.sequence) // width for record in run.samples]
        bins = np.bincount(binned, minlength=len(counts))[: len(counts)]
        lengths.append(Series(name, middles, (100 * bins / len(run.samples)).tolist(), 0, "steps"))
        letters = Counter("".join(record.sequence for record in run.samples))
        total = sum(letters[letter] for letter in AMINO_ACIDS)
        percentages = [100 * letters[letter] / total for letter in AMINO_ACIDS]
        composition.append(Series(name, positions, percentages, 0, "dots"))
    x_name = f"residues, at most {run.report['max_len']}"
    if training.get("cropped"):
        x_name += f"; {training['cropped']:,} longer proteins left out"
    return [
        plot("Length", "% of proteins", lengths, x_name=x_name, from_zero=True),
        plot("Composition", "% of residues", composition, labels=list(AMINO_ACIDS), from_zero=True),
    ]
