"""A trained model, ready to use, from a run, a checkpoint or an export: what every verb but training begins with."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from protlig_dd import __version__
from protlig_dd.config.components import load_model
from protlig_dd.config.read import read_config, spelt
from protlig_dd.config.train import LoggerConfig, RunConfig, TrainConfig, config_in
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.rates import substitution_rates
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.exported import DESCRIPTION, FORMAT, FORMAT_VERSION, WEIGHTS, is_exported, read_description
from protlig_dd.inference.lengths import Lengths, lengths_of
from protlig_dd.model.dit import DiT
from protlig_dd.runs.checkpoint import find_checkpoint, read_state
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.distributed import Processes, join_group, processes_from_environment
from protlig_dd.system.meeting import meeting_of
from protlig_dd.system.terminal import announce

TIMEOUT = 3600  # seconds that a rank waits for the others
OF_A_HOST = ("from", "compare", "input", "train", "output")  # paths, which may be other ones on each host
MODEL_KEYS = ("model", "graph", "noise", "parametrisation", "time_conditioning")  # what a model is, of a run's config


@dataclass(frozen=True)
class SavedModel:
    """Averaged weights on the disk, and what belongs to them."""

    path: Path
    """A checkpoint or an exported model."""
    weights: Path
    config: TrainConfig
    step: int
    length_counts: list[int] | None
    """How many training sequences have 0, 1, ... residues."""
    cropped_sequences: int | None
    """How many have more than the model saw and are not among those; None where they are, as those of max_len."""
    data_fingerprint: str
    skipped: list[str]
    """What is wrong with newer checkpoints of the same run."""


def find_saved(path: str) -> SavedModel:
    """The newest sound checkpoint of a run folder, a checkpoint, or an exported model; its checksums were compared.

    Raises:
        ValueError: none of these there, or a damaged or foreign file; named.
    """
    folder = Path(path)
    if is_exported(folder):
        found = read_description(folder)
        try:
            return SavedModel(
                path=folder,
                weights=folder / WEIGHTS,
                config=config_of(found, folder / DESCRIPTION),
                step=found["step"],
                length_counts=found["length_counts"],
                cropped_sequences=found.get("cropped_sequences"),
                data_fingerprint=found["data_fingerprint"],
                skipped=[],
            )
        except KeyError as error:
            raise ValueError(f"{folder / DESCRIPTION}: not what protlig_dd has written ({error!r})") from error
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
    """The folder of the run that a checkpoint stands in, however its path is spelt; None of what stands in no run."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def load_saved(saved: SavedModel, device: torch.device, precision: str) -> ScoreFn:
    return load_model(
        saved.weights,
        model=saved.config.model,
        graph=saved.config.graph,
        noise=saved.config.noise,
        parametrisation=saved.config.parametrisation,
        time_conditioning=saved.config.time_conditioning,
        device=device,
        precision=precision,
    )


def describe(saved: SavedModel, report: dict[str, Any] | None) -> dict[str, Any]:
    """What config.json of an exported model says of it; no paths of this machine, and not what it logged to.

    Args:
        report: that the run made of these weights, if it did.
    """
    config, graph = saved.config, dict(saved.config.graph)
    if (matrix := graph.get("matrix")) is not None:  # its rates, so that it needs neither the file nor Biopython
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
    parts = {**spelt(training), "graph": graph}
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


def config_of(description: dict[str, Any], file: Path) -> TrainConfig:
    """The run's config, out of what `describe` has made of it.

    Raises:
        ValueError: something else; or an interpolation, which would read what is not in the file.
    """
    try:
        parts = {**description["training"], **{key: description[key] for key in MODEL_KEYS}}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not what protlig_dd has written ({error!r})") from error
    if "${" in json.dumps(parts):
        raise ValueError(f"{file}: has an interpolation, ${{...}}, which no exported model has")
    return read_config(OmegaConf.create(parts), TrainConfig, stored=True)


@dataclass(frozen=True)
class TrainedModel:
    """Averaged weights in an evaluating network, ready to use, and what they were saved with."""

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
        """The run's name; white space, which earlier versions took, would end an id in a FASTA header."""
        return "_".join(self.saved.config.run.name.split())

    @property
    def step(self) -> int:
        return self.saved.step

    @property
    def max_len(self) -> int:
        """Residues of the longest sequence that it was trained on."""
        return self.saved.config.data.max_len

    @property
    def lengths(self) -> Lengths | None:
        """Of its training proteins, where that is known."""
        return lengths_of(self.saved.length_counts, self.saved.cropped_sequences, self.max_len)

    def check_length(self, residues: int, name: str) -> None:
        """Raise for a protein of no length, or a longer one than the model was trained on."""
        if not 1 <= residues <= self.max_len:
            raise ValueError(f"{name} has {residues} residues; this model was trained on 1 to {self.max_len}")


def load_trained(path: str, *, device: str, precision: str) -> TrainedModel:
    """The model that `find_saved` finds; under torchrun on each rank's own device.

    Raises:
        ValueError: nothing sound there, a device or precision that this machine does not have, weights that do not fit
            the config that came with them.
    """
    saved = find_saved(path)
    processes = processes_from_environment()
    for problem in saved.skipped:
        announce(f"skipped: {problem}", processes)
    where = resolve_device(device, processes.local_rank)
    precision = resolve_precision(precision, where)
    trained = TrainedModel(saved, load_saved(saved, where, precision), precision, processes)
    meeting = meeting_of(processes)
    given = (argument.partition("=") for argument in sys.argv[1:])
    facts: dict[str, Any] = {key: value for key, _, value in given if key not in OF_A_HOST}
    facts |= {
        "step": saved.step,
        "data_fingerprint": saved.data_fingerprint,
        "precision": precision,
        "device": where.type,
    }
    meeting.agree(facts | {"protlig_dd": __version__, "torch": str(torch.__version__)}, TIMEOUT)
    join_group(processes, where, TIMEOUT, meeting.store)
    announce(f"{saved.path} on {where} in {precision}, attention {trained.network.attention_backend}", processes)
    return trained
