"""Small runs that are disturbed and compared with runs that were left alone, and the means to disturb them."""

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
from protlig_dd.runs.checkpoint import COMPLETE, newest_sound_checkpoint, step_of
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
    """How often a fault was tried, and how often the run came through it whole."""

    fault: str
    tried: int = 0
    survived: int = 0
    notes: str = ""

    def count(self, survived: bool) -> None:
        self.tried += 1
        self.survived += survived


class Process(Protocol):
    """The part of subprocess.Popen that the campaign uses."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def send_signal(self, sig: signal.Signals, /) -> None: ...
    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]: ...


def start_python(arguments: list[str], folder: Path) -> Process:
    """`python ARGUMENTS` in a process group of its own, so that what is left of it can be told and ended."""
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
    """Runs of 120 steps, or 20 if it is short, in `folder`, all on the bundled proteins.

    Args:
        seed: of the moments at which faults strike.
        start_process: how `python ARGUMENTS` is started in a folder.
    """

    def __init__(
        self, folder: Path, *, short: bool, seed: int, start_process: Callable[[list[str], Path], Process]
    ) -> None:
        self.folder, self.short, self.random, self.store = folder, short, random.Random(seed), bundled_store(folder)
        self.steps = 20 if short else 120
        self.seconds: dict[str, float] = {}  # that each undisturbed run took
        self.kills, self.others = (3, 2) if short else (30, 10)
        self.start_process = start_process

    def start(self, name: str, *more: str) -> Process:
        overrides = [*SMALL, f"data.path={self.store.path}", f"run.name={name}"]
        overrides += [f"trainer.max_steps={self.steps}", *more]
        return self.start_process(["-m", "protlig_dd.training", *overrides], self.folder)

    def attempt(self, name: str, *more: str) -> tuple[int, str, str]:
        """Run until it ends: exit code, what it printed, its last line on stderr."""
        process = self.start(name, *more)
        out, errors = process.communicate(timeout=600)
        return process.returncode, out, (errors.strip().splitlines() or [""])[-1]

    def finish(self, name: str, *more: str) -> str:
        code, out, errors = self.attempt(name, *more)
        if code:
            raise RuntimeError(f"{name} ended with {code}: {errors}")
        return out

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def undisturbed(self, ranks: int) -> str:
        """The run of so many processes that was left alone, made when it is first asked for."""
        name = f"undisturbed{ranks}"
        if name not in self.seconds:
            began = time.monotonic()
            self.finish(name, *RANKS[ranks])
            self.seconds[name] = time.monotonic() - began
        return name

    def same(self, name: str, ranks: int = 1) -> bool:
        """Whether it ended with the undisturbed run's bits, and saw the same sequences in every step, each once."""
        reference = self.undisturbed(ranks)
        first, second = (newest_sound_checkpoint(self.run(one))[0] for one in (name, reference))
        if first is None or second is None or step_of(first) != self.steps:
            return False
        for stem in ("model", "ema", "optimizer"):
            mine, theirs = (load_file(path / f"{stem}.safetensors") for path in (first, second))
            if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in mine):
                return False
        return rows_of(self.run(name)) == rows_of(self.run(reference))

    def wait_for_checkpoint(self, name: str, process: Process) -> None:
        """Until one stands that did not before."""
        known = set(self.run(name).glob(f"checkpoints/*/{COMPLETE}"))
        while process.poll() is None and not set(self.run(name).glob(f"checkpoints/*/{COMPLETE}")) - known:
            time.sleep(0.01)

    def turns(self, times: int, name: str, tally: Tally) -> Iterator[str]:
        """Names of runs to disturb, `times` in all. One that is through is compared, and the next begins; a turn has
        survived when the run that it disturbed ends like the undisturbed one."""
        number = waiting = 0
        with ProgressBar(tally.fault, times) as bar:
            for left in range(times, 0, -1):
                current = f"{name}{number}"
                yield current
                tally.tried += 1
                waiting += 1
                bar.advance()
                if left == 1 or (self.run(current) / "report.json").is_file() or waiting == 8:
                    self.finish(current)
                    tally.survived += waiting * self.same(current)
                    number, waiting = number + 1, 0


def rows_of(run: Path) -> dict[int, list[int]]:
    """Sequences of each step; a step that was made again replaces what was lost."""
    lines = (run / "rows.jsonl").read_text().splitlines()
    return {row["step"]: row["rows"] for row in map(json.loads, lines)}


def end_of(process: Process, seconds: float) -> None:
    """Wait for so long, or until the process has ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


def kill(process: Process, number: signal.Signals) -> None:
    process.send_signal(number)
    process.communicate()


def ranks_of(launcher: Process) -> list[int]:
    """Ids of the processes that a launcher has started, oldest first."""
    return children_of(launcher, "-f", "spawn_main")


def children_of(process: Process, *chosen: str) -> list[int]:
    """Ids of its children, oldest first.

    Args:
        chosen: which ones, for pgrep.
    """
    found = subprocess.run(["pgrep", "-P", str(process.pid), *chosen], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@contextmanager
def mounted(folder: Path, megabytes: int, *options: str) -> Iterator[None]:
    """A small disk in a new folder, which is empty again afterwards."""
    folder.mkdir(parents=True)
    chosen = ",".join([f"size={megabytes}m", *options])
    subprocess.run(["mount", "-t", "tmpfs", "-o", chosen, "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a run may still stand in it
