"""Load a trained model from a run folder, a checkpoint or an exported model."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save as serialize
from torch import Tensor

from protlig_dd import __version__
from protlig_dd.config.components import build_score_fn
from protlig_dd.config.read import as_dict, read_config
from protlig_dd.config.train import LoggerConfig, RunConfig, TrainConfig, config_in
from protlig_dd.data.case import Context
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.rates import substitution_rates
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.adapters import BASE, Adapters, check_base
from protlig_dd.inference.exported import DESCRIPTION, FORMAT, FORMAT_VERSION, WEIGHTS, is_exported, read_description
from protlig_dd.inference.lengths import Lengths, lengths_of
from protlig_dd.inference.sequences import check_trained_length
from protlig_dd.model.config import LoraConfig
from protlig_dd.model.dit import DiT
from protlig_dd.runs.checkpoint import copy_tensors, find_checkpoint, load_tensors, read_state
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.distributed import Processes, join_group, processes_from_environment
from protlig_dd.system.files import sha256
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
    """The file of the weights. If the run has adapters, the file has only the trained parameters; use `tensors`."""
    config: TrainConfig
    """The config of the run. Its network has no adapters, because they are merged with the other weights."""
    step: int
    length_counts: list[int] | None
    """length_counts[n] is the number of training sequences with n residues."""
    cropped_sequences: int | None
    """How many training sequences are longer than max_len. If it is None, length_counts counts these sequences as
    having max_len residues."""
    data_fingerprint: str
    skipped: list[str]
    """The error message of each newer checkpoint of the same run that is not valid."""
    members_fingerprint: str | None = None
    """Fingerprint of the file of members (`data.members`) of the run; None without such a file."""
    converted_from: dict[str, Any] | None = None
    """Origin of a converted model: name, commit, SHA-256 of its files. Models fine-tuned from it keep this record."""
    adapters: Adapters | None = None
    """The adapters of the run; None for a run without adapters and for an exported model."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged weights by name, on the CPU. Adapters are merged with the weights they were added to."""
        return load_tensors(self.weights) if self.adapters is None else self.adapters.merged(self.weights)

    def content(self) -> bytes:
        """Return the averaged weights as a safetensors file; for a run with adapters, the file that `export` writes."""
        return self.weights.read_bytes() if self.adapters is None else serialize(self.tensors())

    def weights_sha256(self) -> str:
        """Return the SHA-256 of `content` in hexadecimal."""
        return sha256(self.weights) if self.adapters is None else hashlib.sha256(self.content()).hexdigest()


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
                members_fingerprint=description.get("members_fingerprint"),
                converted_from=description.get("converted_from"),
            )
        except KeyError as error:
            raise ValueError(f"{folder / DESCRIPTION}: damaged, or not written by protlig_dd ({error!r})") from error
    checkpoint, skipped = find_checkpoint(folder)
    state, config = read_state(checkpoint), config_in(checkpoint)
    return SavedModel(
        path=checkpoint,
        weights=checkpoint / "ema.safetensors",
        config=replace(config, model=replace(config.model, lora=LoraConfig())),
        step=state["step"],
        length_counts=state.get("length_counts"),
        cropped_sequences=state.get("cropped_sequences"),
        data_fingerprint=state["data_fingerprint"],
        skipped=skipped,
        members_fingerprint=state.get("members_fingerprint"),
        converted_from=state.get("converted_from"),
        adapters=find_adapters(checkpoint, config),
    )


def find_adapters(checkpoint: Path, config: TrainConfig) -> Adapters | None:
    """Return the adapters of a checkpoint with this config; None if it has none.

    Raises:
        ValueError: the run folder's copy of the weights that the adapters extend is missing or damaged.
    """
    if config.model.lora.rank is None:
        return None
    folder = run_folder(checkpoint)
    base = None if folder is None else folder / BASE
    if base is None or not base.is_file():
        raise ValueError(
            f"{checkpoint} contains only adapters (model.lora.rank={config.model.lora.rank}), and {BASE} of its run is "
            "needed too: keep the checkpoint in its run folder, or use the model that `python -m protlig_dd.export` "
            "writes, in which the adapters are merged"
        )
    check_base(base, config.from_sha256)
    return Adapters(base, config.model, config.time_conditioning)


def run_folder(checkpoint: Path) -> Path | None:
    """Return the run folder that contains a checkpoint, after resolving links; None if no run folder contains it."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def load_saved(saved: SavedModel, device: torch.device, precision: str) -> ScoreFn:
    """Return the score function of a saved model, with its averaged weights."""
    score_fn = build_score_fn(
        model=saved.config.model,
        graph=saved.config.graph,
        noise=saved.config.noise,
        parametrisation=saved.config.parametrisation,
        time_conditioning=saved.config.time_conditioning,
        device=device,
        precision=precision,
    )
    assert isinstance(score_fn.model, DiT)
    copy_tensors(saved.weights, saved.tensors(), score_fn.model.state_dict())
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
        data=replace(config.data, path=None, members=None),
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
        **({} if saved.members_fingerprint is None else {"members_fingerprint": saved.members_fingerprint}),
        **({} if saved.converted_from is None else {"converted_from": saved.converted_from}),
        **({} if saved.adapters is None else {"lora": asdict(saved.adapters.model.lora)}),
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
