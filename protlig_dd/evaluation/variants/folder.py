"""A folder of assays, each scored by itself, and ProteinGym's average over them."""

from pathlib import Path

from protlig_dd.config.verbs import VariantsConfig
from protlig_dd.evaluation.variants.composition import aggregate_composition, background
from protlig_dd.evaluation.variants.measurements import METRICS, aggregate
from protlig_dd.evaluation.variants.references import read_reference
from protlig_dd.evaluation.variants.scoring import (
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
from protlig_dd.system.files import write_atomic
from protlig_dd.system.tables import as_csv, as_json
from protlig_dd.system.terminal import ProgressBar, announce


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
