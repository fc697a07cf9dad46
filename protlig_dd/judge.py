"""Judge generated proteins, always beside natural held-out ones and the same ones shuffled.

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
from protlig_dd.evaluation.inputs import read_sequences, thinned
from protlig_dd.evaluation.samples.external import outside_judges
from protlig_dd.evaluation.samples.relatives import find_train, relatives
from protlig_dd.evaluation.samples.statistics import COLUMNS, Rows, cheap_judges, for_json, with_controls
from protlig_dd.evaluation.samples.tables import markdown, per_sequence
from protlig_dd.evaluation.samples.verdicts import requested_lengths, verdicts
from protlig_dd.system.files import check_free, write_folder
from protlig_dd.system.tables import as_json, csv_text
from protlig_dd.system.terminal import ProgressBar, console
from protlig_dd.tokenizer import ProteinTokenizer


def judge(cfg: DictConfig) -> None:
    """Read the sets, ask every judge that is there, and write the folder of tables."""
    config = read_config(cfg, JudgeConfig)
    output = check_free(config.output)
    mmseqs = find_mmseqs(config.mmseqs)
    train = find_train(config, mmseqs)
    ids, samples = read(config, config.samples)
    _, pool = read(config, config.natural)
    if len(pool) < 4:
        raise ValueError(
            f"{config.natural} has {len(pool)} sequences; natural proteins and their reference need at least 4"
        )
    others = dict(outside_judges(config))
    chosen = thinned(np.arange(len(samples)), len(pool) // 2, config.seed)
    if len(chosen) < len(samples):
        console.print(f"{len(chosen)} of {len(samples)} samples are judged: half as many as there are natural proteins")
        ids, samples = [ids[i] for i in chosen], [samples[i] for i in chosen]
    controls = with_controls(samples, pool, config.seed)
    sets = controls.sets

    rows: Rows = {}
    cheap = cheap_judges(controls, bootstrap=config.bootstrap, seed=config.seed)
    with ProgressBar("statistics", 3 * len(cheap)) as bar:
        for name, (ask, asked_of) in cheap.items():
            rows[name] = []
            for some in asked_of:
                rows[name].append(ask(some))
                bar.advance(note=name)
    columns: dict[str, Sequence[float]] = {}  # of per_sequence.csv
    if mmseqs:
        with tempfile.TemporaryDirectory() as scratch:
            columns |= relatives(sets, train, Path(scratch), rows)
    texts = [[ProteinTokenizer().decode(one) for one in some] for some in sets]
    for name, (asked, summary) in others.items():
        with ProgressBar(name, sum(map(len, texts))) as bar:
            said_of = [asked(some, bar.advance) for some in texts]
        rows[name] = [summary(values, some) for values, some in zip(said_of, texts, strict=True)]
        columns[name] = said_of[0]
    found = verdicts(rows, len(controls.others), requested_lengths(Path(config.samples), samples))
    table = markdown(rows) + "\n" + "".join(f"- {one}\n" for one in found)
    table += "\nNatural proteins are of the samples' lengths; in rows of lengths they are drawn at random.\n"
    if train is not None:  # which need not be what made the samples
        table += f"\nTraining proteins are those of {train.path}.\n"
    said = {
        "samples": config.samples,
        "natural": config.natural,
        "train": str(train.path) if train else None,
        "seed": config.seed,
    }
    told = said | {"rows": for_json(rows), "verdicts": [one._asdict() for one in found]}
    files = {
        "judges.json": as_json(told),
        "judges.csv": csv_text(
            ["judge", *COLUMNS], [[name, *(x for figure in row for x in figure)] for name, row in rows.items()]
        ),
        "table.md": table,
        "per_sequence.csv": per_sequence(ids, samples, columns),
    }
    write_folder(output, files)
    console.print(table)
    console.print(f"{output}: {', '.join(files)}")


def read(config: JudgeConfig, path: str) -> tuple[list[str], list[np.ndarray]]:
    """Ids and residues, without <bos> and <eos>."""
    _, ids, tokens = read_sequences(Path(path), config.split, None, 0)
    return ids, [one[1:-1] for one in tokens]


def main() -> None:
    """The command line."""
    run_verb(judge, "judge", JudgeConfig, alone=True)


if __name__ == "__main__":
    main()
