"""A run folder is made, reopened or refused."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from protlig_dd.config.read import as_yaml, flatten, spelt
from protlig_dd.config.train import CONFIG, RESUME, TrainConfig, changed_keys, recorded_config
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import StoreGroup
from protlig_dd.inference.model import find_saved
from protlig_dd.runs.checkpoint import (
    complete_checkpoints,
    find_checkpoint,
    newest_sound_checkpoint,
    put_aside_newer,
    read_state,
    remove_unfinished,
)
from protlig_dd.system.device import describe_environment
from protlig_dd.system.files import free_name, locked, sha256, write_atomic
from protlig_dd.system.meeting import Meeting
from protlig_dd.system.signals import STOPPED
from protlig_dd.system.tables import as_json
from protlig_dd.system.terminal import console
from protlig_dd.training.context import Resolved, RunFolder, Start
from protlig_dd.training.extend import check_extension, finished_at, put_report_aside, reports_otherwise
from protlig_dd.training.optim.schedule import count_steps
from protlig_dd.training.packs import plan_version


def first_weights(config: TrainConfig) -> Path:
    """The weights of `from=`, if they are still those that the run has begun with.

    Raises:
        ValueError: they are not; names both checksums.
    """
    saved = find_saved(str(config.from_))
    for problem in saved.skipped:
        console.print(f"skipped: {problem}")
    if (found := sha256(saved.weights)) != config.from_sha256:
        raise ValueError(
            f"{saved.path}: weights of SHA-256 {found[:12]}, and this run began with {str(config.from_sha256)[:12]}; "
            "run.fresh=true moves it aside and begins with these"
        )
    console.print(f"starting from the averaged weights of {saved.path}")
    return saved.weights


def graph_of_run(path: Path) -> dict[str, Any]:
    """The graph's config of the run in this folder; {} where there is none."""
    return dict(recorded_config(path)["graph"]) if (path / CONFIG).is_file() else {}


def open_run_folder(
    path: Path,
    config: TrainConfig,
    store: StoreGroup,
    resolved: Resolved,
    meeting: Meeting,
    left: float | None,
) -> RunFolder:
    """Make or reopen the run folder, and find the checkpoint to go on from: on rank 0.

    Raises:
        ValueError: a run that exists and may not be resumed, or whose config or data differ; names what differs. Or one
            that a newer version of the program has begun.
    """
    started = has_steps(path)
    (path / STOPPED).unlink(missing_ok=True)
    remove_unfinished(path)
    if started and config.run.resume == "never":
        raise ValueError(f"{path} exists and run.resume=never; use another run.name, or run.fresh=true")
    attempt, finished, earlier = 1, None, {}
    if started:
        earlier = check_same_run(path, config, resolved)
        check_extension(path, config)
        attempt, finished = int(earlier["attempt"]) + 1, finished_at(path)
        if finished is not None and not reports_otherwise(path, config):
            return RunFolder(path, config, attempt, Start(), left, finished)
    checkpoint, skipped = newest_sound_checkpoint(path)
    if skipped and checkpoint is None:
        raise ValueError(
            f"{path}: none of its checkpoints can be read ({'; '.join(skipped)}); "
            "run.fresh=true moves it aside and starts anew"
        )
    if checkpoint is None and config.run.resume not in RESUME:
        checkpoint, skipped = find_checkpoint(Path(config.run.resume))
        check_same_data(checkpoint, config, resolved)
    for problem in skipped:
        console.print(f"skipped: {problem}")
    for aside in put_aside_newer(path, checkpoint) if checkpoint is not None else []:
        console.print(f"{aside} is what is left of it, and may be deleted")
    state = read_state(checkpoint) if checkpoint is not None else {}
    plan_version(checkpoint, state)  # refused before anything is written
    weights = first_weights(config) if checkpoint is None and config.from_ is not None else None
    if state:
        check_not_beyond(checkpoint, state["step"], config, store)
    if started:
        say_what_changed(path, config, resolved, earlier)
    if finished is not None:
        console.print(f"the earlier report is now in {put_report_aside(path, finished)}")
    processes = meeting.processes
    record = {
        "attempt": attempt,
        "agents": sorted(set(meeting.agents)),
        "launch": processes.launch,
        "job": processes.job,
        "requeues": processes.requeues,
        "seconds_left": left,
        **vars(resolved),
        **describe_environment(torch.device(resolved.device)),
    }
    write_atomic(path / "environment.json", as_json(record))
    write_atomic(path / "config.yaml", as_yaml(config))  # last: now it is a run
    return RunFolder(path, config, attempt, Start(checkpoint, state, weights), left, None)


