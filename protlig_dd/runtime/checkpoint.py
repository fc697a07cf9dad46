"""Checkpoints: safetensors and JSON, written so that a folder under its final name is whole.

    checkpoints/step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors   tensors by parameter name
        config.yaml  state.json
        complete.json      SHA-256 of each file; written last, so its presence means the rest is there

Loading never unpickles and never runs code that a file names.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from protlig_dd.runtime.files import sync_folder, write_atomic

FORMAT_VERSION = 1
COMPLETE = "complete.json"


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    config_yaml: str,
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write the checkpoint of `step` and drop this run's complete ones beyond the newest `keep_last`.

    The files are written to a temporary folder and synced, the folder is renamed, then marked complete: a kill at any
    moment leaves either no such checkpoint or a whole one.
    """
    parent = run_folder / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step_{step:08d}"
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{final.name}."))
    try:
        temporary.chmod(0o755)
        save_file(_on_cpu(model.state_dict()), temporary / "model.safetensors")
        save_file(_on_cpu(ema), temporary / "ema.safetensors")
        save_file(_on_cpu(_optimizer_tensors(model, optimizer)), temporary / "optimizer.safetensors")
        (temporary / "config.yaml").write_text(config_yaml)
        (temporary / "state.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, **state}))
        sums = {}
        for file in sorted(temporary.iterdir()):
            with file.open("rb") as handle:
                sums[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
                os.fsync(handle.fileno())
        sync_folder(temporary)
        if final.exists():  # killed before it was marked complete, or the run went back to an earlier step
            _remove(final)
        temporary.replace(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(parent)
    write_atomic(final / COMPLETE, json.dumps(sums, indent=1))
    sync_folder(final)
    for old in complete_checkpoints(run_folder)[:-keep_last]:
        _remove(old)
    return final


def remove_unfinished(run_folder: Path) -> None:
    """Delete the temporary folders of checkpoints whose writing was killed."""
    for folder in (run_folder / "checkpoints").glob(".step_*"):
        shutil.rmtree(folder)


def _remove(checkpoint: Path) -> None:
    """Unmark, then delete: a kill in between must not leave a checkpoint that says it is complete."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    sync_folder(checkpoint)
    shutil.rmtree(checkpoint)


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoints that were finished, oldest first."""
    return sorted(path.parent for path in (run_folder / "checkpoints").glob(f"step_*/{COMPLETE}"))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest complete one of a run folder.

    Raises:
        ValueError: no complete checkpoint there.
    """
    if (path / COMPLETE).is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        raise ValueError(f"{path}: neither a run folder with a complete checkpoint nor a checkpoint")
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a complete checkpoint, after all its files were compared with their checksums.

    Raises:
        ValueError: an incomplete checkpoint, a damaged or missing file, or another format version; named.
    """
    try:
        sums = json.loads((checkpoint / COMPLETE).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint}: not a complete checkpoint, {COMPLETE} is missing") from error
    for name, expected in sums.items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{file}: missing from the checkpoint")
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != expected:
            raise ValueError(f"{file}: damaged, SHA-256 {found[:12]} where {expected[:12]} was written")
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{checkpoint}: format {state['format_version']}, this version reads {FORMAT_VERSION}")
    return state


def load_weights(file: Path, model: nn.Module) -> None:
    """Load a safetensors file of named weights into a model, strictly.

    Raises:
        ValueError: a missing, extra or differently shaped tensor; names it and both shapes.
    """
    own = model.state_dict()
    loaded = load_tensors(file)
    check_same_tensors(file, own, loaded)
    model.load_state_dict(loaded, strict=True)


def load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error})") from error


def check_same_tensors(file: Path, own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    for name in own.keys() | loaded.keys():
        if name not in loaded:
            raise ValueError(f"{file}: {name} is missing; the model has it with shape {tuple(own[name].shape)}")
        if name not in own:
            raise ValueError(f"{file}: {name} {tuple(loaded[name].shape)} is not part of this model")
    for name, tensor in own.items():
        if tensor.shape != loaded[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(loaded[name].shape)} in the checkpoint "
                f"and {tuple(tensor.shape)} in this model"
            )


def load_optimizer(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's per-parameter state, by parameter name.

    Raises:
        ValueError: state that is missing or belongs to no parameter.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(file).items():
        name, _, field = key.rpartition("/")
        by_parameter.setdefault(name, {})[field] = tensor
    for name, parameter in model.named_parameters():
        if name not in by_parameter:
            raise ValueError(f"{file}: no optimizer state for {name}")
        optimizer.state[parameter] = {
            field: tensor.to(parameter.device) for field, tensor in by_parameter.pop(name).items()
        }
    if by_parameter:
        raise ValueError(f"{file}: optimizer state for {next(iter(by_parameter))}, which the model does not have")


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            for field, value in optimizer.state[parameter].items():
                yield f"{name}/{field}", value

    return dict(pairs())


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
