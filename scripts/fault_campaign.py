"""What happens to a run when something happens to its machine: real processes, real signals, real disks that are full.

    python -m scripts.fault_campaign            the campaign of docs/reliability.md, half an hour on 2 cores
    python -m scripts.fault_campaign --short    each fault once or twice, a few minutes
    python -m scripts.fault_campaign damage     only what damages checkpoints

Small runs are disturbed, started again until they are through, and compared with runs that were left alone: the same
bits in weights, averaged weights and optimizer state, and the same sequences in every step. Prints Markdown; the exit
code is 1 where anything was lost. A small disk is a tmpfs in a mount namespace of this program's own (needs root, or
user namespaces).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.runs.checkpoint import COMPLETE, FILES, newest_sound_checkpoint, step_of
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
        [sys.executable, *arguments], cwd=folder, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


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

    def kill_trainer(self) -> Tally:
        """SIGKILL at random moments; every third while a checkpoint is being written."""
        tally = Tally("SIGKILL of the trainer")
        writing, took = 0, self.seconds[self.undisturbed(1)]
        for turn in self.turns(self.kills, "kill", tally):
            process = self.start(turn)
            if tally.tried % 3 == 2:
                parent = self.run(turn) / "checkpoints"
                known = set(parent.glob(".step_*"))
                while process.poll() is None and not (fresh := set(parent.glob(".step_*")) - known):
                    time.sleep(0.0005)
                kill(process, signal.SIGKILL)
                writing += any(path.exists() for path in fresh)
            else:
                end_of(process, self.random.uniform(0.1, 1) * took)
                kill(process, signal.SIGKILL)
        tally.notes = f"{writing} of them left half a checkpoint"
        return tally

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

    def kill_rank(self) -> Tally:
        """SIGKILL of one of two ranks; the launcher starts both again."""
        tally = Tally("SIGKILL of one of two ranks, trainer.max_restarts")
        restarts = 5
        for number, first in enumerate(range(0, self.others, restarts)):
            name, own = f"rank{number}", min(restarts, self.others - first)
            process = self.start(name, *TWO, f"trainer.max_restarts={own}")
            killed: set[int] = set()
            for _ in range(own):
                self.wait_for_checkpoint(name, process)
                ranks = [pid for pid in ranks_of(process) if pid not in killed]
                if len(ranks) == 2:
                    killed |= set(ranks)
                    os.kill(self.random.choice(ranks), signal.SIGKILL)
                    tally.tried += 1
            process.communicate(timeout=600)
            tally.survived += len(killed) // 2 * (process.returncode == 0 and self.same(name, 2))
        return tally

    def terminate(self) -> Tally:
        """SIGTERM, to one process and to the launcher of two: a checkpoint and exit code 75."""
        tally = Tally("SIGTERM")
        slowest = 0.0
        for ranks, more in RANKS.items():
            name, good = f"term{ranks}", 0
            for _ in range(self.others // 2):
                process = self.start(name, *more)
                self.wait_for_checkpoint(name, process)
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=120)
                slowest = max(slowest, time.monotonic() - began)
                good += process.returncode == 75
            self.finish(name, *more)
            tally.tried += self.others // 2
            tally.survived += good * self.same(name, ranks)
        tally.notes = f"at most {slowest:.1f} s to the exit"
        return tally

    def stop_rank(self) -> Tally:
        """SIGSTOP of a rank for longer than the others wait."""
        tally = Tally("SIGSTOP of one of two ranks beyond trainer.timeout")
        process = self.start("hung", *TWO, "trainer.timeout=10")
        self.wait_for_checkpoint("hung", process)
        os.kill(ranks_of(process)[-1], signal.SIGSTOP)
        _, errors = process.communicate(timeout=300)
        tally.notes = "exit code 1; names step and rank"
        self.finish("hung", *TWO)
        told = process.returncode == 1 and "did not answer within trainer.timeout" in errors
        tally.count(told and self.same("hung", 2))
        return tally

    def damage(self) -> Tally:
        """Each file of the newest checkpoint truncated, with a flipped bit, or gone."""
        tally = Tally("newest checkpoint damaged: each file truncated, bit-flipped, deleted")
        tally.notes = "the one before is taken, and the damage named"
        self.finish("stopped", f"trainer.stop_at_step={self.steps // 2}")
        files = sorted([*FILES, COMPLETE])
        cases = [(file, how) for file in files for how in (truncate, flip, Path.unlink)]
        cases = cases[1::10] if self.short else cases
        with ProgressBar("damaged checkpoints", len(cases)) as bar:
            for number, (file, how) in enumerate(cases):
                name = f"damaged{number}"
                shutil.copytree(self.run("stopped"), self.run(name))
                newest, _ = newest_sound_checkpoint(self.run(name))
                assert newest is not None
                how(newest / file)
                out = self.finish(name)
                before = f"step_{step_of(newest) - 5:08d}"
                told = f"skipped: runs/{name}/checkpoints/{newest.name}" in out and before in out
                tally.count(told and self.same(name))
                bar.advance()
        return tally

    def full_disk(self) -> Tally:
        """A checkpoint that does not fit, and one that does once there is room."""
        tally = Tally("disk full while a checkpoint is written", notes="exit code 1; the checkpoint before is whole")
        disk = self.run("full")
        with mounted(disk, 64):
            self.finish("full", f"trainer.stop_at_step={self.steps // 2}")
            ballast = disk / "ballast"
            with ballast.open("wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - 200_000))
            code, _, errors = self.attempt("full")
            before, skipped = newest_sound_checkpoint(disk)
            told = code == 1 and "No space left on device" in errors and before is not None and not skipped
            ballast.unlink()
            self.finish("full")
            tally.count(told and self.same("full"))
        return tally

    def read_only(self) -> Tally:
        tally = Tally("run folder that cannot be written", notes="exit code 1 before the first step")
        with mounted(self.run("readonly"), 8, "ro"):
            code, out, errors = self.attempt("readonly")
        tally.count(code == 1 and "Read-only file system" in errors and "training" not in out)
        return tally

    def two_runs(self) -> Tally:
        tally = Tally("a second run started in the same folder", notes="it is refused; the first goes on")
        first = self.start("shared")
        self.wait_for_checkpoint("shared", first)
        first.send_signal(signal.SIGSTOP)  # it must not be through before the second has started
        code, _, errors = self.attempt("shared")
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=600)
        refused = code == 1 and "runs/shared is in use by another run" in errors
        tally.count(refused and first.returncode == 0 and self.same("shared"))
        return tally


FAULTS: dict[str, Callable[[Campaign], Tally]] = {
    "kill": Campaign.kill_trainer,
    "kill-rank": Campaign.kill_rank,
    "terminate": Campaign.terminate,
    "hang": Campaign.stop_rank,
    "damage": Campaign.damage,
    "full-disk": Campaign.full_disk,
    "read-only": Campaign.read_only,
    "two-runs": Campaign.two_runs,
}


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


def enter_namespace() -> None:
    """Go on in a mount namespace of our own, in which mounts are allowed and end with us."""
    if os.environ.get("PROTLIG_NAMESPACE") != str(os.getpid()):
        rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        os.environ["PROTLIG_NAMESPACE"] = str(os.getpid())  # exec keeps the id
        os.execvp(
            "unshare", ["unshare", "--mount", *rights, sys.executable, "-m", "scripts.fault_campaign", *sys.argv[1:]]
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all without it")
    parser.add_argument("--short", action="store_true", help="each fault once or twice")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it strikes")
    parser.add_argument("--folder", type=Path, default=Path(), help="for scratch files, some 100 MB")
    arguments = parser.parse_args()
    if unknown := set(arguments.faults) - FAULTS.keys():
        parser.error(f"no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    enter_namespace()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="fault_campaign.") as folder:
        campaign = Campaign(
            Path(folder).resolve(), short=arguments.short, seed=arguments.seed, start_process=start_python
        )
        tallies = [FAULTS[name](campaign) for name in arguments.faults or FAULTS]
    print("\n| fault | tried | survived | lost | |\n| --- | --- | --- | --- | --- |")
    for tally in tallies:
        lost = tally.tried - tally.survived
        print(f"| {tally.fault} | {tally.tried} | {tally.survived} | {lost} | {tally.notes} |")
    return int(any(tally.survived < tally.tried or not tally.tried for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
