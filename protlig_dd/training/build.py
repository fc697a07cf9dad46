"""One run, on every rank: build, go on from the checkpoint, fit, report."""

import contextlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from protlig_dd.batch import StaticShape, spare_sequences
from protlig_dd.config.components import build_graph, build_model, build_noise, resolve_max_weight
from protlig_dd.config.read import spelt
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import StoreGroup
from protlig_dd.diffusion.likelihood import pick_estimator
from protlig_dd.diffusion.score import Network, ScoreFn
from protlig_dd.evaluation.likelihood.held_out import (
    held_out_bound,
    length_counts,
    per_sequence,
    training_frequencies,
    training_statistics,
)
from protlig_dd.evaluation.report.page import write_run_page
from protlig_dd.model.dit import DiT
from protlig_dd.runs.checkpoint import CheckpointWriter, best_checkpoint
from protlig_dd.runs.metrics import MetricsLog, without_nan
from protlig_dd.system.device import matmul_peak
from protlig_dd.system.distributed import Processes, all_reduce_sum, busy
from protlig_dd.system.files import write_atomic
from protlig_dd.system.random import random_key
from protlig_dd.system.signals import StopRequests
from protlig_dd.system.terminal import announce, console
from protlig_dd.training.cost import count_steps
from protlig_dd.training.ema import run_length_decay
from protlig_dd.training.held_out import find_held_out_leaks, in_training, plan_version, subset
from protlig_dd.training.loop import fit
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.optim.schedule import learning_rate, warmup_of
from protlig_dd.training.report import draw_samples, print_report, sample_report
from protlig_dd.training.trainer import Trainer

SLOW_ON_CPU = 10_000_000  # parameters