def check_not_beyond(checkpoint: Path | None, step: int, config: TrainConfig, store: StoreGroup) -> None:
    """Raise for a run that is to end before the step of its checkpoint."""
    control, data = config.trainer, config.data
    most, told = control.max_steps, f"trainer.max_steps={control.max_steps}"
    if most is None:
        most = count_steps(
            config,
            PackDataset(
                store,
                store.split("train"),
                max_len=data.max_len,
                seed=config.seed,
                tokens_per_pack=data.tokens_per_pack,
                weights=data.weights,
            ),
        )
        told = f"the {most} steps of trainer.epochs={control.epochs:g}"
    if step > most:
        raise ValueError(f"{checkpoint} is beyond {told}")


def seconds_left(path: Path, earlier: dict[str, Any]) -> float | None:
    """Seconds left of the time limit of the start that opened the folder, by the clock that stamps the folder's files:
    mostly a file server's, and so the same for every host.
    """
    if earlier["seconds_left"] is None:
        return None
    opened = (path / "environment.json").stat().st_mtime
    with tempfile.NamedTemporaryFile(dir=path) as file:
        return float(earlier["seconds_left"] - (Path(file.name).stat().st_mtime - opened))


def move_aside(path: Path) -> None:
    """Give an earlier run in this folder another name.

    Raises:
        ValueError: it is still going on.
    """
    if (path / "config.yaml").is_file():
        with locked(path):
            aside = free_name(path)
            path.replace(aside)
        console.print(f"the earlier {path} is now {aside}")


def is_continued(earlier: dict[str, Any], meeting: Meeting) -> bool:
    """Whether this start continues the one that opened the folder last: after a lost process, with another number of
    hosts, or as the same Slurm job that was queued again since.
    """
    processes = meeting.processes
    same_launch = processes.launch is not None and earlier.get("launch") == processes.launch
    restarted = meeting.restart > 0 and processes.launch != "none"  # torchrun's default
    requeued = processes.job is not None and earlier.get("job") == processes.job
    return (same_launch and (restarted or shares_launcher(earlier, meeting))) or (
        requeued and earlier["requeues"] < processes.requeues
    )


def shares_launcher(earlier: dict[str, Any], meeting: Meeting) -> bool:
    """Whether a launcher of the start that opened the folder last has started ranks of this one too."""
    return bool(set(earlier.get("agents", ())) & set(meeting.agents))


def has_steps(path: Path) -> bool:
    """Whether a run has made a step. One that has not may be started again with another config."""
    metrics = path / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(complete_checkpoints(path))


def check_same_data(checkpoint: Path, config: TrainConfig, resolved: Resolved) -> None:
    """Compare with the run that another run's checkpoint is of.

    Raises:
        ValueError: another config (bar the keys that may change) or other data.
    """
    changed = changed_keys(recorded_config(checkpoint), spelt(config))
    if changed:
        raise ValueError(f"{checkpoint} was made with another config ({'; '.join(changed)})")
    found = read_state(checkpoint)["data_fingerprint"]
    if found != resolved.data_fingerprint:
        raise ValueError(f"{checkpoint} was made with data_fingerprint {found}, now {resolved.data_fingerprint}")


def check_same_run(path: Path, config: TrainConfig, resolved: Resolved) -> dict[str, Any]:
    """Compare with the run that stands in `path`; returns its environment.json.

    Raises:
        ValueError: another config (bar the keys that may change), precision or data.
    """
    remedy = f"use another run.name, or run.fresh=true to move {path} aside"
    changed = changed_keys(recorded_config(path), spelt(config))
    if changed:
        raise ValueError(f"{path} was started with another config ({'; '.join(changed)}); {remedy}")
    try:
        earlier = json.loads((path / "environment.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'environment.json'} cannot be read ({error}); {remedy}") from error
    for key in ("precision", "data_fingerprint"):
        if earlier[key] != getattr(resolved, key):
            raise ValueError(f"{path} was started with {key} {earlier[key]}, now {getattr(resolved, key)}; {remedy}")
    return earlier


def say_what_changed(path: Path, config: TrainConfig, resolved: Resolved, earlier: dict[str, Any]) -> None:
    """Print what may differ between two starts of a run, and does."""
    before, now = (flatten(one) for one in (recorded_config(path), spelt(config)))
    for key in ("trainer.max_steps", "trainer.epochs"):
        if before[key] != now[key]:
            console.print(
                f"{key} was {before[key]}, now {now[key]}: the learning rate follows its new course from here"
            )
    for key in ("device", "attention_backend", "compiled", "world_size", "data_path"):
        if earlier[key] != getattr(resolved, key):
            console.print(f"{key} was {earlier[key]}, now {getattr(resolved, key)}")
