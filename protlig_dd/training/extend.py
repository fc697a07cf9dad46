"""Extend a run that has reached the end of its learning-rate schedule."""

import shutil
from pathlib import Path
from typing import Any

from protlig_dd.config.read import as_dict
from protlig_dd.config.train import TrainConfig, all_settings, recorded_config
from protlig_dd.evaluation.report.run import PAGE
from protlig_dd.runs.checkpoint import complete_checkpoints, step_of
from protlig_dd.system.files import creating, free_name
from protlig_dd.system.tables import as_written, read_json


def finished_step(path: Path) -> int | None:
    """Return the last step of a finished run; None for any other run.

    A run is finished if its learning-rate schedule has ended and its report describes its newest checkpoint.
    """
    step, checkpoints = read_json(path / "report.json").get("step"), complete_checkpoints(path)
    if not checkpoints or step != step_of(checkpoints[-1]) or not schedule_finished(path, checkpoints[-1]):
        return None
    # When an earlier version of protlig_dd extended a run, it wrote the new length into the run folder before training.
    # If that process was killed before it saved a checkpoint, the newest checkpoint's config still has the old length.
    # Such a run is not finished.
    lengths = [configured_length(recorded_config(folder)) for folder in (path, checkpoints[-1])]
    return step if lengths[0] == lengths[1] else None


def schedule_finished(path: Path, checkpoint: Path) -> bool:
    """Whether the learning-rate schedule of the run has ended at this checkpoint."""
    step, config = step_of(checkpoint), recorded_config(checkpoint)
    max_steps = read_json(checkpoint / "state.json").get("max_steps", config["trainer"]["max_steps"])
    if max_steps is None:  # a run with trainer.epochs; earlier versions did not record its length in steps
        return bool(read_json(path / "report.json").get("step") == step)
    return bool(step >= max_steps)


def configured_length(config: dict[str, Any]) -> dict[str, Any]:
    """Return trainer.max_steps and trainer.epochs of a config."""
    return {f"trainer.{key}": config["trainer"].get(key) for key in ("max_steps", "epochs")}


def check_extension(path: Path, config: TrainConfig) -> None:
    """Check that the config does not extend a run whose learning-rate schedule has ended.

    With run.resume=extend, every run may be extended. A schedule that does not decay may always be extended.

    Raises:
        ValueError: the config extends such a run. The learning rate would jump from the end of the old schedule to the
            middle of the longer schedule.
    """
    before, now = configured_length(recorded_config(path)), configured_length(as_dict(config))
    longer = [
        key
        for key in now
        if before[key] != now[key] and (before[key] is None or now[key] is None or before[key] < now[key])
    ]
    optim = config.optim
    level = optim.lr == 0 or optim.min_lr_ratio == 1 or (optim.schedule == "wsd" and optim.decay_share == 0)
    checkpoints = complete_checkpoints(path)
    if not longer or not checkpoints or level or config.run.resume == "extend":
        return  # without reading the newest checkpoint; if it is damaged, the run may still resume from an earlier one
    if schedule_finished(path, checkpoints[-1]):
        changes = " and ".join(f"{key} was {as_written(before[key])}, now {as_written(now[key])}" for key in longer)
        raise ValueError(
            f"{path} has finished its schedule at step {step_of(checkpoints[-1])} ({changes}): its learning rate has "
            f"decayed to {config.optim.min_lr_ratio:g} x optim.lr={config.optim.lr:g}, and a longer schedule would "
            f"raise it again; set run.resume=extend to allow this, or another run.name and from={path} to fine-tune "
            "its weights"
        )


def changes_length_or_report(path: Path, config: TrainConfig) -> bool:
    """Whether the config's number of steps or report settings differ from those of the finished run."""
    before, now = (all_settings(values) for values in (recorded_config(path), as_dict(config)))
    prefixes = ("trainer.max_steps", "trainer.epochs", "report.")
    return any(before.get(key) != now[key] for key in now if key.startswith(prefixes))


def put_report_aside(path: Path, step: int) -> Path:
    """Move a finished run's report to the folder reports/step_N, and return this folder.

    The run will then write a new report. The files are copied before they are deleted. So even after a kill, the run
    folder or the new folder has the whole report.
    """
    folder = path / "reports" / f"step_{step:08d}"
    folder = free_name(folder) if folder.exists() else folder
    files = [file for name in ("report.json", "report.csv", PAGE) if (file := path / name).is_file()]
    with creating(folder) as temporary:
        temporary.mkdir()
        for file in files:
            shutil.copy2(file, temporary)
    for file in files:  # report.json is deleted first, because the run does not count as finished without it
        file.unlink()
    return folder
