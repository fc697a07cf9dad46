"""The proteins that a run is measured on, and which of them trained it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.config.train import TrainConfig
from protlig_dd.data.store import StoreGroup
from protlig_dd.evaluation.likelihood.held_out import HeldOut
from protlig_dd.evaluation.likelihood.leaks import FEWEST, Leaks, find_leaks, may_repeat
from protlig_dd.evaluation.likelihood.trained_on import Source, sources_before
from protlig_dd.runs.metrics import without_nan
from protlig_dd.system.terminal import console


def find_held_out_leaks(
    config: TrainConfig, store: StoreGroup, run_folder: Path, held_rows: dict[str, np.ndarray]
) -> dict[str, Leaks]:
    """For each split of {split: rows}, which of its proteins train this run or have trained the models that it begins
    from (`from=`); says so. One store in which `prepare` kept no sequence twice need not be looked through.
    """
    own, before = Source("this run", store), list(sources_before(config, run_folder, store.stores))
    repeats, found = may_repeat(store), {}
    for split, rows in held_rows.items():
        places = store.places(rows)
        proteins = [
            store.stores[number].tokens[begin : begin + residues + 2]
            for number, begin, residues in zip(*(column.tolist() for column in places), strict=True)
        ]
        leaks = find_leaks(proteins, [own, *before] if repeats else before, near=None)
        if not repeats:
            known = np.full(len(rows), split == "train")
            leaks = replace(leaks, sources=[own, *before], copies=[known, *leaks.copies])
        if before or leaks.copied.any():
            console.print("\n".join(leaks.lines(f"{split} proteins")))
        found[split] = leaks
    return found


def in_training(leaks: Leaks, rows: np.ndarray, held: HeldOut) -> dict[str, Any]:
    """What the report says of held-out proteins that have trained the model, with the bound of the others.

    Args:
        rows: those that `leaks` tells of; `held` may have fewer.
    """
    known = np.isin(rows, held.rows)
    leaks = replace(leaks, copies=[found[known] for found in leaks.copies])
    figures = None
    others = ~leaks.copied if len(leaks.copied) else np.zeros(0, bool)
    if leaks.copied.any() and others.sum() >= FEWEST and held.residues[others].sum():
        columns = {name: getattr(held, name)[others] for name in ("rows", "nats", "residues", "unigram_nats")}
        figures = without_nan(replace(held, **columns).summary())
    return {**leaks.report(), "others": figures}
