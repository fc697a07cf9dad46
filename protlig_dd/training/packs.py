"""The packs (batches of whole sequences) on which a run trains, and the packs on which it is evaluated."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.config.train import TrainConfig
from protlig_dd.data.blocks import BlockDataset
from protlig_dd.data.draws import NEWEST, check_version, random_subset
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.member_packs import MemberDataset
from protlig_dd.data.members import ClusterGroup
from protlig_dd.data.rows import SplitRows
from protlig_dd.data.store import StoreGroup
from protlig_dd.training.context import Start


class Packs(NamedTuple):
    """The packs of one run."""

    training: PackDataset
    validation: PackDataset | None
    """None if the run is not evaluated during training."""
    reported: PackDataset
    """The packs from which the final report computes its bound on the negative log-likelihood."""
    held_out: dict[str, np.ndarray]
    """The proteins in `validation` and `reported`: {split: their store rows}."""


def make_packs(config: TrainConfig, store: StoreGroup, start: Start) -> Packs:
    """Return the packs that a config describes.

    Raises:
        ValueError: a split is empty, or its sequences do not fit into packs.
    """
    data, control = config.data, config.trainer
    packs_of = partial(PackDataset, store, max_len=data.max_len, tokens_per_pack=data.tokens_per_pack)
    version = plan_version(start.checkpoint, start.state)
    training = training_packs(config, store, version)
    held_out: dict[str, np.ndarray] = {}

    def unshuffled(split: str, limit: int) -> PackDataset:
        rows = subset(store, split, limit, config.seed, version)
        held_out[split] = np.union1d(held_out.get(split, rows), rows)
        return packs_of(rows, seed=None)

    validation = unshuffled("validation", control.eval_max_sequences) if control.eval_every else None
    return Packs(training, validation, unshuffled(config.report.split, config.report.max_sequences), held_out)


def training_packs(config: TrainConfig, store: StoreGroup, version: int = NEWEST) -> PackDataset:
    """Return the packs of the training split that a config describes.

    Args:
        version: version of the random choices (see `plan_version`).

    Raises:
        ValueError: the split is empty, or its sequences do not fill one pack.
    """
    data, rows = config.data, SplitRows(store, "train")
    packs_of: Callable[..., PackDataset] = partial(PackDataset, weights=data.weights)
    if isinstance(store, ClusterGroup):
        packs_of = MemberDataset
    elif data.order == "blocks":
        packs_of = BlockDataset
    return packs_of(
        store,
        rows,
        max_len=data.max_len,
        tokens_per_pack=data.tokens_per_pack,
        seed=config.seed,
        crop=data.crop,
        version=version,
    )


def plan_version(checkpoint: Path | None, state: dict[str, Any]) -> int:
    """Return the version of the random choices (see draws.py) that a run uses.

    A run that resumes from a checkpoint uses the version of the checkpoint. Any other run uses the newest version.

    Args:
        state: state.json of the checkpoint. If it does not contain a version, the version is 1.

    Raises:
        ValueError: this program does not support the version of the checkpoint.
    """
    return NEWEST if checkpoint is None else check_version(state.get("plan_version", 1), checkpoint)


def subset(store: StoreGroup, split: str, limit: int, seed: int, version: int) -> np.ndarray:
    """Return at most `limit` random rows of a split. Every evaluation of a run gets the same rows.

    Raises:
        ValueError: the split is empty.
    """
    rows = SplitRows(store, split)
    if not len(rows):
        raise ValueError(
            f"{store.name} has no {split} sequences; prepare it with a larger split.{split}_fraction or a {split} file"
        )
    return random_subset(rows, limit, seed, version)
