"""The configuration of a training run, and the checks of its values that need no data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from protlig_dd.config.components import build_graph, build_model, build_noise
from protlig_dd.config.fields import (
    MAY_CHANGE,
    STORED,
    STRICT,
    Above1,
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Auto,
    Decay,
    Fraction,
    NotNegative,
    Number,
    Positive,
    SplitName,
    marked,
)
from protlig_dd.config.read import defaults_of, flatten, read_config, shorten
from protlig_dd.data.case import Context
from protlig_dd.data.crops import Crop
from protlig_dd.data.loader import check_pack_sizes, check_weights
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.diffusion.score import check_parametrisation
from protlig_dd.model.config import ADDED_LATER, COMPUTE_ONLY, ModelConfig, stored_model
from protlig_dd.model.dit import check_model
from protlig_dd.model.lora import check_lora
from protlig_dd.system.signals import seconds_of

Order = Literal["full", "blocks"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd"]
OPTIMIZERS, SCHEDULES = get_args(OptimizerName), get_args(Schedule)
CONFIG = "config.yaml"
RESUME = ("auto", "never", "extend")  # values of run.resume, which may also be a path


@dataclass(config=STRICT)
class RunConfig:
    name: str
    fresh: bool
    resume: str


@dataclass(config=STRICT)
class DataConfig:
    path: Annotated[Any, MAY_CHANGE]  # one or several stores; a resumed run compares their fingerprints, not paths
    weights: list[Positive] | None
    max_len: AtLeast1
    crop: Crop
    tokens_per_pack: AtLeast1
    workers: Annotated[AtLeast0, MAY_CHANGE]
    context: Annotated[Context, ADDED_LATER] = "none"
    order: Annotated[Order, ADDED_LATER] = "full"
    members: Annotated[str | None, ADDED_LATER, MAY_CHANGE] = None  # like `path`: fingerprints are compared

    @field_validator("path")
    @classmethod
    def _is_a_path_or_paths(cls, path: Any) -> Any:
        paths = path if isinstance(path, list) else [path]
        if path is not None and (  # the config of an exported model has no data.path
            not paths or not all(isinstance(item, str) for item in paths) or ("auto" in paths and path != "auto")
        ):
            raise ValueError(f"data.path={path}: give a store, a list of stores [a.h5,b.h5], or auto")
        return path


@dataclass(config=STRICT)
class OptimConfig:
    name: OptimizerName
    lr: NotNegative  # 0 leaves the weights unchanged
    min_lr_ratio: Fraction
    warmup_steps: AtLeast0
    betas: list[Number]
    eps: Positive
    weight_decay: NotNegative
    grad_clip: Positive
    packs_per_step: AtLeast1
    ema_decay: Any  # a number, or auto
    momentum: Decay
    schedule: Schedule
    decay_share: Fraction

    @field_validator("betas")
    @classmethod
    def _are_two_decays(cls, betas: list[float], info: Any) -> list[float]:
        if info.context != STORED and not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"optim.betas must be two numbers in [0, 1), got {betas}")
        return betas

    @field_validator("ema_decay")
    @classmethod
    def _is_a_decay_or_auto(cls, decay: Any, info: Any) -> Any:
        if info.context != STORED and decay != "auto" and not (isinstance(decay, int | float) and 0 <= decay < 1):
            raise ValueError(f"optim.ema_decay must be auto or a number in [0, 1), got {decay}")
        return decay


@dataclass(config=STRICT)
class TrainerConfig:
    max_steps: AtLeast1 | None
    epochs: Positive | None
    stop_at_step: AtLeast1 | None
    device: str
    precision: str  # may change, but must resolve to the same precision when a run is resumed
    log_every: AtLeast1
    log_rows: bool
    eval_every: AtLeast0
    eval_draws: AtLeast1
    eval_max_sequences: AtLeast2
    checkpoint_every: AtLeast1
    keep_last: AtLeast1
    keep_every: AtLeast1 | None
    devices: Any  # a number, or auto
    max_restarts: AtLeast0
    max_time: str | None
    stop_within: AtLeast1
    timeout: AtLeast1
    loss_spike: Above1 | None
    compile: Auto = "auto"


@dataclass(config=STRICT)
class LoggerConfig:
    tensorboard: bool
    wandb_project: str | None
    wandb_name: str | None
    wandb_mode: Literal["online", "offline"] | None = None


@dataclass(config=STRICT)
class ReportConfig:
    split: SplitName
    max_sequences: AtLeast2
    draws: AtLeast1
    samples: AtLeast0
    steps: AtLeast1
    predictor: str
    untrained: bool


@dataclass(config=STRICT)
class TrainConfig:
    run: Annotated[RunConfig, MAY_CHANGE]
    seed: AtLeast0
    data: DataConfig
    model: ModelConfig
    graph: dict[str, Any]
    noise: dict[str, Any]
    parametrisation: str
    time_conditioning: Auto  # resolved to true or false in a run folder's config.yaml
    optim: OptimConfig
    trainer: Annotated[TrainerConfig, MAY_CHANGE]  # max_steps and epochs may change too: this moves the schedule's end
    logger: Annotated[LoggerConfig, MAY_CHANGE]
    report: Annotated[ReportConfig, MAY_CHANGE]
    plan: Annotated[bool, MAY_CHANGE] = False
    from_: str | None = None
    from_sha256: str | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _has_numbers(cls, model: Any) -> Any:
        numbers = (
            "hidden_size",
            "n_heads",
            "n_blocks",
            "cond_dim",
            "dropout",
            "max_positions",
            "sinusoid_scale",
            "norm_eps",
            "lora.rank",
            "lora.alpha",
        )
        values = flatten(model) if isinstance(model, dict) else {}
        for key in numbers:
            if isinstance(values.get(key), bool):
                raise ValueError(f"model.{key}={values[key]}; give a number")
        return model

    @field_validator("noise")
    @classmethod
    def _has_a_cap_and_a_curriculum(cls, noise: dict[str, Any], info: Any) -> dict[str, Any]:
        cap, steps = noise.get("max_weight"), noise.get("curriculum", 0)
        if info.context == STORED:
            return noise
        if cap not in (None, "auto") and not (isinstance(cap, int | float) and cap > 0):
            raise ValueError(f"noise.max_weight must be auto, null or above 0, got {cap}")
        if not (isinstance(steps, int | float) and steps >= 0):
            raise ValueError(f"noise.curriculum must be at least 0, got {steps}")
        return noise


def may_change(key: str) -> bool:
    """Whether a key, such as `data.workers`, may differ when a run is resumed."""
    group, _, name = key.partition(".")
    marks = {"data": marked(DataConfig, MAY_CHANGE), "model": marked(ModelConfig, COMPUTE_ONLY)}
    return group in marked(TrainConfig, MAY_CHANGE) or name in marks.get(group, [])


def config_in(folder: Path) -> TrainConfig:
    """Return the config that was saved in the folder of a run or a checkpoint.

    Raises:
        ValueError: an unknown or missing key, or a damaged file; the message names the file.
    """
    try:
        return read_config(OmegaConf.create(recorded_config(folder)), TrainConfig, stored=True)
    except (ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def recorded_config(folder: Path) -> dict[str, Any]:
    """Return the config saved in a folder as nested dictionaries, with this version's names of the keys.

    Raises:
        ValueError: a damaged file; the message names the file.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    except (OSError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{folder / CONFIG}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / CONFIG}: not a config")
    if isinstance(content.get("model"), dict):
        content["model"] = stored_model(content["model"])
    return {str(key): value for key, value in content.items()}


