"""What a run does between its steps: logging, evaluation and checkpoints."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from protlig_dd.config.read import as_dict, as_yaml
from protlig_dd.runs.checkpoint import best_checkpoint
from protlig_dd.runs.metrics import MetricsLog, Row
from protlig_dd.runs.writer import CheckpointWriter
from protlig_dd.system.terminal import announce
from protlig_dd.training.context import RunContext
from protlig_dd.training.trainer import Trainer

WEIGHTS_SHOWN = 10_000  # a histogram shows at most this many weights of a tensor


class Hooks:
    """Log metrics and write checkpoints on rank 0, and evaluate the model on all ranks.

    Args:
        validate: returns {"val_nll": ..., "val_nll_se": ..., ...} for the current weights of the model.
        state: the entries of each checkpoint's state.json that do not come from the trainer.
    """

    def __init__(
        self, trainer: Trainer, validate: Callable[[], Row], state: dict[str, Any], context: RunContext
    ) -> None:
        self.trainer, self.validate, self.state, self.context = trainer, validate, state, context
        self.best = best_checkpoint(context.folder)[1]
        """The lowest validation bound so far, in nats per residue; infinity if there is no bound yet."""
        self.metrics: MetricsLog | None = None
        self.writer: CheckpointWriter | None = None
        if context.processes.first:
            config, control = as_dict(trainer.config), trainer.config.trainer
            self.writer = CheckpointWriter(
                context.folder,
                config_yaml=as_yaml(trainer.config),
                keep_last=control.keep_last,
                keep_every=control.keep_every,
            )
            self.metrics = MetricsLog(context.folder, context.attempt, config=config, **config["logger"])

    @contextlib.contextmanager
    def closing_log(self) -> Iterator[None]:
        """Close the metrics log at the end of this context."""
        with contextlib.ExitStack() as stack:
            if self.metrics is not None:
                stack.callback(self.metrics.close)
            yield

    @contextlib.contextmanager
    def finishing_checkpoints(self) -> Iterator[None]:
        """At the end of this context, wait until the last checkpoint is completely written."""
        with contextlib.ExitStack() as stack:
            if self.writer is not None:
                stack.callback(self.writer.close)
            yield

    def log(self, rows: list[Row]) -> None:
        """Append rows to metrics.jsonl and to the trackers (TensorBoard and Weights & Biases)."""
        if self.metrics is not None:
            self.metrics.write(rows)

    def log_gradients(self, done: int, norms: Tensor) -> None:
        """Send a histogram of the gradient norms, one for each parameter tensor, to the trackers.

        Args:
            done: number of steps made so far.
        """
        if self.metrics is not None:
            self.metrics.write_histogram(done, "grad_norm/of_each_parameter", norms.cpu().numpy())

    def save(self, done: int, new_best: float | None) -> None:
        """Start writing a checkpoint, and log how long training had to wait for it.

        Args:
            done: number of steps made so far.
            new_best: the checkpoint's validation bound if it is the lowest so far, else None.
        """
        began = time.perf_counter()
        if self.writer is not None:
            self.writer.save(done, self.trainer.snapshot, self.state | self.trainer.state(), new_best)
        self.log([{"step": done, "checkpoint_stall_s": time.perf_counter() - began}])

    def mark_best(self, done: int, bound: float) -> None:
        """Record that the existing checkpoint of step `done` has the lowest validation bound so far."""
        if self.writer is not None:
            self.writer.mark_best(done, bound)

    def evaluate(self, done: int) -> float | None:
        """Compute and log the validation bound of the averaged weights after `done` steps.

        Returns:
            The bound if it is the lowest so far, else None. After 0 steps always None.
        """
        with self.trainer.averaged(), self.context.stop.immediate():
            values = self.validate()
        self.trainer.evaluation_due = False
        self.log([{"step": done, **values}])
        if self.metrics is not None:
            for part, weights in weights_by_part(self.trainer.model).items():
                self.metrics.write_histogram(done, f"weights/{part}", weights)
        bound, error = values["val_nll"], values["val_nll_se"]
        announce(f"step {done}: validation {bound:.4f} ± {error:.4f} nats/residue", self.context.processes)
        if done == 0 or not bound < self.best:  # step 0 is the starting weights, not a checkpoint of this run
            return None
        self.best = bound
        return bound


def weights_by_part(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the finite weights of each part of the network, for histograms: {name of the part: weights}.

    A part is a block, or a module outside the blocks. Of each tensor, at most WEIGHTS_SHOWN evenly spaced weights are
    returned.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, weights in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        flat = weights.detach().flatten()
        parts.setdefault(part, []).append(flat[:: -(-len(flat) // WEIGHTS_SHOWN)].float())
    values = {part: torch.cat(tensors).cpu().numpy() for part, tensors in parts.items()}
    return {part: weights[np.isfinite(weights)] for part, weights in values.items()}
