"""What becomes of a run on two hosts that disagree, or lose one another: network namespaces stand for the hosts, and
torchrun starts the ranks as scripts/slurm/train.sbatch does.

    python -m scripts.host_trials             the table of docs/multinode.md, some minutes; needs root and iproute2
    python -m scripts.host_trials cut-long    only that one

Each host has a name, an address, an /etc/hosts and mounts of its own; all see the same folders. Prints Markdown; the
exit code is 1 where something went otherwise than it should.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.store import SPLITS
from protlig_dd.system.terminal import ProgressBar
from scripts.disturbed_runs import SMALL, Campaign, Process, children_of, start_python
from scripts.hosts import NAMES, NETWORK, Host, addresses, missing_here, two_hosts

STEPS = 100
SOON = 60  # seconds beyond trainer.timeout within which every host has ended


@dataclass
class Trial:
    """What was tried, and what came of it."""

    what: str
    expected: str
    found: list[str] = field(default_factory=list)
    """What went otherwise; empty if nothing did."""

    def check(self, good: object, otherwise: str) -> None:
        if not good:
            self.found.append(otherwise)


class Trials:
    """Runs of 100 steps on two hosts.

    Args:
        folder: for the runs, which all hosts see.
        here: starts `python ARGUMENTS` on the machine itself, for a run in one process to compare with.
    """

    def __init__(self, folder: Path, hosts: Sequence[Host], here: Callable[[list[str], Path], Process]) -> None:
        self.folder, self.hosts, self.port = folder, hosts, 29400
        self.alone = Campaign(folder, short=True, seed=0, start_process=here)
        self.alone.steps = STEPS
        self.reset()

    def reset(self) -> None:
        """Plug all in, and let all know one another."""
        for host in self.hosts:
            host.plug_in()
            host.knows(addresses(), self.folder)

    def agent(
        self,
        host: Host,
        name: str,
        *overrides: str,
        module: str = "protlig_dd.training",
        restarts: int = 0,
        nodes: str = "2",
    ) -> Process:
        arguments = [
            "-m",
            "torch.distributed.run",
            f"--nnodes={nodes}",
            "--nproc-per-node=1",
            f"--max-restarts={restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={NETWORK}.1:{self.port}",
            f"--rdzv-id={name}",
            "--rdzv-conf=read_timeout=60,last_call_timeout=1",
            "-m",
            module,
            *SMALL,
            f"data.path={self.alone.store.path}",
            f"run.name={name}",
            f"trainer.max_steps={STEPS}",
            "trainer.timeout=20",
            *overrides,
        ]
        return host.start(arguments, self.folder)

    def agents(self, name: str, *overrides: str, restarts: int = 0, other: Sequence[str] = ()) -> list[Process]:
        """One on each host.

        Args:
            other: overrides of the second host alone.
        """
        self.port += 1
        first, second = self.hosts
        return [
            self.agent(first, name, *overrides, restarts=restarts),
            self.agent(second, name, *overrides, *other, restarts=restarts),
        ]

    def through(self, trial: Trial, name: str, agents: Sequence[Process]) -> list[str]:
        """Wait for a run that should end well, and compare it with the run in one process; what each host said."""
        said = ["\n".join(process.communicate(timeout=300)) for process in agents]
        codes = [process.returncode for process in agents]
        last_lines = [text.strip().splitlines()[-1:] for text in said]
        trial.check(codes == [0] * len(agents), f"exit codes {codes}: {last_lines}")
        trial.check(self.alone.same(name), "other bits than one process")
        return said

    def refused(self, trial: Trial, agents: Sequence[Process], *told: str, timeout: int = 20) -> list[str]:
        """Wait for a start that should fail on both hosts, each naming `told`, in time and in few lines.

        Returns:
            What each said.
        """
        began, said = time.monotonic(), []
        for host, process in zip(self.hosts, agents, strict=True):
            _, errors = process.communicate(timeout=300)
            ours = [line for line in errors.splitlines() if line.startswith(("[rank", "error:"))]
            trial.check(process.returncode == 1, f"{host.name} ends with {process.returncode}")
            trial.check(all(part in " ".join(ours) for part in told), f"{host.name} says {ours or errors[-300:]}")
            trial.check(len(ours) <= 10, f"{host.name} says {len(ours)} lines")
            trial.check("gloo/" not in " ".join(ours), f"{host.name} shows gloo's own words: {ours}")
            said.append(" ".join(ours))
        took = time.monotonic() - began
        trial.check(took < timeout + SOON, f"took {took:.0f} s")
        return said

    def wait_for_step(self, name: str, step: int, agents: Sequence[Process]) -> None:
        metrics = self.folder / "runs" / name / "metrics.jsonl"
        while all(process.poll() is None for process in agents):
            if metrics.is_file() and f'"step": {step},' in metrics.read_text():
                return
            time.sleep(0.01)

    def alike(self) -> Trial:
        trial = Trial("two hosts, nothing happens", "the bits of one process with the same `optim.packs_per_step`")
        self.through(trial, "alike", self.agents("alike"))
        return trial

    def differ(self) -> Trial:
        keys = {
            "optim.lr": "0.5",
            "seed": "7",
            "optim.packs_per_step": "4",
            "trainer.max_steps": "300",
            "model.n_blocks": "3",
        }
        trial = Trial(
            f"other overrides on one: {', '.join(f'`{key}`' for key in keys)}",
            "both hosts refuse, naming key, both values, hosts and ranks",
        )
        for key, value in keys.items():
            self.refused(
                trial, self.agents("differ", other=[f"{key}={value}"]), f"{key} is", f"and {value} for", *NAMES
            )
        trial.check(not (self.folder / "runs/differ/metrics.jsonl").exists(), "something was trained")
        return trial

    def other_store(self) -> Trial:
        trial = Trial("another store under the same path on one", "both refuse, naming both fingerprints")
        path = self.alone.store.path
        records = [f">{number}\n{'ACDEFGHIKLMNPQRSTVWY'[number % 7 :] * 3}\n" for number in range(60)]
        inputs = {}
        for number, split in enumerate(SPLITS):
            inputs[split] = self.folder / f"{split}.fasta"
            inputs[split].write_text("".join(records[number::3]))
        build_store(inputs, self.folder / "other.h5")
        self.hosts[1].run("mount", "--bind", str(self.folder / "other.h5"), str(path))
        try:
            self.refused(trial, self.agents("store"), "data_fingerprint is", *NAMES)
        finally:
            self.hosts[1].run("umount", str(path))
        return trial

    def no_store(self) -> Trial:
        trial = Trial("no store on one", "it names the file, and the other one the host and the file")
        said = self.refused(trial, self.agents("missing", other=["data.path=nowhere.h5"]), "nowhere.h5")
        trial.check("rank 1 on host-b: nowhere.h5" in said[0], f"host-a says {said[0]}")
        return trial

    def read_only(self) -> Trial:
        trial = Trial("run folder read-only on one", "it names the file, and the other one the host and the file")
        runs = self.folder / "runs"
        runs.mkdir(exist_ok=True)
        self.hosts[1].run("mount", "--bind", "-o", "ro", str(runs), str(runs))
        try:
            said = self.refused(trial, self.agents("readonly"), "Read-only file system", "runs/readonly")
            trial.check("rank 1 on host-b: " in said[0], f"host-a says {said[0]}")
        finally:
            self.hosts[1].run("umount", str(runs))
        return trial

    def cut_short(self) -> Trial:
        trial = Trial("network cut for 20 s, less than `trainer.timeout=60`", "goes on; the bits of one process")
        agents = self.agents("short", "trainer.timeout=60")
        self.cut("short", agents, 20)
        self.through(trial, "short", agents)
        return trial

    def cut_long(self) -> Trial:
        trial = Trial(
            "network cut for 15 s, longer than `trainer.timeout=6`",
            "both start again from the last checkpoint; the bits of one process",
        )
        agents = self.agents("long", "trainer.timeout=6", restarts=3)
        self.cut("long", agents, 15)
        said = self.through(trial, "long", agents)
        trial.check("a process was lost: all start again" in said[0] + said[1], "nobody started again")
        return trial

    def cut(self, name: str, agents: Sequence[Process], seconds: float) -> None:
        self.wait_for_step(name, 10, agents)
        self.hosts[1].unplug()
        time.sleep(seconds)
        self.hosts[1].plug_in()

    def lost(self) -> Trial:
        trial = Trial(
            "one host's processes killed, its torchrun started again",
            "both start again from the last checkpoint; the bits of one process",
        )
        agents = self.agents("lost", restarts=3)
        self.wait_for_step("lost", 10, agents)
        for process in (agents[1].pid, *children_of(agents[1])):
            os.kill(process, signal.SIGKILL)
        agents[1].communicate(timeout=60)
        agents[1] = self.agent(self.hosts[1], "lost", restarts=3)
        self.through(trial, "lost", agents)
        return trial

    def joins(self) -> Trial:
        trial = Trial(
            "a second host joins, `--nnodes=1:2` and `run.fresh=true`",
            "both go on from the last checkpoint; the bits of one process",
        )
        self.port += 1
        more = ("run.fresh=true", f"trainer.max_steps={STEPS}")
        first = self.agent(self.hosts[0], "joins", *more, nodes="1:2")
        self.wait_for_step("joins", 10, [first])
        agents = [first, self.agent(self.hosts[1], "joins", *more, nodes="1:2")]
        said = self.through(trial, "joins", agents)
        trial.check("2 process(es)" in said[0] + said[1], "it never joined")
        trial.check(not (self.folder / "runs/joins.1").exists(), "the run was begun anew")
        return trial

    def told(self) -> Trial:
        trial = Trial(
            "SIGTERM to the torchrun of one",
            "both stop after the same step with a checkpoint, and `stopped.json` names the host; the bits of one "
            "process once they were started again",
        )
        agents = self.agents("told")
        self.wait_for_step("told", 10, agents)
        agents[1].send_signal(signal.SIGTERM)
        agents[1].communicate(timeout=60)
        until = time.monotonic() + 60
        while children_of(agents[0]) and time.monotonic() < until:
            time.sleep(0.05)
        trial.check(not children_of(agents[0]), "the other host's process does not stop")
        agents[0].send_signal(signal.SIGKILL)  # it waits for the other one, for five minutes, deaf to other signals
        agents[0].communicate(timeout=60)
        file = self.folder / "runs/told/stopped.json"
        stopped = json.loads(file.read_text()) if file.is_file() else {}
        trial.check(stopped.get("reason") == "SIGTERM", f"stopped.json has {stopped}")
        trial.check("only host-b was told" in stopped.get("when", ""), f"stopped.json has {stopped}")
        self.through(trial, "told", self.agents("told"))
        return trial

    def clocks(self) -> Trial:
        trial = Trial("the clock of one host's rank an hour ahead, `trainer.max_time=30m`", "goes on to the end")
        self.port += 1
        agents = [
            self.agent(host, "clocks", "trainer.max_time=30m", module=module)
            for host, module in zip(self.hosts, ("protlig_dd.training", "scripts.clock_ahead"), strict=True)
        ]
        self.through(trial, "clocks", agents)
        return trial

    def no_name(self) -> Trial:
        trial = Trial(
            "one host cannot resolve the other's name",
            "it says so, and names `--local-addr`; the other one names the rank that did not start",
        )
        self.hosts[1].knows({"localhost": "127.0.0.1", "host-b": f"{NETWORK}.2"}, self.folder)
        said = self.refused(trial, self.agents("name", "trainer.timeout=8"))
        trial.check("host-a waited 8 s for rank 1, which did not start" in said[0], f"host-a says {said[0]}")
        trial.check("host-b cannot resolve host-a" in said[1] and "--local-addr" in said[1], f"host-b says {said[1]}")
        self.reset()
        return trial

    def loopback(self) -> Trial:
        trial = Trial(
            "one host has `127.0.1.1` for its own name, as Debian sets it up",
            "both say so, and name GLOO_SOCKET_IFNAME",
        )
        self.hosts[1].knows(addresses() | {"host-b": "127.0.1.1"}, self.folder)
        self.refused(trial, self.agents("loopback"), "host-b has 127.0.1.1", "GLOO_SOCKET_IFNAME")
        self.reset()
        return trial


TRIALS: dict[str, Callable[[Trials], Trial]] = {
    "alike": Trials.alike,
    "differ": Trials.differ,
    "other-store": Trials.other_store,
    "no-store": Trials.no_store,
    "read-only": Trials.read_only,
    "cut-short": Trials.cut_short,
    "cut-long": Trials.cut_long,
    "lost": Trials.lost,
    "joins": Trials.joins,
    "told": Trials.told,
    "clocks": Trials.clocks,
    "no-name": Trials.no_name,
    "loopback": Trials.loopback,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"of {', '.join(TRIALS)}; all without it")
    arguments = parser.parse_args()
    if unknown := set(arguments.trials) - TRIALS.keys():
        parser.error(f"no trial {', '.join(sorted(unknown))}; there are {', '.join(TRIALS)}")
    if missing := missing_here():
        parser.error(f"this machine lacks {missing}")
    done, chosen = [], arguments.trials or list(TRIALS)
    with two_hosts() as hosts, tempfile.TemporaryDirectory(prefix="host_trials.") as folder:
        trials = Trials(Path(folder).resolve(), hosts, start_python)
        with ProgressBar("trials", len(chosen)) as bar:
            for name in chosen:
                done.append(TRIALS[name](trials))
                bar.advance()
    print("\n| tried | what happens | as it should |\n| --- | --- | --- |")
    for trial in done:
        print(f"| {trial.what} | {trial.expected} | {'; '.join(trial.found) or 'yes'} |")
    return int(any(trial.found for trial in done))


if __name__ == "__main__":
    sys.exit(main())
