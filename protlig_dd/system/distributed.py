"""The processes of a run, started by torchrun or by `launch_ranks`.

A single process runs the same code without waiting for others.
"""

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
_store: Store | None = None  # the store through which the ranks of this process's group found one another


@dataclass(frozen=True)
class Processes:
    """The rank of this process among the processes of a run, and how the processes were launched."""

    rank: int
    world_size: int
    local_rank: int
    restart: int = 0
    """How often the launcher has restarted the processes."""
    launch: str | None = None
    """The launcher's run id; None without a launcher."""
    job: str | None = None
    """The id of the Slurm job that this process belongs to; None outside Slurm."""
    requeues: int = 0
    """How often Slurm has requeued the job."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints for all ranks."""
        return self.rank == 0


ALONE = Processes(0, 1, 0)


def processes_from_environment() -> Processes:
    """Return the `Processes` that the environment variables of torchrun and Slurm describe.

    Without torchrun there is one process.

    Raises:
        ValueError: a variable that must be a number is not a number.
    """
    names = (
        ("RANK", 0),
        ("WORLD_SIZE", 1),
        ("LOCAL_RANK", 0),
        ("TORCHELASTIC_RESTART_COUNT", 0),
        ("SLURM_RESTART_COUNT", 0),
    )
    numbers = []
    for name, default in names:
        text = os.environ.get(name) or str(default)
        if not text.isdecimal():
            raise ValueError(f"{name}={text}: must be a number; unset it, or start with torchrun, which sets it")
        numbers.append(int(text))
    rank, world_size, local_rank, restart, requeues = numbers
    launch, job = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("SLURM_JOB_ID")
    return Processes(rank, world_size, local_rank, restart, launch, job, requeues)


def join_group(processes: Processes, device: torch.device, timeout: int, store: Store | None) -> None:
    """Make `device` the current device, and join the process group if there are several processes.

    Tensors on GPUs are exchanged by nccl, tensors on CPUs by gloo. A process that has joined already does not join
    again.

    Args:
        timeout: seconds that a rank waits for the other ranks before it raises an error.
        store: the store of the Meeting (see meeting.py), through which the ranks find one another.

    Raises:
        ValueError: the ranks cannot connect; the message names host and rank.
    """
    if device.type == "cuda":
        # a single process needs a current device too, because CUDA graphs and new streams use the current device
        torch.cuda.set_device(device)
    if processes.world_size == 1 or dist.is_initialized():
        return
    global _store
    _store = store
    post_status("")
    backend, bound_device = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=processes.rank,
            world_size=processes.world_size,
            timeout=limit,
            device_id=bound_device,
        )
    except RuntimeError as error:
        raise ValueError(
            f"rank {processes.rank} on {host_name()} cannot connect to the other ranks: {in_one_line(error)}; "
            "with several hosts, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that connects them"
        ) from error


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Post to the store what this rank does inside the block.

    Other ranks that reach their timeout while they wait for this rank include the text in their error message.
    """
    post_status(what)
    try:
        yield
    finally:
        post_status("")


def post_status(what: str) -> None:
    """Post to the store what this rank is doing. The empty text clears the status.

    Other ranks that wait for this rank in vain include the text in their error message.
    """
    if _store is not None:
        with contextlib.suppress(dist.DistError):  # the process that serves the store is gone
            _store.set(f"status {os.environ['RANK']}", f"on {host_name()} {what}" if what else "")


def statuses_of_others() -> list[str]:
    """Return the posted statuses of the other ranks. After 5 seconds, return those that the store has returned so far.

    The store does not answer if the process that serves it (rank 0 or torchrun) is gone, or if the network is cut.
    """
    found: list[str] = []

    def read() -> None:
        assert _store is not None
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        for other in range(world_size):
            if other != rank and (what := _store.get(f"status {other}").decode()):
                found.append(f"rank {other} {what}")

    if _store is not None:
        within(5, read)
        acknowledge()
    return list(found)


def acknowledge() -> None:
    """Record in the store that this rank has read why the run failed, or has failed itself.

    If the ranks are on several hosts, rank 0 waits for the records of all other ranks before it exits, because a store
    that rank 0 serves closes when rank 0 exits.
    """
    if _store is not None:
        within(5, lambda: _store.set(f"heard {os.environ['RANK']}", ""))


def within(seconds: int, action: Callable[[], object]) -> None:
    """Run an action on the store, and return after `seconds` even if the action has not finished.

    If the network is cut, torch's client of the store may wait for ever, whatever timeout is set.
    """

    def run() -> None:
        with contextlib.suppress(dist.DistError):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def host_name() -> str:
    """Return Slurm's name of this node, or else the host's own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def launcher_name() -> str:
    """Return a name for the torchrun agent that started this rank: the host, and the agent's folder of error files.

    Each agent creates a folder of its own, so no two agents have the same name.
    """
    return f"{host_name()} {Path(os.environ.get('TORCHELASTIC_ERROR_FILE', '')).parent.parent.parent}"


class RankLostError(ValueError):
    """Another rank is gone or did not answer in time."""


@contextlib.contextmanager
def lost_ranks_named(where: str, limit: str = "trainer.timeout") -> Iterator[None]:
    """Turn torch's errors about a rank that is gone or does not answer into an error message of one line.

    Args:
        where: the step and this rank, for the message.
        limit: how long a rank waits for the other ranks, as a config key or a duration; for the message.

    Raises:
        RankLostError: the message includes the statuses that other ranks have posted, if any.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error) for word in ("gloo", "NCCL", "process group")):
            raise
        # keep torch's text, but drop gloo's line numbers and advice
        reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", " ".join(str(error).split()))
        details = "; ".join(statuses_of_others()) or reason
        raise RankLostError(f"{where}: another rank is gone or did not answer within {limit} ({details})") from error


class OtherRankError(ValueError):
    """An error of another rank, which ends this rank too."""

    def __init__(self, rank: int, host: str, message: str) -> None:
        super().__init__(f"rank {rank} on {host}: {message}")


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_first(value: Any) -> Any:
    """Return rank 0's value on every rank. The call is also a barrier."""
    return gather_objects(value)[0]


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action on every rank and return this rank's result. If the action fails on any rank, all ranks raise.

    Raises:
        OtherRankError: the action succeeded on this rank but failed on another. The message names the first rank that
            failed, its host and its error.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    failures = gather_objects(None if failure is None else (host_name(), in_one_line(failure)))
    if any(failures):
        acknowledge()
    if failure is not None:
        raise failure
    for rank, other in enumerate(failures):
        if other is not None:
            raise OtherRankError(rank, *other)
    return cast(T, result)


def in_one_line(error: BaseException) -> str:
    """Return an error's text in one line, after the name of the error's type.

    The name is left out for a ValueError or OSError, because their texts are complete messages.
    """
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
