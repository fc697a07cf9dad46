"""Start small training runs, disturb them, and compare their results with those of undisturbed runs.

scripts/fault_campaign.py and scripts/host_trials.py use these functions.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.runs.checkpoint import COMPLETE, newest_valid_checkpoint, step_of
from protlig_dd.system.terminal import ProgressBar

SMALL = [
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
    "trainer.checkpoint_every=5",
    "logger.tensorboard=false",
    "report.max_sequences=4",
    "report.draws=1",
    "report.samples=0",
]
TWO = ("trainer.devices=2",)
RANKS = {1: (), 2: TWO}


@dataclass
class Tally:
    """Counts the trials of a fault, and how many of them a run survived.

    A run survives a trial if it ends as expected, in most trials bit-identical to the undisturbed run.
    """

    fault: str
    tried: int = 0
    survived: int = 0
    notes: str = ""

    def count(self, survived: bool) -> None:
        self.tried += 1
        self.survived += survived


class Process(Protocol):
    """The part of subprocess.Popen that is needed here. The tests pass processes that are not subprocess.Popen."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def send_signal(self, sig: signal.Signals, /) -> None: ...
    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]: ...


def start_python(arguments: list[str], folder: Path) -> Process:
    """Start `python ARGUMENTS` in a folder and in a new process group, which also contains the child processes."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


class Campaign:
    """Trains runs on the bundled proteins, and disturbs them. A run has 120 steps, or 20 in a short campaign.

    Args:
        folder: for the runs and their data.
        short: whether to train fewer steps and to repeat each fault fewer times.
        seed: for the random numbers that decide when a fault occurs and which rank is killed.
        start_process: function of (ARGUMENTS, folder) that starts `python ARGUMENTS` in this working folder.
    """

    def __init__(
        self, folder: Path, *, short: bool, seed: int, start_process: Callable[[list[str], Path], Process]
    ) -> None:
        self.folder, self.short, self.random, self.store = folder, short, random.Random(seed), bundled_store(folder)
        self.steps = 20 if short else 120
        self.seconds: dict[str, float] = {}  # wall time of each undisturbed run
        self.kills, self.others = (3, 2) if short else (30, 10)
        self.start_process = start_process

    def start(self, name: str, *options: str) -> Process:
        overrides = [*SMALL, f"data.path={self.store.path}", f"run.name={name}"]
        overrides += [f"trainer.max_steps={self.steps}", *options]
        return self.start_process(["-m", "protlig_dd.training", *overrides], self.folder)

    def attempt(self, name: str, *options: str) -> tuple[int, str, str]:
        """Train a run until its process ends; return the exit code, stdout and the last line of stderr."""
        process = self.start(name, *options)
        out, errors = process.communicate(timeout=600)
        return process.returncode, out, (errors.strip().splitlines() or [""])[-1]

    def finish(self, name: str, *options: str) -> str:
        """Train a run until its process ends, and return the stdout.

        Raises:
            RuntimeError: the exit code is not 0.
        """
        code, out, errors = self.attempt(name, *options)
        if code:
            raise RuntimeError(f"{name} ended with {code}: {errors}")
        return out

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def undisturbed(self, ranks: int) -> str:
        """Return the name of the undisturbed run with `ranks` processes. The first call trains this run."""
        name = f"undisturbed{ranks}"
        if name not in self.seconds:
            began = time.monotonic()
            self.finish(name, *RANKS[ranks])
            self.seconds[name] = time.monotonic() - began
        return name

    def matches_undisturbed(self, name: str, ranks: int = 1) -> bool:
        """Whether a run has reached its last step and is bit-identical to the undisturbed run there.

        The run must also have read the same sequences in every step. Weights, averaged weights and optimizer state of
        the newest valid checkpoints are compared.
        """
        reference = self.undisturbed(ranks)
        first, second = (newest_valid_checkpoint(self.run(run))[0] for run in (name, reference))
        if first is None or second is None or step_of(first) != self.steps:
            return False
        for stem in ("model", "ema", "optimizer"):
            tensors, expected = (load_file(path / f"{stem}.safetensors") for path in (first, second))
            if tensors.keys() != expected.keys():
                return False
            if not all(torch.equal(tensors[key], expected[key]) for key in tensors):
                return False
        return rows_of(self.run(name)) == rows_of(self.run(reference))

    def wait_for_checkpoint(self, name: str, process: Process) -> None:
        """Wait until a run has written a new checkpoint, or its process has ended."""
        known = set(self.run(name).glob(f"checkpoints/*/{COMPLETE}"))
        while process.poll() is None and not set(self.run(name).glob(f"checkpoints/*/{COMPLETE}")) - known:
            time.sleep(0.01)

    def disturbances(self, times: int, name: str, tally: Tally) -> Iterator[str]:
        """Yield, for each of `times` disturbances, the name of the run to disturb.

        The caller launches the run, disturbs it, and then requests the next name. The same name is repeated until the
        run is finished, but at most 8 times. Then the run is trained to its end without a disturbance and compared with
        the undisturbed run. If they are identical, all disturbances of this run count as survived in `tally`.
        """
        number = waiting = 0
        with ProgressBar(tally.fault, times) as bar:
            for remaining in range(times, 0, -1):
                current = f"{name}{number}"
                yield current
                tally.tried += 1
                waiting += 1
                bar.advance()
                if remaining == 1 or (self.run(current) / "report.json").is_file() or waiting == 8:
                    self.finish(current)
                    tally.survived += waiting * self.matches_undisturbed(current)
                    number, waiting = number + 1, 0


def rows_of(run: Path) -> dict[int, list[int]]:
    """Return {step: rows of the store that the step read}. If a step was repeated, its last execution counts."""
    lines = (run / "rows.jsonl").read_text().splitlines()
    return {row["step"]: row["rows"] for row in map(json.loads, lines)}


def wait_for_end(process: Process, seconds: float) -> None:
    """Wait for `seconds`, or until the process has ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def kill(process: Process, number: signal.Signals) -> None:
    process.send_signal(number)
    process.communicate()


def ranks_of(launcher: Process) -> list[int]:
    """Return the process ids of the ranks that `launcher` has started, oldest first."""
    return children_of(launcher, "-f", "spawn_main")


def children_of(process: Process, *filters: str) -> list[int]:
    """Return the ids of a process's children, oldest first.

    Args:
        filters: arguments of pgrep, to return only matching children.
    """
    found = subprocess.run(["pgrep", "-P", str(process.pid), *filters], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@contextmanager
def mounted(folder: Path, megabytes: int, *options: str) -> Iterator[None]:
    """Mount a tmpfs of this size in a new folder, as a small disk; unmount it at the end of the block."""
    folder.mkdir(parents=True)
    mount_options = ",".join([f"size={megabytes}m", *options])
    subprocess.run(["mount", "-t", "tmpfs", "-o", mount_options, "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazily, because a run may still use the disk
