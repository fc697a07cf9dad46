"""Write checkpoints in a background thread, while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from protlig_dd.runs.checkpoint import Tensors, save_checkpoint, write_best
from protlig_dd.system.distributed import busy


class CheckpointWriter:
    """Write checkpoints one after another in a background thread.

    Training waits only in `save`: first until the previous checkpoint is written, then while the tensors are copied to
    the host.

    Raises:
        ValueError: in `save`, `wait` or `close`, if the last checkpoint that `save` started could not be written. The
            message has the reason.
    """

    def __init__(self, run_folder: Path, *, config_yaml: str, keep_last: int, keep_every: int | None) -> None:
        self.folder = run_folder / "checkpoints"
        self.write = partial(
            save_checkpoint, run_folder, config_yaml=config_yaml, keep_last=keep_last, keep_every=keep_every
        )
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[Path] | None = None

    def save(self, step: int, copy: Callable[[], Tensors], state: Mapping[str, Any], best: float | None) -> None:
        """Wait until the previous checkpoint is written, call `copy`, and start writing the checkpoint of `step`.

        Args:
            copy: returns the checkpoint's tensors, copied to the host (see `snapshot`).
            state, best: see `save_checkpoint`.
        """
        self.wait()
        self.pending = self.thread.submit(self.write, step, copy(), state=state, best=best)

    def mark_best(self, step: int, val_nll: float) -> None:
        """Record that the checkpoint of `step`, which has been written before, has the lowest validation bound so far.

        Args:
            val_nll: this bound, in nats per residue.
        """
        write_best(self.folder, step, val_nll)

    def wait(self) -> None:
        """Wait until the checkpoint that `save` started last is on the disk."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            try:
                with busy(f"waits for a checkpoint to be written to {self.folder}"):
                    pending.result()
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.folder}: a checkpoint cannot be written: {error}") from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()
