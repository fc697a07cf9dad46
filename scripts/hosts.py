"""Simulate hosts on one machine.

A simulated host has its own network, UTS and mount namespaces (see namespaces(7)), and so its own address, host name,
mounts and /etc/hosts.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.disturbed_runs import Process

NAMES = ("host-a", "host-b")
NETWORK = "10.77.0"
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as in scripts/slurm/train.sbatch
# the command after this prefix runs in new network, UTS and mount namespaces
APART = ("unshare", "--net", "--uts", "--mount")


@dataclass
class Host:
    """A simulated host.

    Args:
        holder: id of a process on the host. The host's namespaces exist at least as long as this process.
        start: function of (ARGUMENTS, folder) that starts `python ARGUMENTS` on the host, with this working folder and
            in a new process group.
    """

    name: str
    holder: int
    start: Callable[[list[str], Path], Process]

    def run(self, *command: str) -> None:
        """Run a command on this host.

        Raises:
            subprocess.CalledProcessError: the command failed.
        """
        namespaces = ["--net", "--uts", "--mount", f"--wdns={Path.cwd()}"]
        subprocess.run(
            ["nsenter", f"--target={self.holder}", *namespaces, *command], check=True, capture_output=True, text=True
        )

    def unplug(self) -> None:
        self.run("ip", "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        self.run("ip", "link", "set", "eth0", "up")

    def set_hosts_file(self, names: dict[str, str], folder: Path) -> None:
        """Set the names that this host can resolve, by mounting a new file over its /etc/hosts.

        Args:
            names: {name: address}.
            folder: for the new file.
        """
        file = folder / f"hosts.{self.name}"
        file.write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        self.run("mount", "--bind", str(file), "/etc/hosts")


def missing_requirements() -> str | None:
    """Return the programs or the right that this machine lacks for simulated hosts, or None if it lacks nothing."""
    if missing := [name for name in ("ip", "nsenter", "unshare", "mount") if shutil.which(name) is None]:
        return f"{', '.join(missing)} (iproute2, util-linux)"
    attempt = [*APART, "ip", "link", "add", "try", "type", "bridge"]
    allowed = subprocess.run(attempt, capture_output=True, check=False).returncode == 0
    return None if allowed else "the right to create network namespaces (root)"


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Start two simulated hosts in one network, yield them, and kill their holders at the end of the block."""
    holders = [subprocess.Popen([*APART, "sleep", "infinity"]) for _ in (*NAMES, "switch")]
    try:
        *pids, switch = [wait_until_apart(holder.pid) for holder in holders]
        hosts = [Host(name, pid, start_on(pid)) for name, pid in zip(NAMES, pids, strict=True)]
        join_hosts(hosts, switch)
        yield hosts
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def join_hosts(hosts: Sequence[Host], switch: int) -> None:
    """Connect hosts to one network, and set their host names and addresses.

    Args:
        switch: id of a process in another network namespace. This namespace becomes the switch between the hosts.
    """
    inside = ["nsenter", f"--target={switch}", "--net", "ip", "link"]
    subprocess.run([*inside, "add", "bridge", "type", "bridge"], check=True)
    subprocess.run([*inside, "set", "bridge", "up"], check=True)
    for number, host in enumerate(hosts, 1):
        port = f"port{number}"
        ends = ["add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.holder)]
        subprocess.run([*inside, *ends], check=True)
        subprocess.run([*inside, "set", port, "master", "bridge", "up"], check=True)
        host.run("hostname", host.name)
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        host.plug_in()


def addresses() -> dict[str, str]:
    return {"localhost": "127.0.0.1"} | {name: f"{NETWORK}.{number}" for number, name in enumerate(NAMES, 1)}


def wait_until_apart(holder: int) -> int:
    """Wait until a process that was started with `APART` has left the caller's network namespace. Return its id.

    Args:
        holder: id of the started process.
    """
    current = Path("/proc/self/ns/net").readlink()
    while Path(f"/proc/{holder}/ns/net").readlink() == current:
        time.sleep(0.01)
    return holder


def start_on(holder: int) -> Callable[[list[str], Path], Process]:
    def start(arguments: list[str], folder: Path) -> Process:
        inside = ["nsenter", f"--target={holder}", "--net", "--uts", "--mount", f"--wdns={folder}"]
        return subprocess.Popen(
            [*inside, sys.executable, *arguments],
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        )

    return start
