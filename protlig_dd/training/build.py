"""Carry out a training run, from its config to its report."""

import contextlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from protlig_dd.batch import StaticShape, sequence_slots
from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.context import designed_counts
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.members import ClusterGroup
from protlig_dd.data.store import StoreGroup
from protlig_dd.evaluation.likelihood.held_out import designed_frequencies, held_out_bound, length_counts
from protlig_dd.evaluation.report.page import write_run_page
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers.attention import GRAPHABLE
from protlig_dd.runs.checkpoint import trained_parameters
from protlig_dd.runs.metrics import Row
from protlig_dd.system.distributed import busy
from protlig_dd.system.terminal import announce, console
from protlig_dd.tokenizer import N_STATES
from protlig_dd.training.context import RunContext
from protlig_dd.training.cost import describe_members, three_digits, warning_of_epochs
from protlig_dd.training.held_out import find_held_out_leaks
from protlig_dd.training.hooks import Hooks
from protlig_dd.training.launch import Deadline, launch, opened_run, print_cost
from protlig_dd.training.loop import fit
from protlig_dd.training.objective import objective_of
from protlig_dd.training.optim.schedule import resolve_warmup_steps
from protlig_dd.training.packs import make_packs
from protlig_dd.training.report import report_run
from protlig_dd.training.resolve import resolve
from protlig_dd.training.trainer import Trainer, make_model

SLOW_ON_CPU = 10_000_000  # models with more parameters get a warning on a CPU


def run(cfg: DictConfig) -> None:
    """Train the model that the config describes. With plan=true, only print what the training would cost.

    Raises:
        ValueError: before training, an error in the config, the machine or the data; during training, an error that
            ends the run, such as a non-finite loss.
        RanksFailedError: a process started by this function has failed.
        Stopped: a signal or trainer.max_time stopped the run.
    """
    config = read_config(cfg, TrainConfig)
    path = run_path(config)
    config = resolve(config, path)
    if config.plan:
        print_cost(config)
    else:
        launch(train_rank, config, path)


def run_path(config: TrainConfig) -> Path:
    """Return the run folder: runs/<run.name>, or in a sweep the job's own folder.

    The same command always gets the same folder.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return Path(hydra_config.runtime.output_dir)
    return Path("runs") / config.run.name


def train_rank(config: TrainConfig, path: Path, deadline: Deadline) -> None:
    """Train in this process, which may be one of several processes of the run.

    Does nothing if the run has already finished.
    """
    with opened_run(config, path, deadline) as opened:
        if opened is not None:
            train(*opened)


def train(config: TrainConfig, store: StoreGroup, context: RunContext) -> None:
    """Train on `store` from the context's starting point, and write the report after the last step."""
    packs = make_packs(config, store, context.start)
    first = context.processes.first
    with busy("searches the training data for copies of the held-out proteins"):
        leaks = find_held_out_leaks(config, store, context.folder, packs.held_out) if first else {}
    model = make_model(config, context.device, context.attention_backend)
    prepare_kernels(model, packs.training, config, context)
    trainer = Trainer(model, objective_of(config, context.autocast), packs.training, config, context)
    steps = load_start(trainer, context)
    print_summary(trainer, steps, store, context)
    bound = partial(
        held_out_bound,
        trainer.eval_score_fn,
        unigram=designed_frequencies(store),
        seed=config.seed,
        processes=context.processes,
    )

    def validate() -> Row:
        assert packs.validation is not None  # eval_every > 0
        held = bound(packs.validation, draws=config.trainer.eval_draws, description="validation")
        return {f"val_{key}": value for key, value in held.summary().items() if key != "estimator"}

    unfinished = bool(steps) or trainer.evaluation_due
    with busy("counts the lengths of the training proteins"):  # only rank 0 writes checkpoints
        kept = kept_in_checkpoints(trainer, store, context) if unfinished and first else {}
    hooks = Hooks(trainer, validate, kept, context)
    with hooks.closing_log():
        with hooks.finishing_checkpoints():
            if unfinished:
                fit(trainer, steps, hooks, context)
        if steps.stop == trainer.max_steps:
            context.stop.set_deadline(context.deadline)
            with trainer.averaged(), context.stop.immediate():
                held = bound(packs.reported, draws=config.report.draws, description=f"{config.report.split} set")
                report_run(trainer, packs, store, held, leaks, hooks.metrics, context)
            return
        announce(
            f"stopped at step {steps.stop} of {trainer.max_steps}; run the same command without trainer.stop_at_step "
            "to continue",
            context.processes,
        )
        if context.processes.first:
            write_run_page(context.folder)


def kept_in_checkpoints(trainer: Trainer, store: StoreGroup, context: RunContext) -> dict[str, Any]:
    """Return the entries of a checkpoint's state.json that do not come from the trainer."""
    counts, cropped = length_counts(store, trainer.config.data.max_len)
    origin = context.start.converted_from
    return {
        "data_fingerprint": store.fingerprint,
        **({"members_fingerprint": store.members.fingerprint} if isinstance(store, ClusterGroup) else {}),
        "plan_version": trainer.dataset.version,
        "max_steps": trainer.max_steps,
        "length_counts": counts,
        "cropped_sequences": cropped,
        **({} if origin is None else {"converted_from": origin}),
    }


