"""Data classes that describe a launch of a run: its devices, its run folder and its starting point."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protlig_dd.config.train import TrainConfig
from protlig_dd.system.distributed import Processes
from protlig_dd.system.signals import StopRequests


@dataclass(frozen=True)
class Resolved:
    """What this launch uses for the settings that may be `auto`, and the fingerprint of its data.

    The resolved settings are printed. All fields are recorded in environment.json.
    """

    device: str
    precision: str
    attention_backend: str
    compiled: bool
    world_size: int
    data_path: str
    data_fingerprint: str
    members_path: str | None = None
    members_fingerprint: str | None = None
    """Fingerprint of the file `data.members`; None without this file."""


@dataclass(frozen=True)
class Start:
    """Where a run starts: from a checkpoint, from another model's weights, or from neither (random weights)."""

    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """The contents of the checkpoint's state.json; {} without a checkpoint."""
    weights: Path | None = None
    """The file with the weights of the `from=` model. None without `from=`, or if there is a checkpoint and its run has
    no adapters."""
    converted_from: dict[str, Any] | None = None
    """Where the model of `from=` was converted from; None if it was not converted."""


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder."""

    path: Path
    config: TrainConfig
    """The config as written to config.yaml."""
    attempt: int
    """Number of this launch of the run: 1 until the run has made a step, then 1 more each time that it is resumed."""
    start: Start
    seconds_left: float | None
    """Seconds until trainer.max_time stops the run; None for no limit. This is not a time of day, because the hosts'
    clocks differ. After a lost process, the restarted processes have only the seconds that were left."""
    finished: int | None
    """The last step of the run, if the run has finished and this launch changes neither the number of steps nor the
    report settings. Else None."""


@dataclass(frozen=True)
class RunContext:
    """The run folder, the device, the processes and the numerical settings of this launch of a run."""

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
    """Value of time.monotonic() at which the run stops; None for no limit. Training makes at least one step before it
    stops, unless an evaluation is due before that step."""

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype in which the network computes; None for the dtype of its weights."""
        return torch.bfloat16 if self.precision == "bf16" else None
