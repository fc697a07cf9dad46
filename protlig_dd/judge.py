"""Judge generated proteins, always beside natural held-out ones and the same ones shuffled.

python -m protlig_dd.judge samples=designs.fasta natural=data/my.h5 output=judged
python -m protlig_dd.judge samples=designs.fasta natural=held.fasta train=data/my.h5 hmm=Pfam-A.hmm output=judged
"""

import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from protlig_dd.data.fasta import read_fasta
from protlig_dd.data.homology import best_hits, clusters_of, find_mmseqs
from protlig_dd.data.store import SPLITS, SequenceStore
from protlig_dd.evaluation.inputs import csv_text, is_store, numbered_fasta, read_sequences, thinned
from protlig_dd.evaluation.judges import (
    COLUMNS,
    SETS,
    Figure,
    Rows,
    cheap_judges,
    figures,
    for_json,
    low_complexity,
    perplexity,
    share,
    tandem_repeats,
    with_controls,
    written,
)
from protlig_dd.evaluation.outside import Judge, esm2_pseudo_perplexities, esmfold_plddts, pfam_hits
from protlig_dd.evaluation.verdicts import verdicts
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import JudgeConfig, read_config
from protlig_dd.runtime.files import write_folder
from protlig_dd.runtime.metrics import ProgressBar, console
from protlig_dd.runtime.trained import check_free, check_least
from protlig_dd.tokenizer import ProteinTokenizer

NEAR, COVERED = 0.5, 0.8  # identity and coverage of a near relative
NAN = float("nan")


def judge(cfg: DictConfig) -> None:
    """Read the sets, ask every judge that is there, and write the folder of tables."""
    config = read_config(cfg, JudgeConfig)
    output = check_free(config.output)
    check_least((("bootstrap", config.bootstrap, 2), ("seed", config.seed, 0)))
    if config.split not in SPLITS:
        raise ValueError(f"split={config.split}; there are {', '.join(SPLITS)}")
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
    said = {"samples": config.samples, "natural": config.natural, "train": str(train.path) if train else None,
            "seed": config.seed}  # fmt: skip
    told = said | {"rows": for_json(rows), "verdicts": [one._asdict() for one in found]}
    files = {
        "judges.json": json.dumps(told, indent=1) + "\n",
        "judges.csv": csv_text(
            ["judge", *COLUMNS], [[name, *(x for figure in row for x in figure)] for name, row in rows.items()]
        ),
        "table.md": table,
        "per_sequence.csv": per_sequence(ids, samples, columns),
    }
    write_folder(output, files)
    console.print(table)
    console.print(f"{output}: {', '.join(files)}")


Summary = Callable[[Sequence[float], Sequence[str]], Figure]
"""What a judge said of each of a set's proteins, and the proteins, to a figure of the set."""


def outside_judges(config: JudgeConfig) -> Iterator[tuple[str, tuple[Judge, Summary]]]:
    """Row, judge and summary of those that other packages bring, loaded before time is spent on anything else."""
    if config.hmm is not None:
        yield "with a hit to the HMMs", (pfam_hits(Path(config.hmm)), lambda values, _: share(values))
    if config.esm2 is not None:
        asked = esm2_pseudo_perplexities(config.esm2, config.device)
        yield f"pseudo-perplexity, {config.esm2}", (asked, lambda values, some: perplexity(values, [*map(len, some)]))
    if config.esmfold is not None:
        yield f"pLDDT, {config.esmfold}", (esmfold_plddts(config.esmfold, config.device), lambda v, _: figures(v))


def find_train(config: JudgeConfig, mmseqs: bool) -> SequenceStore | None:
    """The store whose training split is searched, if any: `train`, or `natural` where that is a store."""
    named = config.train or (config.natural if is_store(Path(config.natural)) else None)
    if named is None:
        console.print("no training set to search for relatives: give train=store.h5")
        return None
    store = SequenceStore(named)
    if not len(store.split("train")):
        raise ValueError(f"{named} has no training sequences")
    if not mmseqs:
        console.print("MMseqs2 is not used, so relatives and clusters are not searched for")
        return None
    return store


