"""How scores agree with measurements, as ProteinGym reports it (Notin et al. 2023, its performance_DMS_benchmarks.py).

    spearman     Spearman's rank correlation with the measurements
    auc          how often a fit variant scores above an unfit one
    mcc          Matthews' correlation of fit with a score of at least the median
    ndcg         of the tenth with the highest scores: gains are measurements scaled to 0..1, discounted by
                 log2(rank + 1)
    top_recall   share of the tenth with the highest measurements that is in the tenth with the highest scores

None stands for what there are too few variants for, or no measurements.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

METRICS = ("spearman", "auc", "mcc", "ndcg", "top_recall")
DEPTHS = ("1", "2", "3", "4", "5+")
BOOTSTRAP = 10_000

Metrics = dict[str, float | None]


def compare(scores: np.ndarray, measured: np.ndarray, fit: np.ndarray, high: np.ndarray) -> Metrics:
    """Every metric, each over the rows that it is known for.

    Args:
        scores: (rows,).
        measured: (rows,); NaN where nothing was measured.
        fit: (rows,) 1 or 0; NaN where it is not known.
        high: (rows,) whether the score is at least the median of the whole assay's.
    """
    known = ~np.isnan(measured)
    ours, theirs = scores[known], measured[known]
    return {
        "spearman": spearman(scores, measured),
        "auc": auc(scores, fit),
        "mcc": matthews(high, fit),
        "ndcg": ndcg(ours, theirs),
        "top_recall": top_recall(ours, theirs),
    }


def judge(scores: np.ndarray, measured: np.ndarray, fit: np.ndarray, changed: Sequence[int]) -> dict[str, Any]:
    """The metrics of an assay, and under `by_depth` those of variants with as many substitutions.

    Args:
        changed: of each row.
    """
    labelled = ~np.isnan(fit)
    high = scores >= np.median(scores[labelled] if labelled.any() else scores)
    by_depth = {}
    for depth in DEPTHS:
        inside = np.array([depth == ("5+" if n > 4 else str(n)) for n in changed], bool)
        if (inside & ~np.isnan(measured)).any():
            by_depth[depth] = compare(scores[inside], measured[inside], fit[inside], high[inside])
    return {**compare(scores, measured, fit, high), "by_depth": by_depth}


def spearman(scores: np.ndarray, measured: np.ndarray) -> float | None:
    """Where something was measured; None where one of the two is constant."""
    known = ~np.isnan(measured)
    if not known.any() or np.ptp(scores[known]) == 0 or np.ptp(measured[known]) == 0:
        return None
    from scipy.stats import spearmanr  # takes a second

    return float(spearmanr(scores[known], measured[known]).statistic)


def auc(scores: np.ndarray, fit: np.ndarray) -> float | None:
    """How often a fit variant has a higher score than an unfit one, ties as a half; None without either."""
    positive, negative = fit == 1, fit == 0
    if not positive.any() or not negative.any():
        return None
    from scipy.stats import mannwhitneyu

    wins = mannwhitneyu(scores[positive], scores[negative], method="asymptotic").statistic
    return float(wins / (positive.sum() * negative.sum()))


def matthews(high: np.ndarray, fit: np.ndarray) -> float | None:
    """The correlation of two binary variables; 0 where all scores are high or none is (sklearn's convention)."""
    known = ~np.isnan(fit)
    predicted, true = high[known].astype(float), fit[known]
    if not known.any() or np.ptp(true) == 0:
        return None
    return 0.0 if np.ptp(predicted) == 0 else float(np.corrcoef(predicted, true)[0, 1])


def ndcg(scores: np.ndarray, measured: np.ndarray) -> float | None:
    """Normalised discounted cumulative gain of the highest tenth."""
    top = len(scores) // 10
    if not top or np.ptp(measured) == 0:
        return None
    gains = (measured - measured.min()) / np.ptp(measured)
    discounts = np.log2(np.arange(top) + 2)
    chosen = gains[np.argsort(-scores, kind="stable")[:top]]
    best = np.sort(gains)[::-1][:top]
    return float((chosen / discounts).sum() / (best / discounts).sum())


def top_recall(scores: np.ndarray, measured: np.ndarray) -> float | None:
    """Share of the highest tenth of the measurements that is in that of the scores; ties at its end belong to it."""
    if not len(scores) or np.ptp(measured) == 0:
        return None
    best, chosen = (values >= np.percentile(values, 90) for values in (measured, scores))
    return float((best & chosen).sum() / best.sum())


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ProteinGym's averages: over the assays of a protein within each type, over a type's proteins, over types.

    Args:
        results: of each assay: UniProt_ID, coarse_selection_type, METRICS (None is left out), and, where they are
            known, by_depth, MSA_Neff_L_category and taxon, by which there are averages too (over the assays of a
            protein, then over proteins).
    """
    by_type = {kind: averages(some) for kind, some in grouped(results, "coarse_selection_type").items()}
    overall = {metric: mean(values[metric] for values in by_type.values()) for metric in METRICS}
    errors = {f"{metric}_se": bootstrap_error(results, metric) for metric in METRICS}
    total: dict[str, Any] = {**overall, **errors, "assays": len(results), "by_type": by_type}
    for name, column in (("by_msa_depth", "MSA_Neff_L_category"), ("by_taxon", "taxon")):
        known = [result for result in results if result.get(column)]
        if known:
            total[name] = {kind: averages(some) for kind, some in grouped(known, column).items()}
    depths = {depth: [one for one in results if depth in (one.get("by_depth") or {})] for depth in DEPTHS}
    total["by_mutation_depth"] = {depth: of_depth(some, depth) for depth, some in depths.items() if some}
    return total


def grouped(results: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    """By the value of a key, in alphabetical order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(str(result[key]), []).append(result)
    return dict(sorted(groups.items()))


def averages(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the assays of each protein, then over proteins."""
    proteins = grouped(results, "UniProt_ID").values()
    found: dict[str, Any] = {metric: mean(mean(one[metric] for one in some) for some in proteins) for metric in METRICS}
    return found | {"assays": len(results), "proteins": len(proteins)}


def of_depth(results: Sequence[Mapping[str, Any]], depth: str) -> dict[str, Any]:
    """Over the assays of each protein and type, then over those."""
    pairs = grouped(
        [{**one["by_depth"][depth], "pair": f"{one['UniProt_ID']} {one['coarse_selection_type']}"} for one in results],
        "pair",
    )
    found: dict[str, Any] = {
        metric: mean(mean(one[metric] for one in some) for some in pairs.values()) for metric in METRICS
    }
    return found | {"assays": len(results)}


def bootstrap_error(results: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Of the average over types: standard deviation over draws of each type's proteins, with replacement."""
    generator, total, types = np.random.default_rng(0), np.zeros(BOOTSTRAP), 0
    for some in grouped(results, "coarse_selection_type").values():
        proteins = [mean(one[metric] for one in own) for own in grouped(some, "UniProt_ID").values()]
        values = np.array([value for value in proteins if value is not None])
        if len(values):
            types += 1
            total += values[generator.integers(len(values), size=(BOOTSTRAP, len(values)))].mean(1)
    return float(np.std(total / types, ddof=1)) if types else None


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
