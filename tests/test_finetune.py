"""Tests of fine-tuning. The run or exported model that `from=` names is called the source.

The tests cover the settings that are taken from the source, the loss of the first step, resuming, copies of training
proteins, and errors.
"""

import csv
import functools
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

from protlig_dd.config.components import resolve_max_weight
from protlig_dd.config.read import config_folder, flatten, read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.likelihood.trained_on import source_training_data
from protlig_dd.export import report_of
from protlig_dd.inference.exported import report_lines
from protlig_dd.inference.model import find_saved, load_trained
from protlig_dd.runs.checkpoint import complete_checkpoints
from protlig_dd.runs.metrics import read_metrics
from protlig_dd.system.files import sha256
from protlig_dd.system.random import keyed_generator
from protlig_dd.tokenizer import ProteinTokenizer
from protlig_dd.training.finetune import resolve_source_model, with_source_model
from protlig_dd.training.optim.schedule import resolve_warmup_steps
from protlig_dd.training.trainer import count_residues

from .conftest import Command, MadeOnce, assert_one_line_error, composed
from .test_training import TINY, assert_bit_identical, train


def config_of(*overrides: str) -> TrainConfig:
    return read_config(composed(*overrides), TrainConfig)


SOURCE = replace(config_of("model=tiny", "model.dropout=0.2", "noise.max_weight=3"), time_conditioning=False)


def test_the_network_and_the_diffusion_process_are_taken_from_the_source() -> None:
    config = config_of("from=runs/a", "optim.lr=0.5", "data.max_len=77", "model.checkpointing=true")
    found = with_source_model(config, SOURCE, {"from", "optim.lr", "data.max_len", "model.checkpointing"})
    expected = flatten(asdict(config)) | flatten(asdict(SOURCE.model), "model")
    expected |= {"model.checkpointing": True, "noise.max_weight": 3, "time_conditioning": False}
    assert flatten(asdict(found)) == expected
    free = config_of("from=runs/a", "model.dropout=0.1", "noise.curriculum=9", "time_conditioning=auto", "model=tiny")
    found = with_source_model(free, SOURCE, {"model.dropout", "noise.curriculum", "time_conditioning", "model"})
    assert (found.model.dropout, found.noise["curriculum"], found.noise["max_weight"]) == (0.1, 9, 3)
    assert found.time_conditioning is False


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model=small"], ["model.hidden_size: 256 in the source, 512 requested", "model.n_blocks: 2 in the source"]),
        (["model.n_blocks=3", "model.dropout=0"], ["(model.n_blocks: 2 in the source, 3 requested)"]),
        (["graph=uniform"], ["(graph.name: absorbing in the source, uniform requested)"]),
        (["parametrisation=log_score"], ["(parametrisation: x0 in the source, log_score requested)"]),
        (["time_conditioning=true"], ["(time_conditioning: false in the source, true requested)"]),
        (["noise=cosine"], ["noise.name: loglinear in the source, cosine requested"]),
    ],
)
def test_another_network_or_diffusion_process_is_an_error(overrides: list[str], parts: list[str]) -> None:
    keys = {override.partition("=")[0] for override in overrides}
    with pytest.raises(ValueError, match="^from=runs/a does not match the command line") as error:
        with_source_model(config_of("from=runs/a", *overrides), SOURCE, keys)
    for part in parts:
        assert part in str(error.value)


Resolve = Callable[..., tuple[TrainConfig, str]]


