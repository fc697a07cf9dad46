"""Relatives of samples among themselves and in a training set, by MMseqs2."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protlig_dd.config.verbs import JudgeConfig
from protlig_dd.data.mmseqs import COVERAGE, E_VALUE, IDENTITY, best_hits, clusters_of
from protlig_dd.data.store import SequenceStore
from protlig_dd.evaluation.inputs import is_store, numbered_fasta
from protlig_dd.evaluation.samples.statistics import SETS, Figure, Rows, figures, share
from protlig_dd.system.terminal import ProgressBar, console

NAN = float("nan")


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


def relatives(
    sets: Sequence[Sequence[np.ndarray]], train: SequenceStore | None, scratch: Path, rows: Rows
) -> dict[str, Sequence[float]]:
    """Add MMseqs2's rows: relatives within each set and, where one is given, in the training set.

    Returns:
        By its name, a column of what each sample got.
    """
    alone, twins = (
        f"clusters at {IDENTITY:.0%} identity, a protein",
        f"with another of the set at >= {IDENTITY:.0%} identity",
    )
    hit, identity = f"with a training protein at E <= {E_VALUE}", "identity to the best of those"
    close = f"with one at >= {IDENTITY:.0%} identity over >= {COVERAGE:.0%}"
    for name in (alone, twins, *((hit, identity, close) if train is not None else ())):
        rows[name] = []
    columns: dict[str, Sequence[float]] = {}
    with ProgressBar("MMseqs2", len(SETS) + (train is not None)) as bar:
        for name, sequences in zip(SETS, sets, strict=True):
            clusters = clusters_of(
                numbered_fasta(scratch / name, sequences), scratch / "work", identity=IDENTITY, coverage=COVERAGE
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
