"""The device, precision and kernels of a run on this machine."""

from pathlib import Path

import torch

from protlig_dd.config.train import TrainConfig
from protlig_dd.data.store import StoreGroup
from protlig_dd.model.mixers.attention import resolve_attention_backend
from protlig_dd.runs.metrics import import_wandb
from protlig_dd.system.device import (
    obstacle_to_compiling,
    problem_with_compiling,
    resolve_compile,
    resolve_device,
    resolve_precision,
)
from protlig_dd.system.distributed import Processes
from protlig_dd.system.launcher import recorded_environment
from protlig_dd.system.terminal import announce, console
from protlig_dd.training.context import Resolved
from protlig_dd.training.cost import is_worth_compiling


def resolve_machine(config: TrainConfig, processes: Processes) -> tuple[Resolved, torch.device]:
    """Return the device, precision and kernels of this process.

    In the returned `Resolved`, `data_path` and `data_fingerprint` are still empty.

    Raises:
        ValueError: this machine does not support the requested device, precision or kernel, or wandb is requested but
            not installed.
    """
    device = resolve_device(config.trainer.device, processes.local_rank)
    if processes.world_size > 1 and device.type == "cuda" and config.trainer.device not in ("auto", "cuda"):
        raise ValueError(
            f"trainer.device={config.trainer.device} with {processes.world_size} processes: use auto or cuda"
        )
    precision = resolve_precision(config.trainer.precision, device)
    network = config.model
    backend = resolve_attention_backend(
        network.attention_backend, device, precision, network.head_dim, network.positions
    )
    compiled = resolve_compile(config.trainer.compile, device)
    if config.trainer.compile == "auto" and device.type == "cuda" and not compiled:
        announce(f"not compiled: {obstacle_to_compiling(device)}", processes)
    if config.logger.wandb_project:
        import_wandb()
    return Resolved(str(device), precision, backend, compiled, processes.world_size, "", ""), device


def compiles_on_cpu(config: TrainConfig, path: Path, store: StoreGroup, processes: Processes) -> bool:
    """Whether a run on a CPU with `trainer.compile=auto` compiles its network: if the run is long and compiling works.

    A run that is resumed computes as before, even if it becomes longer. If compiling does not work, each machine prints
    the reason.
    """
    cpu, before = torch.device("cpu"), None if config.run.fresh else recorded_environment(path).get("compiled")
    if before is False or (before is None and not is_worth_compiling(config, store)):
        return False
    # an earlier launch has compiled already, so that the error of another `run.resume` need not wait
    problem = obstacle_to_compiling(cpu) if before else problem_with_compiling(cpu)
    if problem and processes.local_rank == 0:
        console.print(f"not compiled: {problem}")
    return problem is None
