"""Whole runs from the command line on real proteins: resuming, ranks, faults, sweeps and the report."""

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from Bio.Align import substitution_matrices
from safetensors.torch import load_file

from protlig_dd import __version__
from protlig_dd.config.read import config_folder, read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.fasta import read_fasta
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.report.page import run_page
from protlig_dd.evaluation.report.run import read_run
from protlig_dd.runs.checkpoint import COMPLETE, complete_checkpoints
from protlig_dd.runs.metrics import read_metrics
from protlig_dd.system.files import sha256
from protlig_dd.tokenizer import AMINO_ACIDS, ProteinTokenizer
from protlig_dd.training.extend import changes_length_or_report, check_extension, finished_step, put_report_aside
from protlig_dd.training.packs import subset
from protlig_dd.training.report import print_report
from scripts.disturbed_runs import truncate

from .conftest import (
    RESUMES,
    TRAINED,
    Command,
    Start,
    assert_one_line_error,
    composed,
    require_program,
    thorough,
    wait_for,
)

pytestmark = pytest.mark.slow  # each test starts processes that train

decode = ProteinTokenizer().decode

TINY = [
    "experiment=demo",
    "model.hidden_size=32",
    "model.n_heads=4",
    "model.n_blocks=2",
    "model.cond_dim=16",
    "model.dropout=0.1",
    "data.max_len=200",
    "data.tokens_per_pack=800",
    "optim.packs_per_step=2",
    "trainer.log_every=5",
    "trainer.eval_every=0",
    "trainer.log_rows=true",
    "report.max_sequences=4",
    "report.draws=2",
    "report.samples=0",
]


def overrides_for(store: SequenceStore, name: str, *more: str) -> list[str]:
    return [*TINY, f"data.path={store.path}", f"run.name={name}", *more]


