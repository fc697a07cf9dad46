"""An assay of variants from its file to its table of scores."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.config.verbs import VariantsConfig
from protlig_dd.evaluation.variants.assays import Assay, read_assay
from protlig_dd.evaluation.variants.composition import (
    Background,
    beside_composition,
    composition_line,
    composition_scores,
)
from protlig_dd.evaluation.variants.fitness import Scores, score_each
from protlig_dd.evaluation.variants.heatmap import heat_map, to_csv, to_png
from protlig_dd.evaluation.variants.measurements import METRICS
from protlig_dd.evaluation.variants.mutants import AS_THE_TARGET, Numbering
from protlig_dd.evaluation.variants.strategies import choose_strategies, rows_by_strategy
from protlig_dd.evaluation.variants.windows import pieces_of
from protlig_dd.inference.model import TrainedModel
from protlig_dd.inference.sharing import Work
from protlig_dd.system.files import check_free, sha256, write_atomic, write_atomic_bytes
from protlig_dd.system.tables import as_csv, as_json
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import ProteinTokenizer

SHOWN = 3  # rows that were left out
ENOUGH = 10  # measured variants of a strategy, to judge it by itself


def numbered(config: VariantsConfig, known: Numbering) -> Numbering:
    """How an assay's positions are to be read: as `offset` says, or by what is known of the assay."""
    return known if config.offset is None else Numbering(config.offset)


def read_checked(path: Path, target: np.ndarray, config: VariantsConfig, numbering: Numbering = AS_THE_TARGET) -> Assay:
    """An assay whose file has no column yet of the names that are added."""
    assay = read_assay(path, target, numbering=numbered(config, numbering), skip_bad=config.bad_rows == "skip")
    for name in (config.column, *(f"{config.column}_{more}" for more in ("strategy", "se", "minus_composition"))):
        if name in assay.header:
            raise ValueError(f"{assay.where[0]}: there is a column {name} already; name another with column=")
    return assay


def check_assay(trained: TrainedModel, config: VariantsConfig, assay: Assay, target: np.ndarray) -> None:
    """Raise for what cannot be scored with this model."""
    strategies, _ = choose_strategies(config.strategy, trained.graph, assay)
    for strategy, rows in rows_by_strategy(strategies).items():
        pieces_of(assay.only(rows), len(target), trained.max_len, strategy)


def check_different(outputs: list[Path]) -> None:
    """Raise for assays whose files would have the same names, as those of A_heatmap and A, or of summary."""
    taken: dict[Path, str] = {}
    for output in outputs:
        for path in beside(output).values():
            if path in taken:
                raise ValueError(f"{path} would be a file of {taken[path]} and of {output.stem}; rename a DMS_id")
            taken[path] = output.stem


