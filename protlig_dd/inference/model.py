"""Load a trained model from a run folder, a checkpoint or an exported model."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from protlig_dd import __version__
from protlig_dd.config.components import load_model
from protlig_dd.config.read import as_dict, read_config
from protlig_dd.config.train import LoggerConfig, RunConfig, TrainConfig, config_in
from protlig_dd.data.case import Context
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.rates import substitution_rates
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.exported import DESCRIPTION, FORMAT, FORMAT_VERSION, WEIGHTS, is_exported, read_description
from protlig_dd.inference.lengths import Lengths, lengths_of
from protlig_dd.inference.sequences import check_trained_length
from protlig_dd.model.dit import DiT
from protlig_dd.runs.checkpoint import find_checkpoint, read_state
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.distributed import Processes, join_group, processes_from_environment
from protlig_dd.system.meeting import meeting_of
from protlig_dd.system.terminal import announce

TIMEOUT = 3600  # seconds that a rank waits for the other ranks
HOST_ARGUMENTS = ("from", "compare", "input", "train", "output")  # arguments with paths that may differ between hosts
MODEL_KEYS = ("model", "graph", "noise", "parametrisation", "time_conditioning")  # config keys that define a model


@dataclass(frozen=True)
class SavedModel:
    """Averaged weights (EMA) on disk, with the config and the facts about the training that were saved with them."""

    path: Path
    """A checkpoint or an exported model."""
    weights: Path
    config: TrainConfig
    step: int
    length_counts: list[int] | None
    """length_counts[n] is the number of training sequences with n residues."""
    cropped_sequences: int | None
    """How many training sequences are longer than max_len. If it is None, length_counts counts these sequences as
    having max_len residues."""
    data_fingerprint: str
    skipped: list[str]
    """The error message of each newer checkpoint of the same run that is not valid."""


def find_saved(path: str) -> SavedModel:
    """Return the saved model at a path, after verifying its checksums.

    The path is an exported model, a checkpoint, or a run folder. The newest valid checkpoint of a run folder is used.

    Raises:
        ValueError: the path is not one of these, or a file is damaged or not written by protlig_dd. The message names
            the path or the file.
    """
    folder = Path(path)
    if is_exported(folder):
        description = read_description(folder)
        try:
            return SavedModel(
                path=folder,
                weights=folder / WEIGHTS,
                config=config_from_description(description, folder / DESCRIPTION),
                step=description["step"],
                length_counts=description["length_counts"],
                cropped_sequences=description.get("cropped_sequences"),
                data_fingerprint=description["data_fingerprint"],
                skipped=[],
            )
        except KeyError as error:
            raise ValueError(f"{folder / DESCRIPTION}: damaged, or not written by protlig_dd ({error!r})") from error
    checkpoint, skipped = find_checkpoint(folder)
    state = read_state(checkpoint)
    return SavedModel(
        path=checkpoint,
        weights=checkpoint / "ema.safetensors",
        config=config_in(checkpoint),
        step=state["step"],
        length_counts=state.get("length_counts"),
        cropped_sequences=state.get("cropped_sequences"),
        data_fingerprint=state["data_fingerprint"],
        skipped=skipped,
    )


def run_folder(checkpoint: Path) -> Path | None:
    """Return the run folder that contains a checkpoint, after resolving links; None if no run folder contains it."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def load_saved(saved: SavedModel, device: torch.device, precision: str) -> ScoreFn:
    score_fn = load_model(
        saved.weights,
        model=saved.config.model,
        graph=saved.config.graph,
        noise=saved.config.noise,
        parametrisation=saved.config.parametrisation,
        time_conditioning=saved.config.time_conditioning,
        device=device,
        precision=precision,
    )
    return replace(score_fn, trained_with_context=saved.config.data.context != "none")


