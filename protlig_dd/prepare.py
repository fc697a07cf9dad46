"""Turn FASTA files into a store that training reads.

python -m protlig_dd.prepare input=my.fasta output=data/my.h5
python -m protlig_dd.prepare input=[a.fasta,b.fasta.gz] output=data/my.h5 test_fraction=0.05
python -m protlig_dd.prepare 'input={train: a.fasta, validation: b.fasta, test: c.fasta}' output=data/my.h5
"""

from pathlib import Path

from omegaconf import DictConfig

from protlig_dd.data.build import build_store
from protlig_dd.data.store import SPLITS
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import PrepareConfig, read_config
from protlig_dd.runtime.metrics import console


def prepare(cfg: DictConfig) -> None:
    """Read the inputs, split them, write the store, and print what it holds."""
    config = read_config(cfg, PrepareConfig)
    given = config.input
    is_mapping = isinstance(given, dict)
    inputs: dict[str, Path] | list[Path]
    if isinstance(given, dict):
        inputs = {str(split): Path(str(file)) for split, file in given.items()}
    else:
        inputs = [Path(str(file)) for file in (given if isinstance(given, list) else [given])]
    with console.status("reading"):
        store = build_store(
            inputs,
            Path(config.output),
            validation_fraction=0.0 if is_mapping else config.validation_fraction,
            test_fraction=0.0 if is_mapping else config.test_fraction,
        )
    console.print(f"{store.path}: {len(store):,} sequences, {int(store.lengths.sum()):,} residues")
    for split in SPLITS:
        rows = store.split(split)
        console.print(f"  {split:<10} {len(rows):,} sequences, {int(store.lengths[rows].sum()):,} residues")
    for split in SPLITS:
        if not len(store.split(split)):
            remedy = f"name a {split} file" if is_mapping else f"prepare again with a larger {split}_fraction"
            console.print(f"warning: the {split} split is empty and training reads it: {remedy}")


if __name__ == "__main__":
    run_verb(prepare, "prepare", PrepareConfig)
