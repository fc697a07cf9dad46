"""What ends, stops or disturbs a run: signals, time limits, lost processes, damaged and foreign checkpoints."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.runs.checkpoint import (
    COMPLETE,
    FILES,
    complete_checkpoints,
    newest_sound_checkpoint,
    put_aside_newer,
    save_checkpoint,
    snapshot,
)
from protlig_dd.runs.metrics import read_metrics
from protlig_dd.system.files import NO_LOCKS, locked
from protlig_dd.system.launcher import RanksFailedError, count_devices
from protlig_dd.system.signals import REASONS, SIGNALS, Stopped, StopRequests, handled_signals, seconds_of
from scripts.disturbed_runs import Campaign, flip, ranks_of, truncate
from scripts.fault_campaign import FAULTS

from .conftest import (
    ROOT,
    Command,
    Start,
    assert_one_line_error,
    free_port,
    make_model,
    make_store,
    require,
    wait_for,
)
from .test_checkpoint import make_optimizer_for, save
from .test_prepare import may_mount
from .test_training import last_tensors, overrides_for, read_rows, torchrun, train
from .warm import Process, Server


def reasons_asked(stop: StopRequests) -> list[str]:
    return [reason for reason, asked in zip(REASONS, stop.asked(), strict=True) if asked]


def test_a_signal_raises_at_once_or_is_noted() -> None:
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # what schedulers and lost terminals send
        with pytest.raises(Stopped) as raised, StopRequests():
            os.kill(os.getpid(), signal.Signals[name])
        assert (raised.value.reason, raised.value.exit_code) == (name, 75)
    with pytest.raises(Stopped, match="SIGINT"), StopRequests() as stop, stop.deferred():
        assert not reasons_asked(stop)
        os.kill(os.getpid(), signal.SIGINT)
        assert reasons_asked(stop) == ["SIGINT"]
        with pytest.raises(Stopped, match="SIGINT"), stop.immediate():
            pass
        with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C insists
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_first_signal_counts_and_the_others_change_nothing() -> None:
    passed = []
    with pytest.raises(Stopped, match="SIGTERM"), StopRequests():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for number in (signal.SIGTERM, signal.SIGUSR1):  # while what was begun is written
                os.kill(os.getpid(), number)
                passed.append(number)
    assert passed == [signal.SIGTERM, signal.SIGUSR1]
    with pytest.raises(Stopped, match="SIGINT"), StopRequests(insist=False) as stop, stop.deferred():
        # as a launcher sends them that is interrupted twice
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert reasons_asked(stop)[0] == "SIGINT"
    with pytest.raises(Stopped, match="after step 7"), StopRequests() as stop, stop.deferred():
        try:
            raise stop.stopped("SIGTERM", "after step 7")  # another rank heard it
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_fails_for_a_rank_that_has_stopped_waits_for_a_signal_of_its_own() -> None:
    later = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM"), StopRequests(patience=60.0) as stop, stop.deferred():
        later.start()
        with stop.immediate():
            raise RuntimeError("Connection closed by peer")
    later.join()
    with pytest.raises(RuntimeError, match="closed"), StopRequests(patience=0.01) as stop, stop.immediate():
        raise RuntimeError("Connection closed by peer")


def test_time_limits() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "1.5h", "2d")] == [90, 1800, 5400, 172800]
    for wrong in ("90", "h", "-1h", "1:30", ""):
        with pytest.raises(ValueError, match=f"trainer.max_time={wrong}: give a number and its unit"):
            seconds_of(wrong)
    with pytest.raises(Stopped, match="max_time"), StopRequests() as stop, stop.deferred():
        stop.at(None)
        stop.at(time.monotonic() + 0.2)
        assert not reasons_asked(stop)
        time.sleep(0.4)
        assert reasons_asked(stop) == ["max_time"]
    with pytest.raises(Stopped, match="max_time"), StopRequests() as stop:
        stop.at(time.monotonic() - 1)
        time.sleep(60)


def test_how_many_processes_are_started() -> None:
    assert count_devices("auto", "cpu") == 1
    assert count_devices(3, "cpu") == 3
    for wrong in (0, "all", 1.5, None):
        with pytest.raises(ValueError, match=f"trainer.devices={wrong}: give a number from 1 on, or auto"):
            count_devices(wrong, "cpu")


def test_a_folder_has_one_holder(tmp_path: Path, run_python: Command) -> None:
    code = "from pathlib import Path; from protlig_dd.system.files import locked\nwith locked(Path('run')): print('in')"
    with locked(tmp_path / "run"):
        refused = run_python("-c", code)
        assert f"run is in use by another run (process {os.getpid()} on " in refused.stderr
    assert run_python("-c", code).stdout == "in\n"


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_the_work_is_done_with_a_warning(
    number: int,
    proteins: list[FastaRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As on NFS or Lustre that were mounted without them: a run's folder, a store that is built, an epoch's plan."""

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "plans"))
    (tmp_path / "plans").mkdir()
    with locked(tmp_path / "run"):
        pass
    make_store(tmp_path / "small.h5", proteins, train=20, held_out=2)
    dataset = PackDataset(
        group := StoreGroup([SequenceStore(tmp_path / "small.h5")]),
        group.split("train"),
        seed=0,
        max_len=100,
        tokens_per_pack=500,
    )
    dataset.ahead = False
    assert len(dataset.plan(0).rows) == len(dataset.plan(1).rows) == 20  # of which it says so once
    assert not list(tmp_path.glob(".*"))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    for line, folder in zip(said, ("run", ".small.h5.partial", "plans"), strict=True):
        assert line.startswith(f"warning: {tmp_path / folder}")
        assert f"is on a file system without locks ({os.strerror(number)})" in line


