"""Tests of stopped and disturbed runs.

They cover signals, time limits, lost processes, damaged checkpoints and checkpoints of other runs.
"""

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
    newest_valid_checkpoint,
    put_aside_newer,
    save_checkpoint,
    snapshot,
)
from protlig_dd.runs.metrics import read_metrics
from protlig_dd.system.files import NO_LOCKS, locked
from protlig_dd.system.launcher import RanksFailedError, count_devices
from protlig_dd.system.signals import REASONS, SIGNALS, Stopped, StopRequests, handled_signals, seconds_of
from protlig_dd.training import failures
from scripts.disturbed_runs import Campaign, flip, ranks_of, truncate
from scripts.fault_campaign import FAULTS

from .conftest import (
    RESUMES,
    ROOT,
    Command,
    Start,
    assert_one_line_error,
    make_model,
    make_store,
    node_of_two,
    require,
    wait_for,
)
from .test_checkpoint import make_optimizer_for, save
from .test_prepare import may_mount
from .test_training import last_tensors, overrides_for, read_rows, torchrun, train
from .warm import Process, Server


def requested_reasons(stop: StopRequests) -> list[str]:
    return [reason for reason, requested in zip(REASONS, stop.requested(), strict=True) if requested]


def test_a_signal_raises_immediately_unless_deferred() -> None:
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # sent by schedulers and closed terminals
        with pytest.raises(Stopped) as raised, StopRequests():
            os.kill(os.getpid(), signal.Signals[name])
        assert (raised.value.reason, raised.value.exit_code) == (name, 75)
    with pytest.raises(Stopped, match="SIGINT"), StopRequests() as stop, stop.deferred():
        assert not requested_reasons(stop)
        os.kill(os.getpid(), signal.SIGINT)
        assert requested_reasons(stop) == ["SIGINT"]
        with pytest.raises(Stopped, match="SIGINT"), stop.immediate():
            pass
        with pytest.raises(KeyboardInterrupt, match="same command resumes"):  # a second Ctrl-C interrupts immediately
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_first_signal_counts_and_later_ones_are_ignored() -> None:
    passed = []
    with pytest.raises(Stopped, match="SIGTERM"), StopRequests():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for number in (signal.SIGTERM, signal.SIGUSR1):  # such signals may arrive while a checkpoint is written
                os.kill(os.getpid(), number)
                passed.append(number)
    assert passed == [signal.SIGTERM, signal.SIGUSR1]
    with pytest.raises(Stopped, match="SIGINT"), StopRequests(insist=False) as stop, stop.deferred():
        # a launcher that is interrupted twice sends these signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert requested_reasons(stop)[0] == "SIGINT"
    with pytest.raises(Stopped, match="after step 7"), StopRequests() as stop, stop.deferred():
        try:
            raise stop.stopped("SIGTERM", "after step 7")  # another rank received the signal
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_closed_connection_is_an_error_only_if_no_signal_follows() -> None:
    later = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM"), StopRequests(patience=60.0) as stop, stop.deferred():
        later.start()
        with stop.immediate():
            raise RuntimeError("Connection closed by peer")
    later.join()
    with pytest.raises(RuntimeError, match="closed"), StopRequests(patience=0.01) as stop, stop.immediate():
        raise RuntimeError("Connection closed by peer")


def test_time_limits_are_parsed_and_stop_a_run() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "1.5h", "2d")] == [90, 1800, 5400, 172800]
    for wrong in ("90", "h", "-1h", "1:30", ""):
        with pytest.raises(ValueError, match=f"trainer.max_time={wrong}: give a number and its unit"):
            seconds_of(wrong)
    with pytest.raises(Stopped, match="max_time"), StopRequests() as stop, stop.deferred():
        stop.set_deadline(None)
        stop.set_deadline(time.monotonic() + 0.2)
        assert not requested_reasons(stop)
        time.sleep(0.4)
        assert requested_reasons(stop) == ["max_time"]
    with pytest.raises(Stopped, match="max_time"), StopRequests() as stop:
        stop.set_deadline(time.monotonic() - 1)
        time.sleep(60)


def test_the_number_of_processes_is_auto_or_at_least_1() -> None:
    assert count_devices("auto", "cpu") == 1
    assert count_devices(3, "cpu") == 3
    for wrong in (0, "all", 1.5, None, True):
        with pytest.raises(ValueError, match=f"trainer.devices={wrong}: must be auto or a number of at least 1"):
            count_devices(wrong, "cpu")


