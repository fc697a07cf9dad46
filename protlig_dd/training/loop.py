"""The loop around the training step: logging, evaluation, checkpoints, stops, and what ends a run."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from protlig_dd.data.loader import RankPacks, end_workers, pack_loader
from protlig_dd.runs.checkpoint import CheckpointWriter
from protlig_dd.runs.metrics import MetricsLog, Row
from protlig_dd.system.device import peak_memory
from protlig_dd.system.distributed import Processes, gather_objects
from protlig_dd.system.files import drop_partial_line, writing
from protlig_dd.system.signals import REASONS, Stopped, StopRequests
from protlig_dd.system.terminal import ProgressBar, announce
from protlig_dd.training.failures import hosts_stopped, named_losses, raise_frozen
from protlig_dd.training.trainer import Trainer

WEIGHTS_SHOWN = 10_000  # of a tensor, at most, in a histogram


def fit(
    trainer: Trainer,
    *,
    first_step: int,
    last_step: int,
    workers: int,
    log_every: int,
    rows_file: Path | None,
    evaluate: Callable[[], Row],
    eval_every: int,
    writer: CheckpointWriter | None,
    best: float,
    state: dict[str, Any],
    checkpoint_every: int,
    metrics: MetricsLog | None,
    peak_flops: float,
    stop: StopRequests,
    deadline: float | None,
) -> None:
    """Run steps first_step .. last_step - 1, after the evaluation that a stop has left out.

    Args:
        evaluate: () -> {"val_nll": ..., ...}, on the averaged weights; called by every rank.
        writer: rank 0's writer of checkpoints, None on the others.
        best: the lowest validation bound so far; who gets below it is checkpointed, and kept.
        state: what checkpoints keep beside the trainer's own state.
        rows_file: where to log the store rows of every step; None not to.
        metrics: rank 0's log, None on the others.
        deadline: time.monotonic() at which to stop; the step that is being made then, or the first, is finished.
        peak_flops: FLOP/s that all devices together reach in matrix products, which MFU is the share of.

    Raises:
        NonFiniteLossError, LossSpikeError: naming the step, the pack and its sequence ids. No checkpoint is written
            after it.
        LoaderDiedError, RankLostError: naming step and rank.
        Stopped: the step that was being made when a stop was asked for is done, and its checkpoint written.
    """
    device, processes = trainer.device, trainer.processes
    sampler = RankPacks(first_step, last_step, trainer.packs_per_step, processes.rank, processes.world_size)
    packs = iter(pack_loader(trainer.dataset, sampler, workers, pin_memory=device.type == "cuda"))
    pending: list[dict[str, Any]] = []

    def save(done: int, new_best: float | None) -> None:
        began = time.perf_counter()
        if writer is not None:
            writer.save(done, trainer.snapshot, state | trainer.state(), new_best)
        write([{"step": done, "checkpoint_stall_s": time.perf_counter() - began}])

    def write(rows: list[Row]) -> None:
        if metrics is not None:
            metrics.write(rows)

    def evaluated(done: int) -> float | None:
        """Write the validation bound of this step; returns it where it is the lowest so far."""
        nonlocal best
        with trainer.averaged(), stop.immediate():
            values = evaluate()
        trainer.evaluation_due = False
        write([{"step": done, **values}])
        if metrics is not None:
            for part, weights in weights_by_part(trainer.model).items():
                metrics.write_histogram(done, f"weights/{part}", weights)
        bound, error = values["val_nll"], values["val_nll_se"]
        announce(f"step {done}: validation {bound:.4f} ± {error:.4f} nats/residue", processes)
        if done == 0 or not bound < best:  # what a run starts from is none of its checkpoints
            return None
        best = bound
        return bound

    if rows_file is not None and processes.first:
        drop_partial_line(rows_file)
    trainer.model.train()
    with contextlib.ExitStack() as stack:
        stack.callback(trainer.dataset.forget_plans)
        stack.callback(end_workers, packs)
        stack.enter_context(stop.deferred())
        stop.at(deadline)
        stack.enter_context(named_losses(trainer))  # a lost loader is reported wherever the loop may be
        if trainer.evaluation_due and (new_best := evaluated(first_step)) is not None and writer is not None:
            writer.mark_best(first_step, new_best)
        bar = stack.enter_context(ProgressBar("training", trainer.max_steps, first_step, shown=processes.first))
        since = time.perf_counter()
        for step in range(first_step, last_step):
            record = trainer.step(step, packs, stop.asked())
            pending.append(record | {"step": step + 1, "residues_seen": trainer.residues_seen})
            done = step + 1
            stopping = next((reason for reason, asked in zip(REASONS, record["asked"], strict=True) if asked), None)
            trainer.evaluation_due = eval_every > 0 and (done % eval_every == 0 or done == trainer.max_steps)
            saving = done % checkpoint_every == 0 or done == last_step
            if not (done % log_every == 0 or trainer.evaluation_due or saving or stopping):
                bar.advance()
                continue
            frozen = bool(trainer.frozen.item())  # waits for the device, so that the time is that of all the steps
            rows = flush(pending, time.perf_counter() - since, peak_memory(device), peak_flops)
            write(rows)
            if frozen:
                raise_frozen(trainer, pending)
            if rows_file is not None:
                write_rows(rows_file, pending, processes)
            bar.advance(note=f"loss {rows[-1]['loss']:.4f}  {rows[-1]['residues_per_s']:,.0f} residues/s")
            pending, new_best = [], None
            if trainer.evaluation_due and not stopping:
                if metrics is not None:
                    metrics.write_histogram(done, "grad_norm/of_each_parameter", record["grad_norms"].cpu().numpy())
                try:
                    new_best = evaluated(done)
                except Stopped as stopped:
                    stopping = stopped.reason
            signalled = stopping is not None and any(record["asked"]) and stopping.startswith("SIG")
            whose = hosts_stopped(stopping in stop.noted) if signalled else ""  # before rank 0 is long at the disk
            if saving or stopping or new_best is not None:
                save(done, new_best)
            if stopping:
                raise stop.stopped(stopping, f"after step {done} of {trainer.max_steps}{whose}")
            since = time.perf_counter()  # evaluation and checkpoints do not count as training time


def flush(pending: list[dict[str, Any]], seconds: float, memory: int, peak_flops: float) -> list[Row]:
    """The steps since the last flush as rows of numbers: here the host waits for the device.

    Args:
        seconds: that they took.
        memory: peak so far, bytes.
        peak_flops: see `fit`.
    """
    rate = sum(record["residues"] for record in pending) / seconds
    mfu = sum(record["flops"] for record in pending) / seconds / peak_flops
    return [
        {
            "step": record["step"],
            "loss": float(record["pack_loss"].sum()),
            "grad_norm": float(record["grad_norm"]),
            "lr": record["lr"],
            "residues": record["residues_seen"],
            "residues_per_s": rate,
            "mfu": mfu,
            "data_wait_s": record["waited"],
            "peak_memory_gib": memory / 2**30,
        }
        for record in pending
    ]


def weights_by_part(model: nn.Module) -> dict[str, np.ndarray]:
    """Finite weights of each block and of what is outside the blocks, evenly thinned out, for histograms."""
    parts: dict[str, list[Tensor]] = {}
    for name, weights in model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        flat = weights.detach().flatten()
        parts.setdefault(part, []).append(flat[:: -(-len(flat) // WEIGHTS_SHOWN)].float())
    values = {part: torch.cat(some).cpu().numpy() for part, some in parts.items()}
    return {part: some[np.isfinite(some)] for part, some in values.items()}


def write_rows(path: Path, pending: list[dict[str, Any]], processes: Processes) -> None:
    """Append the store rows of each step, all ranks' together and sorted, to rows.jsonl."""
    gathered = gather_objects([record["rows"] for record in pending])
    if not processes.first:
        return
    with writing(path), path.open("a") as file:
        for i, record in enumerate(pending):
            rows = sorted(row for rank_rows in gathered for row in rank_rows[i])
            file.write(json.dumps({"step": record["step"], "rows": rows}) + "\n")
