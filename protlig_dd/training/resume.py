"""Create, reopen or reject a run folder."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from protlig_dd.config.read import as_dict, as_yaml
from protlig_dd.config.train import CONFIG, RESUME, TrainConfig, all_settings, changed_keys, recorded_config
from protlig_dd.data.store import StoreGroup
from protlig_dd.inference.adapters import BASE, check_base
from protlig_dd.inference.model import find_saved
from protlig_dd.runs.checkpoint import (
    complete_checkpoints,
    find_checkpoint,
    newest_valid_checkpoint,
    put_aside_newer,
    read_state,
    remove_unfinished,
)
from protlig_dd.system.device import describe_environment
from protlig_dd.system.files import free_name, locked, sha256, write_atomic, write_atomic_bytes
from protlig_dd.system.meeting import Meeting
from protlig_dd.system.signals import STOPPED
from protlig_dd.system.tables import as_json, as_written
from protlig_dd.system.terminal import console
from protlig_dd.training.context import Resolved, RunFolder, Start
from protlig_dd.training.extend import changes_length_or_report, check_extension, finished_step, put_report_aside
from protlig_dd.training.optim.schedule import count_steps
from protlig_dd.training.packs import plan_version, training_packs

FINGERPRINTS = ("data_fingerprint", "members_fingerprint")  # the second is missing without data.members


def starting_weights(config: TrainConfig, path: Path, *, resumed: bool) -> tuple[Path, dict[str, Any] | None]:
    """Return the path of the weights of the model of `from=`, from which the run starts, and where they came from.

    The second value is `SavedModel.converted_from`; None if `resumed`, because the checkpoint records it.

    If the run has adapters, these weights are also part of every later launch, so the run folder gets a copy. It gets a
    copy too if the model of `from=` has adapters, because then no other file has the merged weights.

    Args:
        path: the run folder.
        resumed: the run continues from a checkpoint of its own, so the run folder must have the copy.

    Raises:
        ValueError: the run started from other weights, the model of `from=` does not exist, or the run folder's copy is
            missing or damaged. In the first case the message has both checksums.
    """
    base = path / BASE
    if resumed:
        if not base.is_file():
            raise ValueError(
                f"{base} is missing, but checkpoints of a run with adapters contain only the trained parameters; "
                f"restore this file: the weights of from={config.from_}, SHA-256 {config.from_sha256}"
            )
        check_base(base, config.from_sha256)
        return base, None
    saved = find_saved(str(config.from_))
    for problem in saved.skipped:
        console.print(f"skipped: {problem}")
    copied = config.model.lora.rank is not None or saved.adapters is not None
    if copied and base.is_file() and sha256(base) == config.from_sha256:
        return base, saved.converted_from  # an earlier launch, which made no checkpoint, has written the copy
    content = saved.content() if copied else b""
    found = hashlib.sha256(content).hexdigest() if copied else sha256(saved.weights)
    if found != config.from_sha256:
        raise ValueError(
            f"{saved.path}: its weights have SHA-256 {found[:12]}, but this run started from weights with SHA-256 "
            f"{str(config.from_sha256)[:12]}; set run.fresh=true to move the run aside and start from the new weights"
        )
    if copied:
        write_atomic_bytes(base, content)
    console.print(f"starting from the averaged weights of {saved.path}")
    return (base if copied else saved.weights), saved.converted_from


def graph_of_run(path: Path) -> dict[str, Any]:
    """Return the graph config of the run in this folder, or {} if there is no run."""
    return dict(recorded_config(path)["graph"]) if (path / CONFIG).is_file() else {}


def open_run_folder(
    path: Path,
    config: TrainConfig,
    store: StoreGroup,
    resolved: Resolved,
    meeting: Meeting,
    left: float | None,
) -> RunFolder:
    """Create or reopen the run folder, and find the checkpoint to resume from. Called on rank 0 only.

    Args:
        left: seconds until trainer.max_time stops the run; None for no limit.

    Raises:
        ValueError: the run exists and may not be resumed, its config or data differ (the message names what differs),
            it has no valid checkpoint, its checkpoint is after the last step, or a newer version of the program started
            it.
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
        attempt, finished = int(earlier["attempt"]) + 1, finished_step(path)
        if finished is not None and not changes_length_or_report(path, config):
            return RunFolder(path, config, attempt, Start(), left, finished)
    checkpoint, skipped = newest_valid_checkpoint(path)
    if skipped and checkpoint is None:
        raise ValueError(
            f"{path}: none of its checkpoints can be read ({'; '.join(skipped)}); "
            "set run.fresh=true to move the run aside and start from step 0"
        )
    if checkpoint is None and config.run.resume not in RESUME:
        checkpoint, skipped = find_checkpoint(Path(config.run.resume))
        check_same_data(checkpoint, config, resolved)
    for problem in skipped:
        console.print(f"skipped: {problem}")
    for aside in put_aside_newer(path, checkpoint) if checkpoint is not None else []:
        console.print(f"this checkpoint is now {aside}")
    state = read_state(checkpoint) if checkpoint is not None else {}
    plan_version(checkpoint, state)  # only to raise its error, because a run of an unknown version must not start
    weights, origin, adapters = None, state.get("converted_from"), config.model.lora.rank is not None
    if config.from_ is not None and (checkpoint is None or adapters):
        weights, found = starting_weights(config, path, resumed=checkpoint is not None)
        origin = found or origin
    if state:
        check_not_beyond(checkpoint, state["step"], config, store)
    if started:
        print_changes(path, config, resolved, earlier)
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
        **{key: value for key, value in vars(resolved).items() if value is not None},
        **describe_environment(torch.device(resolved.device)),
    }
    write_atomic(path / "environment.json", as_json(record))
    write_atomic(path / "config.yaml", as_yaml(config))  # last, because this file makes the folder a run folder
    return RunFolder(path, config, attempt, Start(checkpoint, state, weights, origin), left, None)