def all_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a training config to {"optim.lr": 0.001, ...}, with the defaults of the keys that it leaves out.

    A file of an earlier version has no key that was added after that version. A file of this version leaves out a key
    marked ADDED_LATER if the key has its default (see `stored_model`).
    """
    return {**defaults_of(TrainConfig), **flatten(values)}


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `key: old -> new` for every key that differs although it must not change when a run is resumed."""
    before, now = all_settings(old), all_settings(new)
    return [
        f"{key}: {shorten(str(before.get(key)))} -> {shorten(str(now.get(key)))}"
        for key in sorted(before | now)
        if not may_change(key) and before.get(key) != now.get(key)
    ]


def check_adapters(config: TrainConfig) -> None:
    """Raise a ValueError if the adapters' settings cannot work together, with the network or without `from=`."""
    lora = config.model.lora
    check_lora(lora)
    if lora.rank is None:
        return
    if config.run.resume not in RESUME:
        raise ValueError(
            f"run.resume={config.run.resume} model.lora.rank={lora.rank}: a run with adapters cannot be continued "
            "under another name; start a new run with from="
        )
    if config.from_ is None:
        raise ValueError(f"model.lora.rank={lora.rank}: adapters extend a trained model; give from=")
    with torch.device("meta"):  # compares the rank with the shapes; uses no memory and draws no random numbers
        build_model(config.model, "sdpa", config.time_conditioning is not False)


