"""The packs that a run trains on and those that it is measured on."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.config.train import TrainConfig
from protlig_dd.data.draws import NEWEST, check_version, some_of
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import StoreGroup
from protlig_dd.training.context import Start


class Packs(NamedTuple):
    """Of one run."""

    training: PackDataset
    validation: PackDataset | None
    """None for a run that is not evaluated on its way."""
    reported: PackDataset
    """For the bound of the report."""
    held_out: dict[str, np.ndarray]
    """{split: store rows} of the two above."""


def make_packs(config: TrainConfig, store: StoreGroup, start: Start) -> Packs:
    """The packs that a config describes.

    Raises:
        ValueError: an empty split, or one whose sequences do not fit.
    """
    data, control = config.data, config.trainer
    packs_of = partial(PackDataset, store, max_len=data.max_len, tokens_per_pack=data.tokens_per_pack)
    version = plan_version(start.checkpoint, start.state)
    training = packs_of(store.split("train"), seed=config.seed, crop=data.crop, weights=data.weights, version=version)
    held_out: dict[str, np.ndarray] = {}

    def unshuffled(split: str, most: int) -> PackDataset:
        rows = subset(store, split, most, config.seed, version)
        held_out[split] = np.union1d(held_out.get(split, rows), rows)
        return packs_of(rows, seed=None)

    validation = unshuffled("validation", control.eval_max_sequences) if control.eval_every else None
    return Packs(training, validation, unshuffled(config.report.split, config.report.max_sequences), held_out)


def plan_version(checkpoint: Path | None, state: dict[str, Any]) -> int:
    """The version of the plan (see draws.py) that the run of this checkpoint has: the newest for a run that begins, 1
    where the state names none.

    Raises:
        ValueError: one that is not known here.
    """
    return NEWEST if checkpoint is None else check_version(state.get("plan_version", 1), checkpoint)


def subset(store: StoreGroup, split: str, most: int, seed: int, version: int) -> np.ndarray:
    """At most `most` rows of a split, the same ones at every evaluation of a run.

    Raises:
        ValueError: an empty split.
    """
    rows = store.split(split)
    if not len(rows):
        raise ValueError(
            f"{store.name} has no {split} sequences; prepare it with a larger split.{split}_fraction or a {split} file"
        )
    return some_of(rows, most, seed, version)
