"""Tests of runs under schedulers: a real Slurm on this machine, submitit's local executor, and PBS.

Scripts replace the commands of PBS.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protlig_dd.data.store import SequenceStore
from protlig_dd.runs.checkpoint import complete_checkpoints
from protlig_dd.runs.metrics import read_metrics

from .conftest import RESUMES, ROOT, Command, Start, free_port, require, require_program, wait_for
from .test_training import assert_bit_identical, overrides_for, train
from .warm import Server

pytestmark = pytest.mark.slow

LONG = ("trainer.max_steps=200", "trainer.checkpoint_every=1000", "trainer.eval_every=90", "trainer.log_every=2")
LONG = (*LONG, "trainer.eval_max_sequences=4", "data.tokens_per_pack=400", "data.workers=0")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off type checks, which take half of the time to start a process.

    Other tests run the same code with type checks.
    """
    monkeypatch.setenv("PROTLIG_TYPECHECK", "0")


def last_step(run: Path) -> int:
    """Return the last step in metrics.jsonl, or 0 if there is none. The file's last line may be incomplete."""
    file = run / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+),', file.read_text()) if file.is_file() else []
    return int(steps[-1]) if steps else 0


SLURM_CONF = """\
ClusterName=loopback
FirstJobId={ports[0]}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1,n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=1 RealMemory=1000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a Slurm cluster with two nodes on this machine. Jobs in partition `high` preempt those in `low`."""
    require_program("slurmctld")
    require(os.geteuid() == 0, "starting Slurm needs root")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a socket's path must be short
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    # the launch script derives a job's port from the job's id, so two clusters on a machine need different job ids
    conf.write_text(SLURM_CONF.format(host=socket.gethostname(), ports=[free_port() for _ in range(3)], folder=folder))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
    files = {"key": "key", "pid": "pid", "log": "log", "seed": "seed"}
    munge = [f"--{name}-file={folder}/munge.{end}" for name, end in files.items()]
    with (folder / "log").open("w") as log:
        daemons = [
            subprocess.Popen(command, stdout=log, stderr=log)
            for command in (
                ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
                ["slurmctld", "-D"],
                ["slurmd", "-D", "-N", "n1"],
                ["slurmd", "-D", "-N", "n2"],
            )
            if command[0] == "munged" or not wait_for((folder / "munge.socket").exists)
        ]
        try:
            idle = ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"]
            wait_for(lambda: subprocess.run(idle, capture_output=True, text=True, check=False).stdout == "2\n")
            yield folder
        finally:
            subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], check=False)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def slurm_output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def state_of(job: str) -> tuple[str, int]:
    """Return the job's state and how often it was requeued."""
    output = slurm_output("scontrol", "show", "job", job)
    found = [re.search(pattern, output) for pattern in (r"JobState=(\w+)", r"Restarts=(\d+)")]
    assert all(found), output
    return found[0][1], int(found[1][1])  # type: ignore[index]


def start_now(job: str) -> None:
    """Let Slurm start a queued job now instead of after two minutes.

    Wait 2 s first: slurmd rejects a job that restarts in the second in which the job ended, because slurmd considers
    the job's credential revoked.
    """
    time.sleep(2)
    slurm_output("scontrol", "update", f"jobid={job}", "starttime=now")