def check_members(data: DataConfig) -> None:
    """Raise a ValueError if `data.members` is set together with several stores, weights or an order by blocks."""
    if isinstance(data.path, list) and len(data.path) > 1:
        raise ValueError(
            f"data.members={data.members} and {len(data.path)} stores in data.path: give the one store of the clusters "
            "in data.path"
        )
    if data.weights is not None:
        raise ValueError(f"data.members={data.members} and data.weights={data.weights}: set data.weights=null")
    if data.order != "full":
        raise ValueError(f"data.members={data.members} and data.order={data.order}: set data.order=full")


def check_train_config(config: TrainConfig) -> None:
    """Check, before any data is read, that the values can work together.

    Raises:
        ValueError: values that cannot work together; the message names their keys.
    """
    trainer = config.trainer
    check_model(config.model)
    check_adapters(config)
    check_pack_sizes(config.data.max_len, config.data.tokens_per_pack)
    limit, tokens = config.model.max_positions, config.data.max_len + 2
    if limit is not None and limit < tokens:
        shorter = [f"data.max_len to at most {limit - 2}"] if limit > 2 else []
        longer = [f"model.max_positions to at least {tokens}"] if config.from_ is None else []
        remedy = f"set {' or '.join(shorter + longer)}"
        if config.from_ is not None:
            remedy += "; a fine-tuned model keeps model.max_positions of the model that it starts from"
        raise ValueError(
            f"model.max_positions={limit} is less than the {tokens} tokens of data.max_len={config.data.max_len} "
            f"residues with <bos> and <eos>: {remedy}"
        )
    if config.data.path is None:
        raise ValueError("data.path=null: give a store, a list of stores [a.h5,b.h5], or auto")
    if config.data.weights is not None:
        if config.data.order == "blocks":
            raise ValueError(
                f"data.order=blocks reads each store once an epoch, so data.weights={config.data.weights} cannot be "
                "set; set data.order=full or data.weights=null"
            )
        check_weights(config.data.weights, len(config.data.path) if isinstance(config.data.path, list) else 1)
    if config.data.members is not None:
        check_members(config.data)
    graph = build_graph(config.graph)
    build_noise(config.noise, graph)
    check_parametrisation(graph, config.parametrisation, time_conditioning=config.time_conditioning is not False)
    check_sampler(graph, SamplerOptions(config.report.steps, config.report.predictor))
    if trainer.max_time is not None:
        seconds_of(trainer.max_time)
    if (trainer.max_steps is None) == (trainer.epochs is None):
        both = f"trainer.max_steps={trainer.max_steps} and trainer.epochs={trainer.epochs}"
        raise ValueError(f"{both}: set exactly one of them, and the other to null")
    if config.run.resume not in RESUME and not (folder := Path(config.run.resume)).is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(
            f"run.resume={config.run.resume} {problem}; choose from {', '.join(RESUME)}, "
            "or give the folder of a checkpoint or a run"
        )
    if config.from_ is not None and config.run.resume not in RESUME:
        raise ValueError(f"from={config.from_} and run.resume={config.run.resume}: give only one of them")
    if config.from_ is None and config.from_sha256 is not None:
        raise ValueError("from_sha256 is the checksum of the weights that from= names, but from= is not given")
    name = config.run.name  # not checked in RunConfig, because configs of earlier versions may break these rules
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"run.name={name!r} must be a plain folder name")
    if any(character.isspace() for character in name):
        raise ValueError(f"run.name={name!r} must not contain white space, because the names of samples begin with it")