def check_not_beyond(checkpoint: Path | None, step: int, config: TrainConfig, store: StoreGroup) -> None:
    """Raise a ValueError if `step`, the step of the checkpoint, is after the last step of the run."""
    control = config.trainer
    last, setting = control.max_steps, f"trainer.max_steps={control.max_steps}"
    if last is None:
        last = count_steps(config, training_packs(config, store))
        setting = f"the {last} steps of trainer.epochs={control.epochs:g}"
    if step > last:
        raise ValueError(f"{checkpoint}: step {step} is after the last step ({setting})")


def seconds_left(path: Path, earlier: dict[str, Any]) -> float | None:
    """Return how many seconds are left of the time limit of the folder's last launch; None if it has no limit.

    The time that has passed is measured with the clock that sets the modification times of the folder's files. On a
    shared file system this is the file server's clock, which is the same for all hosts.

    Args:
        earlier: environment.json of the last launch.
    """
    if earlier["seconds_left"] is None:
        return None
    opened = (path / "environment.json").stat().st_mtime
    with tempfile.NamedTemporaryFile(dir=path) as file:
        return float(earlier["seconds_left"] - (Path(file.name).stat().st_mtime - opened))


def move_aside(path: Path) -> None:
    """Rename the folder of an earlier run, if there is one.

    Raises:
        ValueError: a process that trains this run is still active.
    """
    if (path / "config.yaml").is_file():
        with locked(path):
            aside = free_name(path)
            path.replace(aside)
        console.print(f"the earlier {path} is now {aside}")


def is_continued(earlier: dict[str, Any], meeting: Meeting) -> bool:
    """Whether this launch continues the launch that opened the folder last.

    This is so after a process was lost, after the number of hosts changed, and after a Slurm job was requeued.

    Args:
        earlier: environment.json of the last launch.
    """
    processes = meeting.processes
    same_launch = processes.launch is not None and earlier.get("launch") == processes.launch
    restarted = meeting.restart > 0 and processes.launch != "none"  # "none" is the default id of every torchrun
    requeued = processes.job is not None and earlier.get("job") == processes.job
    return (same_launch and (restarted or shares_launcher(earlier, meeting))) or (
        requeued and earlier["requeues"] < processes.requeues
    )


def shares_launcher(earlier: dict[str, Any], meeting: Meeting) -> bool:
    """Whether any launcher process (torchrun agent) took part in both the earlier launch and this one."""
    return bool(set(earlier.get("agents", ())) & set(meeting.agents))


def has_steps(path: Path) -> bool:
    """Whether a run has made a step. A run without steps may be restarted with another config."""
    metrics = path / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(complete_checkpoints(path))


def check_same_data(checkpoint: Path, config: TrainConfig, resolved: Resolved) -> None:
    """Check that this run has the same config and data as the run that wrote the checkpoint.

    Raises:
        ValueError: the data differ, or a config key differs that must not change when a run is resumed.
    """
    changed = changed_keys(recorded_config(checkpoint), as_dict(config))
    if changed:
        raise ValueError(f"{checkpoint} was written with another config ({'; '.join(changed)})")
    state = read_state(checkpoint)
    for key in FINGERPRINTS:
        if (found := state.get(key)) != (now := getattr(resolved, key)):
            raise ValueError(f"{checkpoint} was written with other data: {key} was {found}, now {now}")


def check_same_run(path: Path, config: TrainConfig, resolved: Resolved) -> dict[str, Any]:
    """Check that the run in `path` has the same config, precision and data as this launch. Return its environment.json.

    Raises:
        ValueError: the precision or the data differ, a config key differs that must not change when a run is resumed,
            or environment.json cannot be read.
    """
    remedy = f"use another run.name, or run.fresh=true to move {path} aside"
    changed = changed_keys(recorded_config(path), as_dict(config))
    if changed:
        raise ValueError(f"{path} was started with another config ({'; '.join(changed)}); {remedy}")
    try:
        earlier = json.loads((path / "environment.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'environment.json'} cannot be read ({error}); {remedy}") from error
    for key in ("precision", *FINGERPRINTS):
        if (before := earlier.get(key)) != (now := getattr(resolved, key)):
            raise ValueError(f"{path} was started with {key} {before}, now {now}; {remedy}")
    return earlier


def print_changes(path: Path, config: TrainConfig, resolved: Resolved, earlier: dict[str, Any]) -> None:
    """Print how the number of steps, the machine settings and the data path have changed since the earlier launch.

    Args:
        earlier: environment.json of the earlier launch.
    """
    before, now = (all_settings(values) for values in (recorded_config(path), as_dict(config)))
    for key in ("trainer.max_steps", "trainer.epochs"):
        if before[key] != now[key]:
            change = f"{key} was {as_written(before[key])}, now {as_written(now[key])}"
            console.print(f"{change}: the learning rate follows the new schedule from here")
    for key in ("device", "attention_backend", "compiled", "world_size", "data_path", "members_path"):
        if (value := earlier.get(key)) != (now := getattr(resolved, key)):
            console.print(f"{key} was {value}, now {now}")