@pytest.fixture
def resolve_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Resolve:
    """Return a function that resolves the config of a run with an experiment and a source.

    The function returns the config and the printed text. The experiment may be a file in the test's folder.
    """
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def resolved(source: Path, experiment: str, *overrides: str) -> tuple[TrainConfig, str]:
        search = f"hydra.searchpath=[file://{tmp_path}]"
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = compose("train", [f"experiment={experiment}", f"from={source}", search, *overrides], True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        config = resolve_source_model(read_config(OmegaConf.create(cfg), TrainConfig), tmp_path / "runs/new")
        return config, " ".join(capsys.readouterr().out.split())

    return resolved


def test_settings_of_an_experiment_are_used_or_reported_as_ignored(
    trained_run: Path, tmp_path: Path, resolve_experiment: Resolve
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - demo\nmodel:\n  dropout: 0.25\n  n_heads: 4\nnoise:\n  curriculum: 9\n"
    )
    (tmp_path / "experiment/plain.yaml").write_text("# @package _global_\noptim:\n  lr: 0.5\n")
    resolved = functools.partial(resolve_experiment, trained_run)

    config, out = resolved("uniref50_35m")
    assert (config.model.hidden_size, config.model.n_blocks, config.optim.packs_per_step) == (32, 2, 16)
    assert "its config groups: model.hidden_size=32 (not 512), model.n_heads=2 (not 8)" in out
    assert "model.n_blocks=2 (not 11)" in out
    config, out = resolved("mine")
    assert (config.model.dropout, config.noise["curriculum"], config.model.n_heads) == (0.25, 9, 2)
    assert "its config groups: model.hidden_size=32 (not 256), model.n_heads=2 (not 4)" in out
    assert "dropout" not in out
    config, out = resolved("mine", "model.dropout=0.3")
    assert config.model.dropout == 0.3
    config, out = resolved("plain")
    assert (config.model.hidden_size, config.optim.lr, out) == (32, 0.5, "")


def test_ignored_experiment_settings_are_reported_even_if_a_config_leaves_out_the_key(
    trained_run: Path, tmp_path: Path, resolve_experiment: Resolve
) -> None:
    """A config leaves out a newer key that has its default value.

    The config of the source or that of the experiment may leave out the key.
    """
    (tmp_path / "experiment").mkdir()
    newer = {"positions": "diet", "mixers": "ttt_linear", "max_positions": 400, "tie_weights": True}
    (tmp_path / "experiment/newer.yaml").write_text(
        "# @package _global_\nmodel:\n" + "".join(f"  {key}: {value}\n" for key, value in newer.items())
    )
    (tmp_path / "experiment/unset.yaml").write_text("# @package _global_\nmodel:\n  max_positions: null\n")
    (tmp_path / "experiment/context.yaml").write_text("# @package _global_\ndata:\n  context: lower\n")
    source = shutil.copytree(trained_run, tmp_path / "newer")
    for file in source.rglob("config.yaml"):
        added = "".join(f"  {key}: {value}\n" for key, value in newer.items())
        file.write_text(file.read_text().replace("model:\n", f"model:\n{added}"))
    for file in source.rglob("complete.json"):
        file.write_text(json.dumps({name: sha256(file.parent / name) for name in json.loads(file.read_text())}))

    config, out = resolve_experiment(trained_run, "newer")
    assert {key: getattr(config.model, key) for key in newer} != newer
    for message in (
        "model.positions=rope (not diet)",
        "model.mixers=attention (not ttt_linear)",
        "model.max_positions=null (not 400)",
        "model.tie_weights=false (not true)",
    ):
        assert message in out
    config, out = resolve_experiment(source, "demo")
    assert {key: getattr(config.model, key) for key in newer} == newer
    for message in (
        "model.positions=diet (not rope)",
        "model.mixers=ttt_linear (not attention)",
        "model.tie_weights=true (not false)",
    ):
        assert message in out
    assert "max_positions" not in out  # null keeps the value of the source
    assert resolve_experiment(source, "newer")[1] == resolve_experiment(source, "unset")[1] == ""
    for file in source.rglob("config.yaml"):
        file.write_text(file.read_text().replace("data:\n", "data:\n  context: upper\n"))
    for file in source.rglob("complete.json"):
        file.write_text(json.dumps({name: sha256(file.parent / name) for name in json.loads(file.read_text())}))
    config, out = resolve_experiment(source, "unset")
    expected = "warning: the source was trained with data.context=upper, but this run has data.context=none"
    assert config.data.context == "none"
    assert expected in out
    config, out = resolve_experiment(source, "context")
    assert (config.data.context, out) == ("lower", "")  # the keys of `data` are not taken from the source


def test_a_graph_from_a_matrix_file_matches_without_the_file(tmp_path: Path) -> None:
    rates = [[0.05] * 20] * 20
    matrix = str(tmp_path / "gone.txt")
    graph = {"name": "substitution", "matrix": matrix, "kind": "log_odds", "scale": None, "rates": rates}
    source = replace(SOURCE, graph=graph, time_conditioning=True)
    config = config_of("from=runs/a", "graph=substitution", f"graph.matrix={matrix}")
    assert with_source_model(config, source, {"graph", "graph.matrix"}).graph == graph
    other = config_of("from=runs/a", "graph=blosum62")
    with pytest.raises(ValueError, match=r"graph\.matrix: .* in the source, BLOSUM62 requested") as error:
        with_source_model(other, source, {"graph"})
    assert len(str(error.value)) < 500


BASE = (
    "optim.lr=0.01",
    "model.dropout=0",
    "optim.ema_decay=0.8",
    "optim.warmup_steps=5",
    "trainer.eval_every=30",
    "trainer.precision=fp32",
    "trainer.device=cpu",
)
FAMILY = [option for option in TINY if not option.startswith("model.")]
FAMILY += ["from=runs/base", "data.max_len=150", "seed=5", "trainer.max_steps=8", "trainer.eval_every=4"]
FAMILY += ["trainer.precision=fp32", "trainer.device=cpu"]


@pytest.fixture(scope="session")
def made_runs(store: SequenceStore, python: Command, made_once: MadeOnce) -> Path:
    """A folder with two runs: `base`, 30 steps, and `family`, fine-tuned from `base` and stopped at step 4 of 8."""

    def fill(folder: Path) -> None:
        train(functools.partial(python, cwd=folder), store, "base", *BASE, "trainer.max_steps=30")
        options = [*FAMILY, f"data.path={store.path}", "run.name=family", "trainer.stop_at_step=4"]
        process = python("-m", "protlig_dd.training", *options, cwd=folder)
        assert process.returncode == 0, process.stdout + process.stderr
        (folder / "printed").write_text(process.stdout)

    return made_once("finetune", fill)


@pytest.fixture
def runs(made_runs: Path, tmp_path: Path) -> Path:
    """A copy of the `runs` folder of `made_runs`. The test may change the copy."""
    return shutil.copytree(made_runs / "runs", tmp_path / "runs")


Tune = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tune(run_python: Command, store: SequenceStore, runs: Path) -> Tune:
    """Return a function that fine-tunes `base` with the options of `family`, followed by the function's arguments."""

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "protlig_dd.training", *FAMILY, f"data.path={store.path}", "run.name=family", *more)

    return run