def prepare_kernels(model: DiT, packs: PackDataset, config: TrainConfig, context: RunContext) -> None:
    """If `context.compiled` is set, compile the network and, on a GPU, also pad the packs and capture CUDA graphs.

    Padding gives training packs the same shape. CUDA graphs are captured only if every part of the network allows it.
    """
    if not context.compiled:
        return
    on_gpu = context.device.type == "cuda"
    model.compile_blocks(dynamic=not on_gpu)
    if not on_gpu:
        return
    tokens = config.data.tokens_per_pack
    model.pad_packs(StaticShape(tokens, sequence_slots(tokens, packs.mean_tokens), config.data.max_len + 2))
    # CUDA graphs cannot replay activation checkpointing, because its recomputation sets the random state. They cannot
    # replay operations that read the sequences' lengths on the host, or that build an attention mask for each pack.
    if not config.model.checkpointing and context.attention_backend in GRAPHABLE and not model.uncapturable:
        model.capture(context.autocast)


def load_start(trainer: Trainer, context: RunContext) -> range:
    """Load the checkpoint or the weights that the run starts from, and return the steps that are left to make.

    Returns:
        The numbers of these steps, counted from 0, up to trainer.stop_at_step or the end of the run.

    Raises:
        ValueError: the checkpoint's step is after the run's last step.
    """
    start, control, first = context.start, trainer.config.trainer, 0
    if start.checkpoint is not None:
        trainer.load(start.checkpoint, start.state, start.weights)
        # a checkpoint of another run (run.resume=FOLDER) is not evaluated in this run
        trainer.evaluation_due &= control.eval_every > 0 and start.checkpoint.is_relative_to(context.folder)
        first = start.state["step"]
        if first > trainer.max_steps:
            raise ValueError(
                f"{start.checkpoint}: step {first} is after the last step (trainer.max_steps={trainer.max_steps})"
            )
        announce(f"resuming from {start.checkpoint}", context.processes)
    elif start.weights is not None:
        trainer.start_from(start.weights)
        trainer.evaluation_due = control.eval_every > 0
    return range(first, max(first, min(trainer.max_steps, control.stop_at_step or trainer.max_steps)))


def print_summary(trainer: Trainer, steps: range, store: StoreGroup, context: RunContext) -> None:
    """Print a summary of the model, the data, the device, the number of steps and the noise."""
    say = partial(announce, processes=context.processes)
    config, dataset, model, device = trainer.config, trainer.dataset, trainer.model, context.device
    optim, max_steps, processes = config.optim, trainer.max_steps, context.processes
    warmup_steps = resolve_warmup_steps(optim.warmup_steps, max_steps)
    if warmup_steps != optim.warmup_steps:
        say(
            f"optim.warmup_steps={optim.warmup_steps} is not below the run's {max_steps} steps: warming up "
            f"for {warmup_steps} steps instead"
        )
    if steps:
        epoch = steps.start * optim.packs_per_step // dataset.packs_per_epoch
        with console.status(f"planning epoch {epoch}") if processes.first else contextlib.nullcontext():
            description = dataset.description(epoch)
        say(f"epoch {epoch} of {store.name}: {description}")
    if isinstance(store, ClusterGroup):
        say(f"data.members: {describe_members(store)}")
    if store.context != "none":
        designed, all_of_them = (counts[0, :N_STATES].sum() for counts in (designed_counts(store), store.token_counts))
        say(
            f"data.context={store.context}: {designed:,} of {all_of_them:,} amino acids of the training split are "
            "designed; the others are context"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kernels = ", compiled (the first steps take longer)" if context.compiled else ""
    kernels += ", CUDA graphs" if model.graphed else ""
    epochs = max_steps * optim.packs_per_step / dataset.packs_per_epoch
    say(
        f"{context.folder}: {parameters / 1e6:.1f} M parameters on {device} in {context.precision}, "
        f"{model.kinds}{kernels}; {processes.world_size} process(es); {max_steps} steps of "
        f"{optim.packs_per_step} x {config.data.tokens_per_pack} tokens = "
        f"{epochs:,.2f} epochs"
    )
    if (lora := config.model.lora).rank is not None:
        trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
        share = f"{three_digits(trained / 1e6)} M of {three_digits(parameters / 1e6)} M parameters"
        say(f"{share} are trained ({lora.description})")
    if warning := warning_of_epochs(epochs, len(dataset.rows)):
        say(warning)
    graph, sigma_max = trainer.objective.graph, float(trainer.objective.noise(torch.ones(1))[0])
    name = " ".join(str(config.graph[key]) for key in ("name", "matrix") if key in config.graph)
    say(
        f"graph {name}, lambda_2 = {graph.lambda_2:.3f}; noise up to sigma = {sigma_max:.2f}, "
        f"where the slowest mode of the process has decayed to {math.exp(sigma_max * graph.lambda_2):.1e}"
    )
    if device.type == "cuda" and processes.world_size == 1 and torch.cuda.device_count() > 1:
        say(f"using one of {torch.cuda.device_count()} GPUs; trainer.devices=auto uses all of them")
    if device.type == "cpu" and parameters > SLOW_ON_CPU:
        say("this model is slow on a CPU; experiment=demo is sized for a CPU")
