"""Score an assay of variants and write the output files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.config.verbs import VariantsConfig
from protlig_dd.evaluation.variants.assays import Assay, read_assay
from protlig_dd.evaluation.variants.composition import (
    Background,
    compare_with_composition,
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

SHOWN = 3  # number of skipped rows whose messages are printed
ENOUGH = 10  # with fewer measured variants, metrics are reported with a warning, and not by strategy


def numbering_for(config: VariantsConfig, default: Numbering) -> Numbering:
    """Return the numbering that `offset=` sets, or else the assay's default numbering."""
    return default if config.offset is None else Numbering(config.offset)


def read_checked(path: Path, target: np.ndarray, config: VariantsConfig, numbering: Numbering = AS_THE_TARGET) -> Assay:
    """Read an assay, and raise if its file already has one of the columns that will be added."""
    assay = read_assay(path, target, numbering=numbering_for(config, numbering), skip_bad=config.bad_rows == "skip")
    for name in (config.column, *(f"{config.column}_{suffix}" for suffix in ("strategy", "se", "minus_composition"))):
        if name in assay.header:
            raise ValueError(f"{assay.where[0]}: column {name} exists already; choose another name with column=")
    return assay


def check_assay(trained: TrainedModel, config: VariantsConfig, assay: Assay, target: np.ndarray) -> None:
    """Raise for variants that this model cannot score."""
    strategies, _ = choose_strategies(config.strategy, trained.graph, assay)
    for strategy, rows in rows_by_strategy(strategies).items():
        pieces_of(assay.subset(rows), len(target), trained.max_len, strategy)


def warn_of_context(trained: TrainedModel) -> None:
    """Print a warning if the model was trained with `data.context`: to predict some residues given the others."""
    if trained.context != "none":
        announce(
            f"warning: this model was trained with data.context={trained.context} ({trained.context}-case residues are "
            "given, the others are predicted); variants are scored as if it had been trained on whole proteins",
            trained.processes,
        )


def check_distinct_outputs(outputs: list[Path]) -> None:
    """Raise if two outputs would be the same file.

    This happens for the DMS_ids `A` and `A_heatmap` (A_heatmap.csv), or for a DMS_id `summary` (summary.csv).
    """
    taken: dict[Path, str] = {}
    for output in outputs:
        for path in output_files(output).values():
            if path in taken:
                raise ValueError(f"{path}: both {taken[path]} and {output.stem} would write this file; rename a DMS_id")
            taken[path] = output.stem


