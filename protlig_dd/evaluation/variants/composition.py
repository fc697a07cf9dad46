"""Baseline scores of variants from residue frequencies alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.diffusion.graphs.rates import SWISS_PROT
from protlig_dd.evaluation.likelihood.held_out import training_frequencies
from protlig_dd.evaluation.likelihood.trained_on import find_training_stores
from protlig_dd.evaluation.variants.assays import Assay
from protlig_dd.evaluation.variants.measurements import METRICS, aggregate, judge, spearman
from protlig_dd.evaluation.variants.mutants import Variant
from protlig_dd.inference.model import TrainedModel


class Background(NamedTuple):
    """Residue frequencies of a reference set.

    Args:
        logs: (20,) log frequencies.
        name: name of the reference set, with the fingerprint of the store instead of its path.
        label: name of the reference set for printed lines, with the store's path.
    """

    logs: np.ndarray
    name: str
    label: str


def background(trained: TrainedModel) -> Background:
    """Return the frequencies of the model's training split, or of Swiss-Prot if the model's store is not found."""
    stores = find_training_stores([], trained.saved.path, trained.saved.data_fingerprint)
    if stores is None:
        name = "UniProtKB/Swiss-Prot"
        return Background(np.log(SWISS_PROT / SWISS_PROT.sum()), name, f"{name}, as the training set was not found")
    name = f"training split of {stores.fingerprint}"
    return Background(np.log(training_frequencies(stores)), name, f"the training split of {stores.name}")


def composition_scores(variants: Sequence[Variant], target: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Return the sum over substitutions of log f(mutant) - log f(wild type), (variants,), nats.

    The score of an insertion or deletion is NaN, because this sum is not defined for it.

    Args:
        target: (length,) ids of the wild type.
        logs: (20,) log f.
    """

    def score(variant: Variant) -> float:
        if variant.indel is not None:
            return float("nan")
        return float(sum(logs[residue] - logs[target[site]] for site, residue in variant.substitutions))

    return np.array([score(variant) for variant in variants], np.float64)


def compare_with_composition(assay: Assay, scores: np.ndarray, baseline: np.ndarray, label: str) -> dict[str, Any]:
    """Compare the model's scores with the composition baseline.

    All figures are over the rows with a baseline score, which are the rows without an insertion or deletion. If the
    assay has other rows, the metrics of the model's scores over the rows with a baseline score are included too.

    Args:
        label: name of the reference set, see `Background.label`.

    Returns:
        The rank correlation between the scores and the baseline, the metrics of the baseline against the measurements,
        and the metrics of score - baseline against the measurements.
    """
    known = ~np.isnan(baseline)
    measured, fit = assay.measured[known], assay.fit[known]

    def metrics(values: np.ndarray) -> dict[str, Any]:
        if not len(values):
            return dict.fromkeys(METRICS)
        found = judge(values, measured, fit, [0] * len(values))
        return {name: found[name] for name in METRICS}

    report = {
        "of": label,
        "rows": int(known.sum()),
        "spearman_with_scores": spearman(scores, baseline),
        **metrics(baseline[known]),
        "score_minus_composition": metrics((scores - baseline)[known]),
    }
    if not known.all():
        report["scores_of_the_same_rows"] = metrics(scores[known])
    return report


def composition_line(report: Mapping[str, Any]) -> str:
    """Return the report of `compare_with_composition` as a line to print."""

    def figures(metrics: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in ("spearman", "auc") if metrics[name] is not None)

    if not report["rows"]:
        return "composition alone: no score, because all variants are insertions or deletions"
    agreement = report["spearman_with_scores"]
    parts = [f"Spearman {'undefined' if agreement is None else f'{agreement:.4f}'} with the scores"]
    if text := figures(report):
        parts += [f"with the measurements {text}", f"score - composition {figures(report['score_minus_composition'])}"]
    if same := report.get("scores_of_the_same_rows"):
        parts.append(
            f"over the {report['rows']:,} rows without insertion or deletion"
            + (f", where the model has {figures(same)}" if figures(same) else "")
        )
    return f"composition alone (residue frequencies of {report['of']}): {'; '.join(parts)}"


def aggregate_composition(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ProteinGym's averages (see `aggregate`) of the baseline's metrics."""
    baselines = [
        {**result, **{name: result["composition"][name] for name in METRICS}, "by_depth": None} for result in results
    ]
    total = aggregate(baselines)
    return {name: total[name] for name in METRICS}
