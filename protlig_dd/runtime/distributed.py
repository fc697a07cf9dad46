"""The processes of a run, as torchrun starts them; one process is the same code with nothing to wait for."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    rank: int
    world_size: int
    local_rank: int

    @property
    def first(self) -> bool:
        """True for the one rank that writes and prints."""
        return self.rank == 0


def processes_from_environment() -> Processes:
    """Rank, world size and local rank that torchrun set; 0, 1 and 0 without it."""
    return Processes(*(int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


def join_group(processes: Processes, device: torch.device) -> None:
    """Join torchrun's process group: nccl between GPUs, gloo between CPUs. Nothing to do for one process."""
    if processes.world_size == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


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
