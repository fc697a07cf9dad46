"""Judge generated proteins, always beside natural held-out ones and the same ones shuffled.

python -m protlig_dd.judge samples=designs.fasta natural=data/my.h5 output=judged
python -m protlig_dd.judge samples=designs.fasta natural=held.fasta train=data/my.h5 hmm=Pfam-A.hmm output=judged
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from protlig_dd.data.homology import best_hits, count_clusters, find_mmseqs
from protlig_dd.data.store import SPLITS, SequenceStore
from protlig_dd.evaluation.inputs import csv_text, is_store, read_sequences
from protlig_dd.evaluation.judges import (
    Row,
    cheap_judges,
    figures,
    low_complexity,
    share,
    shuffled,
    tandem_repeats,
)
from protlig_dd.evaluation.outside import esm2_pseudo_perplexities, esmfold_plddts, pfam_hits
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import JudgeConfig, read_config
from protlig_dd.runtime.files import write_folder
from protlig_dd.runtime.metrics import ProgressBar, console
from protlig_dd.runtime.trained import check_free, check_least
from protlig_dd.tokenizer import ProteinTokenizer

SETS = ("samples", "natural", "shuffled")
NEAR, COVERED = 0.5, 0.8  # identity and coverage of a near relative


def judge(cfg: DictConfig) -> None:
    """Read the sets, ask every judge that is there, and write the folder of tables."""
    config = read_config(cfg, JudgeConfig)
    output = check_free(config.output)
    check_least((("bootstrap", config.bootstrap, 2), ("seed", config.seed, 0)))
    if config.split not in SPLITS:
        raise ValueError(f"split={config.split}; there are {', '.join(SPLITS)}")
    mmseqs = find_mmseqs(config.mmseqs)
    train = find_train(config, mmseqs)
    if config.hmm is not None and not Path(config.hmm).is_file():
        raise ValueError(f"hmm={config.hmm}: no such file")
    ids, samples = residues_of(*read_sequences(Path(config.samples), config.split, None, 0)[1:])
    longest = max(map(len, samples))
    _, pool = residues_of(*read_sequences(Path(config.natural), config.split, None, 0)[1:])
    if len(pool) < 4:
        raise ValueError(
            f"{config.natural} has {len(pool)} sequences; natural proteins and their reference need at least 4"
        )
    generator = np.random.default_rng([config.seed, 1])
    order = generator.permutation(len(pool))
    taken = min(len(samples), len(pool) // 2)
    natural = [pool[i][:longest] for i in order[:taken]]
    reference = [pool[i][:longest] for i in order[taken:]]
    sets = {"samples": samples, "natural": natural, "shuffled": shuffled(natural, generator)}

    rows = cheap_judges(sets, reference, bootstrap=config.bootstrap, seed=config.seed)
    columns: dict[str, Sequence[float]] = {}
    jobs = [name for name, wanted in (("mmseqs", mmseqs), ("hmm", config.hmm), ("esm2", config.esm2),
                                      ("esmfold", config.esmfold)) if wanted]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, ProgressBar("judging", 3 * len(jobs)) as bar:
        for job in jobs:
            found = []
            for name in SETS:
                found.append(ask(job, sets[name], config, train, Path(scratch) / f"{job}_{name}"))
                bar.advance(note=f"{job}, {name}")
            rows += [Row(label, *(values[label][0] for values in found)) for label in found[0]]
            columns |= {label: values[1] for label, values in found[0].items() if values[1] is not None}
    table = markdown(rows)
    files = {
        "judges.json": json.dumps([row.as_dict() for row in rows], indent=1) + "\n",
        "judges.csv": csv_text(
            ["judge", *(column for name in SETS for column in (name, f"{name}_se"))],
            [[row.name, *(x for name in SETS for x in getattr(row, name))] for row in rows],
        ),
        "table.md": table,
        "per_sequence.csv": per_sequence(ids, samples, columns),
    }
    write_folder(output, files)
    console.print(table, markup=False)
    console.print(f"{output}: {', '.join(files)}", markup=False)


def find_train(config: JudgeConfig, mmseqs: bool) -> SequenceStore | None:
    """The store whose training split is searched: `train`, or `natural` where that is a store."""
    named = config.train or (config.natural if is_store(Path(config.natural)) else None)
    if named is None:
        console.print("no training set to search for relatives: give train=store.h5")
        return None
    store = SequenceStore(named)
    if not len(store.split("train")):
        raise ValueError(f"{named} has no training sequences")
    if not mmseqs:
        console.print("MMseqs2 is not used, so relatives and clusters are not searched for")
    return store


def residues_of(ids: Sequence[str], tokens: Sequence[np.ndarray]) -> tuple[list[str], list[np.ndarray]]:
    """Without <bos> and <eos>."""
    return list(ids), [one[1:-1] for one in tokens]


Answers = dict[str, tuple[tuple[float, float], Sequence[float] | None]]
"""By row: a figure with its standard error (NaN where it has none), and what each sequence got."""


def ask(
    job: str, sequences: list[np.ndarray], config: JudgeConfig, train: SequenceStore | None, scratch: Path
) -> Answers:
    """One judge's rows for one set."""
    decode = ProteinTokenizer().decode
    texts = [decode(one) for one in sequences]
    if job == "hmm":
        hits = pfam_hits(texts, Path(str(config.hmm)))
        return {"with a hit to the HMMs": (share(hits), [float(hit) for hit in hits])}
    if job == "esm2":
        values = esm2_pseudo_perplexities(texts, str(config.esm2), config.device)
        return {f"pseudo-perplexity, {config.esm2}": (figures(values), values)}
    if job == "esmfold":
        values = esmfold_plddts(texts, config.device)
        return {"ESMFold pLDDT": (figures(values), values)}
    scratch.mkdir()
    queries = scratch / "queries.fasta"
    queries.write_text("".join(f">{i}\n{text}\n" for i, text in enumerate(texts)))
    clusters = count_clusters(queries, scratch / "clusters", identity=NEAR, coverage=COVERED)
    answers: Answers = {f"clusters at {NEAR:.0%} identity, a protein": ((clusters / len(texts), float("nan")), None)}
    if train is None:
        return answers
    targets = scratch.parent / "train.fasta"
    if not targets.exists():
        with targets.open("w") as file:
            file.writelines(f">{row}\n{decode(train[row])}\n" for row in train.split("train"))
    found = best_hits(queries, targets, scratch / "search")
    identity = [found[i].identity if i in found else 0.0 for i in range(len(texts))]
    near = [i in found and found[i].near for i in range(len(texts))]
    of_hits = [found[i].identity for i in sorted(found)]
    answers["with a training protein at E <= 0.001"] = share([i in found for i in range(len(texts))]), None
    answers["identity to the best of those"] = figures(of_hits), identity
    answers[f"with one at >= {NEAR:.0%} identity over >= {COVERED:.0%}"] = share(near), [float(one) for one in near]
    return answers


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| | samples | natural | shuffled |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = []
        for value, error in (row.samples, row.natural, row.shuffled):
            if np.isnan(value):
                cells.append("")
            elif float(value).is_integer() and np.isnan(error):
                cells.append(f"{value:,.0f}")
            else:
                cells.append(f"{value:.4f}" + ("" if np.isnan(error) else f" ± {error:.4f}"))
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
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


if __name__ == "__main__":
    run_verb(judge, "judge", JudgeConfig)
