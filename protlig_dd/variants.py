"""Predict the effects of mutations from a trained model, without training on any (zero-shot); higher is fitter.

python -m protlig_dd.variants from=runs/demo target=wt.fasta output=scan.csv                      # every substitution
python -m protlig_dd.variants from=runs/demo assay=assay.csv target=wt.fasta output=scores.csv
python -m protlig_dd.variants from=runs/demo assay=DMS/ reference=reference.csv output=benchmark  # ProteinGym's files
torchrun --nproc-per-node=8 -m protlig_dd.variants from=runs/demo assay=DMS/ reference=reference.csv output=benchmark
"""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import check_least, read_config
from protlig_dd.config.verbs import VariantsConfig
from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.evaluation.variants.assays import all_substitutions, read_target
from protlig_dd.evaluation.variants.composition import aggregate_composition, background
from protlig_dd.evaluation.variants.measurements import METRICS, aggregate
from protlig_dd.evaluation.variants.mutants import AS_THE_TARGET
from protlig_dd.evaluation.variants.references import read_reference
from protlig_dd.evaluation.variants.scoring import (
    beside,
    check_assay,
    check_different,
    done_before,
    metrics_line,
    numbered,
    of_assay,
    read_checked,
    score_assay,
    settings_of,
)
from protlig_dd.inference.model import load_trained
from protlig_dd.system.distributed import from_first
from protlig_dd.system.files import check_free, write_atomic
from protlig_dd.system.tables import as_csv, as_json
from protlig_dd.system.terminal import ProgressBar, announce

BAD_ROWS = ("fail", "skip")


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


def main() -> None:
    """The command line."""
    run_verb(score, "variants", VariantsConfig)


if __name__ == "__main__":
    main()