@pytest.mark.slow
def test_the_first_step_uses_the_sources_averaged_weights(made_runs: Path, store: SequenceStore) -> None:
    printed, run = (made_runs / "printed").read_text(), made_runs / "runs/family"
    assert "starting from the averaged weights of runs/base/checkpoints/step_00000030" in printed
    assert "step 0: validation" in printed
    recorded = (run / "config.yaml").read_text()
    assert "from: runs/base\n" in recorded
    assert f"from_sha256: {sha256(made_runs / 'runs/base/checkpoints/step_00000030/ema.safetensors')}\n" in recorded
    assert "hidden_size: 32\n" in recorded
    assert json.loads((complete_checkpoints(run)[0] / "state.json").read_text())["step"] == 4

    config = read_config(composed(*FAMILY), TrainConfig)
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[1]["loss"] == pytest.approx(loss_before_training(made_runs / "runs/base", config, store), rel=1e-5)
    untrained = read_metrics(made_runs / "runs/base/metrics.jsonl")[1]["loss"]
    assert abs(rows[1]["loss"] - untrained) > 0.01
    assert rows[0]["val_nll"] < math.log(20) - 0.05  # log(20) is the bound of an untrained network
    warmup = resolve_warmup_steps(config.optim.warmup_steps, max(rows))
    assert rows[1]["lr"] == pytest.approx(config.optim.lr / max(1, warmup))


