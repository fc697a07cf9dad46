"""The loop around the training step: logging, evaluation, checkpoints, stops and errors."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from protlig_dd.data.loader import RankPacks, end_workers, pack_loader
from protlig_dd.runs.metrics import Row
from protlig_dd.system.device import matmul_peak, peak_memory
from protlig_dd.system.distributed import Processes, all_reduce_sum, gather_objects
from protlig_dd.system.files import drop_partial_line, writing
from protlig_dd.system.signals import REASONS, Stopped
from protlig_dd.system.terminal import ProgressBar
from protlig_dd.training.context import RunContext
from protlig_dd.training.failures import describe_stopped_hosts, explain_lost_processes, raise_bad_step
from protlig_dd.training.hooks import Hooks
from protlig_dd.training.trainer import Trainer


def fit(trainer: Trainer, steps: range, hooks: Hooks, context: RunContext) -> None:
    """Run these training steps (counted from 0).

    If an evaluation of the model from which the steps start is still due, it runs first.

    Raises:
        NonFiniteLossError, LossSpikeError: a step is bad. The message names the step, the pack and its sequence ids. No
            checkpoint is written after that step.
        LoaderDiedError, RankLostError: a loader process or another rank is lost. The message names the step and rank.
        Stopped: a stop was requested. The step in progress is finished and its checkpoint is written before Stopped
            is raised. A stop during the evaluation before the first step raises Stopped immediately.
    """
    device, processes, stop, control = context.device, context.processes, context.stop, trainer.config.trainer
    peak = float(all_reduce_sum(torch.tensor(matmul_peak(device, context.precision), dtype=torch.float64)))
    sampler = RankPacks(steps.start, steps.stop, trainer.packs_per_step, processes.rank, processes.world_size)
    loader = pack_loader(trainer.dataset, sampler, trainer.config.data.workers, pin_memory=device.type == "cuda")
    packs, pending = iter(loader), list[dict[str, Any]]()
    rows_file = context.folder / "rows.jsonl" if control.log_rows else None
    if rows_file is not None and processes.first:
        drop_partial_line(rows_file)
    trainer.model.train()
    with contextlib.ExitStack() as stack:
        stack.callback(trainer.dataset.forget_plans)
        stack.callback(end_workers, packs)
        stack.enter_context(stop.deferred())
        stop.set_deadline(context.deadline)
        stack.enter_context(explain_lost_processes(trainer))  # torch may report a lost loader anywhere in the loop
        if trainer.evaluation_due and (new_best := hooks.evaluate(steps.start)) is not None:
            hooks.mark_best(steps.start, new_best)
        bar = stack.enter_context(ProgressBar("training", trainer.max_steps, steps.start, shown=processes.first))
        since = time.perf_counter()
        for step in steps:
            record = trainer.step(step, packs, stop.requested())
            pending.append(record | {"step": step + 1, "residues_seen": trainer.residues_seen})
            done = step + 1
            stopping = next(
                (reason for reason, count in zip(REASONS, record["stop_requests"], strict=True) if count), None
            )
            trainer.evaluation_due = control.eval_every > 0 and (
                done % control.eval_every == 0 or done == trainer.max_steps
            )
            saving = done % control.checkpoint_every == 0 or done == steps.stop
            if not (done % control.log_every == 0 or trainer.evaluation_due or saving or stopping):
                bar.advance()
                continue
            frozen = bool(trainer.frozen.item())  # waits for the device, so the time covers all pending steps
            rows = metrics_rows(pending, time.perf_counter() - since, peak_memory(device), peak)
            hooks.log(rows)
            if frozen:
                raise_bad_step(trainer, pending)
            if rows_file is not None:
                write_rows(rows_file, pending, processes)
            bar.advance(note=f"loss {rows[-1]['loss']:.4f}  {rows[-1]['residues_per_s']:,.0f} residues/s")
            pending, new_best = [], None
            if trainer.evaluation_due and not stopping:
                hooks.log_gradients(done, record["grad_norms"])
                try:
                    new_best = hooks.evaluate(done)
                except Stopped as stopped:
                    stopping = stopped.reason
            hosts = ""
            if stopping is not None and stopping.startswith("SIG") and any(record["stop_requests"]):
                # exchanged between the ranks before rank 0 writes the checkpoint, because writing may take long
                hosts = describe_stopped_hosts(stopping, stop.noted)
            if saving or stopping or new_best is not None:
                hooks.save(done, new_best)
            if stopping:
                raise stop.stopped(stopping, f"after step {done} of {trainer.max_steps}{hosts}")
            since = time.perf_counter()  # evaluation and checkpoints do not count as training time


def metrics_rows(pending: list[dict[str, Any]], seconds: float, memory: int, peak_flops: float) -> list[Row]:
    """Return one row of metrics for each step since metrics were last written. Waits for the device.

    Args:
        pending: the records of these steps that `Trainer.step` returned, with `step` and `residues_seen` added.
        seconds: total duration of these steps.
        memory: this process's peak memory so far, in bytes.
        peak_flops: FLOP/s that all devices together reach in matrix products. The MFU is a fraction of this number.
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


def write_rows(path: Path, pending: list[dict[str, Any]], processes: Processes) -> None:
    """Append one line to rows.jsonl for each pending step: the sorted store rows that all ranks read in that step."""
    gathered = gather_objects([record["rows"] for record in pending])
    if not processes.first:
        return
    with writing(path), path.open("a") as file:
        for i, record in enumerate(pending):
            rows = sorted(row for rank_rows in gathered for row in rank_rows[i])
            file.write(json.dumps({"step": record["step"], "rows": rows}) + "\n")
