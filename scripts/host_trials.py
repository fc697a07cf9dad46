"""Train on two simulated hosts that differ (settings, data, clocks) or lose their connection; check the results.

    python -m scripts.host_trials             run all trials of docs/multinode.md (a few minutes)
    python -m scripts.host_trials cut-long    run only the trial cut-long

Needs root and iproute2. scripts/hosts.py simulates the hosts on this machine; both hosts see the same folders. torchrun
starts the ranks as in scripts/slurm/train.sbatch. Prints a Markdown table; the exit code is 1 if a trial did not give
the expected result.
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
from scripts.hosts import NAMES, NETWORK, Host, addresses, missing_requirements, two_hosts

STEPS = 100
IDENTICAL = "bit-identical to one process"
RESTARTED = f"both restart from the last checkpoint; {IDENTICAL}"
FILE_NAMED = "its error names the file; the other host's error names host and file"
EXIT_WITHIN = 60  # seconds that a failing launch may take in addition to the `timeout` of `Trials.fail`


@dataclass
class Trial:
    """A fault, its expected result, and the deviations from this result that were found."""

    fault: str
    expected: str
    found: list[str] = field(default_factory=list)
    """Deviations from the expected result."""

    def check(self, passed: object, deviation: str) -> None:
        if not passed:
            self.found.append(deviation)


class Trials:
    """Train runs of 100 steps on two hosts, and compare them with a run in one process.

    Args:
        folder: for all runs; both hosts use it.
        start_here: function that starts the run in one process, outside the simulated hosts. start_here(ARGUMENTS,
            folder) starts `python ARGUMENTS` in this working folder.
    """

    def __init__(self, folder: Path, hosts: Sequence[Host], start_here: Callable[[list[str], Path], Process]) -> None:
        self.folder, self.hosts, self.port = folder, hosts, 29400
        self.alone = Campaign(folder, short=True, seed=0, start_process=start_here)
        self.alone.steps = STEPS
        self.reset()

    def reset(self) -> None:
        """Connect all hosts to the network and restore their /etc/hosts."""
        for host in self.hosts:
            host.plug_in()
            host.set_hosts_file(addresses(), self.folder)

    def agent(
        self,
        host: Host,
        name: str,
        *overrides: str,
        module: str = "protlig_dd.training",
        restarts: int = 0,
        nodes: str = "2",
    ) -> Process:
        """Start an agent, which is a torchrun, on one host. It starts one rank."""
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
        """Start an agent on both hosts, with one rank each, and return both agents.

        Args:
            other: additional overrides for the second host only.
        """
        self.port += 1
        first, second = self.hosts
        return [
            self.agent(first, name, *overrides, restarts=restarts),
            self.agent(second, name, *overrides, *other, restarts=restarts),
        ]

    def finish(self, trial: Trial, name: str, agents: Sequence[Process]) -> list[str]:
        """Wait for a run that should finish, and return one text for each host: its stdout and stderr.

        Check that the exit codes are 0 and that the run is bit-identical to the run in one process.
        """
        outputs = ["\n".join(process.communicate(timeout=300)) for process in agents]
        codes = [process.returncode for process in agents]
        last_lines = [text.strip().splitlines()[-1:] for text in outputs]
        trial.check(codes == [0] * len(agents), f"exit codes {codes}: {last_lines}")
        trial.check(self.alone.matches_undisturbed(name), "not bit-identical to one process")
        return outputs

    def fail(self, trial: Trial, agents: Sequence[Process], *parts: str, timeout: int = 20) -> list[str]:
        """Wait for a launch that should fail on both hosts, and return the error message of each host.

        Check that both hosts exit with code 1 in less than `timeout` + EXIT_WITHIN seconds, and that each message has
        at most 10 lines, contains all `parts` and does not contain a message of gloo.
        """
        began, messages = time.monotonic(), []
        for host, process in zip(self.hosts, agents, strict=True):
            _, errors = process.communicate(timeout=300)
            lines = [line for line in errors.splitlines() if line.startswith(("[rank", "error:"))]
            trial.check(process.returncode == 1, f"{host.name} exits with {process.returncode}")
            message = " ".join(lines)
            trial.check(all(part in message for part in parts), f"{host.name} prints {lines or errors[-300:]}")
            trial.check(len(lines) <= 10, f"{host.name} prints {len(lines)} lines")
            trial.check("gloo/" not in message, f"{host.name} prints gloo's own message: {lines}")
            messages.append(message)
        took = time.monotonic() - began
        trial.check(took < timeout + EXIT_WITHIN, f"took {took:.0f} s")
        return messages

    def wait_for_step(self, name: str, step: int, agents: Sequence[Process]) -> None:
        metrics = self.folder / "runs" / name / "metrics.jsonl"
        while all(process.poll() is None for process in agents):
            if metrics.is_file() and f'"step": {step},' in metrics.read_text():
                return
            time.sleep(0.01)

    def alike(self) -> Trial:
        trial = Trial("two hosts, undisturbed", f"{IDENTICAL} with the same `optim.packs_per_step`")
        self.finish(trial, "alike", self.agents("alike"))
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
            f"different overrides on one host: {', '.join(f'`{key}`' for key in keys)}",
            "both exit with an error that names the key, both values, the hosts and the ranks",
        )
        for key, value in keys.items():
            self.fail(trial, self.agents("differ", other=[f"{key}={value}"]), f"{key} is", f"and {value} for", *NAMES)
        trial.check(not (self.folder / "runs/differ/metrics.jsonl").exists(), "training started")
        return trial

    def other_store(self) -> Trial:
        trial = Trial("different stores under the same path", "both exit with an error that names both fingerprints")
        path = self.alone.store.path
        records = [f">{number}\n{'ACDEFGHIKLMNPQRSTVWY'[number % 7 :] * 3}\n" for number in range(60)]
        inputs = {}
        for number, split in enumerate(SPLITS):
            inputs[split] = self.folder / f"{split}.fasta"
            inputs[split].write_text("".join(records[number::3]))
        build_store(inputs, self.folder / "other.h5")
        self.hosts[1].run("mount", "--bind", str(self.folder / "other.h5"), str(path))
        try:
            self.fail(trial, self.agents("store"), "data_fingerprint is", *NAMES)
        finally:
            self.hosts[1].run("umount", str(path))
        return trial

    def no_store(self) -> Trial:
        trial = Trial("no store on one host", FILE_NAMED)
        errors = self.fail(trial, self.agents("missing", other=["data.path=nowhere.h5"]), "nowhere.h5")
        trial.check("rank 1 on host-b: nowhere.h5" in errors[0], f"host-a prints {errors[0]}")
        return trial

    def read_only(self) -> Trial:
        trial = Trial("run folder read-only on one host", FILE_NAMED)
        runs = self.folder / "runs"
        runs.mkdir(exist_ok=True)
        self.hosts[1].run("mount", "--bind", "-o", "ro", str(runs), str(runs))
        try:
            errors = self.fail(trial, self.agents("readonly"), "Read-only file system", "runs/readonly")
            trial.check("rank 1 on host-b: " in errors[0], f"host-a prints {errors[0]}")
        finally:
            self.hosts[1].run("umount", str(runs))
        return trial

    def cut_short(self) -> Trial:
        trial = Trial("network cut for 20 s, less than `trainer.timeout=60`", f"training continues; {IDENTICAL}")
        agents = self.agents("short", "trainer.timeout=60")
        self.cut("short", agents, 20)
        self.finish(trial, "short", agents)
        return trial

    def cut_long(self) -> Trial:
        trial = Trial("network cut for 15 s, longer than `trainer.timeout=6`", RESTARTED)
        agents = self.agents("long", "trainer.timeout=6", restarts=3)
        self.cut("long", agents, 15)
        outputs = self.finish(trial, "long", agents)
        trial.check("a process was lost: restarting all processes" in outputs[0] + outputs[1], "no host restarted")
        return trial

    def cut(self, name: str, agents: Sequence[Process], seconds: float) -> None:
        """Wait until a run has logged step 10, then disconnect the second host from the network for `seconds`."""
        self.wait_for_step(name, 10, agents)
        self.hosts[1].unplug()
        time.sleep(seconds)
        self.hosts[1].plug_in()

    def lost(self) -> Trial:
        trial = Trial("one host's processes killed and its torchrun relaunched", RESTARTED)
        agents = self.agents("lost", restarts=3)
        self.wait_for_step("lost", 10, agents)
        for process in (agents[1].pid, *children_of(agents[1])):
            os.kill(process, signal.SIGKILL)
        agents[1].communicate(timeout=60)
        agents[1] = self.agent(self.hosts[1], "lost", restarts=3)
        self.finish(trial, "lost", agents)
        return trial

    def joins(self) -> Trial:
        trial = Trial(
            "a second host joins, `--nnodes=1:2` and `run.fresh=true`",
            f"both continue from the last checkpoint; {IDENTICAL}",
        )
        self.port += 1
        options = ("run.fresh=true", f"trainer.max_steps={STEPS}")
        first = self.agent(self.hosts[0], "joins", *options, nodes="1:2")
        self.wait_for_step("joins", 10, [first])
        agents = [first, self.agent(self.hosts[1], "joins", *options, nodes="1:2")]
        outputs = self.finish(trial, "joins", agents)
        trial.check("2 process(es)" in outputs[0] + outputs[1], "the second host never joined")
        trial.check(not (self.folder / "runs/joins.1").exists(), "the run was started from step 0 again")
        return trial

    def terminated(self) -> Trial:
        trial = Trial(
            "SIGTERM to the torchrun of one host",
            "both stop after the same step with a checkpoint, and `stopped.json` names the host; after a relaunch "
            f"{IDENTICAL}",
        )
        agents = self.agents("terminated")
        self.wait_for_step("terminated", 10, agents)
        agents[1].send_signal(signal.SIGTERM)
        agents[1].communicate(timeout=60)
        until = time.monotonic() + 60
        while children_of(agents[0]) and time.monotonic() < until:
            time.sleep(0.05)
        trial.check(not children_of(agents[0]), "the other host's process does not stop")
        agents[0].send_signal(signal.SIGKILL)  # while torchrun waits for the other host, only SIGKILL ends it
        agents[0].communicate(timeout=60)
        file = self.folder / "runs/terminated/stopped.json"
        stopped = json.loads(file.read_text()) if file.is_file() else {}
        trial.check(stopped.get("reason") == "SIGTERM", f"stopped.json has {stopped}")
        trial.check("only host-b was told" in stopped.get("when", ""), f"stopped.json has {stopped}")
        self.finish(trial, "terminated", self.agents("terminated"))
        return trial

    def clocks(self) -> Trial:
        trial = Trial("one rank's clock an hour ahead, `trainer.max_time=30m`", f"training finishes; {IDENTICAL}")
        self.port += 1
        agents = [
            self.agent(host, "clocks", "trainer.max_time=30m", module=module)
            for host, module in zip(self.hosts, ("protlig_dd.training", "scripts.clock_ahead"), strict=True)
        ]
        self.finish(trial, "clocks", agents)
        return trial

    def no_name(self) -> Trial:
        trial = Trial(
            "one host cannot resolve the other's name",
            "its error says so and names `--local-addr`; the other host's error names the missing rank",
        )
        self.hosts[1].set_hosts_file({"localhost": "127.0.0.1", "host-b": f"{NETWORK}.2"}, self.folder)
        errors = self.fail(trial, self.agents("name", "trainer.timeout=8"))
        trial.check("host-a waited 8 s for rank 1, which did not start" in errors[0], f"host-a prints {errors[0]}")
        trial.check(
            "host-b cannot resolve host-a" in errors[1] and "--local-addr" in errors[1], f"host-b prints {errors[1]}"
        )
        self.reset()
        return trial

    def loopback(self) -> Trial:
        trial = Trial(
            "one host resolves its own name to `127.0.1.1`, as on Debian",
            "both exit with an error that says so and names GLOO_SOCKET_IFNAME",
        )
        self.hosts[1].set_hosts_file(addresses() | {"host-b": "127.0.1.1"}, self.folder)
        message = "host-b: other hosts cannot reach the address of its own name (127.0.1.1)"
        self.fail(trial, self.agents("loopback"), message, "GLOO_SOCKET_IFNAME")
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
    "told": Trials.terminated,
    "clocks": Trials.clocks,
    "no-name": Trials.no_name,
    "loopback": Trials.loopback,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"choose from {', '.join(TRIALS)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.trials) - TRIALS.keys():
        parser.error(f"no trial {', '.join(sorted(unknown))}; choose from {', '.join(TRIALS)}")
    if missing := missing_requirements():
        parser.error(f"this machine lacks {missing}")
    done, selected = [], arguments.trials or list(TRIALS)
    with two_hosts() as hosts, tempfile.TemporaryDirectory(prefix="host_trials.") as folder:
        trials = Trials(Path(folder).resolve(), hosts, start_python)
        with ProgressBar("trials", len(selected)) as bar:
            for name in selected:
                done.append(TRIALS[name](trials))
                bar.advance()
    print("\n| trial | expected result | as expected |\n| --- | --- | --- |")
    for trial in done:
        print(f"| {trial.fault} | {trial.expected} | {'; '.join(trial.found) or 'yes'} |")
    return int(any(trial.found for trial in done))


if __name__ == "__main__":
    sys.exit(main())