def loss_before_training(run: Path, config: TrainConfig, store: SequenceStore) -> float:
    """Return the loss of `run`'s averaged weights, with the packs and the noise of the first step under `config`."""
    source = load_trained(str(run), device="cpu", precision="fp32")
    packs = PackDataset(store, store.split("train"), max_len=150, tokens_per_pack=800, seed=5)
    losses, residues = [], 0
    for index in range(2):
        generator = keyed_generator(5, "noise", index, torch.device("cpu"))
        cap = resolve_max_weight(config.noise, source.graph)
        with torch.no_grad():
            loss, _ = score_entropy_loss(source.score_fn, packs[index], generator, 1.0, cap)
        losses.append(float(loss))
        residues += count_residues(packs[index])
    return sum(losses) / residues


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_without_its_source(runs: Path, tune: Tune) -> None:
    """The fine-tuned run's own folder is enough. The run's result is bit-identical to that of an uninterrupted run."""
    whole = tune("run.name=whole")
    assert whole.returncode == 0, whole.stderr
    (runs / "base").rename(runs / "moved")
    resumed = tune("optim.lr=0.003")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from runs/family/checkpoints/step_00000004" in resumed.stdout
    assert "starting from" not in resumed.stdout
    assert_bit_identical(runs / "family", runs / "whole")
    (runs / "moved").rename(runs / "base")
    assert_one_line_error(tune("from=null"), "runs/family was started with another config", "from: runs/base -> None")


@pytest.mark.slow
def test_a_fine_tuned_run_can_be_fine_tuned_again(runs: Path, tune: Tune) -> None:
    finished = tune()
    assert finished.returncode == 0, finished.stderr
    process = tune("from=runs/family", "run.name=second", "trainer.max_steps=1", "optim.lr=1e-30")
    assert process.returncode == 0, process.stderr
    before, after = (find_saved(str(runs / name)).weights for name in ("family", "second"))
    assert all(torch.equal(tensor, load_file(after)[name]) for name, tensor in load_file(before).items())


