"""Predict the effects of mutations with a trained model, without training on measurements (zero-shot).

python -m protlig_dd.variants from=runs/demo target=wt.fasta output=scan.csv                      # every substitution
python -m protlig_dd.variants from=runs/demo assay=assay.csv target=wt.fasta output=scores.csv
python -m protlig_dd.variants from=runs/demo assay=DMS/ reference=reference.csv output=benchmark  # ProteinGym's files
torchrun --nproc-per-node=8 -m protlig_dd.variants from=runs/demo assay=DMS/ reference=reference.csv output=benchmark
"""

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import VariantsConfig
from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.evaluation.variants.assays import all_substitutions, read_target
from protlig_dd.evaluation.variants.composition import background
from protlig_dd.evaluation.variants.folder import score_folder
from protlig_dd.evaluation.variants.mutants import AS_THE_TARGET
from protlig_dd.evaluation.variants.scoring import (
    assay_settings,
    numbering_for,
    output_files,
    read_checked,
    score_assay,
    settings_of,
    warn_of_context,
)
from protlig_dd.inference.model import load_trained
from protlig_dd.system.distributed import broadcast_from_first
from protlig_dd.system.files import check_free
from protlig_dd.system.terminal import announce


def score(cfg: DictConfig) -> None:
    """Score one assay or a folder of assays, and write the tables."""
    config = read_config(cfg, VariantsConfig)
    if config.reference is not None or (config.assay is not None and Path(config.assay).is_dir()):
        score_folder(config)
    else:
        score_one(config)


def score_one(config: VariantsConfig) -> None:
    output = Path(config.output)
    if output.suffix != ".csv":
        raise ValueError(
            f"output={config.output}: give a name that ends in .csv; the other output files are named after it"
        )
    for path in output_files(output).values():
        check_free(str(path))
    if config.target is None:
        raise ValueError("target is required: give target=wt.fasta, or a bare sequence of letters")
    target = read_target(config.target)
    assay = all_substitutions(target) if config.assay is None else read_checked(Path(config.assay), target, config)
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    warn_of_context(trained)
    if is_nucleotide(target.astype(np.uint8).tobytes()):
        announce(nucleotide_warning(1, 1, "target="), trained.processes)
    file = None if config.assay is None else Path(config.assay)
    frequencies = broadcast_from_first(background(trained) if trained.processes.first else None)
    settings = settings_of(trained, config) | {"frequencies": frequencies.name}
    settings |= assay_settings(file, target, numbering_for(config, AS_THE_TARGET).offset)
    score_assay(trained, config, assay, target, output, "variants", settings, frequencies)


def main() -> None:
    """The command line."""
    run_verb(score, "variants", VariantsConfig)


if __name__ == "__main__":
    main()
