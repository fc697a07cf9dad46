"""The processes of a run: torchrun starts them, or `launch_ranks`; one process is the same code without waiting."""

import contextlib
import datetime
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_store: Store | None = None  # through which the ranks of this process's group have found one another


@dataclass(frozen=True)
class Processes:
    rank: int
    world_size: int
    local_rank: int
    restart: int = 0
    """How often the launcher has started the processes again."""
    launch: str | None = None
    """The launcher's name for this launch; None without one."""
    job: str | None = None
    """The id of the Slurm job that this is part of."""
    requeues: int = 0
    """How often Slurm has queued that job again."""

    @property
    def first(self) -> bool:
        """True for the one rank that writes and prints."""
        return self.rank == 0


ALONE = Processes(0, 1, 0)


def processes_from_environment() -> Processes:
    """What torchrun set; one process without it.

    Raises:
        ValueError: something else than a number.
    """
    names = (
        ("RANK", 0),
        ("WORLD_SIZE", 1),
        ("LOCAL_RANK", 0),
        ("TORCHELASTIC_RESTART_COUNT", 0),
        ("SLURM_RESTART_COUNT", 0),
    )
    found = []
    for name, default in names:
        text = os.environ.get(name) or str(default)
        if not text.isdecimal():
            raise ValueError(f"{name}={text}: torchrun sets a number; unset it, or start with torchrun")
        found.append(int(text))
    rank, world_size, local_rank, restart, requeues = found
    launch, job = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("SLURM_JOB_ID")
    return Processes(rank, world_size, local_rank, restart, launch, job, requeues)


def join_group(processes: Processes, device: torch.device, timeout: int, store: Store | None) -> None:
    """Make the device this process's own, and join torchrun's process group, if it is one of several and has not yet:
    nccl between GPUs, gloo between CPUs.

    Args:
        timeout: seconds that a rank waits for the others before it gives up.
        store: through which the ranks find one another; of a Meeting.

    Raises:
        ValueError: they cannot connect; names host and rank.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for one process too: CUDA graphs and new streams are the current device's
    if processes.world_size == 1 or dist.is_initialized():
        return
    global _store
    _store = store
    leave_word("")
    backend, own = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            backend, store=store, rank=processes.rank, world_size=processes.world_size, timeout=limit, device_id=own
        )
    except RuntimeError as error:
        raise ValueError(
            f"rank {processes.rank} on {host_name()} cannot connect to the others: {in_one_line(error)}; "
            "with several hosts, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface that joins them"
        ) from error


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Leave word of what this rank does inside, which others may wait for longer than they wait."""
    leave_word(what)
    try:
        yield
    finally:
        leave_word("")


def leave_word(what: str) -> None:
    """For ranks that wait for this one in vain; "" for nothing."""
    if _store is not None:
        with contextlib.suppress(dist.DistError):  # rank 0, which serves the store, is gone
            _store.set(f"word {os.environ['RANK']}", f"on {host_name()} {what}" if what else "")


def words_of_others() -> list[str]:
    """What the other ranks have left word of, as far as the store tells within some seconds: rank 0, which serves it,
    may be gone, or the network cut.
    """
    found: list[str] = []

    def read() -> None:
        assert _store is not None
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        for other in range(world_size):
            if other != rank and (what := _store.get(f"word {other}").decode()):
                found.append(f"rank {other} {what}")

    if _store is not None:
        within(5, read)
        acknowledge()
    return list(found)


def acknowledge() -> None:
    """Let rank 0, with which the store ends, know that this rank has heard why others ended, or has its own reason."""
    if _store is not None:
        within(5, lambda: _store.set(f"heard {os.environ['RANK']}", ""))


def within(seconds: int, action: Callable[[], object]) -> None:
    """Ask the store for something, and go on after so long: where the network is cut, torch's client may wait without
    end, whatever timeout it was given.
    """

    def ask() -> None:
        with contextlib.suppress(dist.DistError):
            action()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)


def host_name() -> str:
    """Of this host: Slurm's name of the node, or its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def launcher_name() -> str:
    """Of the agent that has started this rank: its host and its folder of error files, which is new each time."""
    return f"{host_name()} {Path(os.environ.get('TORCHELASTIC_ERROR_FILE', '')).parent.parent.parent}"


class RankLostError(ValueError):
    """Another rank is gone, or did not answer in time."""


@contextlib.contextmanager
def losses_named(where: str, limit: str = "trainer.timeout") -> Iterator[None]:
    """Turn what torch says of a rank that is gone, or that others wait for in vain, into one line.

    Args:
        where: the step and this rank.
        limit: what a rank waits for the others.

    Raises:
        RankLostError: with the word that another rank has left, if one has.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error) for word in ("gloo", "NCCL", "process group")):
            raise
        # without gloo's line numbers and advice
        met = re.sub(r"^\[\S+\] |\. This is typically.*", "", " ".join(str(error).split()))
        words = "; ".join(words_of_others()) or met
        raise RankLostError(f"{where}: another rank is gone or did not answer within {limit} ({words})") from error


class OtherRankError(ValueError):
    """What another rank met, which ends this one too."""

    def __init__(self, rank: int, host: str, met: str) -> None:
        super().__init__(f"rank {rank} on {host}: {met}")


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank; also a barrier."""
    return gather_objects(value)[0]


def together(action: Callable[[], T]) -> T:
    """Run something on every rank that may fail on some; where it does, all raise.

    Raises:
        OtherRankError: on the ranks where it did not; names the first that failed, its host and what it met.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    told = gather_objects(None if failure is None else (host_name(), in_one_line(failure)))
    if any(told):
        acknowledge()
    if failure is not None:
        raise failure
    for rank, met in enumerate(told):
        if met is not None:
            raise OtherRankError(rank, *met)
    return cast(T, result)


def in_one_line(error: BaseException) -> str:
    """An error's text; with its type, where it is not one of ours, whose texts stand alone."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