def describe(saved: SavedModel, report: dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of an exported model's config.json, without local paths and without the logger's settings.

    Args:
        report: the run's evaluation report on these weights; None if the run has none.
    """
    config, graph = saved.config, dict(saved.config.graph)
    if (matrix := graph.get("matrix")) is not None:  # store rates: loading then needs neither file nor Biopython
        if graph["rates"] is None:
            graph["rates"] = substitution_rates(matrix, graph["kind"], graph["scale"]).tolist()
        graph["matrix"] = Path(matrix).name
    training = replace(
        config,
        from_=None,
        run=RunConfig(name=config.run.name, fresh=False, resume="auto"),
        data=replace(config.data, path=None),
        logger=LoggerConfig(tensorboard=False, wandb_project=None, wandb_name=None),
    )
    parts = {**as_dict(training), "graph": graph}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "protlig_dd": __version__,
        "run": config.run.name,
        "step": saved.step,
        **{key: parts.pop(key) for key in MODEL_KEYS},
        "max_len": config.data.max_len,
        "length_counts": saved.length_counts,
        "cropped_sequences": saved.cropped_sequences,
        "data_fingerprint": saved.data_fingerprint,
        "fine_tuned_from": Path(config.from_).name if config.from_ else None,
        "report": report,
        "training": parts,
    }


def config_from_description(description: dict[str, Any], file: Path) -> TrainConfig:
    """Return the run's config from a description that `describe` returned.

    Raises:
        ValueError: `describe` cannot have returned the description, or the description has an interpolation
            (`${...}`), which could read values outside the file.
    """
    try:
        parts = {**description["training"], **{key: description[key] for key in MODEL_KEYS}}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged, or not written by protlig_dd ({error!r})") from error
    if "${" in json.dumps(parts):
        raise ValueError(f"{file}: has an interpolation, ${{...}}; exported models have none")
    return read_config(OmegaConf.create(parts), TrainConfig, stored=True)


@dataclass(frozen=True)
class TrainedModel:
    """A network in evaluation mode with averaged weights, and the saved model that contains these weights."""

    saved: SavedModel
    score_fn: ScoreFn
    precision: str
    processes: Processes

    @property
    def network(self) -> DiT:
        network = self.score_fn.model
        assert isinstance(network, DiT)
        return network

    @property
    def graph(self) -> Graph:
        return self.score_fn.graph

    @property
    def device(self) -> torch.device:
        return self.score_fn.device

    @property
    def run(self) -> str:
        """The run's name with `_` for white space.

        Earlier versions allowed white space in names, but white space ends an id in FASTA.
        """
        return "_".join(self.saved.config.run.name.split())

    @property
    def step(self) -> int:
        return self.saved.step

    @property
    def max_len(self) -> int:
        """Maximum number of residues that the model read of one training sequence."""
        return self.saved.config.data.max_len

    @property
    def context(self) -> Context:
        """The letter case of the residues that were given as context in training, or `none` (`data.context`)."""
        return self.saved.config.data.context

    @property
    def lengths(self) -> Lengths | None:
        """Lengths of the training proteins; None if they are not recorded."""
        return lengths_of(self.saved.length_counts, self.saved.cropped_sequences, self.max_len)

    def check_length(self, residues: int, name: str) -> None:
        """Raise a ValueError if a protein is empty, or longer than the model was trained on."""
        check_trained_length(residues, name, self.max_len)


def load_trained(path: str, *, device: str, precision: str) -> TrainedModel:
    """Load the saved model at a path (see `find_saved`). Under torchrun each rank loads it on its own device.

    Raises:
        ValueError: there is no valid model at this path, this machine does not have the device or precision, the
            weights do not fit the config that was saved with them, or the ranks have different arguments, models,
            devices, precisions or versions, or cannot connect.
    """
    saved = find_saved(path)
    processes = processes_from_environment()
    for problem in saved.skipped:
        announce(f"skipped: {problem}", processes)
    own_device = resolve_device(device, processes.local_rank)
    precision = resolve_precision(precision, own_device)
    trained = TrainedModel(saved, load_saved(saved, own_device, precision), precision, processes)
    meeting = meeting_of(processes)
    arguments = (argument.partition("=") for argument in sys.argv[1:])
    facts: dict[str, Any] = {key: value for key, _, value in arguments if key not in HOST_ARGUMENTS}
    facts |= {
        "step": saved.step,
        "data_fingerprint": saved.data_fingerprint,
        "precision": precision,
        "device": own_device.type,
    }
    meeting.agree(facts | {"protlig_dd": __version__, "torch": str(torch.__version__)}, TIMEOUT)
    join_group(processes, own_device, TIMEOUT, meeting.store)
    announce(f"{saved.path} on {own_device} in {precision}, {trained.network.kinds}", processes)
    return trained
