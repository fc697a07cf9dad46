"""Judge generated proteins: compare them with natural held-out proteins and with shuffled proteins.

python -m protlig_dd.judge samples=designs.fasta natural=data/my.h5 output=judged
python -m protlig_dd.judge samples=designs.fasta natural=held.fasta train=data/my.h5 hmm=Pfam-A.hmm output=judged
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import JudgeConfig
from protlig_dd.data.mmseqs import find_mmseqs
from protlig_dd.evaluation.inputs import is_store, read_sequences, subsample
from protlig_dd.evaluation.samples.external import outside_judges
from protlig_dd.evaluation.samples.relatives import find_train, relatives
from protlig_dd.evaluation.samples.statistics import COLUMNS, Rows, cheap_judges, for_json, with_controls
from protlig_dd.evaluation.samples.tables import markdown, per_sequence
from protlig_dd.evaluation.samples.verdicts import verdicts, why_lengths_are_not_judged
from protlig_dd.system.files import check_free, write_folder
from protlig_dd.system.tables import as_json, csv_text
from protlig_dd.system.terminal import ProgressBar, console
from protlig_dd.tokenizer import ProteinTokenizer


def judge(cfg: DictConfig) -> None:
    """Read the sets of proteins, compute the statistics of every available judge, and write a folder of tables."""
    config = read_config(cfg, JudgeConfig)
    output = check_free(config.output)
    mmseqs = find_mmseqs(config.mmseqs)
    train = find_train(config, mmseqs)
    ids, samples = read(config, config.samples)
    _, pool = read(config, config.natural)
    if len(pool) < 4:
        raise ValueError(too_few_natural(config, len(pool)))
    others = dict(outside_judges(config))
    chosen = subsample(np.arange(len(samples)), len(pool) // 2, config.seed)
    if len(chosen) < len(samples):
        console.print(
            f"only {len(chosen)} of {len(samples)} samples are judged: each sample needs two natural proteins"
        )
        ids, samples = [ids[i] for i in chosen], [samples[i] for i in chosen]
    controls = with_controls(samples, pool, config.seed)
    sets = controls.sets

    rows: Rows = {}
    cheap = cheap_judges(controls, bootstrap=config.bootstrap, seed=config.seed)
    with ProgressBar("statistics", 3 * len(cheap)) as bar:
        for name, (compute, judged_sets) in cheap.items():
            rows[name] = []
            for sequences in judged_sets:
                rows[name].append(compute(sequences))
                bar.advance(note=name)
    columns: dict[str, Sequence[float]] = {}  # columns of per_sequence.csv
    if mmseqs:
        with tempfile.TemporaryDirectory() as scratch:
            columns |= relatives(sets, train, Path(scratch), rows)
    texts = [[ProteinTokenizer().decode(residues) for residues in sequences] for sequences in sets]
    for name, (compute_each, summarise) in others.items():
        with ProgressBar(name, sum(map(len, texts))) as bar:
            values = [compute_each(sequences, bar.advance) for sequences in texts]
        rows[name] = [summarise(of_set, sequences) for of_set, sequences in zip(values, texts, strict=True)]
        columns[name] = values[0]
    found = verdicts(rows, len(controls.length_reference), why_lengths_are_not_judged(Path(config.samples), samples))
    table = markdown(rows) + "\n" + "".join(f"- {verdict}\n" for verdict in found)
    table += (
        "\nThe natural proteins are chosen to have nearly the samples' lengths; "
        "in rows about lengths they are chosen at random.\n"
    )
    if train is not None:  # name the store: the samples' model may have been trained on another store
        table += f"\nTraining proteins are those of {train.path}.\n"
    inputs = {
        "samples": config.samples,
        "natural": config.natural,
        "train": str(train.path) if train else None,
        "seed": config.seed,
    }
    report = inputs | {"rows": for_json(rows), "verdicts": [verdict._asdict() for verdict in found]}
    files = {
        "judges.json": as_json(report),
        "judges.csv": csv_text(
            ["judge", *COLUMNS], [[name, *(value for figure in row for value in figure)] for name, row in rows.items()]
        ),
        "table.md": table,
        "per_sequence.csv": per_sequence(ids, samples, columns),
    }
    write_folder(output, files)
    console.print(table)
    console.print(f"{output}: {', '.join(files)}")


def too_few_natural(config: JudgeConfig, n: int) -> str:
    """Return the error message for n natural proteins, where n is below 4: half of them are needed as the reference."""
    needed = f"has {n} sequences but needs at least 4, half of them as the reference"
    if not is_store(Path(config.natural)):
        return f"{config.natural} {needed}"
    larger = "more sequences" if config.split == "train" else f"a larger split.{config.split}_fraction"
    remedy = f"build the store with {larger}, or set split= to another split"
    return f"the {config.split} split of {config.natural} {needed}; {remedy}"


def read(config: JudgeConfig, path: str) -> tuple[list[str], list[np.ndarray]]:
    """Return the ids of the proteins in a file, and their residues as token ids, without <bos> and <eos>."""
    _, ids, tokens = read_sequences(Path(path), config.split, None, 0)
    return ids, [sequence[1:-1] for sequence in tokens]


def main() -> None:
    """The command line."""
    run_verb(judge, "judge", JudgeConfig, rank0_only=True)


if __name__ == "__main__":
    main()