def done_before(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier command wrote of this assay; None if it did not, or did not come to its end.

    Raises:
        ValueError: files that this verb did not write, or with another model, assay or settings.
    """
    files = beside(output)
    path = files["summary"]  # written first: what lies beside it is then this verb's, too
    if not path.exists():
        for other in files.values():
            check_free(str(other))
        return None
    try:
        earlier = json.loads(path.read_text())
    except ValueError:
        earlier = None
    if isinstance(earlier, dict) and "weights_sha256" in earlier and (lacking := settings.keys() - earlier.keys()):
        raise ValueError(f"{path} is an earlier version's, without {', '.join(sorted(lacking))}; give another output")
    if not isinstance(earlier, dict) or not {*METRICS, *settings} <= earlier.keys():
        raise ValueError(f"{path} is not what this verb writes; give another output or move it away")
    for key, value in settings.items():
        if earlier[key] != value:
            raise ValueError(f"{path} was made with {key}={earlier[key]}, not {value}; give another output")
    return earlier if output.exists() else None


def settings_of(trained: TrainedModel, config: VariantsConfig) -> dict[str, Any]:
    """What the scores of every assay depend on, for the summary."""
    model = {"run": trained.run, "step": trained.step, "weights_sha256": sha256(trained.saved.weights)}
    wanted = {"wanted": config.strategy, "draws": config.draws, "seed": config.seed, "column": config.column}
    return {**model, "precision": trained.precision, **wanted, "bad_rows": config.bad_rows}


def of_assay(path: Path | None, target: np.ndarray, offset: int) -> dict[str, Any]:
    """What the scores of one assay depend on besides."""
    sequence = ProteinTokenizer().decode(target)
    return {"offset": offset, "assay_sha256": None if path is None else sha256(path), "target": sequence}


def beside(output: Path) -> dict[str, Path]:
    """The files of one assay."""
    endings = {"summary": ".json", "map": "_heatmap.csv", "picture": "_heatmap.png"}
    return {"scores": output} | {name: output.with_name(output.stem + ending) for name, ending in endings.items()}


def score_assay(
    trained: TrainedModel,
    config: VariantsConfig,
    assay: Assay,
    target: np.ndarray,
    output: Path,
    description: str,
    settings: dict[str, Any],
    frequencies: Background,
) -> dict[str, Any]:
    """Score on all ranks, have rank 0 write and say what it wrote; returns the summary."""
    strategies, reason = choose_strategies(config.strategy, trained.graph, assay)
    names = rows_by_strategy(strategies)
    if len(names) == 1:
        lines = [f"{len(assay.rows)} variants by strategy={strategies[0]} ({reason})"]
    else:
        kinds = {name: "insertions and deletions" if name == "bound" else "substitutions" for name in names}
        own = [f"{len(rows)} by strategy={name} ({kinds[name]})" for name, rows in names.items()]
        lines = [f"{len(assay.rows)} variants, {', '.join(own)}"]
    if assay.most_changed > 1:
        lines.append(f"up to {assay.most_changed} substitutions in a row")
    if assay.bad:
        shown = f"the first {SHOWN}: " if len(assay.bad) > SHOWN else ""
        announce(f"{len(assay.bad)} rows are left out, {shown}{' | '.join(assay.bad[:SHOWN])}", trained.processes)
    if repeated := len(assay.variants) - len(set(assay.variants)):
        lines.append(f"{repeated} of them are the protein of an earlier row, and have its score")
    if assay.first_indel is not None:
        lines.append("where lengths differ, by nats per residue, since each residue more costs some 3 whatever it is")
    announce(f"{description}: {'; '.join(lines)}", trained.processes)
    scores = score_each(
        trained.score_fn,
        target,
        assay,
        Work(config.tokens_per_pack, description, trained.processes),
        strategies=strategies,
        longest=trained.max_len,
        draws=config.draws,
        seed=config.seed,
    )
    metrics, strategy = assay.judge(scores.nats), "+".join(names)
    alone = judged_alone(assay, scores, names) if len(names) > 1 else {}
    made = {"variants": len(assay.rows), "left_out": len(assay.bad), "strategy": strategy, **metrics}
    baseline = composition_scores(assay.variants, target, frequencies.logs)
    made["composition"] = beside_composition(assay, scores.nats, baseline, frequencies.told)
    summary = {**made, "by_strategy": alone, "checkpoint": str(trained.saved.path), **settings}
    files = beside(output)
    if trained.processes.first:
        write_atomic(files["summary"], as_json(summary))
        table = heat_map(assay, target, scores.nats)
        if table is not None:
            write_atomic(files["map"], to_csv(table, target))
            write_atomic_bytes(files["picture"], to_png(table, target, f"{output.stem}: {strategy}"))
        rows = scored_rows(assay, strategies, scores, baseline, config.column)
        write_atomic(files["scores"], rows)  # last: an assay with it is done
    measurements = int(max((~np.isnan(known)).sum() for known in (assay.measured, assay.fit)))
    few = f" (of {measurements} measurements, too few to tell)" if 0 < measurements < ENOUGH else ""
    announce(f"{output}: {metrics_line(metrics)}{few}", trained.processes)
    announce(composition_line(made["composition"]), trained.processes)
    if len(names) > 1 and any(metrics[name] is not None for name in METRICS):
        own = [f"{name} alone: {metrics_line(values)}" for name, values in alone.items()]
        few = f"too few measurements to judge each by itself, fewer than {ENOUGH} of one"
        line = f"these figures mix scores by {' and '.join(names)}; {'; '.join(own) or few}"
        announce(f"{output}: {line}", trained.processes)
    return summary


def judged_alone(assay: Assay, scores: Scores, names: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """The metrics of each strategy's rows alone; nothing where one has fewer than ENOUGH that were measured."""
    parts = {name: assay.only(rows) for name, rows in names.items()}
    if any(max((~np.isnan(known)).sum() for known in (one.measured, one.fit)) < ENOUGH for one in parts.values()):
        return {}
    judged = {name: one.judge(scores.nats[names[name]]) for name, one in parts.items()}
    return {
        name: {"variants": len(names[name]), **{metric: one[metric] for metric in METRICS}}
        for name, one in judged.items()
    }


def scored_rows(assay: Assay, strategies: list[str], scores: Scores, baseline: np.ndarray, column: str) -> str:
    """The assay's own rows and columns, and the scores behind them, with the strategy of each.

    Args:
        baseline: (rows,) scores of composition alone; where NaN, the column of the difference is empty.
    """
    columns = {column: written(scores.nats), f"{column}_strategy": strategies}
    if scores.standard_error is not None:
        columns[f"{column}_se"] = written(scores.standard_error)
    columns[f"{column}_minus_composition"] = written(scores.nats - baseline)
    added = zip(*columns.values(), strict=True)
    return as_csv([[*assay.header, *columns], *([*row, *more] for row, more in zip(assay.rows, added, strict=True))])


def written(values: np.ndarray) -> list[str]:
    """Cells with six decimals, empty for NaN."""
    return ["" if math.isnan(value) else f"{value:.6f}" for value in values.tolist()]


def metrics_line(metrics: dict[str, Any]) -> str:
    known = [f"{name} {metrics[name]:.4f}" for name in METRICS if metrics[name] is not None]
    return ", ".join(known) or "no measurements to compare with, or too few"
