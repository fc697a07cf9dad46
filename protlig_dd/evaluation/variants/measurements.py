"""Agreement of scores with measurements, by ProteinGym's metrics (Notin et al. 2023, performance_DMS_benchmarks.py).

    spearman     Spearman's rank correlation with the measurements
    auc          probability that a fit variant scores above an unfit one
    mcc          Matthews correlation of the fitness label with "score at least the median"
    ndcg         normalised discounted cumulative gain of the 10% of the variants with the highest scores; a variant's
                 gain is its measurement scaled to 0..1, divided by log2(rank + 1)
    top_recall   of the 10% of the variants with the highest measurements, the fraction that is also among the 10% with
                 the highest scores

A metric is None if it is not defined, for example for too few variants or without measurements.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

METRICS = ("spearman", "auc", "mcc", "ndcg", "top_recall")
DEPTHS = ("1", "2", "3", "4", "5+")
BOOTSTRAP = 10_000

Metrics = dict[str, float | None]


def metrics_of(scores: np.ndarray, measured: np.ndarray, fit: np.ndarray, high: np.ndarray) -> Metrics:
    """Return all metrics. Each metric is computed over the rows that have the measurement or label that it needs.

    Args:
        scores: (rows,).
        measured: (rows,); NaN if missing.
        fit: (rows,) 1 or 0; NaN if missing.
        high: (rows,) whether the score is at least the median score of all rows of the assay that have a label.
    """
    known = ~np.isnan(measured)
    known_scores, known_measured = scores[known], measured[known]
    return {
        "spearman": spearman(scores, measured),
        "auc": auc(scores, fit),
        "mcc": matthews(high, fit),
        "ndcg": ndcg(known_scores, known_measured),
        "top_recall": top_recall(known_scores, known_measured),
    }


def judge(scores: np.ndarray, measured: np.ndarray, fit: np.ndarray, changed: Sequence[int]) -> dict[str, Any]:
    """Return the metrics of an assay, and under `by_depth` the metrics of its rows with 1, 2, 3, 4 or 5+ substitutions.

    Args:
        changed: number of substitutions in each row.
    """
    labelled = ~np.isnan(fit)
    high = scores >= np.median(scores[labelled] if labelled.any() else scores)
    by_depth = {}
    for depth in DEPTHS:
        inside = np.array([depth == ("5+" if n > 4 else str(n)) for n in changed], bool)
        if (inside & ~np.isnan(measured)).any():
            by_depth[depth] = metrics_of(scores[inside], measured[inside], fit[inside], high[inside])
    return {**metrics_of(scores, measured, fit, high), "by_depth": by_depth}


def spearman(scores: np.ndarray, measured: np.ndarray) -> float | None:
    """Return Spearman's rank correlation over the measured rows; None if scores or measurements are all equal."""
    known = ~np.isnan(measured)
    if not known.any() or np.ptp(scores[known]) == 0 or np.ptp(measured[known]) == 0:
        return None
    from scipy.stats import spearmanr  # imported here because it takes a second

    return float(spearmanr(scores[known], measured[known]).statistic)


def auc(scores: np.ndarray, fit: np.ndarray) -> float | None:
    """Return the area under the ROC curve, with ties counted as a half; None unless both labels occur."""
    positive, negative = fit == 1, fit == 0
    if not positive.any() or not negative.any():
        return None
    from scipy.stats import mannwhitneyu

    wins = mannwhitneyu(scores[positive], scores[negative], method="asymptotic").statistic
    return float(wins / (positive.sum() * negative.sum()))


def matthews(high: np.ndarray, fit: np.ndarray) -> float | None:
    """Return the Matthews correlation; 0 if `high` is constant (sklearn's convention), None if `fit` is constant."""
    known = ~np.isnan(fit)
    predicted, true = high[known].astype(float), fit[known]
    if not known.any() or np.ptp(true) == 0:
        return None
    return 0.0 if np.ptp(predicted) == 0 else float(np.corrcoef(predicted, true)[0, 1])


