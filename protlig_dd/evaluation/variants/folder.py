"""Score a folder of assays and compute ProteinGym's averages over them."""

from pathlib import Path

from protlig_dd.config.verbs import VariantsConfig
from protlig_dd.evaluation.variants.composition import aggregate_composition, background
from protlig_dd.evaluation.variants.measurements import METRICS, aggregate
from protlig_dd.evaluation.variants.references import read_reference
from protlig_dd.evaluation.variants.scoring import (
    assay_settings,
    check_assay,
    check_distinct_outputs,
    earlier_summary,
    metrics_line,
    numbering_for,
    read_checked,
    score_assay,
    settings_of,
    warn_of_context,
)
from protlig_dd.inference.model import load_trained
from protlig_dd.system.distributed import broadcast_from_first
from protlig_dd.system.files import write_atomic
from protlig_dd.system.tables import as_csv, as_json
from protlig_dd.system.terminal import ProgressBar, announce


def score_folder(config: VariantsConfig) -> None:
    """Score the assays of a folder one after the other, and write the averages of their metrics.

    The scores of an assay are written as soon as it is finished, so an interrupted command keeps the finished assays.
    """
    folder = Path(config.assay or "")
    if not folder.exists():  # assay=null becomes the current folder and passes; the next check rejects it
        raise ValueError(f"assay={config.assay} does not exist")
    if config.assay is None or not folder.is_dir():
        raise ValueError(f"assay={config.assay} is not a folder; reference= needs a folder of CSV files")
    if config.reference is None:
        raise ValueError(f"assay={config.assay} is a folder; give ProteinGym's reference file with reference=")
    if config.target is not None:
        raise ValueError(
            f"target={config.target} cannot be used with a folder; its targets are in reference={config.reference}"
        )
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={output} is not a folder; a folder of assays needs an output folder")
    if output.resolve() == folder.resolve():
        raise ValueError(f"output={output} is the folder of assays; give another output")
    references = read_reference(Path(config.reference), folder)
    outputs = {reference.id: output / f"{reference.id}.csv" for reference in references}
    check_distinct_outputs([*outputs.values(), output / "summary.csv"])
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    warn_of_context(trained)
    frequencies = broadcast_from_first(background(trained) if trained.processes.first else None)
    common = settings_of(trained, config) | {"frequencies": frequencies.name}
    settings = {
        reference.id: common
        | assay_settings(reference.path, reference.target, numbering_for(config, reference.numbering).offset)
        for reference in references
    }
    earlier_summary(output / "summary.csv", common)
    done = broadcast_from_first({name: earlier_summary(path, settings[name]) for name, path in outputs.items()})
    remaining = [reference for reference in references if done[reference.id] is None]
    if len(remaining) < len(references):
        finished = len(references) - len(remaining)
        announce(f"{output}: {finished} of {len(references)} assays are scored already", trained.processes)
    with ProgressBar("reading", len(remaining), shown=trained.processes.first) as bar:
        for each in remaining:  # check all assays before any of them is scored
            check_assay(trained, config, read_checked(each.path, each.target, config, each.numbering), each.target)
            bar.advance()
    for each in remaining:
        assay = read_checked(each.path, each.target, config, each.numbering)
        done[each.id] = score_assay(
            trained, config, assay, each.target, outputs[each.id], each.id, settings[each.id], frequencies
        )
    results = [
        {
            "DMS_id": reference.id,
            "UniProt_ID": reference.protein,
            "coarse_selection_type": reference.type,
            **reference.more,
            **(done[reference.id] or {}),
        }
        for reference in references
    ]
    if trained.processes.first:
        total = common | aggregate(results) | {"composition": aggregate_composition(results)}
        columns = ["DMS_id", "UniProt_ID", "coarse_selection_type", "strategy", "variants", *METRICS]
        composition = {f"composition_{key}": key for key in ("spearman_with_scores", "spearman", "auc")}
        cells = [
            [*(result[key] for key in columns), *(result["composition"][key] for key in composition.values())]
            for result in results
        ]
        rows = [["" if cell is None else cell for cell in row] for row in cells]
        write_atomic(output / "summary.json", as_json(total))
        write_atomic(output / "summary.csv", as_csv([[*columns, *composition], *rows]))
        for kind, values in total["by_type"].items():
            announce(f"{kind}: {metrics_line(values)} ({values['proteins']} proteins)", trained.processes)
        announce(f"{output}: {len(results)} assays, {metrics_line(total)}", trained.processes)
        announce(f"composition alone: {metrics_line(total['composition'])}", trained.processes)
