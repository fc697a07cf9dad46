"""What a start of a run has resolved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
class RunFolder:
    path: Path
    attempt: int
    checkpoint: Path | None
    state: dict[str, Any]
    """state.json of that checkpoint."""
    weights: Path | None
    """Of `from=`, where there is no checkpoint yet."""
    seconds_left: float | None
    """Until the run is to stop, by no host's clock; a process that is started again gets no more of it."""
    finished: int | None
    """The last step of a run that has made its report and is not to go on."""