def train(run_python: Command, store: SequenceStore, name: str, *more: str) -> str:
    process = run_python("-m", "protlig_dd.training", *overrides_for(store, name, *more))
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def last_tensors(run_folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the newest checkpoint: weights, averaged weights, optimizer state."""
    checkpoint = complete_checkpoints(run_folder)[-1]
    files = ("model", "ema", "optimizer")
    return {f"{file}/{k}": v for file in files for k, v in load_file(checkpoint / f"{file}.safetensors").items()}


def assert_bit_identical(first: Path, second: Path) -> None:
    tensors, expected = last_tensors(first), last_tensors(second)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    assert read_rows(first) == read_rows(second)


def read_rows(run_folder: Path) -> dict[int, list[int]]:
    rows = [json.loads(line) for line in (run_folder / "rows.jsonl").read_text().splitlines()]
    return {row["step"]: row["rows"] for row in rows}


def test_stop_and_resume_is_bit_identical_to_an_undisturbed_run(
    run_python: Command, store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    """Compare a run of 16 steps with a run of 8 + 8 steps, and with a run that is killed with SIGKILL and restarted."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # waiting threads do not keep the cores busy
    train(run_python, store, "whole", "trainer.max_steps=16")
    stopped = train(run_python, store, "halves", "trainer.max_steps=16", "trainer.stop_at_step=8")
    assert "stopped at step 8 of 16" in stopped
    assert [path.name for path in complete_checkpoints(tmp_path / "runs/halves")] == ["step_00000008"]
    resumed = train(run_python, store, "halves", "trainer.max_steps=16", "trainer.log_every=3")
    assert "resuming from runs/halves/checkpoints/step_00000008" in resumed
    assert_bit_identical(tmp_path / "runs/whole", tmp_path / "runs/halves")
    losses = [read_metrics(tmp_path / f"runs/{name}/metrics.jsonl") for name in ("whole", "halves")]
    assert sorted(losses[0]) == list(range(1, 17))
    assert [row["loss"] for row in losses[0].values()] == [row["loss"] for row in losses[1].values()]
    assert losses[1][8]["attempt"] == 1
    assert losses[1][9]["attempt"] == 2

    command = overrides_for(store, "killed", "trainer.max_steps=16", "trainer.checkpoint_every=2")
    victim = start("-m", "protlig_dd.training", *command, new=True)
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/killed"))
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    again = train(run_python, store, "killed", "trainer.max_steps=16", "trainer.checkpoint_every=2")
    assert "resuming from runs/killed/checkpoints/step_" in again
    assert_bit_identical(tmp_path / "runs/whole", tmp_path / "runs/killed")


def test_a_finished_run_names_its_report_and_trains_further_only_if_it_is_extended(
    trained_run: Path, store: SequenceStore, run_python: Command, tmp_path: Path
) -> None:
    run = tmp_path / "runs/small"
    shutil.copytree(trained_run, run)
    command = ["-m", "protlig_dd.training", *TRAINED, f"data.path={store.path}"]
    report, metrics = (run / "report.json").read_text(), (run / "metrics.jsonl").read_text()
    last = run / "checkpoints/step_00000040"
    assert finished_step(run) == 40
    shutil.copytree(last, last.with_name("step_00000041"))
    assert finished_step(run) is None  # a newer checkpoint: the run has continued
    shutil.rmtree(last.with_name("step_00000041"))
    (run / "report.html").unlink()  # as after a kill before the page was written
    again = run_python(*command)
    assert again.returncode == 0, again.stderr
    assert "runs/small has already finished at step 40; its report is runs/small/report.html" in again.stdout
    assert (run / "report.html").read_text() == run_page(read_run(run))
    longer = run_python(*command, "trainer.max_steps=43")
    assert_one_line_error(
        longer, "trainer.max_steps was 40, now 43", "decayed to 0.1 x optim.lr=0.003", "run.resume=extend"
    )
    fewer = run_python(*command, "trainer.max_steps=39")
    assert_one_line_error(fewer, "step_00000040: step 40 is after the last step (trainer.max_steps=39)")
    epochs = run_python(*command, "trainer.max_steps=null", "trainer.epochs=0.5", "run.resume=extend")
    assert_one_line_error(epochs, "step_00000040: step 40 is after the last step (the 34 steps of trainer.epochs=0.5")
    assert (run / "report.json").read_text() == report
    assert (run / "metrics.jsonl").read_text() == metrics
    assert not (run / "reports").exists()

    more = run_python(*command, "trainer.max_steps=43", "run.resume=extend")
    assert more.returncode == 0, more.stderr
    assert "the earlier report is now in runs/small/reports/step_00000040" in more.stdout
    assert (run / "reports/step_00000040/report.json").read_text() == report
    assert {path.name for path in (run / "reports/step_00000040").iterdir()} == {
        "report.csv",
        "report.html",
        "report.json",
    }
    assert json.loads((run / "report.json").read_text())["step"] == 43
    assert sorted(read_metrics(run / "metrics.jsonl")) == list(range(1, 44))
    draws = run_python(*command, "trainer.max_steps=43", "report.draws=3")
    assert draws.returncode == 0, draws.stderr
    assert json.loads((run / "report.json").read_text())["draws"] == 3
    assert json.loads((run / "reports/step_00000043/report.json").read_text())["draws"] == 2


@pytest.mark.parametrize(
    ("changes", "is_error"),
    [
        (["trainer.max_steps=50"], True),
        (["trainer.max_steps=null", "trainer.epochs=3"], True),
        (["trainer.max_steps=50", "run.resume=extend"], False),
        (["trainer.max_steps=50", "optim.min_lr_ratio=1"], False),
        (["trainer.max_steps=50", "optim.schedule=wsd"], True),
        (["trainer.max_steps=50", "optim.schedule=wsd", "optim.decay_share=0"], False),
        (["trainer.max_steps=30"], False),
    ],
)
def test_a_decayed_schedule_is_extended_only_with_resume_extend(
    trained_run: Path, changes: list[str], is_error: bool
) -> None:
    config = read_config(composed(*TRAINED, *changes), TrainConfig)
    if is_error:
        with pytest.raises(ValueError, match=r"step 40 \(.*learning rate has decayed to 0.1 x optim.lr"):
            check_extension(trained_run, config)
    else:
        check_extension(trained_run, config)
        assert changes_length_or_report(trained_run, config)


@pytest.mark.parametrize("file", ["state.json", "config.yaml"])
def test_checks_before_resuming_do_not_fail_on_a_damaged_checkpoint(
    trained_run: Path, tmp_path: Path, file: str
) -> None:
    """Checks before resuming must not fail, because resuming itself falls back to the previous checkpoint."""
    run = tmp_path / "small"
    shutil.copytree(trained_run, run)
    (run / "report.json").unlink()
    truncate(run / "checkpoints/step_00000040" / file)
    check_extension(run, read_config(composed(*TRAINED), TrainConfig))
    assert finished_step(run) is None


def test_a_run_whose_length_was_increased_is_not_finished(trained_run: Path, tmp_path: Path) -> None:
    """Earlier versions wrote the new length to config.yaml and could be killed before their next checkpoint.

    The second part of the test is a run whose length is given in epochs.
    """
    run = tmp_path / "small"
    shutil.copytree(trained_run, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_steps: 40", "max_steps: 50"))
    assert finished_step(run) is None
    # config.yaml now has 50 steps, so 50 is no extension
    check_extension(run, read_config(composed(*TRAINED, "trainer.max_steps=50"), TrainConfig))
    with pytest.raises(ValueError, match="max_steps was 50, now 60"):
        check_extension(run, read_config(composed(*TRAINED, "trainer.max_steps=60"), TrainConfig))
    by_epochs = text.replace("max_steps: 40", "max_steps: null").replace("epochs: null", "epochs: 2.0")
    last = run / "checkpoints/step_00000040"
    for folder in (run, last):
        (folder / "config.yaml").write_text(by_epochs)
    assert finished_step(run) == 40
    state = json.loads((last / "state.json").read_text())
    assert state["max_steps"] == 40
    (last / "state.json").write_text(json.dumps(state | {"max_steps": 80}))  # as if the run had stopped half way
    assert finished_step(run) is None
    check_extension(run, read_config(composed(*TRAINED, "trainer.max_steps=null", "trainer.epochs=3"), TrainConfig))


def test_a_kill_while_a_report_is_moved_aside_leaves_a_complete_copy(trained_run: Path, tmp_path: Path) -> None:
    """Whichever file is being copied at the kill, the run folder still has all files of the report."""
    names = {"report.csv", "report.html", "report.json"}
    for copied in range(3):
        run = tmp_path / str(copied)
        shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoints", "reports"))
        with pytest.MonkeyPatch.context() as patch:
            copies: list[Path] = []

            def copy(source: Path, target: Path, copies: list[Path] = copies, copied: int = copied) -> None:
                if len(copies) == copied:
                    raise KeyboardInterrupt
                copies.append(source)
                shutil.copy(source, target)

            patch.setattr(shutil, "copy2", copy)
            with pytest.raises(KeyboardInterrupt):
                put_report_aside(run, 40)
        assert names <= {path.name for path in run.iterdir()}
        assert not (run / "reports/step_00000040").exists()
    assert put_report_aside(run, 40) == run / "reports/step_00000040"
    assert {path.name for path in (run / "reports/step_00000040").iterdir()} == names
    assert not names & {path.name for path in run.iterdir()}


def set_plan_version(run_folder: Path, version: int | None) -> None:
    """Set plan_version in the newest checkpoint's state. None removes the key, as in checkpoints of early versions."""
    checkpoint = complete_checkpoints(run_folder)[-1]
    file, sums = checkpoint / "state.json", json.loads((checkpoint / COMPLETE).read_text())
    state = {key: value for key, value in json.loads(file.read_text()).items() if key != "plan_version"}
    file.write_text(json.dumps(state if version is None else state | {"plan_version": version}))
    (checkpoint / COMPLETE).write_text(json.dumps(sums | {file.name: sha256(file)}))


def test_a_resumed_run_keeps_the_plan_version_of_its_checkpoint(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    """Resume from a checkpoint without a plan version, then again from the step-5 checkpoint of the resumed run."""
    steps, runs = ("trainer.max_steps=8", "trainer.checkpoint_every=5"), tmp_path / "runs"
    train(run_python, store, "whole", *steps, "trainer.stop_at_step=2")
    set_plan_version(runs / "whole", None)
    train(run_python, store, "whole", *steps)
    shutil.copytree(runs / "whole", runs / "parts")
    shutil.rmtree(runs / "parts/checkpoints/step_00000008")
    (runs / "parts/rows.jsonl").unlink()
    assert "resuming from runs/parts/checkpoints/step_00000005" in train(run_python, store, "parts", *steps)
    parts, whole = last_tensors(runs / "parts"), last_tensors(runs / "whole")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    group, rows = StoreGroup([store]), read_rows(runs / "whole")
    assert read_rows(runs / "parts") == {step: rows[step] for step in (6, 7, 8)}
    for version, first, last in ((2, 0, 2), (1, 2, 8)):  # a new run starts with the newest version, 2
        dataset = PackDataset(group, group.split("train"), max_len=200, tokens_per_pack=800, seed=0, version=version)
        packs = [np.concatenate([dataset.pack_rows(2 * step + i) for i in (0, 1)]) for step in range(first, last)]
        assert [rows[step + 1] for step in range(first, last)] == [sorted(pack.tolist()) for pack in packs]
    with (runs / "parts/report.csv").open() as file:
        reported = [row["id"] for row in csv.DictReader(file)]
    assert reported == [store.id(row) for row in subset(group, "test", 4, 0, version=1)]
    assert reported != [store.id(row) for row in subset(group, "test", 4, 0, version=2)]

    set_plan_version(runs / "whole", 3)
    before = (runs / "whole/environment.json").read_text()
    more = overrides_for(store, "whole", "trainer.max_steps=9", "run.resume=extend")
    rejected = run_python("-m", "protlig_dd.training", *more)
    assert_one_line_error(rejected, "runs/whole/checkpoints/step_00000008", "plan_version 3", "supports only 1 and 2")
    assert (runs / "whole/environment.json").read_text() == before


def test_a_run_of_many_epochs_prints_a_warning(store: SequenceStore, tmp_path: Path, run_python: Command) -> None:
    out = train(run_python, store, "long", "trainer.max_steps=30000", "trainer.stop_at_step=2")
    sequences = len(store.split("train"))
    assert re.search(rf"warning: [\d,]+ epochs of only {sequences} training sequences; train on more", out)
    assert "warning" not in train(run_python, store, "short", "trainer.max_steps=2")


def test_ctrl_c_exits_with_130_and_the_run_can_be_resumed(
    store: SequenceStore, tmp_path: Path, run_python: Command, start: Start
) -> None:
    command = overrides_for(store, "stopped", "trainer.max_steps=3000", "trainer.checkpoint_every=2")
    process = start("-m", "protlig_dd.training", *command, new=True)
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/stopped"))
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        "\nSIGINT: finishing the steps that have begun, then writing a checkpoint; Ctrl-C again stops at once" in output
    )
    assert re.fullmatch(rf"stopped by SIGINT after step \d+ of 3000{RESUMES}", errors.strip().splitlines()[-1])
    reached = int(complete_checkpoints(tmp_path / "runs/stopped")[-1].name.split("_")[1])
    out = train(run_python, store, "stopped", f"trainer.max_steps={reached + 2}", "trainer.checkpoint_every=2")
    assert "resuming from" in out


def torchrun(processes: int, arguments: Sequence[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "protlig_dd.training", *arguments]


def test_packs_per_step_must_be_divisible_by_the_number_of_processes(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    arguments = overrides_for(store, "odd", "optim.packs_per_step=3")
    process = run_python(*torchrun(2, arguments))
    assert process.returncode != 0
    # The launcher ends the other rank as soon as one has failed, so either rank may print the error.
    assert re.search(r"\[rank [01]\] error: optim\.packs_per_step=3 is not divisible by 2 processes", process.stderr)
    assert not (tmp_path / "runs/odd").exists()


def test_a_non_finite_loss_stops_the_run_and_leaves_the_last_good_checkpoint(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    more = ["trainer.max_steps=40", "trainer.checkpoint_every=4", "trainer.log_every=4"]
    train(run_python, store, "bad", *more, "trainer.stop_at_step=8")
    # the weights of step 8 become infinite: the next step's loss is not a number
    broken = "import sys, torch; from protlig_dd.training import trainer as t; old = t.Trainer.load\n"
    broken += "def load(self, *a):\n    old(self, *a); self.model.head.out.weight.data.fill_(float('inf'))\n"
    broken += "t.Trainer.load = load; sys.argv[0] = 'training'\n"
    broken += "import runpy; runpy.run_module('protlig_dd.training', run_name='__main__')"
    process = run_python("-c", broken, *overrides_for(store, "bad", *more))
    assert_one_line_error(process, "non-finite loss in step 9, pack 0, 1 of 2", "sequences ")
    rows = set(read_rows(tmp_path / "runs/bad")[8])
    assert rows
    named = process.stderr.split("sequences ")[1].split(";")[0].split(", ")
    assert len(named) >= 2
    assert all(any(store.id(row) == id_ for row in range(len(store))) for id_ in named)
    assert [path.name for path in complete_checkpoints(tmp_path / "runs/bad")][-1] == "step_00000008"
    assert "NonFiniteLossError" in (tmp_path / "runs/bad/logs/rank_0.log").read_text()
    rows_written = read_metrics(tmp_path / "runs/bad/metrics.jsonl")
    assert rows_written[8]["loss"] > 0
    assert rows_written[9]["loss"] is None  # the failed step has a row
    train(run_python, store, "bad", *more)  # the run resumes from the good checkpoint


def test_a_run_is_not_resumed_with_another_config_or_other_data(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    more = ["trainer.max_steps=2"]
    train(run_python, store, "same", *more)
    config = (tmp_path / "runs/same/config.yaml").read_text()
    changed = run_python("-m", "protlig_dd.training", *overrides_for(store, "same", *more, "optim.lr=1e-4"))
    assert_one_line_error(changed, "runs/same", "optim.lr: 0.003 -> 0.0001", "run.fresh=true")
    assert (tmp_path / "runs/same/config.yaml").read_text() == config
    older = config.replace(re.search(r"  stop_within: .*\n", config)[0], "")  # as an earlier version wrote it
    (tmp_path / "runs/same/config.yaml").write_text(older)
    out = train(run_python, store, "same", *more, "trainer.stop_at_step=1")  # a step that the run has already reached
    assert len(read_metrics(tmp_path / "runs/same/metrics.jsonl")) == 2, out
    never = run_python("-m", "protlig_dd.training", *overrides_for(store, "same", *more, "run.resume=never"))
    assert_one_line_error(never, "runs/same exists and run.resume=never")
    copy = tmp_path / "elsewhere.h5"
    copy.write_bytes(store.path.read_bytes())
    out = train(run_python, store, "same", "trainer.max_steps=4", f"data.path={copy}", "run.resume=extend")
    assert "resuming from" in out  # the same data under another name are accepted
    environment = tmp_path / "runs/same/environment.json"
    record = json.loads(environment.read_text())
    environment.write_text("{")
    broken = run_python("-m", "protlig_dd.training", *overrides_for(store, "same", "trainer.max_steps=6"))
    assert_one_line_error(broken, "runs/same/environment.json cannot be read")
    environment.write_text(json.dumps(record | {"data_fingerprint": "0" * 64}))
    other = run_python("-m", "protlig_dd.training", *overrides_for(store, "same", "trainer.max_steps=6"))
    assert_one_line_error(other, "runs/same was started with data_fingerprint 000000")


def test_a_run_that_failed_before_its_first_step_may_restart_with_another_config(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    large = run_python("-m", "protlig_dd.training", *overrides_for(store, "start", "data.tokens_per_pack=9000000"))
    assert_one_line_error(large, "9000000")
    train(run_python, store, "start", "trainer.max_steps=2")


def test_fresh_moves_the_earlier_run_aside(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    for _ in range(2):
        out = train(run_python, store, "again", "trainer.max_steps=2", "run.fresh=true")
    assert "the earlier runs/again is now runs/again.1" in out
    assert_bit_identical(tmp_path / "runs/again", tmp_path / "runs/again.1")


def test_a_sweep_has_a_folder_for_each_job_and_fails_if_a_job_fails(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    sweep = ["-m", "protlig_dd.training", "-m", *overrides_for(store, "lrs", "trainer.max_steps=2")]
    process = run_python(*sweep, "optim.lr=3e-4,1e-3")
    assert process.returncode == 0, process.stdout + process.stderr
    folders = sorted(path for path in (tmp_path / "runs/lrs_sweep").iterdir() if path.is_dir())
    assert len(folders) == 2
    assert [folder.name for folder in folders] == ["optim.lr-0.0003", "optim.lr-0.001"]
    for folder, lr in zip(folders, ("0.0003", "0.001"), strict=True):
        assert f"lr: {lr}" in (folder / "config.yaml").read_text()
        assert complete_checkpoints(folder)
    again = run_python(*sweep, "optim.lr=3e-4,1e-3")
    assert again.stdout.count("has already finished at step 2") == 2  # the repeated sweep finds its runs
    failing = run_python(*sweep, "model.n_heads=4,5")
    assert failing.returncode == 1
    assert "n_heads=5" in failing.stderr


def test_a_trained_model_beats_the_untrained_model_in_its_report(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    out = train(
        run_python,
        store,
        "report",
        "trainer.max_steps=60",
        "trainer.eval_every=30",
        "optim.lr=1e-2",
        "optim.warmup_steps=5",
        "optim.ema_decay=0.9",
        "report.samples=6",
        "report.steps=16",
        "report.max_sequences=20",
        "report.untrained=true",
    )
    report = json.loads((tmp_path / "runs/report/report.json").read_text())
    assert report["estimator"] == "exact_count"
    assert report["composition_kl"] < report["untrained_composition_kl"]
    assert 2.7 < report["unigram_nll"] < 3.0
    assert abs(report["nll"] - report["unigram_nll"]) < 0.1
    assert report["difference"] == pytest.approx(report["nll"] - report["unigram_nll"])
    for value in (report["nll"], report["nll_se"], report["unigram_nll"], report["composition_kl"]):
        assert f"{value:.4f}" in out
    assert "run folder             runs/report" in out
    assert all(sequence in out for sequence in report["shown"])
    assert len(report["shown"]) == 3
    fasta = (tmp_path / "runs/report/samples/step_00000060.fasta").read_text()
    assert fasta.count(">report_") == 6
    rows = read_metrics(tmp_path / "runs/report/metrics.jsonl")
    assert {"val_nll", "val_nll_se"} <= rows[30].keys()
    assert rows[60]["val_nll"] < rows[30]["val_nll"] + 0.05
    files = {path.name for path in (tmp_path / "runs/report").iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "samples"} <= files

    sampled = run_python(
        "-m", "protlig_dd.sample", "from=runs/report", "output=s.fasta", "n=3", "lengths=20-30", "steps=8"
    )
    assert sampled.returncode == 0, sampled.stderr
    lines = (tmp_path / "s.fasta").read_text().splitlines()
    assert [line.startswith(">report_") for line in lines] == [True, False] * 3
    assert all(20 <= len(line) <= 30 for line in lines[1::2])
    assert "step=60" in lines[0]
    (tmp_path / "bias.csv").write_text("M,K,W\n50,0,-inf\n0,50,0\n0,-1,50\n")
    steered = ["from=runs/report", "output=mkw.fasta", "n=2", "steps=40", "log_bias=bias.csv"]
    process = run_python("-m", "protlig_dd.sample", *steered, "lengths=3")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "mkw.fasta").read_text().splitlines()[1::2] == ["MKW", "MKW"]
    evaluations = re.search(r"([\d.]+)% of the network's evaluations were skipped", process.stdout)
    assert evaluations is not None
    # each of the 2 proteins has 41 evaluations, one per step and one for the denoising step; at most 4 are needed: the
    # first, and one after the change of each of the 3 residues
    assert 100 * (1 - 8 / 82) - 0.1 < float(evaluations[1]) < 100
    other = run_python("-m", "protlig_dd.sample", *steered[:1], "output=t.fasta", "log_bias=bias.csv", "lengths=5")
    assert_one_line_error(
        other, "bias.csv has 3 rows but protein 1 has 5 residues; the file needs one row per residue, so set lengths=3"
    )
    again = run_python("-m", "protlig_dd.sample", "from=runs/report", "output=s.fasta")
    assert_one_line_error(again, "s.fasta exists already")
    wrong = run_python("-m", "protlig_dd.sample", "from=runs/report", "output=t.fasta", "lengths=long")
    assert_one_line_error(wrong, "lengths=long")


OTHERS = {
    "uniform": ["graph=uniform", "parametrisation=log_score", "noise=geometric"],
    "log_score": ["parametrisation=log_score", "noise.curriculum=5"],
    "substitution": ["graph=substitution", "graph.matrix=blosum.txt", "noise=loglinear", "report.predictor=euler"],
}


@pytest.mark.parametrize("more", OTHERS.values(), ids=OTHERS)
def test_other_graphs_parametrisations_and_noises_train_too(
    run_python: Command, store: SequenceStore, tmp_path: Path, more: list[str]
) -> None:
    matrix = tmp_path / "blosum.txt"
    scores = substitution_matrices.load("BLOSUM62")
    matrix.write_text(scores.format("%4d"))
    more = [*more, "trainer.max_steps=10", "report.samples=2", "report.steps=8", "time_conditioning=true"]
    train(run_python, store, "other", *more, "trainer.stop_at_step=5")
    assert "resuming from" in train(run_python, store, "other", *more)
    report = json.loads((tmp_path / "runs/other/report.json").read_text())
    assert report["estimator"] == "integral"
    assert 1.5 < report["nll"] < 6
    assert len(report["shown"]) == 2
    if "graph=substitution" in more:
        matrix.write_text(scores.format("%4d").replace(" 11 ", " 12 "))
        changed = run_python("-m", "protlig_dd.training", *overrides_for(store, "other", *more))
        assert_one_line_error(changed, "runs/other was started with another config (graph.rates: ")
        assert len(changed.stderr) < 500
        matrix.unlink()  # the run has its own copy of the rates
        assert "resuming from" in train(run_python, store, "other", *more, "trainer.max_steps=12", "run.resume=extend")
        steered = ["n=2", "steps=4", "lengths=50", "temperature=0.8", "log_bias={C:-inf,W:1}"]
        process = run_python("-m", "protlig_dd.sample", "from=runs/other", "output=s.fasta", *steered)
        assert process.returncode == 0, process.stderr
        lines = (tmp_path / "s.fasta").read_text().splitlines()
        assert [len(line) for line in lines[1::2]] == [50, 50]
        assert "C" not in "".join(lines[1::2])
        assert " steps=4 temperature=0.8 log_bias=C:-inf,W:1 lengths=50 nll=" in lines[0]
        wrong = run_python("-m", "protlig_dd.sample", "from=runs/other", "output=t.fasta", "log_bias={Z:1}")
        assert_one_line_error(wrong, "log_bias: 'Z'")


def test_the_classic_launch_flags_start_the_same_training(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    """Run the classic launch line with model=tiny, then with a network of one narrow block.

    With `scripts/test.sh --all`, this block has 1,024 channels, so that training warns that the model is slow on a CPU.
    The network of full size is not trained: plan=true counts its parameters.
    """
    narrow = ["model.n_blocks=1", f"model.hidden_size={1024 if thorough() else 64}", "model.n_heads=2"]
    command = [
        "-m",
        "protlig_dd.training.run_train_uniref50_optimized",
        "--work_dir",
        ".",
        "--config",
        str(config_folder() / "config_uniref50_stable.yaml"),
        "--fresh",
        "--datafile",
        str(store.path),
        "--device",
        "auto",
        "--seed",
        "7",
        "--epochs",
        "0.01",
        "optim.packs_per_step=1",
        "data.max_len=200",
        "data.tokens_per_pack=400",
        "report.samples=0",
        "report.max_sequences=2",
        "report.draws=1",
        "trainer.eval_every=0",
    ]
    for more, slow in ((["model=tiny"], False), (narrow, thorough())):
        process = run_python(*command, *more)
        assert process.returncode == 0, process.stdout + process.stderr
        assert ("slow on a CPU" in process.stdout) is (slow and not torch.cuda.is_available())
    planned = run_python(*command[:2], "--config", command[5], "--datafile", str(store.path), "plan=true")
    assert "parameters  34.7 M" in planned.stdout, planned.stderr
    assert "runs/uniref50_stable is now runs/uniref50_stable.1" in process.stdout
    config = (tmp_path / "runs/uniref50_stable/config.yaml").read_text()
    assert "seed: 7" in config
    assert "epochs: 0.01" in config
    assert_one_line_error(run_python(*command[:2], "--config", "nope.yaml"), "--config nope.yaml: no such file")
    misspelt = run_python(*command, "fresh")
    assert_one_line_error(misspelt, "unknown argument 'fresh'")


def test_a_config_outside_the_package_extends_the_shipped_groups(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nrun: {name: mine}\noptim: {lr: 0.007}\n")
    command = ["-m", "protlig_dd.training.run_train_uniref50_optimized", "--config", "mine.yaml", "--device", "cpu"]
    process = run_python(
        *command,
        "--seed",
        "1",
        *[o for o in TINY if "experiment" not in o],
        f"data.path={store.path}",
        "trainer.max_steps=1",
        "model=tiny",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "lr: 0.007" in (tmp_path / "runs/mine/config.yaml").read_text()
    (tmp_path / "work").mkdir()  # --work_dir is searched after the current folder
    (tmp_path / "mine.yaml").unlink()
    for folder, name in (("work", "there"), ("", "here")):
        (tmp_path / folder / "mine.yaml").write_text(f"defaults: [train, _self_]\noptim: {{schedule: {name}}}\n")
        assert_one_line_error(run_python(*command, "--work_dir", "work"), f"optim.schedule={name}")
    missing = run_python(*command[:3], "other.yaml", "--work_dir", "work")
    assert_one_line_error(missing, f"--config other.yaml: no such file (looked in {tmp_path} and {tmp_path}/work)")


def test_without_data_the_bundled_sample_is_used_and_reported(run_python: Command, tmp_path: Path) -> None:
    more = ["trainer.max_steps=1", "run.name=auto"]
    process = run_python("-m", "protlig_dd.training", *TINY, *more)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "data: the bundled sample of" in process.stdout
    environment = json.loads((tmp_path / "runs/auto/environment.json").read_text())
    assert environment["data_path"].startswith("data/sample-")
    assert environment["precision"] in ("fp32", "bf16")
    (tmp_path / "data/uniref50.h5").write_bytes(Path(tmp_path / environment["data_path"]).read_bytes())
    process = run_python("-m", "protlig_dd.training", *TINY, "trainer.max_steps=1", "run.name=full")
    assert "data: data/uniref50.h5" in process.stdout


def test_the_wheel_trains_in_an_empty_folder(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    """The wheel contains configs and proteins. Unpack it, and train without the checkout."""
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=root,
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name == f"protlig_dd-{__version__}-py3-none-any.whl"  # model cards contain this file name
    site, empty = tmp_path / "site", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    empty.mkdir()
    process = run_python(
        "-m", "protlig_dd.training", *TINY, "trainer.max_steps=1", cwd=empty, new=True, PYTHONPATH=str(site)
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = run_python("-c", "import protlig_dd; print(protlig_dd.__file__)", cwd=empty, PYTHONPATH=str(site))
    assert found.stdout.startswith(str(site))
    assert (empty / "runs/demo/report.json").is_file()
    assert any(empty.glob("data/sample-*.h5"))


def test_the_report_agrees_with_values_recomputed_from_its_rows_and_samples(
    trained_run: Path, store: SequenceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recompute the results in report.json, and find them in the lines that the run prints at its end."""
    report = json.loads((trained_run / "report.json").read_text())
    rows = list(csv.DictReader((trained_run / "report.csv").read_text().splitlines()))
    letters = Counter("".join(decode(store[row]) for row in store.split("train")))
    smoothed = {letter: letters[letter] + 1 for letter in AMINO_ACIDS}
    total = sum(smoothed.values())
    frequencies = {letter: count / total for letter, count in smoothed.items()}
    assert [row["id"] for row in rows] == [store.id(row) for row in store.split("test")]
    for row, number in zip(rows, store.split("test"), strict=True):
        residues = [letter for letter in decode(store[number])[:300] if letter in AMINO_ACIDS]
        assert int(row["residues"]) == len(residues)
        assert float(row["unigram_nats"]) == pytest.approx(
            -sum(math.log(frequencies[letter]) for letter in residues), rel=1e-5
        )
    counts = np.array([int(row["residues"]) for row in rows])
    bound, unigram = (np.array([float(row[key]) for row in rows]) for key in ("nll_nats", "unigram_nats"))
    printed = {}
    for key, nats in (("nll", bound), ("unigram_nll", unigram), ("difference", bound - unigram)):
        ratio, n = nats.sum() / counts.sum(), len(rows)
        error = math.sqrt(((nats - ratio * counts) ** 2).sum() * n / (n - 1)) / counts.sum()
        assert (report[key], report[f"{key}_se"]) == pytest.approx((ratio, error), rel=1e-3, abs=1e-5)
        printed[key] = f"{report[key]:{'+' if key == 'difference' else ''}.4f} ± {report[f'{key}_se']:.4f}"
    assert (report["sequences"], report["residues"]) == (len(rows), counts.sum())
    samples = "".join(record.sequence for record in read_fasta(trained_run / report["samples"]))
    sampled = {letter: count / len(samples) for letter, count in Counter(samples).items()}
    divergence = sum(p * math.log(p / frequencies[letter]) for letter, p in sampled.items())
    assert report["composition_kl"] == pytest.approx(divergence, rel=1e-5)
    weights = load_file(complete_checkpoints(trained_run)[-1] / "model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in weights.values())
    print_report(trained_run, 40, report, "some.h5")
    printed_lines = capsys.readouterr().out
    for line in (
        f"NLL bound            {printed['nll']}",
        f"unigram NLL          {printed['unigram_nll']}, of the training split of some.h5",
        f"bound - unigram NLL  {printed['difference']}",
        f"samples              {divergence:.4f}",
        f"test set, {len(rows)} proteins, {counts.sum():,} residues (the first 300 of each)",
    ):
        assert line in printed_lines


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("mixer", ["attention", "ttt_linear"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(
    run_python: Command, store: SequenceStore, tmp_path: Path, mixer: str
) -> None:
    """The network is compiled once for packs of many sizes and an evaluation between them.

    Shape checks are off, because they interfere with compilation.
    """
    require_program("g++")
    losses = []
    # the learning rate is low, because Muon amplifies the rounding of gradients that are close to 0 in the first steps
    more = ["trainer.max_steps=6", "trainer.eval_every=3", "model.n_blocks=1", "optim.lr=1e-4", f"model.mixers={mixer}"]
    train(run_python, store, "eager", *more)
    process = run_python(
        "-m",
        "protlig_dd.training",
        *overrides_for(store, "compiled", *more, "trainer.compile=true"),
        new=True,
        PROTLIG_TYPECHECK="0",
        TORCH_LOGS="recompiles",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert process.returncode == 0, process.stderr
    assert "Recompiling" not in process.stderr
    for name in ("eager", "compiled"):
        rows = read_metrics(tmp_path / f"runs/{name}/metrics.jsonl").values()
        losses.append([row["loss"] for row in rows if "loss" in row])
        environment = json.loads((tmp_path / f"runs/{name}/environment.json").read_text())
        assert environment["compiled"] is (name == "compiled")
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.system
def test_a_long_run_on_a_cpu_is_compiled_and_resumes_bit_identically(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    require_program("g++")

    def train_until(name: str, step: int, steps: int = 20_000_000, checks: str = "0", **variables: str) -> str:
        process = run_python(
            "-m",
            "protlig_dd.training",
            *overrides_for(store, name, f"trainer.max_steps={steps}", f"trainer.stop_at_step={step}"),
            new=True,
            PROTLIG_TYPECHECK=checks,
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
            OMP_NUM_THREADS="1",
            **variables,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    for name, steps in (("whole", [6]), ("halves", [3, 6])):
        for step in steps:
            assert "compiled (the first steps take longer)" in train_until(name, step)
        assert json.loads((tmp_path / f"runs/{name}/environment.json").read_text())["compiled"] is True
    assert_bit_identical(tmp_path / "runs/halves", tmp_path / "runs/whole")
    printed = train_until("eager", 1, PATH=str(tmp_path))
    assert "not compiled: torch.compile needs a C++ compiler for the CPU (g++)" in printed
    assert "not compiled: torch.compile cannot compile the checks" in train_until("checked", 1, checks="1")
    train_until("longer", 1, steps=40)
    train_until("longer", 2)  # a run that becomes longer goes on as it began
    for name in ("eager", "checked", "longer"):
        assert json.loads((tmp_path / f"runs/{name}/environment.json").read_text())["compiled"] is False


def test_compiling_without_a_compiler_is_an_error(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    process = run_python(
        "-m",
        "protlig_dd.training",
        *overrides_for(store, "none", "trainer.compile=true"),
        new=True,
        PATH=str(tmp_path),
        PROTLIG_TYPECHECK="0",
    )
    assert_one_line_error(process, "trainer.compile=true", "C++ compiler", "g++")


@pytest.mark.gpu
def test_training_runs_on_a_gpu(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    train(run_python, store, "gpu", "trainer.max_steps=5", "report.samples=2", "report.steps=4")
    assert json.loads((tmp_path / "runs/gpu/environment.json").read_text())["device"] == "cuda:0"
    assert complete_checkpoints(tmp_path / "runs/gpu")
