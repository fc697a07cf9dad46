"""What residue frequencies alone say of variants: the baseline that a model's scores stand beside."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.diffusion.graphs.rates import SWISS_PROT
from protlig_dd.evaluation.likelihood.held_out import training_frequencies
from protlig_dd.evaluation.likelihood.trained_on import own_data
from protlig_dd.evaluation.variants.assays import Assay
from protlig_dd.evaluation.variants.measurements import METRICS, aggregate, judge, spearman
from protlig_dd.evaluation.variants.mutants import Variant
from protlig_dd.inference.model import TrainedModel


class Background(NamedTuple):
    """Residue frequencies."""

    logs: np.ndarray
    """(20,)."""
    name: str
    """Whose they are; the same from wherever a store is opened."""
    told: str
    """The same for the user."""


def background(trained: TrainedModel) -> Background:
    """Frequencies in the training split of the model where its stores are found, else those of Swiss-Prot."""
    stores = own_data([], trained.saved.path, trained.saved.data_fingerprint)
    if stores is None:
        name = "UniProtKB/Swiss-Prot"
        return Background(np.log(SWISS_PROT / SWISS_PROT.sum()), name, f"{name}, as the training set was not found")
    name = f"training split of {stores.fingerprint}"
    return Background(np.log(training_frequencies(stores)), name, f"the training split of {stores.name}")


def composition_scores(variants: Sequence[Variant], target: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """(variants,) sum over substitutions of log f(mutant) - log f(wild type), nats; NaN where there is an insertion or
    deletion, of which frequencies say nothing.

    Args:
        target: (length,) ids of the wild type.
        logs: (20,) log f.
    """

    def of(variant: Variant) -> float:
        if variant.indel is not None:
            return float("nan")
        return float(sum(logs[residue] - logs[target[site]] for site, residue in variant.substitutions))

    return np.array([of(variant) for variant in variants], np.float64)


def beside_composition(assay: Assay, scores: np.ndarray, baseline: np.ndarray, told: str) -> dict[str, Any]:
    """How scores agree with the baseline, and how the baseline, and what scores say beyond it, agree with measurements.

    All over the rows that have a baseline; where others have none, the model's own metrics of these rows are there too.
    """
    known = ~np.isnan(baseline)
    measured, fit = assay.measured[known], assay.fit[known]

    def metrics(values: np.ndarray) -> dict[str, Any]:
        if not len(values):
            return dict.fromkeys(METRICS)
        found = judge(values, measured, fit, [0] * len(values))
        return {name: found[name] for name in METRICS}

    report = {
        "of": told,
        "rows": int(known.sum()),
        "spearman_with_scores": spearman(scores, baseline),
        **metrics(baseline[known]),
        "score_minus_composition": metrics((scores - baseline)[known]),
    }
    if not known.all():
        report["scores_of_the_same_rows"] = metrics(scores[known])
    return report


def composition_line(report: Mapping[str, Any]) -> str:
    """What the user is told of it."""

    def told(metrics: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in ("spearman", "auc") if metrics[name] is not None)

    if not report["rows"]:
        return "composition alone says nothing of insertions and deletions, and there are no other variants"
    agreement = report["spearman_with_scores"]
    parts = [f"Spearman {'not known' if agreement is None else f'{agreement:.4f}'} with the scores"]
    if figures := told(report):
        parts += [f"with the measurements {figures}", f"score - composition {told(report['score_minus_composition'])}"]
    if same := report.get("scores_of_the_same_rows"):
        parts.append(
            f"over the {report['rows']:,} rows without insertion or deletion"
            + (f", where the model has {told(same)}" if told(same) else "")
        )
    return f"composition alone (residue frequencies of {report['of']}): {'; '.join(parts)}"


def aggregate_composition(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ProteinGym's averages of the baseline's metrics, as those of the scores are made."""
    own = [{**one, **{name: one["composition"][name] for name in METRICS}, "by_depth": None} for one in results]
    total = aggregate(own)
    return {name: total[name] for name in METRICS}
