"""From a composed config to a run: validate, resolve every `auto`, open the run folder, hand over to the job."""

import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from protlig_dd.data.build import bundled_store
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.model.attention import resolve_attention_backend
from protlig_dd.runtime.checkpoint import complete_checkpoints, read_state, remove_unfinished
from protlig_dd.runtime.config import TrainConfig, changed_keys, graph_with_rates, read_config
from protlig_dd.runtime.distributed import (
    Processes,
    from_first,
    join_group,
    leave_group,
    processes_from_environment,
)
from protlig_dd.runtime.environment import describe_environment, resolve_device, resolve_precision
from protlig_dd.runtime.files import free_name, write_atomic
from protlig_dd.runtime.metrics import announce, console, import_wandb
from protlig_dd.training.job import train
from protlig_dd.training.validate import check_train_config

UNIREF50 = Path("data/uniref50.h5")


@dataclass(frozen=True)
class Resolved:
    """What this start made of the config's `auto` values; printed, and kept in environment.json."""

    device: str
    precision: str
    attention_backend: str
    world_size: int
    data_path: str
    data_fingerprint: str


@dataclass(frozen=True)
class RunFolder:
    path: Path
    attempt: int
    checkpoint: Path | None


def run(cfg: DictConfig) -> None:
    """Train as the config says. Every rank calls this.

    Raises:
        ValueError: whatever is wrong with the config, the machine or the data, before any training.
        NonFiniteLossError: the loss stopped being a number.
    """
    config = read_config(cfg, TrainConfig)
    config.graph = graph_with_rates(config.graph, {} if config.run.fresh else graph_of_run(run_path(config)))
    check_train_config(config)
    processes = processes_from_environment()
    if config.optim.packs_per_step % processes.world_size:
        raise ValueError(
            f"optim.packs_per_step={config.optim.packs_per_step} is not divisible by {processes.world_size} processes"
        )
    device = resolve_device(config.trainer.device, processes.local_rank)
    if processes.world_size > 1 and device.type == "cuda" and config.trainer.device not in ("auto", "cuda"):
        raise ValueError(
            f"trainer.device={config.trainer.device} with {processes.world_size} processes: use auto or cuda"
        )
    precision = resolve_precision(config.trainer.precision, device)
    head_dim = config.model.hidden_size // config.model.n_heads
    backend = resolve_attention_backend(config.model.attention_backend, device, precision, head_dim)
    if config.logger.wandb_project:
        import_wandb()
    join_group(processes, device)
    try:
        store = open_data(config.data.path, processes)
        resolved = Resolved(str(device), precision, backend, processes.world_size, store.name, store.fingerprint)
        folder = open_run_folder(run_path(config), config, resolved, processes)
        try:
            train(
                config,
                store,
                run_folder=folder.path,
                attempt=folder.attempt,
                checkpoint=folder.checkpoint,
                precision=precision,
                attention_backend=backend,
                device=device,
                processes=processes,
            )
        except Exception:
            log = folder.path / "logs" / f"rank_{processes.rank}.log"
            log.parent.mkdir(exist_ok=True)
            with log.open("a") as file:
                file.write(traceback.format_exc())
            raise
    finally:
        leave_group()


def open_data(path: str | list[str], processes: Processes) -> StoreGroup:
    """The stores of `data.path`; `auto` is data/uniref50.h5 where it was prepared, else the bundled sample."""
    if path != "auto":
        return StoreGroup([SequenceStore(one) for one in (path if isinstance(path, list) else [path])])
    if UNIREF50.is_file():
        announce(f"data: {UNIREF50}", processes)
        return StoreGroup([SequenceStore(UNIREF50)])
    store = SequenceStore(from_first(bundled_store().path if processes.first else None))
    announce(f"data: the bundled sample of {len(store):,} proteins ({UNIREF50} has not been prepared)", processes)
    return StoreGroup([store])


def run_path(config: TrainConfig) -> Path:
    """runs/<run.name>, or the job's own folder in a sweep. No timestamps: the same command finds its run again."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return Path(hydra_config.runtime.output_dir)
    return Path("runs") / config.run.name


def graph_of_run(path: Path) -> dict[str, Any]:
    """The graph's config of the run in this folder; {} where there is none."""
    file = path / "config.yaml"
    return dict(OmegaConf.to_container(OmegaConf.load(file))["graph"]) if file.is_file() else {}  # type: ignore


def open_run_folder(path: Path, config: TrainConfig, resolved: Resolved, processes: Processes) -> RunFolder:
    """Make, move aside or reopen the run folder (rank 0), and find the checkpoint to go on from.

    Raises:
        ValueError: a run that exists and may not be resumed, or whose config or data differ; names what differs.
    """
    folder = None
    if processes.first:
        if (path / "config.yaml").is_file() and config.run.fresh:
            aside = free_name(path)
            path.replace(aside)
            console.print(f"the earlier {path} is now {aside}")
        started = has_steps(path)
        remove_unfinished(path)
        if started and config.run.resume == "never":
            raise ValueError(f"{path} exists and run.resume=never; use another run.name, or run.fresh=true")
        attempt = check_same_run(path, config, resolved) + 1 if started else 1
        checkpoint = None
        if started and (complete := complete_checkpoints(path)):
            checkpoint = complete[-1]
            most = config.trainer.max_steps
            if most is not None and read_state(checkpoint)["step"] > most:
                raise ValueError(f"{checkpoint} is beyond trainer.max_steps={most}")
        record = {"attempt": attempt, **vars(resolved), **describe_environment(torch.device(resolved.device))}
        write_atomic(path / "environment.json", json.dumps(record, indent=1) + "\n")
        write_atomic(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))  # last: now it is a run
        folder = RunFolder(path, attempt, checkpoint)
    opened: RunFolder = from_first(folder)
    return opened


def has_steps(path: Path) -> bool:
    """Whether a run has got beyond its start: one that failed there may be started again with another config."""
    metrics = path / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(complete_checkpoints(path))


def check_same_run(path: Path, config: TrainConfig, resolved: Resolved) -> int:
    """Compare with the run that stands in `path`; returns its attempt number.

    Raises:
        ValueError: another config (bar the keys that may change), precision or data.
    """
    remedy = f"use another run.name, or run.fresh=true to move {path} aside"
    changed = changed_keys(
        OmegaConf.to_container(OmegaConf.load(path / "config.yaml")),  # type: ignore[arg-type]
        OmegaConf.to_container(OmegaConf.structured(config)),  # type: ignore[arg-type]
    )
    if changed:
        raise ValueError(f"{path} was started with another config ({'; '.join(changed)}); {remedy}")
    try:
        earlier = json.loads((path / "environment.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'environment.json'} cannot be read ({error}); {remedy}") from error
    for key in ("precision", "data_fingerprint"):
        if earlier[key] != getattr(resolved, key):
            raise ValueError(f"{path} was started with {key} {earlier[key]}, now {getattr(resolved, key)}; {remedy}")
    for key in ("device", "attention_backend", "world_size", "data_path"):
        if earlier[key] != getattr(resolved, key):
            console.print(f"{key} was {earlier[key]}, now {getattr(resolved, key)}")
    return int(earlier["attempt"])