def test_a_host_that_receives_the_signal_a_moment_later_is_not_named_as_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "gather_objects", lambda own: [("first", True), own])
    received: set[str] = set()
    timer = threading.Timer(0.2, received.add, ["SIGTERM"])
    timer.start()
    assert failures.describe_stopped_hosts("SIGTERM", received) == ""
    monkeypatch.setattr(failures, "SIGNAL_DELAY", 0.1)
    assert failures.describe_stopped_hosts("SIGUSR1", received).startswith("; only first was told to stop")


def test_a_locked_folder_rejects_other_processes(tmp_path: Path, run_python: Command) -> None:
    code = "from pathlib import Path; from protlig_dd.system.files import locked\nwith locked(Path('run')): print('in')"
    with locked(tmp_path / "run"):
        rejected = run_python("-c", code)
        assert f"run is in use by another run (process {os.getpid()} on " in rejected.stderr
    assert run_python("-c", code).stdout == "in\n"


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_file_system_without_locks_gives_one_warning_for_each_folder(
    number: int,
    proteins: list[FastaRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """NFS and Lustre may be mounted without locks. This test locks a run's folder, builds a store and plans packs."""

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", fail)
    monkeypatch.setattr("fcntl.flock", fail)
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
    dataset.plan_ahead = False
    assert len(dataset.plan(0).rows) == len(dataset.plan(1).rows) == 20  # two plans, one warning
    assert not list(tmp_path.glob(".*"))
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 3
    for line, folder in zip(warnings, ("run", ".small.h5.partial", "plans"), strict=True):
        assert line.startswith(f"warning: {tmp_path / folder}")
        assert f"is on a file system without locks ({os.strerror(number)})" in line


@pytest.mark.slow
def test_a_fresh_run_locks_its_folder(store: SequenceStore, tmp_path: Path, run_python: Command, start: Start) -> None:
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


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda file: file.write_bytes(b"[1]")])
@pytest.mark.parametrize("name", sorted([*FILES, COMPLETE]))
def test_a_damaged_checkpoint_is_skipped_and_named_in_the_message(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    first, _, _ = save(tmp_path, 1)
    second, _, _ = save(tmp_path, 2)
    assert newest_valid_checkpoint(tmp_path) == (second, [])
    damage(second / name)
    found, (problem,) = newest_valid_checkpoint(tmp_path)
    assert found == first
    assert str(second) in problem
    shutil.rmtree(first)
    assert newest_valid_checkpoint(tmp_path)[0] is None


def stop_after_checkpoint(process: Process, run: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal once the run has a checkpoint; return the exit code and stderr."""
    wait_for(lambda: complete_checkpoints(run))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.system
def test_processes_on_one_machine_need_no_resolvable_host_name(store: SequenceStore, tmp_path: Path) -> None:
    """Train in a UTS namespace with an unknown host name.

    The run starts in a new interpreter, because a fork of the interpreter `warm` would have the host name of `warm`.
    """
    require(may_mount(), "setting another host name needs root")
    options = overrides_for(store, "nameless", "trainer.max_steps=2", "trainer.devices=2", "optim.packs_per_step=2")
    command = " ".join([sys.executable, *TRAINING, *options, "trainer.timeout=60"])
    process = subprocess.run(
        ["unshare", "--uts", "bash", "-c", f"hostname no-such-host && {command}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PROTLIG_TYPECHECK": "0"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert complete_checkpoints(tmp_path / "runs/nameless")[-1].name == "step_00000002"


def test_an_ignored_sighup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under nohup a run ignores the SIGHUP of a terminal that closes."""
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
def test_a_closed_terminal_stops_a_run_after_a_step(
    devices: int, store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    """The terminal sends SIGHUP to the launcher and its ranks."""
    options = overrides_for(store, "lost", *OFTEN, f"trainer.devices={devices}", "optim.packs_per_step=2")
    process = start(*TRAINING, *options)
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/lost"))
    os.killpg(process.pid, signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert re.fullmatch(rf"stopped by SIGHUP after step \d+ of 3000{RESUMES}\n", errors)


TRAINING = ("-m", "protlig_dd.training")
OFTEN = ("trainer.checkpoint_every=4", "trainer.max_steps=3000")


@pytest.mark.slow
def test_under_torchrun_a_stop_is_not_a_failure_and_leaves_a_marker(
    store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    """Stopped ranks exit with 0, because torchrun would report any other exit code as a failure."""
    code, errors = stop_after_checkpoint(
        start(*torchrun(2, overrides_for(store, "under", *OFTEN))), tmp_path / "runs/under", signal.SIGTERM
    )
    assert code != 0  # torchrun itself exits with a nonzero code, as after a failure
    assert "stopped by SIGTERM after step" in errors
    marker = json.loads((tmp_path / "runs/under/stopped.json").read_text())
    assert marker["reason"] == "SIGTERM"
    reached = complete_checkpoints(tmp_path / "runs/under")[-1]
    assert f"after step {int(reached.name[5:])} of 3000" == marker["when"]
    assert "rank 1" not in (tmp_path / "runs/under/logs/rank_1.log").read_text()


@pytest.mark.slow
def test_an_interrupted_evaluation_is_repeated_when_the_run_resumes(
    run_python: Command, store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    evaluated = ("trainer.max_steps=6", "trainer.eval_every=4", "trainer.eval_max_sequences=8")
    long = ("trainer.eval_draws=100000", "trainer.log_every=1")
    process = start(*TRAINING, *overrides_for(store, "broken", *evaluated, *long))
    run = tmp_path / "runs/broken"
    wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 4,' in (run / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (75, f"stopped by SIGTERM after step 4 of 6{RESUMES}\n")
    assert not any("val_nll" in row for row in read_metrics(run / "metrics.jsonl").values())
    # another run does not repeat the evaluation
    other = train(run_python, store, "other", *evaluated, "run.resume=runs/broken")
    assert "step 4: validation" not in other
    out = train(run_python, store, "broken", *evaluated)
    assert out.index("step 4: validation") < out.index("training 5/6")
    train(run_python, store, "undisturbed", *evaluated)
    resumed, undisturbed = (read_metrics(tmp_path / f"runs/{name}/metrics.jsonl") for name in ("broken", "undisturbed"))
    assert [step for step, row in resumed.items() if "val_nll" in row] == [4, 6]
    for step in (4, 6):
        assert resumed[step]["val_nll"] == undisturbed[step]["val_nll"]
        assert resumed[step]["attempt"] == 2
    best = [(tmp_path / f"runs/{name}/checkpoints/best.json").read_text() for name in ("broken", "undisturbed")]
    assert best[0] == best[1]


@pytest.mark.slow
def test_processes_that_do_not_stop_in_time_are_killed_with_an_error(
    store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    monkeypatch.setenv("PROTLIG_TYPECHECK", "0")  # type checks take a quarter of the time to start a rank
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
    message = r"error: runs/hung: the step was not finished within trainer\.stop_within=2 s of SIGTERM, .*checkpoint\n"
    assert re.fullmatch(message, errors), errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.slow
def test_a_run_that_lost_a_process_still_stops_on_sigterm(store: SequenceStore, tmp_path: Path, start: Start) -> None:
    """The error that rank 0 wrote about the lost process must not be taken for the reason of the stop."""
    more = ("trainer.devices=2", "trainer.max_restarts=2")
    process = start(*TRAINING, *overrides_for(store, "twice", *OFTEN, *more))
    run = tmp_path / "runs/twice"
    wait_for(lambda: complete_checkpoints(run))
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    wait_for(lambda: '"attempt": 2' in (run / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert re.fullmatch(rf"stopped by SIGTERM after step \d+ of 3000{RESUMES}\n", errors)
    assert "a process was lost: restarting all processes (restart 1 of 2)" in out


@pytest.mark.slow
def test_agents_that_receive_sigterm_one_after_the_other_both_stop(
    store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    """The first rank stops during an evaluation. The second rank loses the connection before it receives the signal."""
    long = ("trainer.eval_every=4", "trainer.eval_draws=100000", "trainer.eval_max_sequences=8", "trainer.log_every=1")
    agent = [*node_of_two(), *TRAINING]
    agents = [start(*agent, *overrides_for(store, "skew", *OFTEN, *long)) for _ in range(2)]
    run = tmp_path / "runs/skew"
    wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 4,' in (run / "metrics.jsonl").read_text())
    for process in agents:
        process.send_signal(signal.SIGTERM)
        time.sleep(2)
    errors = [process.communicate(timeout=120)[1] for process in agents]
    assert json.loads((run / "stopped.json").read_text()) == {"reason": "SIGTERM", "when": "after step 4 of 3000"}
    assert complete_checkpoints(run)[-1].name == "step_00000004"
    assert "another rank" not in errors[0] + errors[1]


def train_with_time_limit(
    run_python: Command, overrides: Sequence[str], until: Callable[[str], object]
) -> subprocess.CompletedProcess[str]:
    """Train with a time limit of 2 s, and return the completed process.

    Until `until(stderr)` is true, repeat with twice the limit, up to 128 s, because slow machines need longer.
    """
    for seconds in (2, 4, 8, 16, 32, 64, 128):
        process = run_python(*TRAINING, *overrides, f"trainer.max_time={seconds}s")
        assert process.returncode == 75, process.stderr
        if until(process.stderr):
            break
    return process


@pytest.mark.slow
def test_the_time_limit_interrupts_evaluations_and_reports(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    endless = overrides_for(store, "long", "trainer.max_steps=4", "report.draws=1000000")
    evaluated = [*endless, "trainer.eval_every=2", "trainer.eval_draws=1000000"]
    in_evaluation = f"stopped by max_time after step 2 of 4{RESUMES}\n"
    process = train_with_time_limit(run_python, evaluated, lambda errors: errors == in_evaluation)
    assert process.stderr == in_evaluation
    in_report = f"stopped by max_time outside the training steps (before the first or after the last){RESUMES}\n"
    run = tmp_path / "runs/long"
    last = run / "checkpoints/step_00000004"
    # without evaluations, but with the report
    process = train_with_time_limit(run_python, endless, lambda errors: errors == in_report and last.exists())
    assert process.stderr == in_report
    assert complete_checkpoints(run)[-1] == last


@pytest.mark.slow
def test_a_repeated_signal_does_not_change_the_exit_code(store: SequenceStore, tmp_path: Path, start: Start) -> None:
    process = start(*TRAINING, *overrides_for(store, "again", *OFTEN))
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/again"))
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.returncode == 75


@pytest.mark.slow
def test_a_time_limit_ends_a_run_with_a_checkpoint_and_exit_code_75(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    overrides = overrides_for(store, "limited", *OFTEN[1:], "trainer.checkpoint_every=2000")
    message = re.compile(rf"stopped by max_time after step \d+ of 3000{RESUMES}\n")
    process = train_with_time_limit(run_python, overrides, message.fullmatch)
    assert message.fullmatch(process.stderr)
    (checkpoint,) = complete_checkpoints(tmp_path / "runs/limited")
    step = int(checkpoint.name[5:])
    out = train(run_python, store, "limited", f"trainer.max_steps={step + 1}")
    assert f"resuming from {checkpoint.relative_to(tmp_path)}" in out
    assert not (tmp_path / "runs/limited/stopped.json").exists()
    rows = read_metrics(tmp_path / "runs/limited/metrics.jsonl")
    seconds = {key: [row[key] for row in rows.values() if key in row] for key in ("checkpoint_stall_s", "data_wait_s")}
    assert seconds["checkpoint_stall_s"][-1] > 0
    assert len(seconds["data_wait_s"]) == step + 1
    assert max(seconds["data_wait_s"]) > 0
    assert 0.1 < rows[step]["peak_memory_gib"] < 8
    assert 0 < rows[step]["mfu"] < 10


@pytest.mark.slow
def test_the_error_for_a_lost_loader_process_names_step_rank_and_sequences(
    store: SequenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    # torch may raise the error of a dead loader during a type check, which would then report a wrong type
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
        r"error: step (\d+), rank 0: a loader process died, perhaps killed for lack of memory .*sequences ", line
    )
    assert found, line
    known = {store.id(row) for row in range(len(store))}
    assert set(line[found.end() :].split(", ")) <= known


@pytest.mark.slow
def test_a_signal_to_the_process_group_does_not_stop_the_loaders(
    store: SequenceStore, tmp_path: Path, start: Start
) -> None:
    """A scheduler, or Ctrl-C in a terminal, sends the signal to every process of the run."""
    process = start(*TRAINING, *overrides_for(store, "group", *OFTEN, "data.workers=1"))
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/group"))
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert re.fullmatch(rf"stopped by SIGTERM after step \d+ of 3000{RESUMES}\n", errors)


@pytest.mark.slow
def test_a_loss_spike_stops_a_run_that_sets_loss_spike(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    more = ["trainer.max_steps=70", "trainer.log_every=7", "trainer.checkpoint_every=5", "optim.lr=1e-9"]
    more.append("data.workers=1")  # a worker must not keep the process from ending
    process = run_python(*TRAINING, *overrides_for(store, "spike", *more, "trainer.loss_spike=1.0001"))
    spike = "is more than trainer.loss_spike=1.0001 times the running mean"
    assert_one_line_error(process, spike, "; the weights are those")
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


def test_the_checkpoint_just_written_is_never_deleted(tmp_path: Path) -> None:
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
def test_with_resume_set_to_never_an_existing_run_is_rejected_despite_restarts(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    train(run_python, store, "once", "trainer.max_steps=2")
    again = overrides_for(store, "once", "trainer.max_steps=4", "run.resume=never", "trainer.max_restarts=1")
    rejected = run_python(*TRAINING, *again)
    assert_one_line_error(rejected, "runs/once exists and run.resume=never")
    assert len(complete_checkpoints(tmp_path / "runs/once")) == 1


@pytest.mark.slow
def test_a_run_can_resume_from_another_runs_checkpoint(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    train(run_python, store, "whole", "trainer.max_steps=8", "trainer.checkpoint_every=4")
    branch = "run.resume=runs/whole/checkpoints/step_00000004"
    out = train(run_python, store, "branch", "trainer.max_steps=8", branch)
    assert "resuming from runs/whole/checkpoints/step_00000004" in out
    branched, whole = last_tensors(tmp_path / "runs/branch"), last_tensors(tmp_path / "runs/whole")
    assert all(torch.equal(branched[name], whole[name]) for name in whole)
    assert "resuming from runs/branch/" in train(
        run_python, store, "branch", "trainer.max_steps=9", "run.resume=extend"
    )
    other = run_python(*TRAINING, *overrides_for(store, "other", branch, "optim.lr=1"))
    assert_one_line_error(other, "step_00000004 was written with another config (optim.lr: 0.003 -> 1.0)")
    missing = run_python(*TRAINING, *overrides_for(store, "other", "run.resume=runs/nothing"))
    assert_one_line_error(missing, "run.resume=runs/nothing does not exist; choose from auto, never, extend, or give")


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_run(
    run_python: Command, store: SequenceStore, marked_store: SequenceStore, tmp_path: Path
) -> None:
    """With 4 packs per step, 1 process sums 4 backward passes, 2 processes sum 2 each, and 4 processes run 1 each."""
    more = ["trainer.max_steps=6", "optim.packs_per_step=4", "data.tokens_per_pack=400"]
    more += ["trainer.precision=fp32"]  # in bf16 the order of sums changes the third digit of gradients
    with_context = ["data.context=lower", "report.split=validation"]
    for name, data, options, numbers in (("on", store, [], (1, 2, 4)), ("given", marked_store, with_context, (1, 2))):
        for devices in numbers:
            train(run_python, data, f"{name}{devices}", *more, *options, f"trainer.devices={devices}")
        first = tmp_path / f"runs/{name}1"
        reference, weights = read_metrics(first / "metrics.jsonl"), last_tensors(first)
        for devices in numbers[1:]:
            run = tmp_path / f"runs/{name}{devices}"
            for step, row in read_metrics(run / "metrics.jsonl").items():
                assert row["loss"] == pytest.approx(reference[step]["loss"], rel=1e-5), (devices, step)
                assert row["residues"] == reference[step]["residues"], (devices, step)
            for tensor_name, tensor in last_tensors(run).items():
                if tensor_name.startswith("model/"):
                    assert (tensor - weights[tensor_name]).abs().max() < 1e-5, (devices, tensor_name)
            assert read_rows(run) == read_rows(first)
            assert {path.name for path in (run / "logs").iterdir()} == {
                f"rank_{rank}.log" for rank in range(1, devices)
            }
            reports = [json.loads((folder / "report.json").read_text()) for folder in (run, first)]
            assert reports[0]["residues"] == reports[1]["residues"]
            assert reports[0]["nll"] == pytest.approx(reports[1]["nll"], rel=1e-4)
    weights = last_tensors(tmp_path / "runs/on1")
    train(run_python, store, "moved", *more, "trainer.devices=2", "trainer.stop_at_step=3")
    assert "resuming from" in train(run_python, store, "moved", *more, "trainer.devices=1")
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


def test_a_bug_in_a_rank_is_distinguished_from_bad_input() -> None:
    assert RanksFailedError(3, "ValueError: no such file", "trace").foreseen
    assert str(RanksFailedError(3, "ValueError: no such file", "trace")) == "rank 3: no such file"
    unforeseen = RanksFailedError(3, "KeyError: 'x'", "trace")
    assert not unforeseen.foreseen
    assert str(unforeseen) == "rank 3: KeyError: 'x'"


@pytest.mark.slow
def test_a_bug_in_all_ranks_prints_one_traceback(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    broken = "import runpy\nimport protlig_dd.training.loop as loop\n"
    broken += "def metrics_rows(*_):\n    return {}['not there']\nloop.metrics_rows = metrics_rows\n"
    broken += "if __name__ == '__main__':\n    runpy.run_module('protlig_dd.training', run_name='__main__')\n"
    (tmp_path / "broken.py").write_text(broken)  # each rank imports the launcher's __main__, which is this file
    overrides = overrides_for(store, "bug", "trainer.max_steps=5", "trainer.devices=2")
    process = run_python("-m", "broken", *overrides)
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1
    assert process.stderr.count("return {}['not there']") == 1
    assert re.fullmatch(r"error: rank [01]: KeyError: 'not there'", process.stderr.splitlines()[-1])


@pytest.mark.slow
def test_two_torchrun_agents_train_one_run(
    store: SequenceStore,
    tmp_path: Path,
    run_python: Command,
    start: Start,
    warm: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each agent stands for a node. The two agents run on this machine and connect over the loopback interface."""
    agent = [*node_of_two(), *TRAINING]
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
    assert len(designs[0].read_text().split(">")) == 6  # the two ranks write 5 samples together
    assert (
        designs[0].read_text().split()
        == designs[1].read_text().replace(">node_", ">nodes_").replace("run=node ", "run=nodes ").split()
    )
    for step, row in read_metrics(tmp_path / "runs/nodes/metrics.jsonl").items():
        assert row["loss"] == pytest.approx(read_metrics(tmp_path / "runs/node/metrics.jsonl")[step]["loss"], rel=1e-5)


@pytest.mark.slow
def test_evaluation_is_the_same_on_any_number_of_processes(store: SequenceStore, tmp_path: Path, start: Start) -> None:
    """23 is a prime number, so two or three processes never have equal numbers of sequences."""
    summaries = []
    for world_size in (1, 2, 3):
        command = ["-m", "tests.bound_on_rank", str(store.path), str(tmp_path / f"meeting{world_size}")]
        ranks = [start(*command, str(rank), str(world_size)) for rank in range(world_size)]
        printed = [process.communicate(timeout=300) for process in ranks]
        assert [process.returncode for process in ranks] == [0] * world_size, printed
        summaries.append(json.loads(printed[-1][0].splitlines()[-1]))
    assert summaries[0] == summaries[1] == summaries[2]
    assert summaries[0]["sequences"] == 23
    assert math.isfinite(summaries[0]["nll"])


@pytest.fixture
def in_forks(start: Start) -> Callable[[list[str], Path], Process]:
    """Return a function that starts the campaign's runs in forks, or in new interpreters if the fault uses SIGSTOP.

    With forks, SIGSTOP would only stop the process that waits for the rank's fork.
    """

    def start_in(arguments: list[str], folder: Path) -> Process:
        hangs = any(argument.startswith("trainer.timeout=") for argument in arguments)
        return start(*arguments, new=hangs, cwd=folder)

    return start_in


TRIED = {"kill": 3, "kill-rank": 2, "terminate": 2, "damage": 2}  # trials of a fault; other faults have one trial


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS)
def test_the_short_fault_campaign_loses_nothing(
    fault: str, tmp_path: Path, in_forks: Callable[[list[str], Path], Process]
) -> None:
    require(may_mount(), "mounting a small disk needs root")
    tally = FAULTS[fault](Campaign(tmp_path, short=True, seed=0, start_process=in_forks))
    assert tally.survived == tally.tried == TRIED.get(fault, 1), tally


@pytest.mark.slow
@pytest.mark.campaign
def test_the_fault_campaign_runs_as_a_command(run_python: Command) -> None:
    require(may_mount(), "mounting a small disk needs root")
    environment = {"PYTHONPATH": str(ROOT), "PROTLIG_TYPECHECK": "0"}
    process = run_python("-m", "scripts.fault_campaign", "--short", "read-only", new=True, **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "| run folder that cannot be written | 1 | 1 | 0 | exit code 1 before the first step |" in process.stdout
    unknown = run_python("-m", "scripts.fault_campaign", "flood", new=True, **environment)
    assert unknown.returncode == 2
    assert "no fault flood; choose from kill, kill-rank, terminate, hang, damage" in unknown.stderr
