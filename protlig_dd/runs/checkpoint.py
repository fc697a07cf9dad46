"""Write and read checkpoints: folders of safetensors, YAML and JSON files.

    checkpoints/step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors   tensors by parameter name
        config.yaml  state.json
        complete.json      SHA-256 of each of the other files

The files are written to a temporary folder. When they are on the disk, the folder is renamed to its final name, and
complete.json is written into it. A folder that contains complete.json is therefore a complete checkpoint.

Loading a checkpoint never unpickles and never runs code that a file names.
"""

import hashlib
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from protlig_dd.system.files import free_name, sha256, sync_folder, write_atomic, writing

FORMAT_VERSION = 3
COMPLETE, BEST = "complete.json", "best.json"
FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.yaml", "state.json"}
Tensors = dict[str, dict[str, Tensor]]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name: all of them, unless the model has adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module, ema: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensors:
    """Copy a checkpoint's tensors to the host, so that training can continue while the checkpoint is written.

    Returns: {file stem: {name: tensor}}, with the stems model, ema and optimizer.
    """
    trained = trained_parameters(model)
    state = {
        f"{name}/{field}": value
        for name, parameter in trained.items()
        for field, value in optimizer.state[parameter].items()
    }
    parts: dict[str, Mapping[str, Tensor]] = {"model": trained, "ema": ema, "optimizer": state}
    return {
        stem: {name: tensor.detach().contiguous().to("cpu", copy=True) for name, tensor in tensors.items()}
        for stem, tensors in parts.items()
    }


def save_checkpoint(
    run_folder: Path,
    step: int,
    tensors: Tensors,
    *,
    config_yaml: str,
    state: Mapping[str, Any],
    keep_last: int,
    keep_every: int | None = None,
    best: float | None = None,
) -> Path:
    """Write the checkpoint of `step`, and delete complete checkpoints that are no longer kept.

    The files are written to a temporary folder and synced. The folder is then renamed, and complete.json is written
    into it. A folder without complete.json does not count as a checkpoint, so a kill does no harm at any moment.

    Args:
        tensors: as returned by `snapshot`.
        state: entries of state.json, in addition to the format version and the step.
        keep_last: number of newest complete checkpoints to keep.
        keep_every: also keep the checkpoints of all steps that are divisible by this number. The checkpoint of `step`
            and the best checkpoint are always kept.
        best: the bound on the validation NLL in nats per residue if it is the lowest of the run so far, else None. The
            checkpoint with the lowest bound is the best checkpoint, and best.json records its step and bound.
    """
    parent = run_folder / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step_{step:08d}"
    temporary = parent / f".{final.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        numbers = {"format_version": FORMAT_VERSION, "step": step, **state}
        sums = {}
        for name, text in (("config.yaml", config_yaml), ("state.json", json.dumps(numbers))):
            with writing(final / name):
                write_atomic(temporary / name, text)
            sums[name] = hashlib.sha256(text.encode()).hexdigest()
        mode = stat.S_IMODE((temporary / "state.json").stat().st_mode)
        for stem, named in tensors.items():
            name = f"{stem}.safetensors"
            with writing(final / name):
                sums[name] = write_tensors(named, temporary / name, mode)
        sync_folder(temporary)
        if final.exists():  # incomplete, damaged, or written before the run was resumed from an earlier step
            _remove(final)
        temporary.replace(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(parent)
    write_atomic(final / COMPLETE, json.dumps(sums, indent=1, sort_keys=True))
    sync_folder(final)
    if best is not None:
        write_best(parent, step, best)
    kept = {step, best_checkpoint(run_folder)[0]}
    for old in complete_checkpoints(run_folder)[:-keep_last]:
        number = step_of(old)
        if number not in kept and not (keep_every and number % keep_every == 0):
            _remove(old)
    return final


def write_tensors(tensors: Mapping[str, Tensor], file: Path, mode: int) -> str:
    """Write tensors that are on the host to a safetensors file, sync it, and return the file's SHA-256.

    While the system writes the file to the disk, the tensors are hashed in memory, in the order in which the file has
    them. They are not read back from the file. If the file is damaged on its way to the disk, the returned checksum
    therefore differs from that of the file, and `read_state` detects the damage.

    Args:
        mode: permissions to set on the file. safetensors itself creates files that only their owner can read, whatever
            the umask.
    """
    save_file(dict(tensors), file)
    file.chmod(mode)
    with file.open("rb") as handle, ThreadPoolExecutor(1, "sync") as thread:
        synced = thread.submit(os.fsync, handle.fileno())
        size = handle.read(8)  # the header's size, little-endian
        header = handle.read(int.from_bytes(size, "little"))
        digest = hashlib.sha256(size + header)
        entries: dict[str, Any] = json.loads(header)
        offsets = {name: entry["data_offsets"] for name, entry in entries.items() if name in tensors}
        for name in sorted(offsets, key=offsets.__getitem__):
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
        synced.result()
    return digest.hexdigest()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def write_best(checkpoints: Path, step: int, val_nll: float) -> None:
    write_atomic(checkpoints / BEST, json.dumps({"step": step, "val_nll": val_nll}) + "\n")


def best_checkpoint(run_folder: Path) -> tuple[int | None, float]:
    """Return the step and the validation bound of the run's best checkpoint; (None, infinity) if there is none.

    The best checkpoint is the one with the lowest bound on the validation NLL, in nats per residue.
    """
    file = run_folder / "checkpoints" / BEST
    if not file.is_file():
        return None, math.inf
    found = json.loads(file.read_text())
    # a resume renames damaged checkpoints, so the checkpoint that best.json names may no longer exist
    if not (file.parent / f"step_{found['step']:08d}" / COMPLETE).is_file():  # damaged, and put aside
        return None, math.inf
    return found["step"], found["val_nll"]


def put_aside_newer(run_folder: Path, checkpoint: Path) -> list[Path]:
    """Rename the checkpoints of steps later than that of `checkpoint`, so that `keep_last` does not count them.

    `checkpoint` is the run's newest valid checkpoint, so the renamed checkpoints are not valid.

    Returns: the new paths of the renamed checkpoints.
    """
    damaged = [path for path in (run_folder / "checkpoints").glob("step_*") if path.name > checkpoint.name]
    return [path.rename(free_name(path.with_name(f"damaged_{path.name}"))) for path in damaged]


def remove_unfinished(run_folder: Path) -> None:
    """Delete the temporary folders of checkpoints that were not finished because the process was killed."""
    for folder in (run_folder / "checkpoints").glob(".step_*"):
        shutil.rmtree(folder)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. complete.json is deleted first, so a partly deleted checkpoint never counts as complete."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    sync_folder(checkpoint)
    shutil.rmtree(checkpoint)


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run_folder / "checkpoints").glob(f"step_*/{COMPLETE}"))