@pytest.mark.slow
def test_held_out_proteins_in_the_sources_training_data_are_counted(
    runs: Path, run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    """The run counts these proteins when it starts, and in its report.

    `evaluate` finds the source's store through the run's `from`.
    """
    decode = ProteinTokenizer().decode
    test = store.split("test")
    chosen = {"train": test[:12], "validation": [*range(5), *test[12:14]], "test": [*range(5, 8), *test[14:18]]}
    for split, rows in chosen.items():
        text = "".join(f">{split}{i}\n{decode(store[i])}\n" for i in rows)
        (tmp_path / f"{split}.fasta").write_text(text)
    family = build_store({split: tmp_path / f"{split}.fasta" for split in chosen}, tmp_path / "family.h5")
    options = [*FAMILY, "data.path=family.h5", "run.name=leaky", "trainer.max_steps=1", "report.max_sequences=15"]
    process = run_python("-m", "protlig_dd.training", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    trained = f"are exact copies of training proteins of the source model runs/base ({store.path})"
    assert f"warning: 5 of 7 validation proteins {trained}\n" in process.stdout
    assert f"warning: 3 of 7 test proteins {trained}\n" in process.stdout
    report = json.loads((runs / "leaky/report.json").read_text())
    source = {"model": "the source model runs/base", "store": str(store.path), "copies": 3}
    this_run = {"model": "this run", "store": "family.h5", "copies": 0}
    found = report["in_training"]
    assert (found["copies"], found["searched"], found["not_searched"]) == (3, [this_run, source], [])
    rows = list(csv.DictReader((runs / "leaky/report.csv").read_text().splitlines()))[3:]
    nats, residues = (np.array([float(row[key]) for row in rows]) for key in ("nll_nats", "residues"))
    assert (found["others"]["nll"], found["others"]["nll_se"]) == pytest.approx(per_residue(nats, residues), abs=1e-6)
    printed = process.stdout.partition("3 of these proteins are in the model's training data; without them:\n")[2]
    assert printed.splitlines()[:3] == [
        f"  NLL bound            {found['others']['nll']:.4f} ± {found['others']['nll_se']:.4f}",
        f"  unigram NLL          {found['others']['unigram_nll']:.4f} ± {found['others']['unigram_nll_se']:.4f}",
        f"  bound - unigram NLL  {found['others']['difference']:+.4f} ± {found['others']['difference_se']:.4f}",
    ]

    assert "none of 7 test proteins is an exact copy of a training protein of this run (family.h5)\n" in process.stdout
    sentence = "3 of 7 proteins of the test set are exact copies of proteins the model was trained on"
    assert sentence in (runs / "leaky/report.html").read_text()
    exported = report_of(find_saved(str(runs / "leaky")).path, 1)
    others = found["others"]
    difference = f"the paired difference to the unigram model is {others['difference']:+.4f}"
    clean = f"{others['nll']:.4f} ± {others['nll_se']:.4f}, and {difference}"
    assert report_lines(exported)[-1].startswith("Exact copies of training proteins of the model: 3. Over the other ")
    assert f" proteins the bound is {clean}" in report_lines(exported)[-1]
    assert store.path.name not in json.dumps(exported)  # no paths of this machine

    options = [option for option in options if not option.startswith(("from=", "data.path", "run.name"))]
    both = run_python("-m", "protlig_dd.training", *options, f"data.path=[family.h5,{store.path}]", "run.name=both")
    assert both.returncode == 0, both.stdout + both.stderr
    # one store may hold out proteins that the other store trains on
    report = json.loads((runs / "both/report.json").read_text())
    judged = {row["id"] for row in csv.DictReader((runs / "both/report.csv").read_text().splitlines())}
    copied = {f"test{i}" for i in range(5, 8)} | {store.id(i) for i in test[:12]}
    assert report["in_training"]["copies"] == len(judged & copied)
    assert 3 < len(judged & copied) < len(judged)

    command = ["-m", "protlig_dd.evaluate", "from=runs/leaky", "input=family.h5", "draws=1", "near=false"]
    done = run_python(*command, "output=out", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert f"warning: 3 of 7 proteins {trained}" in done.stdout
    assert "none of 7 proteins is an exact copy of a training protein of this model (family.h5)" in done.stdout
    assert json.loads((tmp_path / "out/report.json").read_text())["in_training"]["copies"] == 3

    run = load_trained(str(runs / "leaky"), device="cpu", precision="fp32")
    find_source_data = functools.partial(source_training_data, run.saved.config, runs / "leaky")
    assert [model_data.stores is not None for model_data in find_source_data([])] == [True]
    (checkpoint,) = complete_checkpoints(runs / "base")
    shutil.copytree(checkpoint, newer := checkpoint.with_name("step_00000031"))  # the source run was continued
    sums = json.loads((newer / "complete.json").read_text())
    (newer / "complete.json").write_text(json.dumps(sums | {"ema.safetensors": "0"}))
    assert [model_data.stores is not None for model_data in find_source_data([])] == [True]
    (runs / "base/environment.json").unlink()  # this file names the run's store
    assert [model_data.reason for model_data in find_source_data([])] == [
        "its training set was not found or cannot be read"
    ]
    assert [model_data.stores is not None for model_data in find_source_data([store])] == [True]
    shutil.rmtree(checkpoint)
    assert [model_data.reason for model_data in find_source_data([])] == [
        "its weights have changed since the run began"
    ]
    (runs / "base").rename(runs / "moved")
    assert [model_data.reason for model_data in find_source_data([])] == ["runs/base does not exist"]
    (unknown,) = source_training_data(replace(run.saved.config, from_=None), None, [])
    assert (unknown.model, unknown.reason) == (
        "the source model",
        "an exported model does not record the path of its source",
    )
    assert family.fingerprint != store.fingerprint


@pytest.mark.slow
def test_weights_other_than_those_the_run_started_from_are_rejected(
    runs: Path, tune: Tune, run_python: Command, store: SequenceStore
) -> None:
    train(run_python, store, "base", *BASE, "trainer.max_steps=31", "run.resume=extend")
    fresh = "run.name=third"
    wrong = tune(fresh, f"from_sha256={'0' * 64}")
    assert_one_line_error(wrong, "from=runs/base has weights of SHA-256", "from_sha256=0000")
    shutil.rmtree(runs / "family/checkpoints")
    assert_one_line_error(tune(), "step_00000031: its weights have SHA-256", "run.fresh=true")
    for more, parts in (
        (["from=runs/none"], ["runs/none does not exist"]),
        (
            ["model=small"],
            ["from=runs/base does not match the command line (model.hidden_size: 32 in the source, 512 requested"],
        ),
        (["run.resume=runs/base"], ["from=runs/base and run.resume=runs/base"]),
        (["from=null", f"from_sha256={'0' * 64}"], ["from_sha256 is the checksum of the weights that from= names"]),
    ):
        assert_one_line_error(tune(fresh, *more), *parts)
    assert not (runs / "third").exists()
