"""Find the held-out proteins of a run that are also in the training data of its model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.config.train import TrainConfig
from protlig_dd.data.members import ClusterGroup, MembersOfSplits
from protlig_dd.data.store import StoreGroup
from protlig_dd.evaluation.likelihood.held_out import HeldOut
from protlig_dd.evaluation.likelihood.leaks import MIN_PROTEINS, Leaks, find_leaks, may_have_duplicates
from protlig_dd.evaluation.likelihood.trained_on import TrainingData, source_training_data
from protlig_dd.runs.metrics import without_nan
from protlig_dd.system.terminal import console


def find_held_out_leaks(
    config: TrainConfig, store: StoreGroup, run_folder: Path, held_rows: dict[str, np.ndarray]
) -> dict[str, Leaks]:
    """Find and print the held-out proteins that are in the training data of this run or of its source models (`from=`).

    The run's own training split is searched only if the data may contain a protein twice. This is possible with several
    stores, or with a store whose duplicates `prepare` did not remove. The members of the training clusters, if any, are
    always searched.

    Args:
        held_rows: {split: rows of the held-out proteins in `store`}.

    Returns:
        {split: Leaks}.
    """
    this_run = TrainingData("this run", store)
    others = list(source_training_data(config, run_folder, store.stores))
    if isinstance(store, ClusterGroup):
        others.insert(0, TrainingData("this run", StoreGroup([MembersOfSplits(store)])))
    repeats, found = may_have_duplicates(store), {}
    for split, rows in held_rows.items():
        locations = store.locate(rows)
        proteins = [
            store.stores[number].tokens[begin : begin + residues + 2]
            for number, begin, residues in zip(*(column.tolist() for column in locations), strict=True)
        ]
        leaks = find_leaks(proteins, [this_run, *others] if repeats else others, near=None)
        if not repeats:
            trained = np.full(len(rows), split == "train")
            leaks = replace(leaks, sources=[this_run, *others], copies=[trained, *leaks.copies])
        if others or leaks.copied.any():
            console.print("\n".join(leaks.lines(f"{split} proteins")))
        found[split] = leaks
    return found


def leak_report(leaks: Leaks, rows: np.ndarray, held: HeldOut) -> dict[str, Any]:
    """Return the report's entry about held-out proteins that are in the training data.

    The entry's key `others` has the bound over the proteins that are not in the training data. The bound is None if no
    protein is in the training data, or if too few proteins are left for a bound.

    Args:
        rows: store rows of the proteins in `leaks`. `held` may contain only some of these proteins.
    """
    judged = np.isin(rows, held.rows)
    leaks = replace(leaks, copies=[copied[judged] for copied in leaks.copies])
    figures = None
    others = ~leaks.copied if len(leaks.copied) else np.zeros(0, bool)
    if leaks.copied.any() and others.sum() >= MIN_PROTEINS and held.residues[others].sum():
        columns = {name: getattr(held, name)[others] for name in ("rows", "nats", "residues", "unigram_nats")}
        figures = without_nan(replace(held, **columns).summary())
    return {**leaks.report(), "others": figures}
