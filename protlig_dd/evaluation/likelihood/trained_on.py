"""Find the training data of a model: the stores of its own run, and the stores of its source models (`from=`)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from protlig_dd.config.train import TrainConfig, config_in
from protlig_dd.data.members import ClusterGroup, Members, MembersOfSplits
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.inputs import is_store
from protlig_dd.inference.exported import is_exported
from protlig_dd.inference.model import TrainedModel, find_saved, run_folder
from protlig_dd.runs.checkpoint import COMPLETE, complete_checkpoints
from protlig_dd.system.launcher import recorded_environment

NO_STORE = "its training set was not found or cannot be read"


class TrainingData(NamedTuple):
    """The training data of a model, or of one of its source models."""

    model: str
    """Name of the model in messages."""
    stores: StoreGroup | None
    reason: str = ""
    """Why the stores were not found; empty if they were found."""


class SourceModel(NamedTuple):
    """A model whose weights are the starting weights of a run (`from=`)."""

    path: Path
    config: TrainConfig
    data_fingerprint: str
    members_fingerprint: str | None


def find_training_stores(
    known_stores: Sequence[SequenceStore], checkpoint: Path, fingerprint: str
) -> StoreGroup | None:
    """Return the stores with the fingerprint of a model's training data; None if they are not found.

    Each of `known_stores` is tried alone. Then the stores that the checkpoint's run recorded are tried together.
    Recorded paths may be relative to the folder in which the run was launched, so they are looked up in the current
    folder and in every folder that contains the run.
    """
    candidates = [[store.path] for store in known_stores]
    run = run_folder(checkpoint)
    if run is not None and (paths := recorded_environment(run).get("data_path")):
        candidates += [[folder / path for path in paths.split(", ")] for folder in (Path(), *run.parents)]
    for paths in candidates:
        if all(map(is_store, paths)):
            try:
                group = StoreGroup([SequenceStore(path) for path in paths])
            except (ValueError, OSError):  # a store that is damaged or in an earlier format counts as not found
                continue
            if group.fingerprint == fingerprint:
                return group
    return None


def members_read(
    model: str, checkpoint: Path, clusters: StoreGroup | None, fingerprint: str | None
) -> list[TrainingData]:
    """Return the members of clusters that a model was trained on, or [] if it was trained without `data.members`.

    The file of members is looked up at the path that the checkpoint's run recorded (see `find_training_stores`).

    Args:
        model: name of the model in messages.
        clusters: the model's stores, if they were found.
        fingerprint: fingerprint of the file of members; None if the model was trained without it.
    """
    if fingerprint is None:
        return []
    run = run_folder(checkpoint)
    if run is not None and clusters is not None:
        recorded = str(recorded_environment(run).get("members_path", ""))
        for path in (folder / recorded for folder in (Path(), *run.parents)):
            try:
                group = ClusterGroup(clusters.stores[0], Members(path))
            except (ValueError, OSError):  # a missing or damaged file, or a file for other stores
                continue
            if group.members.fingerprint == fingerprint:
                return [TrainingData(model, StoreGroup([MembersOfSplits(group)]))]
    return [TrainingData(f"{model} (members of clusters, data.members)", None, NO_STORE)]


def source_training_data(
    config: TrainConfig, run: Path | None, known_stores: Sequence[SequenceStore]
) -> Iterator[TrainingData]:
    """Yield the training data of a run's source model, of the source model of that model, and so on.

    The chain ends with the first model that is not found.

    Args:
        config: the run's config.
        run: the run folder; a relative `from=` is looked up in the current folder and in the parent folders of `run`.
        known_stores: stores that may be the training data.
    """
    while config.from_sha256 is not None:
        name = "the source model" if config.from_ is None else f"the source model {config.from_}"
        source, reason = find_source_model(config, run)
        if source is None:
            yield TrainingData(name, None, reason)
            return
        stores = find_training_stores(known_stores, source.path, source.data_fingerprint)
        yield TrainingData(name, stores, "" if stores else NO_STORE)
        yield from members_read(name, source.path, stores, source.members_fingerprint)
        config, run = source.config, run_folder(source.path)


def find_source_model(config: TrainConfig, run: Path | None) -> tuple[SourceModel | None, str]:
    """Return the model of `from=` if its weights are still the run's starting weights; else None and the reason."""
    if config.from_ is None:
        return None, "an exported model does not record the path of its source"
    exists = False
    for folder in (Path(), *(run.resolve().parents if run is not None else ())):
        path = folder / config.from_
        for model in [path] if is_exported(path) or (path / COMPLETE).is_file() else complete_checkpoints(path):
            exists = True
            try:
                if averaged_weights_sha256(model) == config.from_sha256:
                    return read_source_model(model), ""
            except ValueError as error:
                return None, str(error)
    return None, "its weights have changed since the run began" if exists else f"{config.from_} does not exist"


def read_source_model(model: Path) -> SourceModel:
    """Return the config and data fingerprint of a model, without reading the weights of a checkpoint.

    Raises:
        ValueError: the model is damaged; the message names the file.
    """
    if is_exported(model):
        saved = find_saved(str(model))
        return SourceModel(saved.path, saved.config, saved.data_fingerprint, saved.members_fingerprint)
    try:
        state, config = json.loads((model / "state.json").read_text()), config_in(model)
        return SourceModel(model, config, state["data_fingerprint"], state.get("members_fingerprint"))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model}: damaged ({error})") from error


def averaged_weights_sha256(model: Path) -> str | None:
    """Return the SHA-256 of a model's averaged weights.

    For an exported model and a checkpoint with adapters the checksum is computed. For any other checkpoint it is read
    from the checkpoint's list of checksums.

    Raises:
        ValueError: the model is damaged; the message names the file.
    """
    if is_exported(model) or config_in(model).model.lora.rank is not None:
        return find_saved(str(model)).weights_sha256()
    try:
        return str(json.loads((model / COMPLETE).read_text())["ema.safetensors"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{model / COMPLETE}: damaged ({error})") from error


def all_training_data(
    train: str | None, store: SequenceStore | None, trained: TrainedModel, label: str = "this model"
) -> list[TrainingData]:
    """Return the training data of the model and of its source models.

    Args:
        train: path of the store that the user set with `train=`, if any. It is used if its fingerprint is that of the
            model's training data. With the label "this model", it is also used if the model's stores are not found.
        store: the evaluated store, which may be the training data.
        label: name of the model in messages. With a label other than "this model", `train=` may be the training data of
            another model, so its fingerprint must match.
    """
    train_stores = [] if train is None else [SequenceStore(train)]
    known_stores = train_stores + ([] if store is None else [store])
    own_stores = find_training_stores(known_stores, trained.saved.path, trained.saved.data_fingerprint)
    if own_stores is None and train_stores and label == "this model":
        own = TrainingData(f"{label}, with the training set of train=", StoreGroup(train_stores))
    else:
        hint = "; name it with train=store.h5" if label == "this model" else ""
        own = TrainingData(label, own_stores, "" if own_stores else NO_STORE + hint)
    saved = trained.saved
    members = members_read(label, saved.path, own_stores, saved.members_fingerprint)
    return [own, *members, *source_training_data(saved.config, run_folder(saved.path), known_stores)]