def ndcg(scores: np.ndarray, measured: np.ndarray) -> float | None:
    """Return the normalised discounted cumulative gain of the 10% of the rows with the highest scores."""
    top = len(scores) // 10
    if not top or np.ptp(measured) == 0:
        return None
    gains = (measured - measured.min()) / np.ptp(measured)
    discounts = np.log2(np.arange(top) + 2)
    selected = gains[np.argsort(-scores, kind="stable")[:top]]
    best = np.sort(gains)[::-1][:top]
    return float((selected / discounts).sum() / (best / discounts).sum())


def top_recall(scores: np.ndarray, measured: np.ndarray) -> float | None:
    """Return the fraction of the rows in the top 10% by measurement that are also in the top 10% by score.

    The top 10% are the rows at or above the 90th percentile, so with ties there may be more of them.
    """
    if not len(scores) or np.ptp(measured) == 0:
        return None
    best, selected = (values >= np.percentile(values, 90) for values in (measured, scores))
    return float((best & selected).sum() / best.sum())


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return ProteinGym's averages of the metrics.

    Within each type of assay, the metrics are averaged over the assays of each protein, then over proteins. The overall
    average is over the types.

    Args:
        results: for each assay: UniProt_ID, coarse_selection_type (the type) and METRICS. Metrics that are None are
            left out of averages. Optional keys are MSA_Neff_L_category, taxon and by_depth (see `judge`). For each
            value of MSA_Neff_L_category and of taxon, the assays with this value are averaged like those of a type. The
            metrics in by_depth are averaged by `depth_averages`.
    """
    by_type = {kind: averages(group) for kind, group in group_by(results, "coarse_selection_type").items()}
    overall = {metric: mean(values[metric] for values in by_type.values()) for metric in METRICS}
    errors = {f"{metric}_se": bootstrap_error(results, metric) for metric in METRICS}
    total: dict[str, Any] = {**overall, **errors, "assays": len(results), "by_type": by_type}
    for name, column in (("by_msa_depth", "MSA_Neff_L_category"), ("by_taxon", "taxon")):
        known = [result for result in results if result.get(column)]
        if known:
            total[name] = {kind: averages(group) for kind, group in group_by(known, column).items()}
    depths = {depth: [result for result in results if depth in (result.get("by_depth") or {})] for depth in DEPTHS}
    total["by_mutation_depth"] = {depth: depth_averages(group, depth) for depth, group in depths.items() if group}
    return total


def group_by(results: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return {value: results with this value of the key}, with the values in alphabetical order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(str(result[key]), []).append(result)
    return dict(sorted(groups.items()))


def averages(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics averaged over the assays of each protein, then over proteins."""
    proteins = group_by(results, "UniProt_ID").values()
    found: dict[str, Any] = {
        metric: mean(mean(result[metric] for result in protein) for protein in proteins) for metric in METRICS
    }
    return found | {"assays": len(results), "proteins": len(proteins)}


def depth_averages(results: Sequence[Mapping[str, Any]], depth: str) -> dict[str, Any]:
    """Return the metrics at one depth, averaged over the assays of each (protein, type), then over these pairs.

    Args:
        depth: the number of substitutions, one of DEPTHS. Each of `results` has metrics at this depth.
    """
    pairs = group_by(
        [
            {**result["by_depth"][depth], "pair": f"{result['UniProt_ID']} {result['coarse_selection_type']}"}
            for result in results
        ],
        "pair",
    )
    found: dict[str, Any] = {
        metric: mean(mean(result[metric] for result in pair) for pair in pairs.values()) for metric in METRICS
    }
    return found | {"assays": len(results)}


def bootstrap_error(results: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Return the standard error of the average over types, from bootstrap samples of each type's proteins."""
    generator, total, types = np.random.default_rng(0), np.zeros(BOOTSTRAP), 0
    for of_type in group_by(results, "coarse_selection_type").values():
        proteins = [mean(result[metric] for result in protein) for protein in group_by(of_type, "UniProt_ID").values()]
        values = np.array([value for value in proteins if value is not None])
        if len(values):
            types += 1
            total += values[generator.integers(len(values), size=(BOOTSTRAP, len(values)))].mean(1)
    return float(np.std(total / types, ddof=1)) if types else None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