def newest_valid_checkpoint(run_folder: Path) -> tuple[Path | None, list[str]]:
    """Return the run's newest valid checkpoint, and an error message for each newer checkpoint.

    A checkpoint is valid if `read_state` accepts it. If none is valid, the first value is None, and there is a message
    for every checkpoint.
    """
    skipped = []
    for checkpoint in sorted((run_folder / "checkpoints").glob("step_*"), reverse=True):
        try:
            read_state(checkpoint)
        except ValueError as error:
            skipped.append(str(error))
        else:
            return checkpoint, skipped
    return None, skipped


def find_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """Return a checkpoint, and an error message for each newer checkpoint of the run that is not valid.

    Args:
        path: a complete checkpoint or a run folder. A checkpoint is returned as it is, without comparing its checksums
            and without messages. For a run folder, its newest valid checkpoint is returned.

    Raises:
        ValueError: `path` does not exist, or is neither a complete checkpoint nor a run folder with a valid checkpoint.
            The message has the error of each checkpoint in the run folder.
    """
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a run folder, a checkpoint or an exported model, such as "
            "`python -m protlig_dd.convert` writes for ESM-2 and DPLM"
        )
    if (path / COMPLETE).is_file():
        return path, []
    checkpoint, skipped = newest_valid_checkpoint(path)
    if checkpoint is None:
        errors = f" ({'; '.join(skipped)})" if skipped else ""
        raise ValueError(
            f"{path}: neither a checkpoint, an exported model nor a run folder with a valid checkpoint{errors}"
        )
    return checkpoint, skipped


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json as a dictionary, after comparing all its files with their checksums.

    Raises:
        ValueError: the checkpoint is incomplete or has another format version, or one of its files is damaged or
            missing. The message names the file or folder.
    """
    try:
        sums = json.loads((checkpoint / COMPLETE).read_text())
        missing = FILES - sums.keys()
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint}: not a complete checkpoint, {COMPLETE} is missing") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{checkpoint / COMPLETE}: damaged ({error})") from error
    if missing:
        raise ValueError(f"{checkpoint / COMPLETE}: damaged, it has no checksum of {min(missing)}")
    for name, expected in sums.items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{file}: missing from the checkpoint")
        if (found := sha256(file)) != expected:
            raise ValueError(f"{file}: damaged, SHA-256 is {found[:12]} but {expected[:12]} was written")
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{checkpoint} has format {state['format_version']}; "
            f"this version of protlig_dd reads only format {FORMAT_VERSION}"
        )
    return state


def load_weights(file: Path, model: nn.Module) -> None:
    """Load a safetensors file with all weights of a model into the model; see `copy_tensors`."""
    load_into(model.state_dict(), file)


def load_into(targets: Mapping[str, Tensor], file: Path) -> None:
    """Load a safetensors file into tensors of a model, by name; see `copy_tensors`."""
    copy_tensors(file, load_tensors(file), targets)


def copy_tensors(file: Path, loaded: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy the values of loaded tensors into tensors of a model. Names and shapes must be the same.

    Args:
        file: the file that `loaded` comes from, for the message.

    Raises:
        ValueError: a tensor is missing, is not part of the model or has another shape. The message names the file, the
            tensor and its shapes.
    """
    check_same_tensors(file, targets, loaded)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(loaded[name])


def load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error})") from error


def check_same_tensors(file: Path, expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    for name in expected.keys() | loaded.keys():
        if name not in loaded:
            raise ValueError(f"{file}: {name} is missing; the model has it with shape {tuple(expected[name].shape)}")
        if name not in expected:
            raise ValueError(f"{file}: {name} with shape {tuple(loaded[name].shape)} is not part of this model")
    for name, tensor in expected.items():
        if tensor.shape != loaded[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(loaded[name].shape)} in the checkpoint "
                f"and {tuple(tensor.shape)} in this model"
            )


def load_optimizer(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state of every trained parameter from a safetensors file, by parameter name.

    Raises:
        ValueError: the file cannot be read, a parameter of the model has no state in it, or the file has the state of a
            parameter that the model does not train.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(file).items():
        name, _, field = key.rpartition("/")
        by_parameter.setdefault(name, {})[field] = tensor
    for name, parameter in trained_parameters(model).items():
        if name not in by_parameter:
            raise ValueError(f"{file}: no optimizer state for {name}")
        optimizer.state[parameter] = {
            field: tensor.to(parameter.device) for field, tensor in by_parameter.pop(name).items()
        }
    if by_parameter:
        raise ValueError(f"{file}: optimizer state for {next(iter(by_parameter))}, which the model does not have")