@pytest.mark.slow
def test_a_fresh_run_holds_its_folder(store: SequenceStore, tmp_path: Path, run_python: Command, start: Start) -> None:
    train(run_python, store, "held", "trainer.max_steps=2")
    process = start(*TRAINING, *overrides_for(store, "held", *OFTEN, "run.fresh=true"))
    wait_for(lambda: (tmp_path / "runs/held.1").exists() and complete_checkpoints(tmp_path / "runs/held"))
    for more in ("run.fresh=true", "run.fresh=false"):
        second = run_python(*TRAINING, *overrides_for(store, "held", *OFTEN, more))
        assert_one_line_error(second, "runs/held is in use by another run (process ")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not (tmp_path / "runs/held.2").exists()


@pytest.mark.parametrize("how", [truncate, flip, Path.unlink, lambda file: file.write_bytes(b"[1]")])
@pytest.mark.parametrize("name", sorted([*FILES, COMPLETE]))
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path, name: str, how: Callable[[Path], None]) -> None:
    first, _, _ = save(tmp_path, 1)
    second, _, _ = save(tmp_path, 2)
    assert newest_sound_checkpoint(tmp_path) == (second, [])
    how(second / name)
    found, (problem,) = newest_sound_checkpoint(tmp_path)
    assert found == first
    assert str(second) in problem
    shutil.rmtree(first)
    assert newest_sound_checkpoint(tmp_path)[0] is None


