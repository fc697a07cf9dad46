"""The configuration of a training run, and all that can be wrong with it by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from protlig_dd.config.components import build_graph, build_noise
from protlig_dd.config.read import flatten, read_config, shorten
from protlig_dd.data.crops import check_crop
from protlig_dd.data.loader import check_pack_sizes, check_weights
from protlig_dd.data.store import SPLITS
from protlig_dd.diffusion.sampling import SamplerOptions, check_sampler
from protlig_dd.diffusion.score import check_parametrisation
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import check_model

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")

RESUME = ("auto", "never", "extend")  # of run.resume, beside a path


# What may differ when a run is resumed, whole groups (with a dot at their end) and single keys. trainer.max_steps and
# trainer.epochs move the end of the learning rate's cosine; trainer.precision and model.attention_backend are compared
# as resolved, and of data.path the fingerprint.
RESUMABLE = (
    "plan",
    "run.",
    "trainer.",
    "logger.",
    "report.",
    "data.path",
    "data.workers",
    "model.attention_backend",
    "model.checkpointing",
)


@dataclass
class RunConfig:
    name: str
    fresh: bool
    resume: str


@dataclass
class DataConfig:
    path: Any  # a store, or a list of them
    weights: list[float] | None
    max_len: int
    crop: str
    tokens_per_pack: int
    workers: int


@dataclass
class OptimConfig:
    name: str
    lr: float
    min_lr_ratio: float
    warmup_steps: int
    betas: list[float]
    eps: float
    weight_decay: float
    grad_clip: float
    packs_per_step: int
    ema_decay: Any  # a number, or auto
    momentum: float
    schedule: str
    decay_share: float


@dataclass
class TrainerConfig:
    max_steps: int | None
    epochs: float | None
    stop_at_step: int | None
    device: str
    precision: str
    log_every: int
    log_rows: bool
    eval_every: int
    eval_draws: int
    eval_max_sequences: int
    checkpoint_every: int
    keep_last: int
    keep_every: int | None
    devices: Any  # a number, or auto
    max_restarts: int
    max_time: str | None
    stop_within: int
    timeout: int
    loss_spike: float | None
    compile: Any = "auto"  # true, false or auto


@dataclass
class LoggerConfig:
    tensorboard: bool
    wandb_project: str | None
    wandb_name: str | None
    wandb_mode: str | None = None


@dataclass
class ReportConfig:
    split: str
    max_sequences: int
    draws: int
    samples: int
    steps: int
    predictor: str
    untrained: bool


@dataclass
class TrainConfig:
    run: RunConfig
    seed: int
    data: DataConfig
    model: ModelConfig
    graph: dict[str, Any]
    noise: dict[str, Any]
    parametrisation: str
    time_conditioning: Any  # true, false or auto; in a run's own config no longer auto
    optim: OptimConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    report: ReportConfig
    plan: bool = False
    from_: str | None = None
    from_sha256: str | None = None


def config_in(folder: Path) -> TrainConfig:
    """The config of a run, or of a checkpoint, that was written to this folder; keys that its version did not have yet
    are as that version behaved.

    Raises:
        ValueError: a key that this version does not have, or a damaged file; names the file.
    """
    file = folder / "config.yaml"
    try:
        loaded = OmegaConf.load(file)
        assert isinstance(loaded, DictConfig)
        return read_config(loaded, TrainConfig)
    except (ValueError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs and may not when a run is resumed."""
    old_flat, new_flat = flatten(old), flatten(new)
    keys = [key for key in sorted(old_flat | new_flat) if not key.startswith(RESUMABLE)]
    return [
        f"{key}: {shorten(str(old_flat.get(key)))} -> {shorten(str(new_flat.get(key)))}"
        for key in keys
        if old_flat.get(key) != new_flat.get(key)
    ]


def check_data(data: DataConfig) -> None:
    """Raise for a path that is neither a file nor a list of files, or weights that do not go with it."""
    paths = data.path if isinstance(data.path, list) else [data.path]
    if not paths or not all(isinstance(path, str) for path in paths) or ("auto" in paths and data.path != "auto"):
        raise ValueError(f"data.path={data.path}: give a store, a list of stores [a.h5,b.h5], or auto")
    if data.weights is not None:
        check_weights(data.weights, len(paths))
    check_crop(data.crop)


