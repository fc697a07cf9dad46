"""What trained a model: the stores of its own run, and those of the models that it began from (`from=`)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from protlig_dd.config.train import TrainConfig, config_in
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.inputs import is_store
from protlig_dd.inference.exported import is_exported
from protlig_dd.inference.model import TrainedModel, find_saved, run_folder
from protlig_dd.runs.checkpoint import COMPLETE, complete_checkpoints
from protlig_dd.system.files import sha256
from protlig_dd.system.launcher import recorded_environment

NO_STORE = "its training set was not found, or cannot be read"


class Source(NamedTuple):
    """What trained a model, or one that it began from."""

    model: str
    """What a message calls it."""
    stores: StoreGroup | None
    why: str = ""
    """What was not found, where there are no stores."""


class Known(NamedTuple):
    """A model that another began from."""

    path: Path
    config: TrainConfig
    data_fingerprint: str


def own_data(given: Sequence[SequenceStore], checkpoint: Path, fingerprint: str) -> StoreGroup | None:
    """The stores that a model was trained on, known by their fingerprint: one that is given, or those of its run.

    A run's record has paths as they were given: from where it was started, which is a folder that the run lies in.
    """
    candidates = [[store.path] for store in given]
    run = run_folder(checkpoint)
    if run is not None and (paths := recorded_environment(run).get("data_path")):
        candidates += [[folder / path for path in paths.split(", ")] for folder in (Path(), *run.parents)]
    for paths in candidates:
        if all(map(is_store, paths)):
            try:
                group = StoreGroup([SequenceStore(path) for path in paths])
            except (ValueError, OSError):  # damaged, or an earlier format's: as good as gone, and no reason to stop
                continue
            if group.fingerprint == fingerprint:
                return group
    return None


def sources_before(config: TrainConfig, run: Path | None, given: Sequence[SequenceStore]) -> Iterator[Source]:
    """The model that a run began from, the one that that one began from, and so on, as far as they are found.

    Args:
        config: of the run.
        run: its folder; a relative `from=` begins at one that it lies in.
        given: stores that may be theirs.
    """
    while config.from_sha256 is not None:
        name = "the model that it began from" if config.from_ is None else f"its source {config.from_}"
        saved, why = find_source(config, run)
        if saved is None:
            yield Source(name, None, why)
            return
        stores = own_data(given, saved.path, saved.data_fingerprint)
        yield Source(name, stores, "" if stores else NO_STORE)
        config, run = saved.config, run_folder(saved.path)


def find_source(config: TrainConfig, run: Path | None) -> tuple[Known | None, str]:
    """The model of `from=` with the weights that the run began with; or None and what became of it."""
    if config.from_ is None:
        return None, "an exported model does not name it"
    there = False
    for folder in (Path(), *(run.resolve().parents if run is not None else ())):
        path = folder / config.from_
        for model in [path] if is_exported(path) or (path / COMPLETE).is_file() else complete_checkpoints(path):
            there = True
            try:
                if weights_of(model) == config.from_sha256:
                    return read_known(model), ""
            except ValueError as error:
                return None, str(error)
    return None, "it has other weights by now" if there else f"there is no {config.from_}"


def read_known(model: Path) -> Known:
    """The config and data of a model. The weights of a checkpoint are not read: this is not to load them.

    Raises:
        ValueError: a damaged model; named.
    """
    if is_exported(model):
        saved = find_saved(str(model))
        return Known(saved.path, saved.config, saved.data_fingerprint)
    try:
        fingerprint = json.loads((model / "state.json").read_text())["data_fingerprint"]
        config = config_in(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model}: damaged ({error})") from error
    return Known(model, config, fingerprint)


def weights_of(model: Path) -> str | None:
    """SHA-256 of the averaged weights of an exported model, or as a checkpoint has it written down.

    Raises:
        ValueError: a damaged model; named.
    """
    if is_exported(model):
        return sha256(find_saved(str(model)).weights)
    try:
        return str(json.loads((model / COMPLETE).read_text())["ema.safetensors"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{model / COMPLETE}: damaged ({error})") from error


def all_sources(
    wanted: str | None, store: SequenceStore | None, trained: TrainedModel, called: str = "this model"
) -> list[Source]:
    """What trained the model and those that it began from; of a training set that is not found, `train=` tells.

    Args:
        called: what messages call the model; `train=` may be another one's where it is not "this model".
    """
    named = [] if wanted is None else [SequenceStore(wanted)]
    given = named + ([] if store is None else [store])
    own = own_data(given, trained.saved.path, trained.saved.data_fingerprint)
    if own is None and named and called == "this model":
        first = Source(f"{called}, as train= says", StoreGroup(named))
    else:
        hint = " (train=store.h5 names it)" if called == "this model" else ""
        first = Source(called, own, "" if own else NO_STORE + hint)
    return [first, *sources_before(trained.saved.config, run_folder(trained.saved.path), given)]
