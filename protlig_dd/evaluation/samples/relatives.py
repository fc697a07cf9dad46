"""Similar proteins among the samples and in the training set, found with MMseqs2."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protlig_dd.config.verbs import JudgeConfig
from protlig_dd.data.mmseqs import COVERAGE, E_VALUE, IDENTITY, best_hits, clusters_of
from protlig_dd.data.store import SequenceStore
from protlig_dd.evaluation.inputs import is_store, numbered_fasta
from protlig_dd.evaluation.samples.statistics import SETS, Figure, Rows, mean_figure, share
from protlig_dd.system.terminal import ProgressBar, console

NAN = float("nan")


def find_train(config: JudgeConfig, mmseqs: bool) -> SequenceStore | None:
    """Return the store whose training split is searched for relatives (similar proteins) of the samples.

    It is the store of `train=`, or else that of `natural=` if `natural=` is a store. If no store can be searched, print
    the reason and return None.
    """
    path = config.train or (config.natural if is_store(Path(config.natural)) else None)
    if path is None:
        console.print("there is no training set in which to search for relatives of the samples; set train=store.h5")
        return None
    store = SequenceStore(path)
    if not any(map(len, store.split_blocks("train"))):
        raise ValueError(f"{path}: no training sequences in it; set train= to a store that has a training split")
    if not mmseqs:
        console.print("MMseqs2 is not used, so relatives and clusters are not searched for")
        return None
    return store


def relatives(
    sets: Sequence[Sequence[np.ndarray]], train: SequenceStore | None, scratch: Path, rows: Rows
) -> dict[str, Sequence[float]]:
    """Find similar proteins with MMseqs2, and add the statistics to `rows`.

    The similar proteins are found within each set and, unless `train` is None, in the training split of `train`.

    Args:
        sets: the proteins of each of the SETS, of which the first is the samples.

    Returns:
        {column name: one value for each sample}.
    """
    clusters_row = f"clusters at {IDENTITY:.0%} identity, per protein"
    same_cluster_row = f"with another of the set at >= {IDENTITY:.0%} identity"
    hit_row, identity_row = f"with a training protein at E <= {E_VALUE}", "identity to the best of those"
    near_row = f"with one at >= {IDENTITY:.0%} identity over >= {COVERAGE:.0%}"
    train_rows = (hit_row, identity_row, near_row) if train is not None else ()
    for name in (clusters_row, same_cluster_row, *train_rows):
        rows[name] = []
    columns: dict[str, Sequence[float]] = {}
    with ProgressBar("MMseqs2", len(SETS) + (train is not None)) as bar:
        for name, sequences in zip(SETS, sets, strict=True):
            clusters = clusters_of(
                numbered_fasta(scratch / name, sequences), scratch / "work", identity=IDENTITY, coverage=COVERAGE
            )
            bar.advance(note=f"clusters, {name}")
            members = {i for cluster in clusters if len(cluster) > 1 for i in cluster}
            not_alone = [float(i in members) for i in range(len(sequences))]
            rows[clusters_row].append(Figure(len(clusters) / len(sequences)))
            rows[same_cluster_row].append(share(not_alone))
            columns.setdefault(same_cluster_row, not_alone)
        if train is not None:
            targets = numbered_fasta(
                scratch / "train", (train[row][1:-1] for rows in train.split_blocks("train") for row in rows)
            )
            queries = numbered_fasta(scratch / "all", itertools.chain(*sets))
            hit_of_query = best_hits(queries, targets, scratch / "work")
            bar.advance(note="relatives in the training set")
            numbers = iter(range(sum(map(len, sets))))
            for sequences in sets:
                hits = [hit_of_query.get(i) for i in itertools.islice(numbers, len(sequences))]
                has_hit = [float(hit is not None) for hit in hits]
                near = [float(hit is not None and hit.near) for hit in hits]
                rows[hit_row].append(share(has_hit))
                rows[identity_row].append(mean_figure([hit.identity for hit in hits if hit]))
                rows[near_row].append(share(near))
                columns.setdefault(hit_row, has_hit)
                columns.setdefault(identity_row, [hit.identity if hit else NAN for hit in hits])
                columns.setdefault(near_row, near)
    return columns