@pytest.fixture
def forks_in_jobs(warm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Slurm jobs a virtual environment whose python runs modules in forks of the interpreter `warm`."""
    monkeypatch.setenv("PROTLIG_VENV", str(warm.executable.parent))
    monkeypatch.setenv("PYTHON_EXEC", str(warm.executable))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the node name n1, which scontrol prints, cannot be resolved
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # both nodes are this machine
    (warm.executable.parent / "bin").mkdir(exist_ok=True)
    python = warm.executable.parent / "bin/python"
    if not python.exists():
        python.symlink_to(warm.executable)


@pytest.mark.system
def test_a_slurm_job_is_requeued_at_its_time_limit_and_when_preempted(
    slurm: Path, store: SequenceStore, tmp_path: Path, forks_in_jobs: None, run_python: Command
) -> None:
    """A job on two nodes receives the signal that Slurm sends before the time limit. Then another job preempts it."""
    script = str(ROOT / "scripts/slurm/train.sbatch")
    small = ["--gpus-per-node=0", "--cpus-per-task=1", "--output=out"]
    overrides = overrides_for(store, "given", *LONG, "run.fresh=true")
    job = subprocess.run(
        ["sbatch", "--parsable", *small, script, "try", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    run = tmp_path / "runs/try"
    wait_for(lambda: last_step(run) > 4)
    slurm_output("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: state_of(job) == ("PENDING", 1))
    first = int(complete_checkpoints(run)[-1].name[5:])
    assert f'"when": "after step {first} of 200"' in (run / "stopped.json").read_text()

    start_now(job)
    wait_for(lambda: last_step(run) > first)
    slurm_output("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(lambda: state_of(job) == ("PENDING", 2))
    second = int(complete_checkpoints(run)[-1].name[5:])
    assert second > first

    start_now(job)
    wait_for(lambda: state_of(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert state_of(job) == ("COMPLETED", 2), (tmp_path / "out").read_text()
    assert not (tmp_path / "runs/try.1").exists()  # run.fresh=true only applies to the job's first start
    train(run_python, store, "undisturbed", *LONG, "trainer.devices=2")
    assert_bit_identical(run, tmp_path / "runs/undisturbed")
    bounds = [
        {step: row["val_nll"] for step, row in read_metrics(folder / "metrics.jsonl").items() if "val_nll" in row}
        for folder in (run, tmp_path / "runs/undisturbed")
    ]
    assert list(bounds[0]) == [90, 180, 200]
    assert bounds[0] == bounds[1]


@pytest.mark.system
def test_a_slurm_job_that_is_cancelled_or_fails_is_not_requeued(
    slurm: Path, store: SequenceStore, tmp_path: Path, forks_in_jobs: None
) -> None:
    script = str(ROOT / "scripts/slurm/train.sbatch")
    submit = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--output=out-%j", script]
    ended = {}
    for name, more in (("cancelled", ()), ("wrong", ("optim.lr=-1",))):
        job = subprocess.run(
            [*submit, name, *overrides_for(store, "given", *LONG, *more)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if name == "cancelled":
            wait_for(lambda: last_step(tmp_path / "runs/cancelled") > 4)
            slurm_output("scancel", job)
        wait_for(lambda job=job: state_of(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"))  # type: ignore[misc]
        ended[name] = state_of(job)
        out = (tmp_path / f"out-{job}").read_text()
    assert ended == {"cancelled": ("CANCELLED", 0), "wrong": ("FAILED", 0)}
    assert "error: optim.lr must be at least 0, got -1" in out
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/cancelled"))


@pytest.mark.system
def test_a_slurm_job_whose_nodes_lost_contact_is_requeued(
    slurm: Path, store: SequenceStore, tmp_path: Path, forks_in_jobs: None
) -> None:
    """If torchrun loses the connection to the other nodes, it sends SIGTERM to its ranks, and exits with 1."""
    submit = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--output=out"]
    job = subprocess.run(
        [*submit, str(ROOT / "scripts/slurm/train.sbatch"), "lost", *overrides_for(store, "given", *LONG)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    wait_for(lambda: last_step(tmp_path / "runs/lost") > 4)
    first, second = slurm_output("pgrep", "-f", f"warm.py command .*rdzv-id={job} ").split()
    os.kill(int(first), signal.SIGTERM)
    wait_for((tmp_path / "runs/lost/stopped.json").is_file)
    time.sleep(1)
    # the second torchrun may have ended already, because it lost the connection to the first
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(second), signal.SIGKILL)  # otherwise the second torchrun waits five minutes for the first
    wait_for(lambda: state_of(job) == ("PENDING", 1))
    assert (
        "the nodes lost contact and stopped with a checkpoint; the job is queued again"
        in (tmp_path / "out").read_text()
    )


def test_a_submitit_sweep_continues_after_its_time_limit(
    run_python: Command, start: Start, store: SequenceStore, tmp_path: Path
) -> None:
    """submitit sends SIGUSR2 to a job at the job's time limit, and then restarts the job."""
    fewer = ("trainer.max_steps=100", "trainer.eval_every=0")
    swept = ["-m", "protlig_dd.training", "-m", *overrides_for(store, "swept", *LONG, *fewer), "optim.lr=3e-4,1e-3"]
    sweep = start(*swept, "hydra/launcher=submitit_local")
    run = tmp_path / "runs/swept_sweep/optim.lr-0.0003"
    wait_for(lambda: last_step(run) > 4)
    holder = int(re.search(r"process (\d+)", (run / "lock").read_text())[1])  # type: ignore[index]
    os.kill(holder, signal.SIGUSR2)
    _, errors = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, errors
    attempts = {
        name: json.loads((run.parent / name / "environment.json").read_text())["attempt"]
        for name in ("optim.lr-0.0003", "optim.lr-0.001")
    }
    assert attempts == {"optim.lr-0.0003": 2, "optim.lr-0.001": 1}
    train(run_python, store, "plain", *LONG, *fewer, "optim.lr=3e-4")
    assert_bit_identical(run, tmp_path / "runs/plain")


def test_the_end_of_a_submitit_job_is_reported_in_one_line(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    sweep = ["-m", "protlig_dd.training", "-m", "hydra/launcher=submitit_local", *overrides_for(store, "sweep", *LONG)]
    missing = run_python(*sweep, "data.path=none.h5")
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("error: none.h5: no such data file")
    late = run_python(*sweep, "trainer.max_time=0s")
    assert late.returncode == 75
    assert late.stderr.splitlines()[-1] == f"stopped by max_time after step 1 of 200{RESUMES}"
    assert "Traceback" not in missing.stderr + late.stderr


def test_hydra_composes_the_slurm_launcher(run_python: Command) -> None:
    process = run_python("-m", "protlig_dd.training", "hydra/launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    assert process.returncode == 0, process.stderr
    assert "SlurmLauncher" in process.stdout
    assert "signal_delay_s: 180" in process.stdout
    assert "name: ${run.name}" in process.stdout


MPIEXEC = """#!/bin/sh
# two nodes on this machine: mpiexec -n 2 --ppn 1 --cpu-bind none COMMAND
[ "$1 $2 $3 $4 $5 $6" = "-n 2 --ppn 1 --cpu-bind none" ] || exit 9
shift 6
"$@" & first=$!
"$@" & second=$!
wait $first; code=$?
wait $second && exit $code
"""


def test_a_pbs_job_submits_itself_again_until_the_run_is_finished(
    store: SequenceStore, warm: Server, tmp_path: Path
) -> None:
    """PBS is not available to the tests, so scripts replace its mpiexec and qsub."""
    programs = {"mpiexec": MPIEXEC, "qsub": f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\n'}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nodes").write_text("x1\nx2\n")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(warm.executable)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PBS_O_WORKDIR": str(tmp_path),
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "MASTER_ADDR": "127.0.0.1",
        "PROTLIG_VENV": str(tmp_path / "venv"),
        "PYTHON_EXEC": str(warm.executable),
    }

    def job(max_steps: int, max_time: str) -> subprocess.CompletedProcess[str]:
        edited = (ROOT / "scripts/pbs/train.pbs").read_text()
        overrides = " ".join(overrides_for(store, "given", *LONG, f"trainer.max_steps={max_steps}"))
        values = {"run": "pbs", "overrides": f"({overrides})", "max_time": max_time, "gpus": "1"}
        for variable, value in values.items():
            edited, count = re.subn(rf"^{variable}=.*$", f"{variable}={value}", edited, flags=re.MULTILINE)
            assert count == 1
        (tmp_path / "my_train.pbs").write_text(edited)
        environment["PBS_JOBID"] = f"{free_port() - 20000}.polaris"
        return subprocess.run(
            ["bash", "my_train.pbs"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    for seconds in (4, 8, 16, 32, 64, 128):  # retry until a step is completed within the limit
        (tmp_path / "submitted").unlink(missing_ok=True)
        first = job(1_000_000, f"{seconds}s")
        assert first.returncode == 75, first.stderr
        if complete_checkpoints(tmp_path / "runs/pbs"):
            break
    assert json.loads((tmp_path / "runs/pbs/stopped.json").read_text())["reason"] == "max_time"
    assert (tmp_path / "submitted").read_text() == "my_train.pbs\n"
    checkpoint = complete_checkpoints(tmp_path / "runs/pbs")[-1]
    second = job(int(checkpoint.name[5:]) + 2, "1h")
    assert second.returncode == 0, second.stderr
    assert f"resuming from {checkpoint.relative_to(tmp_path)}" in second.stdout
    assert (tmp_path / "submitted").read_text() == "my_train.pbs\n"
