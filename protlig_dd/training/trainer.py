"""The training loop. `Trainer.step` is the whole training step."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from protlig_dd.batch import PackedBatch
from protlig_dd.data.loader import PackDataset, RankPacks, pack_loader
from protlig_dd.diffusion.graph import Graph
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.diffusion.noise import Noise, curriculum_t_max
from protlig_dd.diffusion.score import Network, ScoreFn
from protlig_dd.model.dit import DiT
from protlig_dd.runtime.checkpoint import CheckpointWriter, Tensors, load_optimizer, load_weights, snapshot
from protlig_dd.runtime.distributed import Processes, all_reduce_sum, gather_objects
from protlig_dd.runtime.environment import peak_memory
from protlig_dd.runtime.files import drop_partial_line
from protlig_dd.runtime.metrics import MetricsLog, ProgressBar, Row, console
from protlig_dd.runtime.random import keyed_generator, random_key
from protlig_dd.runtime.stop import REASONS, Stopped, StopRequests
from protlig_dd.tokenizer import N_STATES
from protlig_dd.training.ema import EMA
from protlig_dd.training.optim import learning_rate

SPIKE_STEPS = 50  # over which the usual loss is averaged, and before which no loss is a spike


class NonFiniteLossError(ValueError):
    """The loss or the gradient stopped being a number; the weights were frozen before that step."""


class LossSpikeError(ValueError):
    """The loss rose far above its running mean; the weights were frozen before that step."""


class Trainer:
    """Steps, logs, evaluates and checkpoints one model on one dataset of packs.

    Everything random in step k is keyed by (seed, purpose, k * packs_per_step + i), and the loss is normalised by the
    residues of the whole step, so the split over ranks and accumulation changes nothing but the order of sums.
    """

    def __init__(
        self,
        *,
        model: DiT,
        make_score: Callable[[Network], ScoreFn],
        graph: Graph,
        noise: Noise,
        optimizer: torch.optim.Optimizer,
        dataset: PackDataset,
        device: torch.device,
        processes: Processes,
        seed: int,
        packs_per_step: int,
        lr: float,
        warmup_steps: int,
        max_steps: int,
        min_lr_ratio: float,
        grad_clip: float,
        ema_decay: float,
        curriculum_steps: int,
        loss_spike: float | None = None,
    ) -> None:
        self.model, self.graph, self.noise, self.optimizer, self.dataset = model, graph, noise, optimizer, dataset
        self.device, self.processes, self.seed = device, processes, seed
        self.packs_per_step, self.grad_clip, self.max_steps = packs_per_step, grad_clip, max_steps
        self.t_max = partial(curriculum_t_max, steps=curriculum_steps, t_min=noise.t_min)
        self.learning_rate = partial(
            learning_rate, lr=lr, warmup_steps=warmup_steps, max_steps=max_steps, min_lr_ratio=min_lr_ratio
        )
        self.ema = EMA(model, ema_decay)
        self.wrapped: nn.Module = DistributedDataParallel(model) if processes.world_size > 1 else model
        self.score_fn: ScoreFn = make_score(self.wrapped)
        self.eval_score_fn: ScoreFn = make_score(model)  # ranks evaluate different numbers of packs: no DDP there
        self.frozen = torch.zeros((), device=device)  # 1 from the first non-finite loss or gradient on
        optimizer.found_inf = self.frozen  # type: ignore[attr-defined]
        self.loss_spike, self.usual_loss = loss_spike, torch.zeros((), device=device)
        self.residues_seen = self.current_step = 0

    def step(self, step: int, packs: Iterator[PackedBatch], asked: list[int]) -> dict[str, Any]:
        """One optimizer step (counted from 0). Nothing here waits for the device.

        Args:
            asked: for each of REASONS whether this rank was asked to stop; the record tells whether any was.
        """
        rank, world_size = self.processes.rank, self.processes.world_size
        mine = range(rank, self.packs_per_step, world_size)
        self.current_step = step
        since = time.perf_counter()
        batches = [next(packs) for _ in mine]
        waited = time.perf_counter() - since
        own = sum(count_residues(batch) for batch in batches)
        residues, *asked = all_reduce_sum(torch.tensor([own, *asked])).tolist()
        pack_loss = torch.zeros(self.packs_per_step, device=self.device)
        for pack, batch in zip(mine, batches, strict=True):
            index = step * self.packs_per_step + pack
            torch.manual_seed(random_key(self.seed, "dropout", index))
            generator = keyed_generator(self.seed, "noise", index, self.device)
            with self.accumulate(last=pack == mine[-1]):
                loss_sum, _ = score_entropy_loss(
                    self.score_fn, batch.to(self.device), self.graph, self.noise, generator, self.t_max(step)
                )
                # DDP averages over ranks; the objective is the sum over all packs / residues of all packs
                (loss_sum * world_size / max(residues, 1)).backward()
            pack_loss[pack] = loss_sum.detach() / max(residues, 1)
        all_reduce_sum(pack_loss)
        grad_norm = clip_grad_norm_(self.model.parameters(), self.grad_clip, error_if_nonfinite=False)
        bad = self.watch(step, pack_loss.sum(), grad_norm)
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()  # changes nothing where self.frozen is 1
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, step + 1)
        self.residues_seen += residues
        rows = [row for batch in batches for row in batch.rows.tolist()]
        return {"pack_loss": pack_loss, "grad_norm": grad_norm, "lr": lr, "residues": residues, "rows": rows,
                "waited": waited, "asked": asked, "bad": bad}  # fmt: skip

    def watch(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Freeze the weights from the first loss or gradient on that is no number, or a loss far above the usual.

        Returns: a flag on the device, whether this step is such a one.
        """
        bad = ~torch.isfinite(loss + grad_norm)
        if self.loss_spike is not None and step >= SPIKE_STEPS:
            bad |= loss > self.loss_spike * self.usual_loss
        self.frozen.copy_(torch.maximum(self.frozen, bad.float()))
        usual = loss if step == 0 else torch.lerp(self.usual_loss, loss, 1 / SPIKE_STEPS)
        self.usual_loss.copy_(torch.where(self.frozen > 0, self.usual_loss, usual))
        return bad

    def accumulate(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged in the backward pass of the step's last pack only."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model evaluates inside: averaged weights, no dropout."""
        training = self.model.training
        self.model.eval()
        try:
            with self.ema.swapped_in(self.model):
                yield
        finally:
            self.model.train(training)

    def snapshot(self) -> Tensors:
        """What a checkpoint keeps, copied to the host."""
        return snapshot(self.model, self.ema.weights, self.optimizer)

    def state(self) -> dict[str, Any]:
        """The rest of it: numbers."""
        return {"residues_seen": self.residues_seen, "usual_loss": float(self.usual_loss)}

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint whose state was read and verified."""
        load_weights(checkpoint / "ema.safetensors", self.model)
        self.ema.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        load_weights(checkpoint / "model.safetensors", self.model)
        load_optimizer(checkpoint / "optimizer.safetensors", self.model, self.optimizer)
        self.residues_seen = state["residues_seen"]
        self.usual_loss.fill_(state["usual_loss"])


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
    stop: StopRequests,
) -> None:
    """Run steps first_step .. last_step - 1.

    Args:
        evaluate: () -> {"val_nll": ..., ...}, on the averaged weights; called by every rank.
        writer: rank 0's writer of checkpoints, None on the others.
        best: the lowest validation bound so far; who gets below it is checkpointed, and kept.
        state: what checkpoints keep beside the trainer's own state.
        rows_file: where to log the store rows of every step; None not to.
        metrics: rank 0's log, None on the others.

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

    def save(step: int, best: float | None) -> float:
        """Seconds that training waited for it."""
        began = time.perf_counter()
        if writer is not None:
            writer.save(step, trainer.snapshot, state | trainer.state(), best)
        return time.perf_counter() - began

    if rows_file is not None and processes.first:
        drop_partial_line(rows_file)
    since = time.perf_counter()
    trainer.model.train()
    with contextlib.ExitStack() as stack:
        stack.callback(trainer.dataset.forget_plans)
        bar = stack.enter_context(ProgressBar("training", trainer.max_steps, first_step, shown=processes.first))
        stack.enter_context(stop.deferred())
        stack.enter_context(named_losses(trainer))  # a lost loader is reported wherever the loop may be
        for step in range(first_step, last_step):
            record = trainer.step(step, packs, stop.asked())
            pending.append(record | {"step": step + 1, "residues_seen": trainer.residues_seen})
            done = step + 1
            stopping = next((reason for reason, asked in zip(REASONS, record["asked"], strict=True) if asked), None)
            evaluating = eval_every > 0 and (done % eval_every == 0 or done == trainer.max_steps) and not stopping
            saving = done % checkpoint_every == 0 or done == last_step or stopping is not None
            if not (done % log_every == 0 or evaluating or saving):
                bar.advance()
                continue
            rows = flush(pending, time.perf_counter() - since, peak_memory(device))
            if trainer.frozen.item():
                if metrics is not None:
                    metrics.write(rows)
                raise_frozen(trainer, pending)
            if rows_file is not None:
                write_rows(rows_file, pending, processes)
            bar.advance(note=f"loss {rows[-1]['loss']:.4f}  {rows[-1]['residues_per_s']:,.0f} residues/s")
            pending = []
            new_best = None
            if evaluating:
                try:
                    with trainer.averaged(), stop.immediate():
                        values = evaluate()
                except Stopped as stopped:
                    save(done, None)
                    if metrics is not None:
                        metrics.write(rows)
                    raise Stopped(stopped.reason, f"after step {done} of {trainer.max_steps}") from stopped
                rows.append({"step": done, **values})
                if values["val_nll"] < best:
                    best = new_best = values["val_nll"]
                if processes.first:
                    console.print(
                        f"step {done}: validation {values['val_nll']:.4f} ± {values['val_nll_se']:.4f} nats/residue"
                    )
            if saving or new_best is not None:
                rows.append({"step": done, "checkpoint_stall_s": save(done, new_best)})
            if metrics is not None:
                metrics.write(rows)
            if stopping is not None:
                raise Stopped(stopping, f"after step {done} of {trainer.max_steps}")
            since = time.perf_counter()  # evaluation and checkpoints do not count as training time


class LoaderDiedError(ValueError):
    """A process that loads packs is gone: killed for memory, say."""


class RankLostError(ValueError):
    """Another rank is gone, or did not answer in time."""


@contextlib.contextmanager
def named_losses(trainer: Trainer) -> Iterator[None]:
    """Turn what torch says of a lost loader process or rank into one line that names step, rank and sequences."""
    try:
        yield
    except RuntimeError as error:
        step = trainer.current_step
        where = f"step {step + 1}, rank {trainer.processes.rank}"
        if "DataLoader worker" in str(error) and "Original Traceback" not in str(error):
            first = step * trainer.packs_per_step
            mine = range(trainer.processes.rank, trainer.packs_per_step, trainer.processes.world_size)
            ids = ", ".join(ids_of_packs(trainer.dataset, [first + pack for pack in mine]))
            raise LoaderDiedError(
                f"{where}: a loader process is gone, killed for memory perhaps ({' '.join(str(error).split())}); "
                f"wanted were sequences {ids}"
            ) from error
        if trainer.processes.world_size > 1 and any(word in str(error) for word in ("gloo", "NCCL", "process group")):
            raise RankLostError(
                f"{where}: another rank is gone or did not answer within trainer.timeout "
                f"({' '.join(str(error).split())})"
            ) from error
        raise


def ids_of_packs(dataset: PackDataset, packs: Sequence[int]) -> list[str]:
    return [dataset.group.id(row) for pack in packs for row in dataset.pack_rows(pack)]


def flush(pending: list[dict[str, Any]], seconds: float, memory: int) -> list[Row]:
    """The steps since the last flush as rows of numbers: here the host waits for the device.

    Args:
        seconds: that they took.
        memory: peak so far, bytes.
    """
    rate = sum(record["residues"] for record in pending) / seconds
    return [
        {
            "step": record["step"],
            "loss": float(record["pack_loss"].sum()),
            "grad_norm": float(record["grad_norm"]),
            "lr": record["lr"],
            "residues": record["residues_seen"],
            "residues_per_s": rate,
            "data_wait_s": record["waited"],
            "peak_memory_gib": memory / 2**30,
        }
        for record in pending
    ]


def raise_frozen(trainer: Trainer, pending: list[dict[str, Any]]) -> None:
    """Raise for the first step since the last flush after which the weights stood still."""
    for record in pending:
        if not record["bad"].item():
            continue
        losses = record["pack_loss"].tolist()
        bad = [pack for pack, loss in enumerate(losses) if not math.isfinite(loss)]
        first = (record["step"] - 1) * trainer.packs_per_step
        ids = ids_of_packs(trainer.dataset, [first + pack for pack in bad or range(trainer.packs_per_step)])
        where = (
            f"in step {record['step']}, pack {', '.join(str(p) for p in bad) or 'unknown'} of {trainer.packs_per_step}"
        )
        after = f"sequences {', '.join(ids)}; the weights are those before that step"
        if bad or trainer.loss_spike is None or not math.isfinite(float(record["grad_norm"])):
            raise NonFiniteLossError(f"non-finite {'loss' if bad else 'gradient'} {where}; {after}")
        raise LossSpikeError(
            f"loss {sum(losses):.4g} {where} is more than trainer.loss_spike={trainer.loss_spike} times the usual "
            f"{float(trainer.usual_loss):.4g}; {after}"
        )


def write_rows(path: Path, pending: list[dict[str, Any]], processes: Processes) -> None:
    """Append the store rows of each step, all ranks' together and sorted, to rows.jsonl."""
    gathered = gather_objects([record["rows"] for record in pending])
    if not processes.first:
        return
    with path.open("a") as file:
        for i, record in enumerate(pending):
            rows = sorted(row for rank_rows in gathered for row in rank_rows[i])
            file.write(json.dumps({"step": record["step"], "rows": rows}) + "\n")


def count_residues(batch: PackedBatch) -> int:
    """Residues of a pack that is still on the host."""
    return int((batch.tokens < N_STATES).sum())