def check_train_config(config: TrainConfig) -> None:
    """Raise a ValueError, before any data is read, for values that cannot work together."""
    optim, trainer = config.optim, config.trainer
    check_model(config.model)
    check_pack_sizes(config.data.max_len, config.data.tokens_per_pack)
    check_data(config.data)
    graph = build_graph(config.graph)
    build_noise(config.noise, graph)
    if config.time_conditioning not in ("auto", True, False):
        raise ValueError(f"time_conditioning={config.time_conditioning}; there are auto, true and false")
    check_parametrisation(graph, config.parametrisation, time_conditioning=config.time_conditioning is not False)
    check_sampler(graph, SamplerOptions(config.report.steps, config.report.predictor))
    if (trainer.max_steps is None) == (trainer.epochs is None):
        raise ValueError(f"give one of trainer.max_steps={trainer.max_steps} and trainer.epochs={trainer.epochs}")
    for key, value, least in (
        ("seed", config.seed, 0),
        ("data.workers", config.data.workers, 0),
        ("optim.packs_per_step", optim.packs_per_step, 1),
        ("optim.warmup_steps", optim.warmup_steps, 0),
        ("trainer.max_steps", trainer.max_steps, 1),
        ("trainer.stop_at_step", trainer.stop_at_step, 1),
        ("trainer.log_every", trainer.log_every, 1),
        ("trainer.eval_every", trainer.eval_every, 0),
        ("trainer.eval_draws", trainer.eval_draws, 1),
        ("trainer.eval_max_sequences", trainer.eval_max_sequences, 2),
        ("trainer.checkpoint_every", trainer.checkpoint_every, 1),
        ("trainer.keep_last", trainer.keep_last, 1),
        ("trainer.keep_every", trainer.keep_every, 1),
        ("trainer.max_restarts", trainer.max_restarts, 0),
        ("trainer.timeout", trainer.timeout, 1),
        ("trainer.stop_within", trainer.stop_within, 1),
        ("noise.curriculum", config.noise.get("curriculum", 0), 0),
        ("report.max_sequences", config.report.max_sequences, 2),
        ("report.draws", config.report.draws, 1),
        ("report.samples", config.report.samples, 0),
        ("report.steps", config.report.steps, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    if trainer.loss_spike is not None and not trainer.loss_spike > 1:
        raise ValueError(f"trainer.loss_spike must be above 1, got {trainer.loss_spike}")
    if trainer.epochs is not None and not trainer.epochs > 0:
        raise ValueError(f"trainer.epochs must be above 0, got {trainer.epochs}")
    if optim.name not in OPTIMIZERS:
        raise ValueError(f"optim.name={optim.name}; there are {', '.join(OPTIMIZERS)}")
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={optim.schedule}; there are {', '.join(SCHEDULES)}")
    for key, share in (("optim.min_lr_ratio", optim.min_lr_ratio), ("optim.decay_share", optim.decay_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{key} must lie in [0, 1], got {share}")
    if not 0 <= optim.momentum < 1:
        raise ValueError(f"optim.momentum must lie in [0, 1), got {optim.momentum}")
    if not optim.weight_decay >= 0:
        raise ValueError(f"optim.weight_decay must be at least 0, got {optim.weight_decay}")
    for key, number in (("optim.lr", optim.lr), ("optim.grad_clip", optim.grad_clip), ("optim.eps", optim.eps)):
        if not number > 0:
            raise ValueError(f"{key} must be above 0, got {number}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"optim.betas must be two numbers in [0, 1), got {list(optim.betas)}")
    if optim.ema_decay != "auto" and not (isinstance(optim.ema_decay, int | float) and 0 <= optim.ema_decay < 1):
        raise ValueError(f"optim.ema_decay must be auto or lie in [0, 1), got {optim.ema_decay}")
    max_weight = config.noise.get("max_weight")
    if max_weight not in (None, "auto") and not (isinstance(max_weight, int | float) and max_weight > 0):
        raise ValueError(f"noise.max_weight must be auto, null or above 0, got {max_weight}")
    if trainer.compile not in ("auto", True, False):
        raise ValueError(f"trainer.compile={trainer.compile}; there are auto, true and false")
    if config.run.resume not in RESUME and not (named := Path(config.run.resume)).is_dir():
        what = "is no folder" if named.exists() else "does not exist"
        raise ValueError(
            f"run.resume={config.run.resume} {what}; there are {', '.join(RESUME)}, and folders of checkpoints or runs"
        )
    if config.logger.wandb_mode not in (None, "online", "offline"):
        raise ValueError(f"logger.wandb_mode={config.logger.wandb_mode}; there are online, offline and null")
    if config.from_ is not None and config.run.resume not in RESUME:
        raise ValueError(f"from={config.from_} and run.resume={config.run.resume}: a run starts from one of them")
    if config.from_ is None and config.from_sha256 is not None:
        raise ValueError("from_sha256 is that of from=, which is not given")
    if config.report.split not in SPLITS:
        raise ValueError(f"report.split={config.report.split}; there are {', '.join(SPLITS)}")
    if config.run.name != Path(config.run.name).name or config.run.name in ("", ".", ".."):
        raise ValueError(f"run.name={config.run.name!r} must be a plain folder name")
    if any(character.isspace() for character in config.run.name):
        raise ValueError(f"run.name={config.run.name!r} must be without white space: samples are named after it")
