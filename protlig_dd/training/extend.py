"""A run that has come to its end, and is to go on."""

import shutil
from pathlib import Path
from typing import Any

from protlig_dd.config.read import flatten, spelt
from protlig_dd.config.train import TrainConfig, recorded_config
from protlig_dd.evaluation.report.run import PAGE
from protlig_dd.runs.checkpoint import complete_checkpoints, step_of
from protlig_dd.system.files import free_name, replacing
from protlig_dd.system.tables import read_json


def finished_at(path: Path) -> int | None:
    """The last step of a run that has made its report; None of one that has not, or has gone on since."""
    step, checkpoints = read_json(path / "report.json").get("step"), complete_checkpoints(path)
    if not checkpoints or step != step_of(checkpoints[-1]) or not at_its_end(path, checkpoints[-1]):
        return None
    # an earlier version may have been told to go on, and been killed before it had a checkpoint
    ends = [ends_of(recorded_config(folder)) for folder in (path, checkpoints[-1])]
    return step if ends[0] == ends[1] else None


def at_its_end(path: Path, checkpoint: Path) -> bool:
    """Whether the learning rate of the run has come to the end of its schedule at this checkpoint."""
    step, config = step_of(checkpoint), recorded_config(checkpoint)
    most = read_json(checkpoint / "state.json").get("max_steps", config["trainer"]["max_steps"])
    if most is None:  # an earlier version's, of trainer.epochs: the report tells
        return bool(read_json(path / "report.json").get("step") == step)
    return bool(step >= most)


def ends_of(config: dict[str, Any]) -> dict[str, Any]:
    """trainer.max_steps and trainer.epochs of a config."""
    return {f"trainer.{key}": config["trainer"].get(key) for key in ("max_steps", "epochs")}


def check_extension(path: Path, config: TrainConfig) -> None:
    """Compare the steps that a run has been told to make with those that it is to make now.

    Raises:
        ValueError: more, after it has come to the end of its schedule: the learning rate would jump from there to the
            middle of a longer one.
    """
    before, now = ends_of(recorded_config(path)), ends_of(spelt(config))
    longer = [
        key
        for key in now
        if before[key] != now[key] and (before[key] is None or now[key] is None or before[key] < now[key])
    ]
    level = config.optim.min_lr_ratio == 1 or (config.optim.schedule == "wsd" and config.optim.decay_share == 0)
    checkpoints = complete_checkpoints(path)
    if longer and checkpoints and at_its_end(path, checkpoints[-1]) and not level and config.run.resume != "extend":
        told = " and ".join(f"{key} was {before[key]}, now {now[key]}" for key in longer)
        raise ValueError(
            f"{path} has come to its end, step {step_of(checkpoints[-1])} ({told}): its learning rate is down to "
            f"{config.optim.min_lr_ratio:g} of optim.lr={config.optim.lr:g}, and a longer schedule would raise it "
            f"again. run.resume=extend does that; another run.name with from={path} fine-tunes its weights"
        )


def reports_otherwise(path: Path, config: TrainConfig) -> bool:
    """Whether the config asks a run that has finished for another number of steps, or for another report."""
    before, now = (flatten(one) for one in (recorded_config(path), spelt(config)))
    ends = ("trainer.max_steps", "trainer.epochs", "report.")
    return any(before.get(key) != now[key] for key in now if key.startswith(ends))


def put_report_aside(path: Path, step: int) -> Path:
    """Copy a finished run's report to a folder of its own and take it out of the run, which will make another. Killed
    on the way, it is in one place at least as a whole.
    """
    folder = path / "reports" / f"step_{step:08d}"
    folder = free_name(folder) if folder.exists() else folder
    files = [file for name in ("report.json", "report.csv", PAGE) if (file := path / name).is_file()]
    with replacing(folder) as temporary:
        temporary.mkdir()
        for file in files:
            shutil.copy2(file, temporary)
    for file in files:  # report.json first: without it the run is no finished one
        file.unlink()
    return folder