def train(
    config: TrainConfig,
    store: StoreGroup,
    *,
    run_folder: Path,
    attempt: int,
    checkpoint: Path | None,
    state: dict[str, Any],
    weights: Path | None,
    precision: str,
    attention_backend: str,
    compiled: bool,
    device: torch.device,
    processes: Processes,
    stop: StopRequests,
    deadline: float | None,
) -> None:
    """Train `config` on `store` from `checkpoint` (or from nothing) and report once the last step is reached.

    Args:
        state: of that checkpoint, whose files were found to match their checksums.
        weights: of another model, to begin with where there is no checkpoint.
        deadline: time.monotonic() at which to stop, after one step at least.
    """
    graph = build_graph(config.graph)
    noise = build_noise(config.noise, graph)
    data, optim, control = config.data, config.optim, config.trainer
    packs_of = partial(PackDataset, store, max_len=data.max_len, tokens_per_pack=data.tokens_per_pack)
    version = plan_version(checkpoint, state)
    dataset = packs_of(store.split("train"), seed=config.seed, crop=data.crop, weights=data.weights, version=version)

    held_rows: dict[str, np.ndarray] = {}

    def held_out(split: str, most: int) -> PackDataset:
        rows = subset(store, split, most, config.seed, version)
        held_rows[split] = np.union1d(held_rows.get(split, rows), rows)
        return packs_of(rows, seed=None)

    validation = held_out("validation", control.eval_max_sequences) if control.eval_every else None
    reported = held_out(config.report.split, config.report.max_sequences)
    with busy("looks for copies of the held-out proteins in what trains the model"):
        leaks = find_held_out_leaks(config, store, run_folder, held_rows) if processes.first else {}

    def make_model() -> DiT:
        torch.manual_seed(random_key(config.seed, "weights", 0))
        with device:
            return build_model(config.model, attention_backend, config.time_conditioning)

    def make_score(network: Network) -> ScoreFn:
        autocast = torch.bfloat16 if precision == "bf16" else None
        return ScoreFn(network, graph, config.parametrisation, config.time_conditioning, autocast)

    model = make_model()
    max_steps = count_steps(config, dataset)
    warmup_steps = warmup_of(optim.warmup_steps, max_steps)
    if warmup_steps != optim.warmup_steps:
        announce(
            f"optim.warmup_steps={optim.warmup_steps} is not below the run's {max_steps} steps: it warms up for "
            f"{warmup_steps}",
            processes,
        )
    if compiled:
        model.compile_blocks(dynamic=device.type != "cuda")
    if compiled and device.type == "cuda":
        most = spare_sequences(data.tokens_per_pack, dataset.mean_tokens)
        model.fill_packs(StaticShape(data.tokens_per_pack, most, data.max_len + 2))
        # neither recomputation, which sets the random state, nor sdpa's loop over sequences can be replayed
        if not config.model.checkpointing and attention_backend != "sdpa":
            model.capture(torch.bfloat16 if precision == "bf16" else None)
    trainer = Trainer(
        model=model,
        make_score=make_score,
        graph=graph,
        noise=noise,
        optimizer=make_optimizer(
            optim.name,
            model,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            precision=precision,
        ),
        dataset=dataset,
        device=device,
        processes=processes,
        seed=config.seed,
        packs_per_step=optim.packs_per_step,
        max_steps=max_steps,
        learning_rate=partial(
            learning_rate,
            schedule=optim.schedule,
            lr=optim.lr,
            warmup_steps=warmup_steps,
            max_steps=max_steps,
            min_lr_ratio=optim.min_lr_ratio,
            decay_share=optim.decay_share,
        ),
        grad_clip=optim.grad_clip,
        ema_decay=run_length_decay(max_steps) if optim.ema_decay == "auto" else float(optim.ema_decay),
        curriculum_steps=config.noise.get("curriculum", 0),
        max_weight=resolve_max_weight(config.noise, graph),
        loss_spike=control.loss_spike,
    )
    first_step = 0
    if checkpoint is not None:
        trainer.load(checkpoint, state)
        # a checkpoint of another run is that run's to evaluate
        trainer.evaluation_due &= control.eval_every > 0 and checkpoint.is_relative_to(run_folder)
        first_step = state["step"]
        if first_step > max_steps:
            raise ValueError(f"{checkpoint} is beyond trainer.max_steps={max_steps}")
        announce(f"going on from {checkpoint}", processes)
    elif weights is not None:
        trainer.start_from(weights)
        trainer.evaluation_due = control.eval_every > 0
    last_step = max(first_step, min(max_steps, control.stop_at_step or max_steps))
    if first_step < last_step:
        epoch = first_step * optim.packs_per_step // dataset.packs_per_epoch
        with console.status(f"planning epoch {epoch}") if processes.first else contextlib.nullcontext():
            rows, left_over = len(dataset.plan(epoch).rows), dataset.tail(epoch)
        announce(
            f"epoch {epoch}: {rows:,} sequences in {dataset.packs_per_epoch:,} packs, {left_over:,} of them left over; "
            f"{store.name}",
            processes,
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    announce(
        f"{run_folder}: {parameters / 1e6:.1f} M parameters on {device} in {precision}, attention {attention_backend}"
        f"{', compiled (the first steps wait for it)' if compiled else ''}{', CUDA graphs' if model.graphed else ''}; "
        f"{processes.world_size} process(es); {max_steps} steps of "
        f"{optim.packs_per_step} x {data.tokens_per_pack} tokens = "
        f"{max_steps * optim.packs_per_step / dataset.packs_per_epoch:.2f} epochs",
        processes,
    )
    sigma_max = float(noise(torch.ones(1))[0])
    name = " ".join(str(config.graph[key]) for key in ("name", "matrix") if key in config.graph)
    announce(
        f"graph {name}, lambda_2 = {graph.lambda_2:.3f}; noise up to sigma = {sigma_max:.2f}, "
        f"which leaves {math.exp(sigma_max * graph.lambda_2):.1e} of the data",
        processes,
    )
    if device.type == "cuda" and processes.world_size == 1 and torch.cuda.device_count() > 1:
        announce(f"one of {torch.cuda.device_count()} GPUs is used; trainer.devices=auto uses all", processes)
    if device.type == "cpu" and parameters > SLOW_ON_CPU:
        announce("this model is slow on a CPU: experiment=demo and model=tiny are sized for one", processes)

    bound = partial(
        held_out_bound,
        graph=graph,
        noise=noise,
        unigram=training_frequencies(store),
        estimator=pick_estimator(graph, config.parametrisation, config.time_conditioning),
        seed=config.seed,
        device=device,
        processes=processes,
    )

    def evaluate() -> dict[str, Any]:
        assert validation is not None  # eval_every > 0
        held = bound(trainer.eval_score_fn, dataset=validation, draws=control.eval_draws, description="validation")
        return {f"val_{key}": value for key, value in held.summary().items() if key != "estimator"}

    with contextlib.ExitStack() as logs:
        metrics = None
        if processes.first:
            metrics = MetricsLog(run_folder, attempt, config=spelt(config), **vars(config.logger))
            logs.callback(metrics.close)
        with contextlib.ExitStack() as stack:
            writer = None
            if processes.first:
                writer = CheckpointWriter(
                    run_folder,
                    config_yaml=OmegaConf.to_yaml(OmegaConf.create(spelt(config))),
                    keep_last=control.keep_last,
                    keep_every=control.keep_every,
                )
                stack.callback(writer.close)
            if first_step < last_step or trainer.evaluation_due:
                counts, cropped = length_counts(store, data.max_len)
                peak = matmul_peak(device, precision)
                fit(
                    trainer,
                    first_step=first_step,
                    last_step=last_step,
                    workers=data.workers,
                    log_every=control.log_every,
                    rows_file=run_folder / "rows.jsonl" if control.log_rows else None,
                    evaluate=evaluate,
                    eval_every=control.eval_every,
                    writer=writer,
                    best=best_checkpoint(run_folder)[1],
                    state={
                        "data_fingerprint": store.fingerprint,
                        "plan_version": version,
                        "max_steps": max_steps,
                        "length_counts": counts,
                        "cropped_sequences": cropped,
                    },
                    checkpoint_every=control.checkpoint_every,
                    metrics=metrics,
                    peak_flops=float(all_reduce_sum(torch.tensor(peak, dtype=torch.float64))),
                    stop=stop,
                    deadline=deadline,
                )
        if last_step < max_steps:
            announce(
                f"stopped at step {last_step} of {max_steps}; without trainer.stop_at_step it goes on",
                processes,
            )
            if processes.first:
                write_run_page(run_folder)
            return
        stop.at(deadline)
        with trainer.averaged(), stop.immediate():
            held = bound(
                trainer.eval_score_fn,
                dataset=reported,
                draws=config.report.draws,
                description=f"{config.report.split} set",
            )
            report: dict[str, Any] = {"split": config.report.split, "max_len": data.max_len, **held.summary()}
            report |= {"step": max_steps, "draws": config.report.draws, "t_min": noise.t_min, "sigma_max": sigma_max}
            report["precision"] = precision
            if processes.first:
                report |= {"parameters": parameters, "training": training_statistics(store, data.max_len)}
                report["in_training"] = in_training(leaks[config.report.split], held_rows[config.report.split], held)
            if config.report.samples:
                # of a fine-tune, the untrained network is not what it began with
                wanted = config.report.untrained and config.from_ is None
                untrained = make_score(make_model().eval()) if wanted else None
                with busy("samples for the report"):
                    samples = draw_samples(config, store, trainer.eval_score_fn, untrained, noise, device, processes)
                if metrics is not None and samples is not None:
                    report |= sample_report(config, store, run_folder, max_steps, samples, metrics, version)
        if processes.first:
            write_atomic(run_folder / "report.csv", per_sequence(store, held))
            write_atomic(run_folder / "report.json", json.dumps(without_nan(report), indent=1) + "\n")
            write_run_page(run_folder)
            print_report(run_folder, max_steps, report, store.name)
