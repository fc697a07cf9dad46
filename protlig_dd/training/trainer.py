"""The training step, which is `Trainer.step`. The loop over the steps is in loop.py."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_model
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.loader import PackDataset
from protlig_dd.model.dit import DiT
from protlig_dd.model.lora import base_weights
from protlig_dd.runs.checkpoint import Tensors, load_into, load_optimizer, snapshot, trained_parameters
from protlig_dd.system.distributed import all_reduce_sum
from protlig_dd.system.random import keyed_generator, random_key
from protlig_dd.tokenizer import N_STATES
from protlig_dd.training.context import RunContext
from protlig_dd.training.ema import EMA, resolve_decay
from protlig_dd.training.objective import Objective
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.optim.schedule import count_steps, learning_rate

SPIKE_STEPS = 50  # steps in the running mean of the loss; in the first SPIKE_STEPS steps of a run, no loss is a spike


class Trainer:
    """Trains one model on one dataset of packs.

    All random numbers of pack i of step k are keyed by (seed, purpose, k * packs_per_step + i), and the loss is
    divided by the number of residues in the whole step. So the number of ranks changes only the order of sums.
    """

    def __init__(
        self, model: DiT, objective: Objective, dataset: PackDataset, config: TrainConfig, context: RunContext
    ) -> None:
        self.model, self.objective, self.dataset, self.config = model, objective, dataset, config
        self.device, self.processes = context.device, context.processes
        self.packs_per_step, self.max_steps = config.optim.packs_per_step, count_steps(config, dataset)
        self.optimizer = make_optimizer(model, config.optim, context.precision)
        self.ema = EMA(model, resolve_decay(config.optim.ema_decay, self.max_steps))
        self.wrapped: nn.Module = DistributedDataParallel(model) if self.processes.world_size > 1 else model
        self.score_fn = objective.score_fn(self.wrapped)
        self.eval_score_fn = objective.score_fn(model)  # without DDP, because ranks evaluate different numbers of packs
        self.frozen = torch.zeros((), device=self.device)  # 1 from the first bad step on
        self.optimizer.found_inf = self.frozen  # type: ignore[attr-defined]
        self.usual_loss = torch.zeros((), device=self.device)
        self.residues_seen = self.current_step = 0
        self.evaluation_due = False  # whether the model still has to be evaluated after the most recent step

    def step(self, step: int, packs: Iterator[PackedBatch], stop_requests: list[int]) -> dict[str, Any]:
        """Make one optimizer step. Nothing in this method waits for the device.

        Args:
            step: number of the step, counted from 0.
            stop_requests: for each reason in REASONS, 1 if this rank was requested to stop for that reason, else 0.

        Returns:
            A record of the step. Its losses and norms are on the device. `stop_requests` has the sums over all ranks.
        """
        rank, world_size = self.processes.rank, self.processes.world_size
        mine = range(rank, self.packs_per_step, world_size)
        self.current_step = step
        since = time.perf_counter()
        batches = [next(packs) for _ in mine]
        waited = time.perf_counter() - since
        residues = sum(count_residues(batch) for batch in batches)
        flops = sum(self.model.training_flops(batch.lengths) for batch in batches)
        residues, flops, *stop_requests = all_reduce_sum(torch.tensor([residues, flops, *stop_requests])).tolist()
        pack_loss = torch.zeros(self.packs_per_step, device=self.device)
        for pack, batch in zip(mine, batches, strict=True):
            index = step * self.packs_per_step + pack
            torch.manual_seed(random_key(self.config.seed, "dropout", index))
            generator = keyed_generator(self.config.seed, "noise", index, self.device)
            with self.gradient_sync(last=pack == mine[-1]):
                loss_sum = self.objective.loss(self.score_fn, batch.to(self.device), generator, step)
                # The loss of the step is the sum over the packs of all ranks, divided by their residues. DDP averages
                # gradients over ranks, so multiply by the number of ranks.
                (loss_sum * world_size / max(residues, 1)).backward()
            pack_loss[pack] = loss_sum.detach() / max(residues, 1)
        all_reduce_sum(pack_loss)
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        grad_norm = torch.linalg.vector_norm(norms)
        clip_grads_with_norm_(self.model.parameters(), self.config.optim.grad_clip, grad_norm)
        bad = self.freeze_if_bad(step, pack_loss.sum(), grad_norm)
        lr = learning_rate(step, self.config.optim, self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()  # changes nothing if self.frozen is 1
        self.optimizer.zero_grad(set_to_none=self.model.graphed is None)
        self.ema.update(self.model, step + 1)
        self.residues_seen += residues
        rows = [row for batch in batches for row in batch.rows.tolist()]
        return {
            "pack_loss": pack_loss,
            "grad_norm": grad_norm,
            "grad_norms": norms,
            "lr": lr,
            "residues": residues,
            "rows": rows,
            "flops": flops,
            "waited": waited,
            "stop_requests": stop_requests,
            "bad": bad,
        }

    def freeze_if_bad(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Freeze the weights from the first bad step on.

        A step is bad if its loss or gradient is not finite, or if its loss exceeds trainer.loss_spike times the running
        mean of the loss.

        Returns:
            A flag on the device: whether this step is bad.
        """
        bad = ~torch.isfinite(loss + grad_norm)
        spike = self.config.trainer.loss_spike
        if spike is not None and step >= SPIKE_STEPS:
            bad |= loss > spike * self.usual_loss
        self.frozen.copy_(torch.maximum(self.frozen, bad.float()))
        usual = loss if step == 0 else torch.lerp(self.usual_loss, loss, 1 / SPIKE_STEPS)
        self.usual_loss.copy_(torch.where(self.frozen > 0, self.usual_loss, usual))
        return bad

    def gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context for the backward pass of one pack. DDP exchanges gradients in it only if `last` is set.

        Args:
            last: whether this is the rank's last pack of the step.
        """
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the model into evaluation mode inside this context: averaged weights, no dropout."""
        training = self.model.training
        self.model.eval()
        try:
            with self.ema.swapped_in(self.model):
                yield
        finally:
            self.model.train(training)

    def snapshot(self) -> Tensors:
        """Return the tensors of a checkpoint, copied to the host."""
        return snapshot(self.model, self.ema.weights, self.optimizer)

    def state(self) -> dict[str, Any]:
        """Return the entries that the trainer adds to a checkpoint's state.json."""
        return {
            "residues_seen": self.residues_seen,
            "usual_loss": float(self.usual_loss),
            "evaluation_due": self.evaluation_due,
        }

    def start_from(self, weights: Path) -> None:
        """Load the source model's averaged weights. The moving average of the weights starts from them too.

        If the network has adapters, these weights are loaded beside the adapters, which are unchanged.
        """
        load_into(base_weights(self.model), weights)
        self.ema.restart(self.model)

    def load(self, checkpoint: Path, state: dict[str, Any], base: Path | None = None) -> None:
        """Load a checkpoint, to continue from it.

        Args:
            state: the checkpoint's state.json, from `read_state`, which also verifies the checkpoint.
            base: the weights that the adapters extend; None without adapters.
        """
        if base is not None:
            load_into(base_weights(self.model), base)
        load_into(trained_parameters(self.model), checkpoint / "ema.safetensors")
        self.ema.restart(self.model)
        load_into(trained_parameters(self.model), checkpoint / "model.safetensors")
        load_optimizer(checkpoint / "optimizer.safetensors", self.model, self.optimizer)
        self.residues_seen = state["residues_seen"]
        self.usual_loss.fill_(state["usual_loss"])
        self.evaluation_due = state["evaluation_due"]


def count_residues(batch: PackedBatch) -> int:
    """Return the number of residues of a pack that are in the loss. The pack must still be on the host."""
    return int((batch.targets < N_STATES).sum())


def make_model(config: TrainConfig, device: torch.device, attention_backend: str) -> DiT:
    """Return the network of a config with initial weights, which are random numbers that follow from config.seed."""
    torch.manual_seed(random_key(config.seed, "weights", 0))
    with device:
        return build_model(config.model, attention_backend, config.time_conditioning)