def stopped_by(process: Process, run: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal once there is a checkpoint; exit code and stderr."""
    wait_for(lambda: complete_checkpoints(run))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.system
def test_processes_of_one_machine_need_no_host_name(store: SequenceStore, tmp_path: Path) -> None:
    """In a namespace of its own, whose name nothing resolves; with new interpreters, as forks keep their server's."""
    require(may_mount(), "another host name needs root")
    options = overrides_for(store, "nameless", "trainer.max_steps=2", "trainer.devices=2", "optim.packs_per_step=2")
    command = " ".join([sys.executable, *TRAINING, *options, "trainer.timeout=60"])
    done = subprocess.run(
        ["unshare", "--uts", "bash", "-c", f"hostname no-such-host && {command}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PROTLIG_TYPECHECK": "0"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert complete_checkpoints(tmp_path / "runs/nameless")[-1].name == "step_00000002"


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """nohup has a run ignore the SIGHUP of a terminal that closes."""
    assert signal.SIGHUP in handled_signals()
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert handled_signals() == SIGNALS - {signal.SIGHUP}
        with StopRequests():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, earlier)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_lost_connection_stops_a_run_in_time(
    devices: int, store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    """The terminal sends SIGHUP to the launcher and its ranks."""
    options = overrides_for(store, "lost", *OFTEN, f"trainer.devices={devices}", "optim.packs_per_step=2")
    process = start(*TRAINING, *options)
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/lost"))
    os.killpg(process.pid, signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert re.fullmatch(r"stopped by SIGHUP after step \d+ of 3000\n", errors)


TRAINING = ("-m", "protlig_dd.training")
OFTEN = ("trainer.checkpoint_every=4", "trainer.max_steps=3000")


@pytest.mark.slow
def test_under_torchrun_ranks_that_stop_are_no_failure_and_a_marker_tells(
    store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    """torchrun would report any code but 0 as a failure."""
    code, errors = stopped_by(
        start(*torchrun(2, overrides_for(store, "under", *OFTEN))), tmp_path / "runs/under", signal.SIGTERM
    )
    assert code != 0  # torchrun's own, which a script cannot tell from a failure
    assert "stopped by SIGTERM after step" in errors
    marker = json.loads((tmp_path / "runs/under/stopped.json").read_text())
    assert marker["reason"] == "SIGTERM"
    reached = complete_checkpoints(tmp_path / "runs/under")[-1]
    assert f"after step {int(reached.name[5:])} of 3000" == marker["when"]
    assert "rank 1" not in (tmp_path / "runs/under/logs/rank_1.log").read_text()


@pytest.mark.slow
def test_an_evaluation_that_a_stop_broke_off_is_made_when_the_run_goes_on(
    run_python: Command, store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    evaluated = ("trainer.max_steps=6", "trainer.eval_every=4", "trainer.eval_max_sequences=8")
    long = ("trainer.eval_draws=100000", "trainer.log_every=1")
    process = start(*TRAINING, *overrides_for(store, "broken", *evaluated, *long))
    run = tmp_path / "runs/broken"
    wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 4,' in (run / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (75, "stopped by SIGTERM after step 4 of 6\n")
    assert not any("val_nll" in row for row in read_metrics(run / "metrics.jsonl").values())
    other = train(run_python, store, "other", *evaluated, "run.resume=runs/broken")  # is not this run's to evaluate
    assert "step 4: validation" not in other
    out = train(run_python, store, "broken", *evaluated)
    assert out.index("step 4: validation") < out.index("training 5/6")
    train(run_python, store, "undisturbed", *evaluated)
    mine, theirs = (read_metrics(tmp_path / f"runs/{name}/metrics.jsonl") for name in ("broken", "undisturbed"))
    assert [step for step, row in mine.items() if "val_nll" in row] == [4, 6]
    for step in (4, 6):
        assert mine[step]["val_nll"] == theirs[step]["val_nll"]
        assert mine[step]["attempt"] == 2
    best = [(tmp_path / f"runs/{name}/checkpoints/best.json").read_text() for name in ("broken", "undisturbed")]
    assert best[0] == best[1]


@pytest.mark.slow
def test_processes_that_do_not_stop_in_time_are_killed_and_that_is_an_error(
    store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    monkeypatch.setenv("PROTLIG_TYPECHECK", "0")  # a quarter of a new rank's start; other tests check what ranks run
    more = ("trainer.devices=2", "trainer.stop_within=2")
    process = start(*TRAINING, *overrides_for(store, "hung", *OFTEN, *more), new=True)
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/hung"))
    ranks = ranks_of(process)
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    said = r"error: runs/hung: the step was not finished within trainer\.stop_within=2 s of SIGTERM; .*checkpoint\n"
    assert re.fullmatch(said, errors), errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_a_run_that_lost_a_process_still_stops_in_time(store: SequenceStore, tmp_path: Path, start: Start) -> None:
    """What rank 0 wrote of the loss must not be taken for what ended the run."""
    more = ("trainer.devices=2", "trainer.max_restarts=2")
    process = start(*TRAINING, *overrides_for(store, "twice", *OFTEN, *more))
    run = tmp_path / "runs/twice"
    wait_for(lambda: complete_checkpoints(run))
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    wait_for(lambda: '"attempt": 2' in (run / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert re.fullmatch(r"stopped by SIGTERM after step \d+ of 3000\n", errors)
    assert "a process was lost: all start again (1 of 2)" in out


@pytest.mark.slow
def test_agents_that_are_told_to_stop_one_after_the_other_stop_both(
    store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    """In an evaluation, which a signal breaks off, the second rank finds the first gone before it is told itself."""
    long = ("trainer.eval_every=4", "trainer.eval_draws=100000", "trainer.eval_max_sequences=8", "trainer.log_every=1")
    agent = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=pair",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        *TRAINING,
    ]
    agents = [start(*agent, *overrides_for(store, "skew", *OFTEN, *long)) for _ in range(2)]
    run = tmp_path / "runs/skew"
    wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 4,' in (run / "metrics.jsonl").read_text())
    for process in agents:
        process.send_signal(signal.SIGTERM)
        time.sleep(2)
    said = [process.communicate(timeout=120)[1] for process in agents]
    assert json.loads((run / "stopped.json").read_text()) == {"reason": "SIGTERM", "when": "after step 4 of 3000"}
    assert complete_checkpoints(run)[-1].name == "step_00000004"
    assert "another rank" not in said[0] + said[1]


def limited(
    run_python: Command, overrides: Sequence[str], until: Callable[[str], object]
) -> subprocess.CompletedProcess[str]:
    """Train for 2 s, and again for twice as long until stderr is as wanted: a slow machine needs longer."""
    for seconds in (2, 4, 8, 16, 32, 64, 128):
        process = run_python(*TRAINING, *overrides, f"trainer.max_time={seconds}s")
        assert process.returncode == 75, process.stderr
        if until(process.stderr):
            break
    return process


@pytest.mark.slow
def test_the_time_limit_breaks_off_evaluations_and_reports(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    endless = overrides_for(store, "long", "trainer.max_steps=4", "report.draws=1000000")
    evaluated = [*endless, "trainer.eval_every=2", "trainer.eval_draws=1000000"]
    in_evaluation = "stopped by max_time after step 2 of 4\n"
    assert limited(run_python, evaluated, lambda said: said == in_evaluation).stderr == in_evaluation
    in_report = "stopped by max_time before training began or after it ended\n"
    run = tmp_path / "runs/long"
    last = run / "checkpoints/step_00000004"
    # the evaluation is not wanted any more; the report is
    assert limited(run_python, endless, lambda said: said == in_report and last.exists()).stderr == in_report
    assert complete_checkpoints(run)[-1] == last


@pytest.mark.slow
def test_a_signal_that_comes_twice_leaves_the_exit_code(store: SequenceStore, tmp_path: Path, start: Start) -> None:
    process = start(*TRAINING, *overrides_for(store, "again", *OFTEN))
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/again"))
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.returncode == 75


@pytest.mark.slow
def test_a_time_limit_ends_a_run_with_a_checkpoint_and_75(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    overrides = overrides_for(store, "limited", *OFTEN[1:], "trainer.checkpoint_every=2000")
    after = re.compile(r"stopped by max_time after step \d+ of 3000\n")
    process = limited(run_python, overrides, after.fullmatch)
    assert after.fullmatch(process.stderr)
    (checkpoint,) = complete_checkpoints(tmp_path / "runs/limited")
    step = int(checkpoint.name[5:])
    out = train(run_python, store, "limited", f"trainer.max_steps={step + 1}")
    assert f"going on from {checkpoint.relative_to(tmp_path)}" in out
    assert not (tmp_path / "runs/limited/stopped.json").exists()
    rows = read_metrics(tmp_path / "runs/limited/metrics.jsonl")
    spent = {key: [row[key] for row in rows.values() if key in row] for key in ("checkpoint_stall_s", "data_wait_s")}
    assert spent["checkpoint_stall_s"][-1] > 0
    assert len(spent["data_wait_s"]) == step + 1
    assert max(spent["data_wait_s"]) > 0
    assert 0.1 < rows[step]["peak_memory_gib"] < 8
    assert 0 < rows[step]["mfu"] < 10


@pytest.mark.slow
def test_a_lost_loader_process_names_step_rank_and_sequences(
    store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    # torch raises what happened wherever the process is; inside a check of types that would look like a wrong type
    monkeypatch.setenv("PROTLIG_TYPECHECK", "0")
    process = start(*TRAINING, *overrides_for(store, "loader", *OFTEN, "data.workers=1"), new=True)
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/loader"))
    (worker,) = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    line = errors.strip()
    found = re.match(
        r"error: step (\d+), rank 0: a loader process is gone, killed for memory perhaps .*sequences ", line
    )
    assert found, line
    known = {store.id(row) for row in range(len(store))}
    assert set(line[found.end() :].split(", ")) <= known


@pytest.mark.slow
def test_a_signal_to_the_whole_group_spares_the_loaders(store: SequenceStore, tmp_path: Path, start: Start) -> None:
    """Ctrl-C in a terminal, and schedulers, signal every process there is."""
    process = start(*TRAINING, *overrides_for(store, "group", *OFTEN, "data.workers=1"))
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/group"))
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert re.fullmatch(r"stopped by SIGTERM after step \d+ of 3000\n", errors)


@pytest.mark.slow
def test_a_loss_spike_stops_a_run_that_asked_for_it(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    more = ["trainer.max_steps=70", "trainer.log_every=7", "trainer.checkpoint_every=5", "optim.lr=1e-9"]
    more.append("data.workers=1")  # which must not keep the process from ending
    process = run_python(*TRAINING, *overrides_for(store, "spike", *more, "trainer.loss_spike=1.0001"))
    assert_one_line_error(process, "is more than trainer.loss_spike=1.0001 times the usual", "; the weights are those")
    step = int(process.stderr.split("in step ")[1].split(",")[0])
    assert step > 50
    assert int(complete_checkpoints(tmp_path / "runs/spike")[-1].name[5:]) < step


@pytest.mark.slow
def test_the_best_and_every_nth_checkpoint_are_kept(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    more = ["trainer.max_steps=12", "trainer.checkpoint_every=2", "trainer.keep_last=1", "trainer.keep_every=4"]
    train(run_python, store, "kept", *more, "trainer.eval_every=3", "trainer.eval_max_sequences=4", "optim.lr=1e-2")
    rows = read_metrics(tmp_path / "runs/kept/metrics.jsonl")
    bounds = {step: row["val_nll"] for step, row in rows.items() if "val_nll" in row}
    assert list(bounds) == [3, 6, 9, 12]
    best = min(bounds, key=lambda step: bounds[step])
    assert json.loads((tmp_path / "runs/kept/checkpoints/best.json").read_text()) == {
        "step": best,
        "val_nll": bounds[best],
    }
    steps = {int(path.name[5:]) for path in complete_checkpoints(tmp_path / "runs/kept")}
    assert steps == {4, 8, 12, best}


def test_a_new_checkpoint_is_never_the_one_to_go(tmp_path: Path) -> None:
    for step in (5, 20):
        save(tmp_path, step)
    flip(tmp_path / "checkpoints/step_00000020/model.safetensors")
    model, optimizer = make_model(), make_optimizer_for(make_model())
    save_checkpoint(tmp_path, 10, snapshot(model, {}, optimizer), config_yaml="", state={}, keep_last=1)
    assert "step_00000010" in [path.name for path in complete_checkpoints(tmp_path)]
    put_aside_newer(tmp_path, tmp_path / "checkpoints/step_00000010")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step_00000010",
        "damaged_step_00000020.1",
    }


@pytest.mark.slow
def test_never_is_kept_by_a_restart(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    train(run_python, store, "once", "trainer.max_steps=2")
    again = overrides_for(store, "once", "trainer.max_steps=4", "run.resume=never", "trainer.max_restarts=1")
    refused = run_python(*TRAINING, *again)
    assert_one_line_error(refused, "runs/once exists and run.resume=never")
    assert len(complete_checkpoints(tmp_path / "runs/once")) == 1


@pytest.mark.slow
def test_a_run_may_start_from_another_runs_checkpoint(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    train(run_python, store, "whole", "trainer.max_steps=8", "trainer.checkpoint_every=4")
    branch = "run.resume=runs/whole/checkpoints/step_00000004"
    out = train(run_python, store, "branch", "trainer.max_steps=8", branch)
    assert "going on from runs/whole/checkpoints/step_00000004" in out
    mine, theirs = last_tensors(tmp_path / "runs/branch"), last_tensors(tmp_path / "runs/whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert "going on from runs/branch/" in train(
        run_python, store, "branch", "trainer.max_steps=9", "run.resume=extend"
    )
    other = run_python(*TRAINING, *overrides_for(store, "other", branch, "optim.lr=1"))
    assert_one_line_error(other, "step_00000004 was made with another config (optim.lr: 0.003 -> 1.0)")
    missing = run_python(*TRAINING, *overrides_for(store, "other", "run.resume=runs/nothing"))
    assert_one_line_error(missing, "run.resume=runs/nothing does not exist; there are auto, never, extend, and folders")


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_run(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    """4 packs a step: one process adds up 4 backward passes, two add up 2 each, four make 1 each."""
    more = ["trainer.max_steps=6", "optim.packs_per_step=4", "data.tokens_per_pack=400"]
    more += ["trainer.precision=fp32"]  # in bf16 the order of sums shows from the third digit of a gradient on
    for devices in (1, 2, 4):
        train(run_python, store, f"on{devices}", *more, f"trainer.devices={devices}")
    reference = read_metrics(tmp_path / "runs/on1/metrics.jsonl")
    weights = last_tensors(tmp_path / "runs/on1")
    for devices in (2, 4):
        run = tmp_path / f"runs/on{devices}"
        for step, row in read_metrics(run / "metrics.jsonl").items():
            assert row["loss"] == pytest.approx(reference[step]["loss"], rel=1e-5), (devices, step)
        for name, tensor in last_tensors(run).items():
            if name.startswith("model/"):
                assert (tensor - weights[name]).abs().max() < 1e-5, (devices, name)
        assert read_rows(run) == read_rows(tmp_path / "runs/on1")
        assert {path.name for path in (run / "logs").iterdir()} == {f"rank_{rank}.log" for rank in range(1, devices)}
    train(run_python, store, "moved", *more, "trainer.devices=2", "trainer.stop_at_step=3")
    assert "going on from" in train(run_python, store, "moved", *more, "trainer.devices=1")
    for name, tensor in last_tensors(tmp_path / "runs/moved").items():
        assert (tensor - weights[name]).abs().max() < 1e-5, name
    assert read_rows(tmp_path / "runs/moved") == read_rows(tmp_path / "runs/on1")
    odd = run_python(*TRAINING, *overrides_for(store, "odd", "trainer.devices=3"))
    assert_one_line_error(odd, "optim.packs_per_step=2 is not divisible by 3 processes")


@pytest.mark.slow
def test_a_sweep_starts_processes_for_each_job_and_reports_the_first_failure(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    sweep = [*TRAINING, "-m", *overrides_for(store, "jobs", "trainer.max_steps=2", "trainer.devices=2")]
    process = run_python(*sweep, "optim.lr=3e-4,1e-3")
    assert process.returncode == 0, process.stderr
    assert all(complete_checkpoints(folder) for folder in (tmp_path / "runs/jobs_sweep").glob("optim*"))
    failing = run_python(*sweep, f"data.path={tmp_path / 'none.h5'}", "optim.lr=3e-4")
    assert failing.returncode == 1
    (line,) = failing.stderr.strip().splitlines()
    assert re.match(r"error: rank [01]: .*none\.h5: no such data file", line)


def test_a_bug_in_a_rank_is_told_apart_from_bad_input() -> None:
    assert RanksFailedError(3, "ValueError: no such file", "trace").foreseen
    assert str(RanksFailedError(3, "ValueError: no such file", "trace")) == "rank 3: no such file"
    unforeseen = RanksFailedError(3, "KeyError: 'x'", "trace")
    assert not unforeseen.foreseen
    assert str(unforeseen) == "rank 3: KeyError: 'x'"


@pytest.mark.slow
def test_of_a_bug_that_all_ranks_meet_one_traceback_is_printed(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    broken = "import runpy\nimport protlig_dd.training.loop as loop\n"
    broken += "def flush(*_):\n    return {}['not there']\nloop.flush = flush\n"
    broken += "if __name__ == '__main__':\n    runpy.run_module('protlig_dd.training', run_name='__main__')\n"
    (tmp_path / "broken.py").write_text(broken)  # which each rank imports too, as multiprocessing does with __main__
    overrides = overrides_for(store, "bug", "trainer.max_steps=5", "trainer.devices=2")
    process = run_python("-m", "broken", *overrides)
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1
    assert process.stderr.count("return {}['not there']") == 1
    assert re.fullmatch(r"error: rank [01]: KeyError: 'not there'", process.stderr.splitlines()[-1])


@pytest.mark.slow
def test_two_agents_make_one_run(
    store: SequenceStore,
    tmp_path: Path,
    run_python: Command,
    start: Start,
    warm: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes, as torchrun sees them, on loopback."""
    agent = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=pair",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        *TRAINING,
    ]
    more = ("trainer.max_steps=6", "report.samples=5")
    arguments = overrides_for(store, "nodes", *more)
    monkeypatch.setenv("PYTHON_EXEC", str(warm.executable))
    agents = [start(*agent, *arguments) for _ in range(2)]
    printed = [process.communicate(timeout=300) for process in agents]
    assert [process.returncode for process in agents] == [0, 0], printed
    assert sum("2 process(es)" in out for out, _ in printed) == 1
    train(run_python, store, "node", *more)
    assert read_rows(tmp_path / "runs/nodes") == read_rows(tmp_path / "runs/node")
    designs = [tmp_path / f"runs/{name}/samples/step_00000006.fasta" for name in ("nodes", "node")]
    assert len(designs[0].read_text().split(">")) == 6  # each rank samples a part of them
    assert (
        designs[0].read_text().split()
        == designs[1].read_text().replace(">node_", ">nodes_").replace("run=node ", "run=nodes ").split()
    )
    for step, row in read_metrics(tmp_path / "runs/nodes/metrics.jsonl").items():
        assert row["loss"] == pytest.approx(read_metrics(tmp_path / "runs/node/metrics.jsonl")[step]["loss"], rel=1e-5)


@pytest.mark.slow
def test_evaluation_is_the_same_on_any_number_of_processes(store: SequenceStore, tmp_path: Path, start: Start) -> None:
    """23 sequences, a prime number, so that no two processes have the same share of packs."""
    found = []
    for world_size in (1, 2, 3):
        command = ["-m", "tests.bound_on_rank", str(store.path), str(tmp_path / f"meeting{world_size}")]
        ranks = [start(*command, str(rank), str(world_size)) for rank in range(world_size)]
        printed = [process.communicate(timeout=300) for process in ranks]
        assert [process.returncode for process in ranks] == [0] * world_size, printed
        found.append(json.loads(printed[-1][0].splitlines()[-1]))
    assert found[0] == found[1] == found[2]
    assert found[0]["sequences"] == 23
    assert math.isfinite(found[0]["nll"])


@pytest.fixture
def in_forks(start: Start) -> Callable[[list[str], Path], Process]:
    """The campaign's runs are forks; a rank that is to hang is an interpreter that no signal needs handing on to."""

    def start_in(arguments: list[str], folder: Path) -> Process:
        hangs = any(argument.startswith("trainer.timeout=") for argument in arguments)
        return start(*arguments, new=hangs, cwd=folder)

    return start_in


TRIED = {"kill": 3, "kill-rank": 2, "terminate": 2, "damage": 2}  # the other faults once


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS)
def test_the_short_fault_campaign_loses_nothing(
    fault: str, tmp_path: Path, in_forks: Callable[[list[str], Path], Process]
) -> None:
    require(may_mount(), "a small disk needs root to mount it")
    tally = FAULTS[fault](Campaign(tmp_path, short=True, seed=0, start_process=in_forks))
    assert tally.survived == tally.tried == TRIED.get(fault, 1), tally


@pytest.mark.slow
@pytest.mark.campaign
def test_the_fault_campaign_as_a_command(run_python: Command) -> None:
    require(may_mount(), "a small disk needs root to mount it")
    here = {"PYTHONPATH": str(ROOT), "PROTLIG_TYPECHECK": "0"}
    process = run_python("-m", "scripts.fault_campaign", "--short", "read-only", new=True, **here)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "| run folder that cannot be written | 1 | 1 | 0 | exit code 1 before the first step |" in process.stdout
    wrong = run_python("-m", "scripts.fault_campaign", "flood", new=True, **here)
    assert wrong.returncode == 2
    assert "no fault flood; there are kill, kill-rank, terminate, hang, damage" in wrong.stderr
