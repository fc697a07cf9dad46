"""What a start of a run has found out: devices, folder, where it begins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protlig_dd.config.train import TrainConfig
from protlig_dd.system.distributed import Processes
from protlig_dd.system.signals import StopRequests


@dataclass(frozen=True)
class Resolved:
    """What this start made of the config's `auto` values; printed, and kept in environment.json."""

    device: str
    precision: str
    attention_backend: str
    compiled: bool
    world_size: int
    data_path: str
    data_fingerprint: str


@dataclass(frozen=True)
class Start:
    """Where a run begins: a checkpoint, another model's weights, or neither."""

    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """state.json of that checkpoint."""
    weights: Path | None = None
    """Of `from=`, where there is no checkpoint yet."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder that was opened."""

    path: Path
    config: TrainConfig
    """As the folder has it."""
    attempt: int
    start: Start
    seconds_left: float | None
    """Until the run stops: a duration, as hosts' clocks differ. A restart after a lost process does not renew it."""
    finished: int | None
    """The last step of a run that has made its report and is not to go on."""


@dataclass(frozen=True)
class RunContext:
    """Where and how this start of a run computes."""

    folder: Path
    attempt: int
    start: Start
    device: torch.device
    precision: str
    """bf16 | fp32."""
    attention_backend: str
    compiled: bool
    processes: Processes
    stop: StopRequests
    deadline: float | None
    """time.monotonic() at which to stop, after one step at least."""

    @property
    def autocast(self) -> torch.dtype | None:
        """What the network computes in; None for the type of its weights."""
        return torch.bfloat16 if self.precision == "bf16" else None
