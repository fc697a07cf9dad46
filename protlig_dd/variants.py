"""Predict the effects of mutations from a trained model, without training on any (zero-shot); higher is fitter.

python -m protlig_dd.variants from=runs/demo target=wt.fasta output=scan.csv                      # every substitution
python -m protlig_dd.variants from=runs/demo assay=assay.csv target=wt.fasta output=scores.csv
python -m protlig_dd.variants from=runs/demo assay=DMS/ reference=reference.csv output=benchmark  # ProteinGym's files
torchrun --nproc-per-node=8 -m protlig_dd.variants from=runs/demo assay=DMS/ reference=reference.csv output=benchmark
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.evaluation.assays import (
    AS_THE_TARGET,
    Assay,
    Numbering,
    all_substitutions,
    read_assay,
    read_reference,
    read_target,
)
from protlig_dd.evaluation.composition import (
    Background,
    aggregate_composition,
    background,
    beside_composition,
    composition_line,
    composition_scores,
)
from protlig_dd.evaluation.fitness import Scores, Work, choose_strategies, pieces_of, rows_by_strategy, score_each
from protlig_dd.evaluation.heatmap import heat_map, to_csv, to_png
from protlig_dd.evaluation.measurements import METRICS, aggregate
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import VariantsConfig, read_config
from protlig_dd.runtime.distributed import from_first
from protlig_dd.runtime.files import sha256, write_atomic, write_atomic_bytes
from protlig_dd.runtime.metrics import ProgressBar, announce
from protlig_dd.runtime.trained import Trained, check_free, check_least, load_trained
from protlig_dd.tokenizer import ProteinTokenizer

BAD_ROWS = ("fail", "skip")
SHOWN = 3  # rows that were left out
ENOUGH = 10  # measured variants of a strategy, to judge it by itself


def score(cfg: DictConfig) -> None:
    """Read everything, load the model, score one assay or a folder of them, and write."""
    config = read_config(cfg, VariantsConfig)
    check_least((("seed", config.seed, 0), ("tokens_per_pack", config.tokens_per_pack, 1), ("draws", config.draws, 4)))
    if config.draws % 2:
        raise ValueError(f"draws must be an even number, got {config.draws}")
    if config.bad_rows not in BAD_ROWS:
        raise ValueError(f"bad_rows={config.bad_rows}; there are {', '.join(BAD_ROWS)}")
    if config.reference is not None or (config.assay is not None and Path(config.assay).is_dir()):
        score_folder(config)
    else:
        score_one(config)


def score_one(config: VariantsConfig) -> None:
    output = Path(config.output)
    if output.suffix != ".csv":
        raise ValueError(f"output={config.output}: give a name that ends in .csv; other files get their names from it")
    for path in beside(output).values():
        check_free(str(path))
    if config.target is None:
        raise ValueError("target is required: give target=wt.fasta, or a bare sequence of letters")
    target = read_target(config.target)
    assay = all_substitutions(target) if config.assay is None else read_checked(Path(config.assay), target, config)
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    if is_nucleotide(target.astype(np.uint8).tobytes()):
        announce(nucleotide_warning(1, 1, "target="), trained.processes)
    file = None if config.assay is None else Path(config.assay)
    frequencies = from_first(background(trained) if trained.processes.first else None)
    settings = settings_of(trained, config) | {"frequencies": frequencies.name}
    settings |= of_assay(file, target, numbered(config, AS_THE_TARGET).offset)
    score_assay(trained, config, assay, target, output, "variants", settings, frequencies)


def score_folder(config: VariantsConfig) -> None:
    """Each assay by itself, so that what is done stays done; then ProteinGym's average."""
    folder = Path(config.assay or "")
    if not folder.exists():  # without an assay, the current folder
        raise ValueError(f"assay={config.assay} does not exist")
    if config.assay is None or not folder.is_dir():
        raise ValueError(f"assay={config.assay}: with reference=, give a folder of CSV files")
    if config.reference is None:
        raise ValueError(f"assay={config.assay} is a folder: give reference=, ProteinGym's reference file")
    if config.target is not None:
        raise ValueError(
            f"target={config.target}: the targets of a folder's assays are in reference={config.reference}"
        )
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is no folder; a folder of assays needs one")
    if output.resolve() == folder.resolve():
        raise ValueError(f"output={output} is the folder of assays; give another")
    references = read_reference(Path(config.reference), folder)
    outputs = {one.id: output / f"{one.id}.csv" for one in references}
    check_different([*outputs.values(), output / "summary.csv"])
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    frequencies = from_first(background(trained) if trained.processes.first else None)
    common = settings_of(trained, config) | {"frequencies": frequencies.name}
    settings = {
        one.id: common | of_assay(one.path, one.target, numbered(config, one.numbering).offset) for one in references
    }
    done_before(output / "summary.csv", common)
    done = from_first({name: done_before(path, settings[name]) for name, path in outputs.items()})
    left = [one for one in references if done[one.id] is None]
    if len(left) < len(references):
        announce(f"{output}: {len(references) - len(left)} of {len(references)} are there already", trained.processes)
    with ProgressBar("reading", len(left), shown=trained.processes.first) as bar:
        for one in left:  # all of them, so that an error in the last is told before the first is scored
            check_assay(trained, config, read_checked(one.path, one.target, config, one.numbering), one.target)
            bar.advance()
    for one in left:
        assay = read_checked(one.path, one.target, config, one.numbering)
        done[one.id] = score_assay(
            trained, config, assay, one.target, outputs[one.id], one.id, settings[one.id], frequencies
        )
    results = [
        {
            "DMS_id": one.id,
            "UniProt_ID": one.protein,
            "coarse_selection_type": one.type,
            **one.more,
            **(done[one.id] or {}),
        }
        for one in references
    ]
    if trained.processes.first:
        total = common | aggregate(results) | {"composition": aggregate_composition(results)}
        columns = ["DMS_id", "UniProt_ID", "coarse_selection_type", "strategy", "variants", *METRICS]
        more = {f"composition_{key}": key for key in ("spearman_with_scores", "spearman", "auc")}
        cells = [
            [*(result[key] for key in columns), *(result["composition"][key] for key in more.values())]
            for result in results
        ]
        rows = [["" if cell is None else cell for cell in row] for row in cells]
        write_atomic(output / "summary.json", as_json(total))
        write_atomic(output / "summary.csv", as_csv([[*columns, *more], *rows]))
        for kind, values in total["by_type"].items():
            announce(f"{kind}: {metrics_line(values)} ({values['proteins']} proteins)", trained.processes)
        announce(f"{output}: {len(results)} assays, {metrics_line(total)}", trained.processes)
        announce(f"composition alone: {metrics_line(total['composition'])}", trained.processes)


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


def check_assay(trained: Trained, config: VariantsConfig, assay: Assay, target: np.ndarray) -> None:
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


def settings_of(trained: Trained, config: VariantsConfig) -> dict[str, Any]:
    """What the scores of every assay depend on, for the summary."""
    model = {"run": trained.run, "step": trained.step, "weights_sha256": sha256(trained.weights)}
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
    trained: Trained,
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
        trained.noise,
        target,
        assay,
        Work(trained.device, config.tokens_per_pack, description, trained.processes),
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
    summary = {**made, "by_strategy": alone, "checkpoint": str(trained.checkpoint), **settings}
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


def as_csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def main() -> None:
    """The command line."""
    run_verb(score, "variants", VariantsConfig)


if __name__ == "__main__":
    main()
