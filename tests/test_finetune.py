"""Fine-tuning: what is taken over of the source, the first step's loss, resume, and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.runtime.checkpoint import complete_checkpoints
from protlig_dd.runtime.config import TrainConfig, config_folder, flatten, read_config, resolve_max_weight, spelt
from protlig_dd.runtime.files import sha256
from protlig_dd.runtime.metrics import read_metrics
from protlig_dd.runtime.random import keyed_generator
from protlig_dd.runtime.trained import find_saved, load_trained
from protlig_dd.training.finetune import taken_over
from protlig_dd.training.launch import starting_from
from protlig_dd.training.trainer import count_residues

from .conftest import Command, assert_one_line_error
from .test_configs import composed
from .test_training import TINY, assert_same_bits, train


def config_of(*overrides: str) -> TrainConfig:
    return read_config(composed(*overrides), TrainConfig)


SOURCE = replace(config_of("model=tiny", "model.dropout=0.2", "noise.max_weight=3"), time_conditioning=False)


def test_the_sources_network_and_process_are_taken() -> None:
    config = config_of("from=runs/a", "optim.lr=0.5", "data.max_len=77", "model.checkpointing=true")
    found = taken_over(config, SOURCE, {"from", "optim.lr", "data.max_len", "model.checkpointing"})
    expected = flatten(spelt(config)) | {f"model.{key}": value for key, value in vars(SOURCE.model).items()}
    expected |= {"model.checkpointing": True, "noise.max_weight": 3, "time_conditioning": False}
    assert flatten(spelt(found)) == expected
    free = config_of("from=runs/a", "model.dropout=0.1", "noise.curriculum=9", "time_conditioning=auto", "model=tiny")
    found = taken_over(free, SOURCE, {"model.dropout", "noise.curriculum", "time_conditioning", "model"})
    assert (found.model.dropout, found.noise["curriculum"], found.noise["max_weight"]) == (0.1, 9, 3)
    assert found.time_conditioning is False


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model=small"], ["model.hidden_size: 256 there, 512 here", "model.n_blocks: 2 there"]),
        (["model.n_blocks=3", "model.dropout=0"], ["(model.n_blocks: 2 there, 3 here)"]),
        (["graph=uniform"], ["(graph.name: absorbing there, uniform here)"]),
        (["parametrisation=log_score"], ["(parametrisation: x0 there, log_score here)"]),
        (["time_conditioning=true"], ["(time_conditioning: False there, True here)"]),
        (["noise=cosine"], ["noise.name: loglinear there, cosine here"]),
    ],
)
def test_another_network_or_process_is_refused(overrides: list[str], parts: list[str]) -> None:
    given = {override.partition("=")[0] for override in overrides}
    with pytest.raises(ValueError, match="^from=runs/a is another model") as error:
        taken_over(config_of("from=runs/a", *overrides), SOURCE, given)
    for part in parts:
        assert part in str(error.value)


def test_what_an_experiment_sets_is_taken_or_said_to_be_left_out(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\nmodel:\n  dropout: 0.25\n  n_heads: 4\nnoise:\n  curriculum: 9\n"
    )
    (tmp_path / "experiment/plain.yaml").write_text("# @package _global_\noptim:\n  lr: 0.5\n")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def started(experiment: str, *more: str) -> tuple[TrainConfig, str]:
        search = f"hydra.searchpath=[file://{tmp_path}]"
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = compose("train", [f"experiment={experiment}", f"from={trained_run}", search, *more], True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        config = starting_from(read_config(OmegaConf.create(cfg), TrainConfig), tmp_path / "runs/new")
        return config, " ".join(capsys.readouterr().out.split())

    config, out = started("uniref50_35m")
    assert (config.model.hidden_size, config.model.n_blocks, config.optim.packs_per_step) == (32, 2, 16)
    assert "of which is left out: model.hidden_size=512 (32 there), model.n_heads=8 (2 there)" in out
    assert "model.dropout=0.1 (0.0 there)" in out
    config, out = started("mine")
    assert (config.model.dropout, config.noise["curriculum"], config.model.n_heads) == (0.25, 9, 2)
    assert "left out: model.hidden_size=256 (32 there), model.n_heads=4 (2 there)" in out
    assert "dropout" not in out
    config, out = started("mine", "model.dropout=0.3")
    assert config.model.dropout == 0.3
    config, out = started("plain")
    assert (config.model.hidden_size, config.optim.lr, out) == (32, 0.5, "")


def test_a_graph_of_a_matrix_file_is_the_same_without_the_file(tmp_path: Path) -> None:
    rates = [[0.05] * 20] * 20
    matrix = str(tmp_path / "gone.txt")
    graph = {"name": "substitution", "matrix": matrix, "kind": "log_odds", "scale": None, "rates": rates}
    source = replace(SOURCE, graph=graph, time_conditioning=True)
    config = config_of("from=runs/a", "graph=substitution", f"graph.matrix={matrix}")
    assert taken_over(config, source, {"graph", "graph.matrix"}).graph == graph
    other = config_of("from=runs/a", "graph=blosum62")
    with pytest.raises(ValueError, match=r"graph\.matrix: .* there, BLOSUM62 here") as error:
        taken_over(other, source, {"graph"})
    assert len(str(error.value)) < 500


@pytest.mark.slow
def test_a_fine_tuned_run_begins_with_the_weights_and_resumes(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    train(run_python, store, "base", "trainer.max_steps=30", "optim.lr=0.01", "model.dropout=0", "optim.ema_decay=0.8",
          "optim.warmup_steps=5", "trainer.eval_every=30", "trainer.precision=fp32", "trainer.device=cpu")  # fmt: skip
    kept = [o for o in TINY if not o.startswith("model.")]
    command = [*kept, f"data.path={store.path}", "from=runs/base", "run.name=family", "data.max_len=150"]
    command += ["seed=5", "trainer.max_steps=8", "trainer.eval_every=4", "trainer.precision=fp32", "trainer.device=cpu"]

    def tune(*more: str) -> str:
        process = run_python("-m", "protlig_dd.training", *command, *more)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    out = tune("trainer.stop_at_step=4")
    base = tmp_path / "runs/base/checkpoints/step_00000030"
    assert "starting from the averaged weights of runs/base/checkpoints/step_00000030" in out
    assert "step 0: validation" in out
    run = tmp_path / "runs/family"
    config = read_config(composed(*command), TrainConfig)
    recorded = (run / "config.yaml").read_text()
    assert "from: runs/base\n" in recorded
    assert f"from_sha256: {sha256(base / 'ema.safetensors')}\n" in recorded
    assert "hidden_size: 32\n" in recorded
    assert json.loads((complete_checkpoints(run)[0] / "state.json").read_text())["step"] == 4

    # the first step's loss is that of the source's averaged weights on the same packs, noise and all
    source = load_trained(str(tmp_path / "runs/base"), device="cpu", precision="fp32")
    packs = PackDataset(store, store.split("train"), max_len=150, tokens_per_pack=800, seed=5)
    losses, residues = [], 0
    for index in range(2):
        generator = keyed_generator(5, "noise", index, torch.device("cpu"))
        cap = resolve_max_weight(config.noise, source.graph)
        with torch.no_grad():
            loss, _ = score_entropy_loss(source.score_fn, packs[index], source.graph, source.noise, generator, 1.0, cap)
        losses.append(float(loss))
        residues += count_residues(packs[index])
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[1]["loss"] == pytest.approx(sum(losses) / residues, rel=1e-5)
    untrained = read_metrics(tmp_path / "runs/base/metrics.jsonl")[1]["loss"]
    assert abs(rows[1]["loss"] - untrained) > 0.01
    assert rows[0]["val_nll"] < math.log(20) - 0.05  # which is the untrained network's
    assert rows[1]["lr"] == pytest.approx(config.optim.lr / config.optim.warmup_steps)

    # its own folder is enough to go on, and gives the bits of a run that was left alone
    command[command.index("run.name=family")] = "run.name=whole"
    tune()
    command[command.index("run.name=whole")] = "run.name=family"
    (tmp_path / "runs/base").rename(tmp_path / "runs/away")
    resumed = tune("optim.lr=0.003")
    assert "going on from runs/family/checkpoints/step_00000004" in resumed
    assert "starting from" not in resumed
    assert_same_bits(run, tmp_path / "runs/whole")
    (tmp_path / "runs/away").rename(tmp_path / "runs/base")
    assert_one_line_error(
        run_python("-m", "protlig_dd.training", *[o for o in command if not o.startswith("from=")]),
        "runs/family was started with another config", "from: runs/base -> None",
    )  # fmt: skip

    # from a fine-tuned run, one goes on as from any other
    again = [o for o in command if not o.startswith(("from=", "run.name="))] + ["from=runs/family", "run.name=second"]
    process = run_python("-m", "protlig_dd.training", *again, "trainer.max_steps=1", "optim.lr=1e-30")
    assert process.returncode == 0, process.stderr
    before, after = (find_saved(str(tmp_path / "runs" / name)).weights for name in ("family", "second"))
    assert all(torch.equal(tensor, load_file(after)[name]) for name, tensor in load_file(before).items())

    # weights that are no longer those that the run began with
    shutil.rmtree(tmp_path / "runs/second/checkpoints")
    train(run_python, store, "base", "trainer.max_steps=31", "optim.lr=0.01", "model.dropout=0", "optim.ema_decay=0.8",
          "optim.warmup_steps=5", "trainer.eval_every=30", "trainer.precision=fp32", "trainer.device=cpu")  # fmt: skip
    fresh = ["-m", "protlig_dd.training", *again[:-2], "run.name=third"]
    wrong = run_python(*fresh, "from=runs/base", f"from_sha256={'0' * 64}")
    assert_one_line_error(wrong, "from=runs/base has weights of SHA-256", "from_sha256=0000")
    shutil.rmtree(tmp_path / "runs/family/checkpoints")
    moved_on = run_python("-m", "protlig_dd.training", *command)
    assert_one_line_error(moved_on, "step_00000031: weights of SHA-256", "run.fresh=true")

    for more, parts in (
        (["from=runs/none"], ["runs/none: neither a run folder with a complete checkpoint nor"]),
        (["from=runs/base", "model=small"], ["from=runs/base is another model (model.hidden_size: 32 there, 512 here"]),
        (["from=runs/base", "run.resume=runs/base"], ["from=runs/base and run.resume=runs/base"]),
        ([f"from_sha256={'0' * 64}"], ["from_sha256 is that of from="]),
    ):
        assert_one_line_error(run_python(*fresh, *more), *parts)
    assert not (tmp_path / "runs/third").exists()