def earlier_summary(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of this assay if an earlier `variants` command has completed the assay, else None.

    Raises:
        ValueError: output files exist that were not written by `variants`, or that were written by an earlier version
            or with another model, assay or settings.
    """
    files = output_files(output)
    path = files["summary"]  # the summary is written first: if it exists, the other files belong to it
    if not path.exists():
        for other in files.values():
            check_free(str(other))
        return None
    try:
        earlier = json.loads(path.read_text())
    except ValueError:
        earlier = None
    if isinstance(earlier, dict) and "weights_sha256" in earlier and (lacking := settings.keys() - earlier.keys()):
        raise ValueError(
            f"{path} was written by an earlier version and lacks {', '.join(sorted(lacking))}; give another output"
        )
    if not isinstance(earlier, dict) or not {*METRICS, *settings} <= earlier.keys():
        raise ValueError(f"{path} was not written by this command; give another output or move the file")
    for key, value in settings.items():
        if earlier[key] != value:
            raise ValueError(f"{path} was written with {key}={earlier[key]}, not {value}; give another output")
    return earlier if output.exists() else None


def settings_of(trained: TrainedModel, config: VariantsConfig) -> dict[str, Any]:
    """Return the entries of the summary for the model and the settings, which are the same for every assay."""
    model = {"run": trained.run, "step": trained.step, "weights_sha256": trained.saved.weights_sha256()}
    options = {"wanted": config.strategy, "draws": config.draws, "seed": config.seed, "column": config.column}
    return {**model, "precision": trained.precision, **options, "bad_rows": config.bad_rows}


def assay_settings(path: Path | None, target: np.ndarray, offset: int) -> dict[str, Any]:
    """Return the entries of the summary that are specific to one assay."""
    sequence = ProteinTokenizer().decode(target)
    return {"offset": offset, "assay_sha256": None if path is None else sha256(path), "target": sequence}


def output_files(output: Path) -> dict[str, Path]:
    """Return the paths of the files written for one assay."""
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
    """Score an assay on all ranks; rank 0 writes the files and prints. Return the summary."""
    strategies, reason = choose_strategies(config.strategy, trained.graph, assay)
    names = rows_by_strategy(strategies)
    if len(names) == 1:
        lines = [f"{len(assay.rows)} variants by strategy={strategies[0]} ({reason})"]
    else:
        kinds = {name: "insertions and deletions" if name == "bound" else "substitutions" for name in names}
        counts = [f"{len(rows)} by strategy={name} ({kinds[name]})" for name, rows in names.items()]
        lines = [f"{len(assay.rows)} variants, {', '.join(counts)}"]
    if assay.most_changed > 1:
        lines.append(f"up to {assay.most_changed} substitutions per row")
    if assay.bad:
        shown = f"the first {SHOWN}: " if len(assay.bad) > SHOWN else ""
        announce(f"{len(assay.bad)} invalid rows skipped, {shown}{' | '.join(assay.bad[:SHOWN])}", trained.processes)
    if repeated := len(assay.variants) - len(set(assay.variants)):
        lines.append(f"{repeated} rows repeat the protein of an earlier row and get its score")
    if assay.first_indel is not None:
        lines.append("scores of indels are corrected for the change of length, because each residue costs about 3 nats")
    announce(f"{description}: {'; '.join(lines)}", trained.processes)
    scores = score_each(
        trained.score_fn,
        target,
        assay,
        Work(config.tokens_per_pack, description, trained.processes),
        strategies=strategies,
        max_len=trained.max_len,
        draws=config.draws,
        seed=config.seed,
    )
    metrics, strategy = assay.judge(scores.nats), "+".join(names)
    by_strategy = judge_by_strategy(assay, scores, names) if len(names) > 1 else {}
    results = {"variants": len(assay.rows), "left_out": len(assay.bad), "strategy": strategy, **metrics}
    baseline = composition_scores(assay.variants, target, frequencies.logs)
    results["composition"] = compare_with_composition(assay, scores.nats, baseline, frequencies.label)
    summary = {**results, "by_strategy": by_strategy, "checkpoint": str(trained.saved.path), **settings}
    files, picture = output_files(output), ""
    if trained.processes.first:
        write_atomic(files["summary"], as_json(summary))
        table = heat_map(assay, target, scores.nats)
        if table is not None:
            write_atomic(files["map"], to_csv(table, target))
            write_atomic_bytes(files["picture"], to_png(table, target, f"{output.stem}: {strategy}"))
            picture = f"; heat map in {files['picture']}"
        rows = scored_rows(assay, strategies, scores, baseline, config.column)
        write_atomic(files["scores"], rows)  # last, because this file marks the assay as done
    measurements = int(max((~np.isnan(known)).sum() for known in (assay.measured, assay.fit)))
    few = f" ({measurements} measurements, too few to be meaningful)" if 0 < measurements < ENOUGH else ""
    found = f"{metrics_line(metrics)}{few}" if measurements else f"{len(assay.rows)} scores"
    announce(f"{output}: {found}{picture}", trained.processes)
    announce(composition_line(results["composition"]), trained.processes)
    if len(names) > 1 and any(metrics[name] is not None for name in METRICS):
        separate = [f"{name} alone: {metrics_line(values)}" for name, values in by_strategy.items()]
        few = f"no separate metrics, because one strategy has fewer than {ENOUGH} measurements"
        line = f"these metrics are over scores by {' and '.join(names)}; {'; '.join(separate) or few}"
        announce(f"{output}: {line}", trained.processes)
    return summary


def judge_by_strategy(assay: Assay, scores: Scores, names: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each strategy's rows; empty if any strategy has fewer than ENOUGH measured rows."""
    parts = {name: assay.subset(rows) for name, rows in names.items()}
    if any(max((~np.isnan(known)).sum() for known in (part.measured, part.fit)) < ENOUGH for part in parts.values()):
        return {}
    judged = {name: part.judge(scores.nats[names[name]]) for name, part in parts.items()}
    return {
        name: {"variants": len(names[name]), **{metric: metrics[metric] for metric in METRICS}}
        for name, metrics in judged.items()
    }


def scored_rows(assay: Assay, strategies: list[str], scores: Scores, baseline: np.ndarray, column: str) -> str:
    """Return the assay's rows as CSV, with additional columns about the score.

    The columns are the score, the strategy, the standard error (unless no score has one), and the score minus the
    composition score.

    Args:
        baseline: (rows,) composition scores. If one is NaN, the cell of the difference is empty.
    """
    columns = {column: format_cells(scores.nats), f"{column}_strategy": strategies}
    if scores.standard_error is not None:
        columns[f"{column}_se"] = format_cells(scores.standard_error)
    columns[f"{column}_minus_composition"] = format_cells(scores.nats - baseline)
    added = zip(*columns.values(), strict=True)
    rows = ([*row, *cells] for row, cells in zip(assay.rows, added, strict=True))
    return as_csv([[*assay.header, *columns], *rows])


def format_cells(values: np.ndarray) -> list[str]:
    """Return the values as text with six decimals; an empty string for NaN."""
    return ["" if math.isnan(value) else f"{value:.6f}" for value in values.tolist()]


def metrics_line(metrics: dict[str, Any]) -> str:
    known = [f"{name} {metrics[name]:.4f}" for name in METRICS if metrics[name] is not None]
    return ", ".join(known) or "too few measurements for metrics"