def read(config: JudgeConfig, path: str) -> tuple[list[str], list[np.ndarray]]:
    """Ids and residues, without <bos> and <eos>."""
    _, ids, tokens = read_sequences(Path(path), config.split, None, 0)
    return ids, [one[1:-1] for one in tokens]


def requested_lengths(path: Path, samples: Sequence[np.ndarray]) -> str | None:
    """Why the lengths of samples say nothing of the model that made them, where that is so: by their headers, which
    `sample` and `infill` write, or as all are alike.
    """
    told = [] if is_store(path) else [f" {record.description} " for record in read_fasta(path)]
    asked = {match[1] if (match := re.search(r" (lengths=\S+) ", one)) else None for one in told}
    if asked and None not in asked:
        return f"they were asked for ({', '.join(sorted(filter(None, asked)))})"
    if told and all(" nll_free=" in one for one in told):
        return "infill was given them"
    if len(samples) > 1 and len({len(one) for one in samples}) == 1:
        return f"all have {len(samples[0])} residues"
    return None


def relatives(
    sets: Sequence[Sequence[np.ndarray]], train: SequenceStore | None, scratch: Path, rows: Rows
) -> dict[str, Sequence[float]]:
    """Add MMseqs2's rows: relatives within each set and, where one is given, in the training set.

    Returns:
        By its name, a column of what each sample got.
    """
    alone, twins = f"clusters at {NEAR:.0%} identity, a protein", f"with another of the set at >= {NEAR:.0%} identity"
    hit, identity = "with a training protein at E <= 0.001", "identity to the best of those"
    close = f"with one at >= {NEAR:.0%} identity over >= {COVERED:.0%}"
    for name in (alone, twins, *((hit, identity, close) if train is not None else ())):
        rows[name] = []
    columns: dict[str, Sequence[float]] = {}
    with ProgressBar("MMseqs2", len(SETS) + (train is not None)) as bar:
        for name, sequences in zip(SETS, sets, strict=True):
            clusters = clusters_of(
                numbered_fasta(scratch / name, sequences), scratch / "work", identity=NEAR, coverage=COVERED
            )
            bar.advance(note=f"clusters, {name}")
            members = {i for cluster in clusters if len(cluster) > 1 for i in cluster}
            has_twin = [float(i in members) for i in range(len(sequences))]
            rows[alone].append(Figure(len(clusters) / len(sequences)))
            rows[twins].append(share(has_twin))
            columns.setdefault(twins, has_twin)
        if train is not None:
            targets = numbered_fasta(scratch / "train", (train[row][1:-1] for row in train.split("train")))
            queries = numbered_fasta(scratch / "all", itertools.chain(*sets))
            found = best_hits(queries, targets, scratch / "work")
            bar.advance(note="relatives in the training set")
            numbers = iter(range(sum(map(len, sets))))
            for sequences in sets:
                hits = [found.get(i) for i in itertools.islice(numbers, len(sequences))]
                near = [float(one is not None and one.near) for one in hits]
                rows[hit].append(share([float(one is not None) for one in hits]))
                rows[identity].append(figures([one.identity for one in hits if one]))
                rows[close].append(share(near))
                columns.setdefault(hit, [float(one is not None) for one in hits])
                columns.setdefault(identity, [one.identity if one else NAN for one in hits])
                columns.setdefault(close, near)
    return columns


def markdown(rows: Rows) -> str:
    lines = [f"| | {' | '.join(SETS)} |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(map(written, row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def per_sequence(ids: Sequence[str], samples: list[np.ndarray], columns: dict[str, Sequence[float]]) -> str:
    """A row for each sample."""
    seen: dict[bytes, int] = {}
    rows = []
    for i, (id_, one) in enumerate(zip(ids, samples, strict=True)):
        first = seen.setdefault(one.tobytes(), i)
        flags = low_complexity(one), tandem_repeats(one)
        shares = [float(flag.mean()) for flag in flags]
        rows.append(
            [id_, len(one), ids[first] if first != i else "", *shares, *(values[i] for values in columns.values())]
        )
    return csv_text(["id", "length", "same_as", "low_complexity", "tandem_repeats", *columns], rows)


def main() -> None:
    """The command line."""
    run_verb(judge, "judge", JudgeConfig, alone=True)


if __name__ == "__main__":
    main()
