"""How ranks start together: before they form a process group they compare, through torchrun's store, what each was
started with, so that a difference or a failure is named on every host.
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

SAY_EVERY = 30.0  # seconds of waiting between two lines about it
RESOLVE_WITHIN = 30.0  # seconds after which a host name that cannot be resolved is an error
READ_WITHIN = 10.0  # seconds that a rank that failed waits for the others to come and read why
COME_WITHIN = 120.0  # the same where there are several hosts, which read their libraries from slow disks
SHOWN = 5  # differences in one message
SHOWN_LETTERS = 80  # of a value


class RankMissingError(ValueError):
    """A rank does not come in time."""


class Meeting:
    """The ranks of one start. One rank alone has nothing to compare.

    Used as a context manager: an exception before the ranks have agreed is posted, so that the others raise too
    instead of waiting for this one.

    Args:
        processes: this rank, as torchrun has set it.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes, self.host = processes, host_name()
        self.hosts: list[str] = []
        """The host of each rank, once they have agreed."""
        self.agents = [launcher_name()]
        """The launcher of each rank."""
        self.restart = processes.restart
        """How often any of them has started its ranks again; that of a host which joins later knows of none."""
        self.store: Store | None = None
        self._came = self._agreed = False

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or self.processes.world_size == 1:
            return
        with contextlib.suppress(ValueError, OverflowError, DistError):  # the error itself is what to report
            if not self._came:
                self._connect(self._patience())
                self._post({"failed": in_one_line(error)})
                self._has_read()
            if self.store is not None and not isinstance(error, RankLostError):  # of that, no other needs to know
                late = self._agreed or isinstance(error, RankMissingError)
                seconds = READ_WITHIN if late else self._patience()
                self._wait_for_others("heard" if self._agreed else "read", seconds)

    def agree(self, facts: Mapping[str, Any], timeout: int | float) -> None:
        """Wait for all ranks and compare what each was started with; the first time that it is called.

        Args:
            facts: name -> JSON value.
            timeout: seconds to wait for the others.

        Raises:
            ValueError: a rank does not come, or was started with something else; names hosts, ranks and both values.
                Or the host of a rank cannot be reached by its own name.
            OtherRankError: a rank failed before it came here; names host, rank and what it met.
        """
        if self.processes.world_size == 1 or self.hosts:
            return
        self._came = True
        self._connect(timeout)
        own = {"loopback": loopback_name(), "agent": self.agents[0], "restart": self.restart}
        self._post({"facts": dict(facts), **own})
        notes = self._read(timeout)
        for rank, note in notes.items():
            if "failed" in note:
                raise OtherRankError(rank, note["host"], note["failed"])
        self.hosts, self.agents = ([notes[rank][key] for rank in range(len(notes))] for key in ("host", "agent"))
        self.restart = max(note["restart"] for note in notes.values())
        if differences := self._differences([notes[rank]["facts"] for rank in range(len(notes))]):
            more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            raise ValueError(f"the ranks were not started alike: {'; '.join(differences[:SHOWN])}{more}")
        unreachable = {note["host"]: note["loopback"] for note in notes.values() if note["loopback"]}
        if unreachable and len(set(self.hosts)) > 1:
            host, address = next(iter(unreachable.items()))
            raise ValueError(
                f"{host} has {address} for its own name, where no other host reaches it: on each host export "
                "GLOO_SOCKET_IFNAME=INTERFACE, the one that joins the hosts (ip -brief address lists them)"
            )
        self._agreed = True

    def _differences(self, facts: list[dict[str, Any]]) -> list[str]:
        """Of every rank from rank 0; of ranks that differ alike, the first."""
        found: dict[tuple[str, str], str] = {}
        for rank, other in enumerate(facts):
            for key in sorted({*facts[0], *other}):
                mine, theirs = shown(facts[0].get(key), other.get(key))
                if facts[0].get(key) != other.get(key):
                    found.setdefault(
                        (key, theirs),
                        f"{key} is {mine} for rank 0 on {self.hosts[0]} and {theirs} for rank {rank} on "
                        f"{self.hosts[rank]}",
                    )
        return list(found.values())

    def _connect(self, timeout: int | float) -> None:
        """Open torchrun's store: rank 0 serves it, or torchrun does.

        Raises:
            ValueError: the host of rank 0 cannot be resolved or reached.
        """
        processes = self.processes
        address, number = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if not address or not number.isdecimal():
            raise ValueError(
                f"WORLD_SIZE={processes.world_size}, but MASTER_ADDR={address} and MASTER_PORT={number}: torchrun sets "
                "all; unset them, or start with torchrun"
            )
        port = int(number)
        torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = processes.first and not torchruns
        if not serves:
            self._reach(address, port, timeout)
        store = TCPStore(
            "localhost" if serves else address,
            port,
            processes.world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        # torchrun's own store outlives a restart, and with it what the ranks before have left there
        self.store = PrefixStore(f"meeting {processes.restart}" if torchruns else "meeting", store)

    def _reach(self, address: str, port: int, timeout: int | float) -> None:
        """Wait until the store listens; torch's own client would wait without a word, and print what it meets."""
        began = said = time.monotonic()
        while True:
            try:
                socket.create_connection((address, port), timeout=5).close()
            except OSError as error:
                waited = time.monotonic() - began
                if isinstance(error, socket.gaierror) and waited > min(timeout, RESOLVE_WITHIN):
                    raise ValueError(
                        f"{self.host} cannot resolve {address}, the host of rank 0: enter it in /etc/hosts, or start "
                        "torchrun on each host with --local-addr=ADDRESS, its own address"
                    ) from error
                if waited > timeout:
                    raise ValueError(
                        f"{self.host} did not reach rank 0 at {address}:{port} within {timeout:g} s: {error}"
                    ) from error
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    self._say(f"{self.host} waits for rank 0 at {address}:{port}, {waited:.0f} s so far ({error})")
                time.sleep(0.2)
            else:
                return

    def _post(self, note: dict[str, Any]) -> None:
        assert self.store is not None
        self.store.set(f"rank {self.processes.rank}", json.dumps({"host": self.host} | note))

    def _read(self, timeout: int | float) -> dict[int, dict[str, Any]]:
        """The note of every rank, or of those that were there when one had failed.

        Raises:
            ValueError: one does not come.
        """
        assert self.store is not None
        began = said = time.monotonic()
        notes: dict[int, dict[str, Any]] = {}
        while True:
            missing = [rank for rank in range(self.processes.world_size) if rank not in notes]
            for rank in missing:
                if self.store.check([f"rank {rank}"]):
                    notes[rank] = json.loads(self.store.get(f"rank {rank}"))
            if len(notes) == self.processes.world_size or any("failed" in note for note in notes.values()):
                self._has_read()
                return notes
            ranks = ", ".join(str(rank) for rank in missing if rank not in notes)
            waited = time.monotonic() - began
            if waited > timeout:
                raise RankMissingError(f"{self.host} waited {timeout:g} s for rank {ranks}, which did not start")
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                self._say(f"{self.host} waits for rank {ranks} to start, {waited:.0f} s so far")
            time.sleep(0.05)

    def _has_read(self) -> None:
        assert self.store is not None
        self.store.set(f"read {self.processes.rank}", "")

    def _wait_for_others(self, what: str, seconds: float) -> None:
        """Rank 0, with which the store ends, waits so long at most until all others have read why."""
        assert self.store is not None
        if self.processes.first and (what == "read" or len(set(self.hosts)) > 1):  # on one host, the launcher tells
            keys = [f"{what} {rank}" for rank in range(1, self.processes.world_size)]
            self.store.wait(keys, timedelta(seconds=seconds))

    def _patience(self) -> float:
        several = os.environ.get("LOCAL_WORLD_SIZE", str(self.processes.world_size)) != str(self.processes.world_size)
        return COME_WITHIN if several else READ_WITHIN

    def _say(self, message: str) -> None:
        if self.processes.local_rank == 0:  # once a host
            print(message, flush=True)


@functools.cache
def meeting_of(processes: Processes) -> Meeting:
    """The one of this process: its ranks meet once, whatever asks for it."""
    return Meeting(processes)


def loopback_name() -> str | None:
    """The address of this host's own name, if gloo would listen there and no other host could reach it.

    Source: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, createDefaultDevice.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return None
    try:
        address = str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except socket.gaierror:
        return "no address"
    return address if ipaddress.ip_address(address.partition("%")[0]).is_loopback else None


def shown(*values: Any) -> list[str]:
    """Texts of values; of long ones, from a little before where they differ."""
    texts = [str(value) for value in values]
    same = next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), 0)
    start = max(0, same - 30) if max(map(len, texts)) > SHOWN_LETTERS else 0
    cut = [text[start : start + SHOWN_LETTERS] for text in texts]
    return [
        f"{'...' if start else ''}{part}{'...' if start + SHOWN_LETTERS < len(text) else ''}"
        for part, text in zip(cut, texts, strict=True)
    ]
