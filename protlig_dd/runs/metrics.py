"""Write a run's metrics to metrics.jsonl, TensorBoard and Weights & Biases, and read metrics.jsonl."""

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.system.files import drop_partial_line, write_atomic, writing

Row = dict[str, float | int]


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, with None (null in JSON) instead of NaN and infinities, which JSON cannot represent."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def with_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that were read from JSON, with NaN instead of None."""
    return {k: math.nan if v is None else v for k, v in values.items()}


class MetricsLog:
    """Append rows of metrics to metrics.jsonl, and send them to the trackers (TensorBoard and Weights & Biases).

    Samples and histograms are sent to the trackers only. Only rank 0 has a MetricsLog.

    Args:
        folder: the run folder.
        attempt: number of this launch of the run. It is added to each row of metrics.jsonl.
        config: the run's config, which is sent to Weights & Biases.
        wandb_mode: online, offline, or None to use the environment variable WANDB_MODE.

    Raises:
        ValueError: `wandb_project` is set, but wandb is not installed.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int,
        *,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool,
        wandb_project: str | None,
        wandb_name: str | None,
        wandb_mode: str | None = None,
    ) -> None:
        wandb = import_wandb() if wandb_project else None
        self.attempt = attempt
        drop_partial_line(folder / "metrics.jsonl")
        self.path, self.events = folder / "metrics.jsonl", folder / "tensorboard"
        self.file = self.path.open("a")
        self.tensorboard: Any = None
        self.wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.events)  # type: ignore[no-untyped-call]
        if wandb is not None:
            id_file = folder / "wandb_id"  # all launches of a run share this id; run.fresh=true starts with a new id
            if not id_file.exists():
                write_atomic(id_file, uuid.uuid4().hex[:12])
            self.wandb = wandb.init(
                project=wandb_project,
                name=wandb_name,
                config=None if config is None else dict(config),
                allow_val_change=True,  # the number of steps and devices may change when a run is resumed
                # absolute, because a parent process in another working directory may have started wandb's service
                dir=folder.resolve(),
                id=id_file.read_text(),
                resume="allow",
                mode=wandb_mode,
            )

    def write(self, rows: list[Row]) -> None:
        """Append rows to metrics.jsonl and send them to the trackers. Each row has a `step`.

        In metrics.jsonl, NaN and infinities are written as null.
        """
        for row in rows:
            with writing(self.path):
                self.file.write(json.dumps(without_nan(row) | {"attempt": self.attempt}) + "\n")
            step = int(row["step"])
            values = {key: value for key, value in row.items() if key != "step"}
            if self.tensorboard is not None:
                with writing(self.events):
                    for key, value in values.items():
                        self.tensorboard.add_scalar(key, value, step)
            if self.wandb is not None:
                self.wandb.log(values, step=step)
        with writing(self.path):
            self.file.flush()

    def write_samples(self, step: int, sequences: Mapping[str, str]) -> None:
        """Send protein sequences to the trackers as text.

        Args:
            sequences: {name: sequence}.
        """
        if self.tensorboard is not None:
            lines = "\n".join(f"    {name}  {sequence}" for name, sequence in sequences.items())
            self.tensorboard.add_text("samples", lines, step)  # text is shown as Markdown; indented lines are verbatim
        if self.wandb is not None:
            table = import_wandb().Table(columns=["name", "sequence"], data=[list(item) for item in sequences.items()])
            self.wandb.log({"samples": table}, step=step)

    def write_histogram(self, step: int, name: str, values: np.ndarray, bins: np.ndarray | int = 64) -> None:
        """Send a histogram of values (n,), which must be finite, to the trackers.

        Args:
            bins: the number of bins, or their edges.
        """
        if self.tensorboard is not None:
            self.tensorboard.add_histogram(name, values, step, bins=bins)
        if self.wandb is not None:
            histogram = import_wandb().Histogram(np_histogram=np.histogram(values, bins))
            self.wandb.log({name: histogram}, step=step)

    def close(self) -> None:
        with writing(self.path):  # close() writes rows that are still buffered, which fails on a full disk
            self.file.close()
        if self.tensorboard is not None:
            with writing(self.events):
                self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "logger.wandb_project is set, but wandb is not installed: pip install 'protlig_dd[wandb]'"
        ) from error
    return wandb


def read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics in metrics.jsonl as {step: row}.

    Several lines may have the same step, for example after a resume. Their keys are merged into one row. If a key is in
    several of these lines, the value of the last line counts.

    Text after the last newline is ignored. It is a row that is still being written, or a row that was not finished
    because the process was killed.

    Raises:
        ValueError: a complete line (one that ends with a newline) cannot be read as a row. The message names the file
            and the line.
    """
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().rpartition("\n")[0].splitlines(), 1):
        try:
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: damaged, not a row of metrics ({error})") from error
    return rows
