"""What a launch of a run resolves: devices, run folder, starting point."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protlig_dd.config.train import TrainConfig
from protlig_dd.system.distributed import Processes
from protlig_dd.system.signals import StopRequests


@dataclass(frozen=True)
class Resolved:
    """The config's `auto` values as resolved in this launch. They are printed, and recorded in environment.json."""

    device: str
    precision: str
    attention_backend: str
    compiled: bool
    world_size: int
    data_path: str
    data_fingerprint: str


@dataclass(frozen=True)
class Start:
    """Where a run starts: from a checkpoint, from another model's weights, or from neither."""

    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """state.json of that checkpoint."""
    weights: Path | None = None
    """The weights of `from=`, if there is no checkpoint yet."""


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder."""

    path: Path
    config: TrainConfig
    """As written to config.yaml."""
    attempt: int
    start: Start
    seconds_left: float | None
    """Seconds until the run stops, None for no limit; not a time of day, because the hosts' clocks differ. A restart
    after a lost process does not renew this time."""
    finished: int | None
    """The last step of a run that has finished and is not extended; else None."""


@dataclass(frozen=True)
class RunContext:
    """Where and how this launch of a run computes."""

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
    """Value of time.monotonic() at which the run stops, after at least one step; None for no limit."""

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype in which the network computes; None for the dtype of its weights."""
        return torch.bfloat16 if self.precision == "bf16" else None
