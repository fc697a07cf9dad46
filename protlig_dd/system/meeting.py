"""Compare all ranks of a launch before they form a process group.

The ranks compare their configs, data and versions through a key-value store, so that every host reports a difference or
a failure. torchrun or rank 0 serves this store.
"""

import contextlib
import functools
import ipaddress
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from protlig_dd.system.distributed import (
    OtherRankError,
    Processes,
    RankLostError,
    host_name,
    in_one_line,
    launcher_name,
)

REPORT_EVERY = 30.0  # seconds between two progress lines while waiting
RESOLVE_WITHIN = 30.0  # seconds after which a host name that cannot be resolved is an error
READ_WITHIN = 10.0  # after a failure: seconds to wait for the store, and for other ranks to arrive and read the error
READ_WITHIN_SEVERAL_HOSTS = 120.0  # the same for several hosts, which may load their libraries from slow disks
MAX_DIFFERENCES = 5  # differences listed in one message
MAX_VALUE_LENGTH = 80  # characters of a value in a message


class RankMissingError(ValueError):
    """A rank did not arrive in time."""


class Meeting:
    """The comparison of all ranks of one launch before they start. A single rank compares nothing.

    Call `agree` inside the Meeting's `with` block. If this rank raises an exception in the block before it calls
    `agree`, the exception is posted to the store, so that the other ranks raise too instead of waiting for this rank.

    Args:
        processes: the rank of this process, and how torchrun launched the process.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes, self.host = processes, host_name()
        self.hosts: list[str] = []
        """The host of each rank; empty until all ranks have arrived."""
        self.agents = [launcher_name()]
        """The name of each rank's launcher; until all ranks have arrived, only the name of this rank's launcher."""
        self.restart = processes.restart
        """The highest restart count of all launchers. The counts differ if a host joined later and started at 0."""
        self.store: Store | None = None
        self._arrived = self._agreed = False

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or self.processes.world_size == 1:
            return
        with contextlib.suppress(ValueError, OverflowError, DistError):  # only the original error is reported
            if not self._arrived:
                self._connect(self._wait_limit())
                self._post({"failed": in_one_line(error)})
                self._mark_as_read()
            if self.store is not None and not isinstance(error, RankLostError):  # no other rank reads a RankLostError
                late = self._agreed or isinstance(error, RankMissingError)
                seconds = READ_WITHIN if late else self._wait_limit()
                self._wait_for_others("heard" if self._agreed else "read", seconds)

    def agree(self, facts: Mapping[str, Any], timeout: int | float) -> None:
        """Wait for all ranks and compare their facts. Once the ranks have met, further calls do nothing.

        Args:
            facts: name -> JSON value, which must be equal on all ranks.
            timeout: seconds to wait for the other ranks.

        Raises:
            ValueError: a rank does not arrive, facts differ, or a host's own name resolves to an address that other
                hosts cannot reach. If facts differ, the message names hosts, ranks and both values.
            OtherRankError: a rank failed before it arrived. The message names that rank, its host and its error.
        """
        if self.processes.world_size == 1 or self.hosts:
            return
        self._arrived = True
        self._connect(timeout)
        launch = {"loopback": loopback_address(), "agent": self.agents[0], "restart": self.restart}
        self._post({"facts": dict(facts), **launch})
        # sort by rank, so that the messages of all ranks name the same host
        notes = dict(sorted(self._read(timeout).items()))
        for rank, note in notes.items():
            if "failed" in note:
                raise OtherRankError(rank, note["host"], note["failed"])
        self.hosts, self.agents = ([notes[rank][key] for rank in range(len(notes))] for key in ("host", "agent"))
        self.restart = max(note["restart"] for note in notes.values())
        if differences := self._differences([notes[rank]["facts"] for rank in range(len(notes))]):
            more = f"; and {len(differences) - MAX_DIFFERENCES} more" if len(differences) > MAX_DIFFERENCES else ""
            raise ValueError(
                f"the ranks differ in their config, data or versions: {'; '.join(differences[:MAX_DIFFERENCES])}{more}"
            )
        unreachable = {note["host"]: note["loopback"] for note in notes.values() if note["loopback"]}
        if unreachable and len(set(self.hosts)) > 1:
            host, address = next(iter(unreachable.items()))
            raise ValueError(
                f"{host}: other hosts cannot reach the address of its own name ({address}); on each host export "
                "GLOO_SOCKET_IFNAME=INTERFACE, the interface that connects the hosts (`ip -brief address` lists them)"
            )
        self._agreed = True

    def _differences(self, facts: list[dict[str, Any]]) -> list[str]:
        """Return a text for each value that differs from rank 0's value. It names the first rank that has the value."""
        found: dict[tuple[str, str], str] = {}
        for rank, other in enumerate(facts):
            for key in sorted({*facts[0], *other}):
                mine, theirs = abbreviated(facts[0].get(key), other.get(key))
                if facts[0].get(key) != other.get(key):
                    found.setdefault(
                        (key, theirs),
                        f"{key} is {mine} for rank 0 on {self.hosts[0]} and {theirs} for rank {rank} on "
                        f"{self.hosts[rank]}",
                    )
        return list(found.values())

    def _connect(self, timeout: int | float) -> None:
        """Connect to the store at MASTER_ADDR and MASTER_PORT. If torchrun does not serve the store, rank 0 does.

        Raises:
            ValueError: one of these variables is missing, or the host of rank 0 cannot be resolved or reached.
        """
        processes = self.processes
        address, number = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if not address or not number.isdecimal():
            raise ValueError(
                f"WORLD_SIZE={processes.world_size}, but MASTER_ADDR={address} and MASTER_PORT={number}: torchrun sets "
                "all of these; unset them, or start with torchrun"
            )
        port = int(number)
        torchrun_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = processes.first and not torchrun_serves
        if not serves:
            self._wait_for_store(address, port, timeout)
        store = TCPStore(
            "localhost" if serves else address,
            port,
            processes.world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        # torchrun's store keeps its keys across a restart, so each restart needs its own prefix
        self.store = PrefixStore(f"meeting {processes.restart}" if torchrun_serves else "meeting", store)

    def _wait_for_store(self, address: str, port: int, timeout: int | float) -> None:
        """Wait until the store accepts connections, and print a progress line every REPORT_EVERY seconds.

        torch's own client could wait for the store too, but it would print each failed attempt.
        """
        began = reported = time.monotonic()
        while True:
            try:
                socket.create_connection((address, port), timeout=5).close()
            except OSError as error:
                waited = time.monotonic() - began
                if isinstance(error, socket.gaierror) and waited > min(timeout, RESOLVE_WITHIN):
                    raise ValueError(
                        f"{self.host} cannot resolve {address}, the host of rank 0: add it to /etc/hosts, or start "
                        "torchrun on each host with --local-addr=ADDRESS, the address of that host"
                    ) from error
                if waited > timeout:
                    raise ValueError(
                        f"{self.host} did not reach rank 0 at {address}:{port} within {timeout:g} s: {error}"
                    ) from error
                if time.monotonic() - reported > REPORT_EVERY:
                    reported = time.monotonic()
                    self._print(f"{self.host} waits for rank 0 at {address}:{port}, {waited:.0f} s so far ({error})")
                time.sleep(0.2)
            else:
                return

    def _post(self, note: dict[str, Any]) -> None:
        assert self.store is not None
        self.store.set(f"rank {self.processes.rank}", json.dumps({"host": self.host} | note))

    def _read(self, timeout: int | float) -> dict[int, dict[str, Any]]:
        """Return the note (facts or failure) that each rank has posted, by rank. After a failure, notes may be missing.

        Raises:
            RankMissingError: a rank does not arrive in time.
        """
        assert self.store is not None
        began = reported = time.monotonic()
        notes: dict[int, dict[str, Any]] = {}
        while True:
            missing = [rank for rank in range(self.processes.world_size) if rank not in notes]
            for rank in missing:
                if self.store.check([f"rank {rank}"]):
                    notes[rank] = json.loads(self.store.get(f"rank {rank}"))
            if len(notes) == self.processes.world_size or any("failed" in note for note in notes.values()):
                self._mark_as_read()
                return notes
            ranks = ", ".join(str(rank) for rank in missing if rank not in notes)
            waited = time.monotonic() - began
            if waited > timeout:
                raise RankMissingError(f"{self.host} waited {timeout:g} s for rank {ranks}, which did not start")
            if time.monotonic() - reported > REPORT_EVERY:
                reported = time.monotonic()
                self._print(f"{self.host} waits for rank {ranks} to start, {waited:.0f} s so far")
            time.sleep(0.05)

    def _mark_as_read(self) -> None:
        assert self.store is not None
        self.store.set(f"read {self.processes.rank}", "")

    def _wait_for_others(self, mark: str, seconds: float) -> None:
        """On rank 0, wait at most `seconds` until all other ranks have set this mark.

        Rank 0 must not exit earlier, because a store that rank 0 serves closes when rank 0 exits.

        Args:
            mark: `read`: the rank has read the notes, or has posted its failure. `heard`: see
                `distributed.acknowledge`.
        """
        assert self.store is not None
        # after `agree`, rank 0 waits only if there are several hosts; on a single host, the launcher reports the error
        if self.processes.first and (mark == "read" or len(set(self.hosts)) > 1):
            keys = [f"{mark} {rank}" for rank in range(1, self.processes.world_size)]
            self.store.wait(keys, timedelta(seconds=seconds))

    def _wait_limit(self) -> float:
        several = os.environ.get("LOCAL_WORLD_SIZE", str(self.processes.world_size)) != str(self.processes.world_size)
        return READ_WITHIN_SEVERAL_HOSTS if several else READ_WITHIN

    def _print(self, message: str) -> None:
        if self.processes.local_rank == 0:  # one rank per host prints
            print(message, flush=True)


@functools.cache
def meeting_of(processes: Processes) -> Meeting:
    """Return this process's Meeting. Every call returns the same Meeting, because the ranks meet only once."""
    return Meeting(processes)


def loopback_address() -> str | None:
    """Return the address that this host's own name resolves to if it is a loopback address, else None.

    gloo listens at the address of this name, and other hosts cannot reach a loopback address. The result is "no
    address" if the name cannot be resolved, and None if GLOO_SOCKET_IFNAME sets the interface.

    Source: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, createDefaultDevice.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    try:
        address = str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except socket.gaierror:
        return "no address"
    return address if ipaddress.ip_address(address.partition("%")[0]).is_loopback else None


def abbreviated(*values: Any) -> list[str]:
    """Return the values as texts. Long texts are cut to a part that begins a little before their first difference."""
    texts = [str(value) for value in values]
    first_difference = next((i for i, chars in enumerate(zip(*texts, strict=False)) if len(set(chars)) > 1), 0)
    start = max(0, first_difference - 30) if max(map(len, texts)) > MAX_VALUE_LENGTH else 0
    parts = [text[start : start + MAX_VALUE_LENGTH] for text in texts]
    return [
        f"{'...' if start else ''}{part}{'...' if start + MAX_VALUE_LENGTH < len(text) else ''}"
        for part, text in zip(parts, texts, strict=True)
    ]
