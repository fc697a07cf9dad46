import hashlib
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from protlig_dd.runs import checkpoint
from protlig_dd.runs.checkpoint import (
    COMPLETE,
    FILES,
    best_checkpoint,
    complete_checkpoints,
    find_checkpoint,
    load_optimizer,
    load_weights,
    read_state,
    remove_unfinished,
    save_checkpoint,
    snapshot,
    write_best,
)
from protlig_dd.training.ema import EMA
from protlig_dd.training.optim.make import make_optimizer

from .conftest import make_model, random_batch, train_config


def make_optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, replace(train_config().optim, name="adamw", lr=1e-3, weight_decay=0.1), "fp32")


def train_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, steps: int) -> None:
    for step in range(steps):
        model(random_batch([9, 4], seed=step), torch.ones(2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step + 1)


def save(folder: Path, step: int, seed: int = 0, **dimensions: int) -> tuple[Path, torch.nn.Module, EMA]:
    model = make_model(seed=seed, **dimensions)
    optimizer, ema = make_optimizer_for(model), EMA(model, 0.9)
    train_steps(model, optimizer, ema, 3)
    path = save_checkpoint(
        folder,
        step,
        snapshot(model, ema.weights, optimizer),
        config_yaml="seed: 0\n",
        state={"residues_seen": 5},
        keep_last=2,
    )
    return path, model, ema


def test_saved_weights_and_state_are_loaded_by_name(tmp_path: Path) -> None:
    path, model, ema = save(tmp_path, 7)
    state = read_state(path)
    assert (state["step"], state["residues_seen"]) == (7, 5)
    other = make_model(seed=99)
    load_weights(path / "model.safetensors", other)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    load_weights(path / "ema.safetensors", other)
    for name, weight in ema.weights.items():
        assert torch.equal(weight, other.get_parameter(name))
        assert not torch.equal(weight, model.get_parameter(name))


def test_training_continues_bit_identically_after_a_load(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 3)
    loaded = make_model(seed=99)
    load_weights(path / "model.safetensors", loaded)
    loaded_optimizer = make_optimizer_for(loaded)
    load_optimizer(path / "optimizer.safetensors", loaded, loaded_optimizer)
    undisturbed = make_model()
    optimizer, ema = make_optimizer_for(undisturbed), EMA(undisturbed, 0.9)
    train_steps(undisturbed, optimizer, ema, 3)
    for network, its_optimizer in ((loaded, loaded_optimizer), (undisturbed, optimizer)):
        train_steps(network, its_optimizer, EMA(network, 0.9), 2)
    for name, parameter in undisturbed.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert find_checkpoint(tmp_path)[0].name == "step_00000003"
    assert find_checkpoint(tmp_path / "checkpoints/step_00000002")[0].name == "step_00000002"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000002", "step_00000003"}


def test_an_error_for_another_width_names_both_shapes(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1, hidden_size=1024, n_heads=16, n_blocks=1)
    with torch.device("meta"):
        wide = make_model(hidden_size=4096, n_heads=16, n_blocks=1)
    with pytest.raises(ValueError, match=r"embedding.weight has shape \(30, 1024\) .* and \(30, 4096\) in this model"):
        load_weights(path / "model.safetensors", wide)


def test_missing_and_extra_tensors_are_errors(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"blocks\.2\.\S+ is missing; the model has it with shape"):
        load_weights(path / "model.safetensors", make_model(n_blocks=3))
    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ .* is not part of this model"):
        load_weights(path / "model.safetensors", make_model(n_blocks=1))
    with pytest.raises(ValueError, match=r"no optimizer state for blocks\.2"):
        load_optimizer(path / "optimizer.safetensors", make_model(n_blocks=3), make_optimizer_for(make_model()))
    fewer = make_model(n_blocks=1)
    with pytest.raises(ValueError, match=r"optimizer state for blocks\.1\.\S+, which the model does not have"):
        load_optimizer(path / "optimizer.safetensors", fewer, make_optimizer_for(fewer))


def test_incomplete_and_damaged_checkpoints_are_not_used(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path, _, _ = save(tmp_path, 2)
    (path / COMPLETE).rename(path / "renamed")
    assert find_checkpoint(tmp_path)[0].name == "step_00000001"
    with pytest.raises(ValueError, match=r"not a complete checkpoint, complete\.json is missing"):
        read_state(path)
    (path / "renamed").rename(path / COMPLETE)
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged, SHA-256"):
        read_state(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing from the checkpoint"):
        read_state(path)
    with pytest.raises(ValueError, match="elsewhere does not exist"):
        find_checkpoint(tmp_path / "elsewhere")


def test_checksums_are_computed_from_memory_and_not_from_the_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checksum of the written file would match even if the file was damaged on its way to the disk."""
    path, _, _ = save(tmp_path, 1)
    sums = json.loads((path / COMPLETE).read_text())
    assert list(sums) == sorted(FILES)
    assert sums == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}

    def save_damaged(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save_file(tensors, file)
        with file.open("r+b") as handle:
            handle.seek(-3, os.SEEK_END)
            handle.write(b"\x7f")

    monkeypatch.setattr(checkpoint, "save_file", save_damaged)
    path, _, _ = save(tmp_path, 2)
    with pytest.raises(ValueError, match=r"ema\.safetensors: damaged, SHA-256"):
        read_state(path)
    assert find_checkpoint(tmp_path)[0].name == "step_00000001"


def test_tensors_of_any_type_and_shape_have_the_checksum_of_their_file(tmp_path: Path) -> None:
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {
        f"{i}/{shape}": torch.ones(shape).to(dtype)
        for i, dtype in enumerate(types)
        for shape in ((), (3,), (2, 5), (0, 4))
    }
    file = tmp_path / "any.safetensors"
    written = checkpoint.write_tensors(tensors, file, 0o640)
    assert written == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.stat().st_mode & 0o777 == 0o640
    loaded = checkpoint.load_tensors(file)
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    save_file(tensors, tmp_path / "library.safetensors")
    assert file.read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_a_failed_sync_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail_for_tensors(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".safetensors":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail_for_tensors)
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_partial_checkpoint_left_by_a_killed_run_is_removed(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    (path.parent / ".step_00000002.abc").mkdir()
    (path.parent / ".step_00000002.abc" / "model.safetensors").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == ["step_00000001"]
    assert read_state(path)["step"] == 1
    remove_unfinished(tmp_path / "missing")


def test_an_incomplete_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    (path / COMPLETE).unlink()
    path, _, _ = save(tmp_path, 1, seed=3)
    assert read_state(path)["step"] == 1


def test_other_format_versions_are_errors(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text()) | {"format_version": 99}
    (path / "state.json").write_text(json.dumps(state))
    sums = json.loads((path / COMPLETE).read_text())
    sums["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / COMPLETE).write_text(json.dumps(sums))
    with pytest.raises(ValueError, match="has format 99; this version of protlig_dd reads only format 3"):
        read_state(path)


class Bomb:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return RuntimeError, ("a pickle was executed",)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path, _, _ = save(tmp_path, 1)
    for name in ("model.safetensors", "model.pt", "optimizer.pt"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_weights(path / "model.safetensors", make_model())


def test_the_best_checkpoint_is_ignored_if_it_no_longer_exists(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) == (None, math.inf)
    path, _, _ = save(tmp_path, 7)
    write_best(path.parent, 7, 2.5)
    assert best_checkpoint(tmp_path) == (7, 2.5)
    write_best(path.parent, 8, 2.4)  # step 8 has no checkpoint
    assert best_checkpoint(tmp_path) == (None, math.inf)
    write_best(path.parent, 7, 2.5)
    (path / COMPLETE).unlink()
    assert best_checkpoint(tmp_path) == (None, math.inf)
