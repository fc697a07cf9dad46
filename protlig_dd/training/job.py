"""One run, on every rank: build, go on from the checkpoint, fit, report."""

import contextlib
import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from protlig_dd.batch import StaticShape, spare_sequences
from protlig_dd.data.draws import NEWEST, check_version, some_of
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import StoreGroup
from protlig_dd.diffusion.likelihood import pick_estimator
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.score import Network, ScoreFn
from protlig_dd.evaluation.held_out import (
    HeldOut,
    composition_kl,
    held_out_bound,
    length_counts,
    per_sequence,
    training_frequencies,
    training_statistics,
)
from protlig_dd.evaluation.judges import cheap_judges, for_json, with_controls
from protlig_dd.evaluation.leaks import FEWEST, Leaks, find_leaks, may_repeat
from protlig_dd.evaluation.page import PAGE, write_run_page
from protlig_dd.evaluation.trained_on import Source, sources_before
from protlig_dd.evaluation.verdicts import verdicts
from protlig_dd.model.dit import DiT
from protlig_dd.runtime.checkpoint import CheckpointWriter, best_checkpoint
from protlig_dd.runtime.config import TrainConfig, build_graph, build_model, build_noise, resolve_max_weight, spelt
from protlig_dd.runtime.distributed import Processes, all_reduce_sum, busy
from protlig_dd.runtime.environment import matmul_peak
from protlig_dd.runtime.files import write_atomic
from protlig_dd.runtime.generate import designs_fasta, draw_lengths, generate
from protlig_dd.runtime.metrics import MetricsLog, announce, console, with_nan, without_nan
from protlig_dd.runtime.random import random_key
from protlig_dd.runtime.stop import StopRequests
from protlig_dd.runtime.trained import lengths_of
from protlig_dd.tokenizer import N_STATES, ProteinTokenizer
from protlig_dd.training.ema import run_length_decay
from protlig_dd.training.loop import fit
from protlig_dd.training.optim import learning_rate, make_optimizer, warmup_of
from protlig_dd.training.plan import count_steps
from protlig_dd.training.trainer import Trainer

SLOW_ON_CPU = 10_000_000  # parameters
BOOTSTRAP = 100  # draws for the standard errors of the samples' divergences
SHOWN_SAMPLES = 3
LOGGED_SAMPLES = 8  # to the trackers


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


def plan_version(checkpoint: Path | None, state: dict[str, Any]) -> int:
    """Of the run that has this checkpoint (see draws.py): the newest of one that begins, 1 where its state has none.

    Raises:
        ValueError: one that is not known here.
    """
    return NEWEST if checkpoint is None else check_version(state.get("plan_version", 1), checkpoint)


def subset(store: StoreGroup, split: str, most: int, seed: int, version: int) -> np.ndarray:
    """At most `most` rows of a split, the same ones at every evaluation of a run.

    Raises:
        ValueError: an empty split.
    """
    rows = store.split(split)
    if not len(rows):
        raise ValueError(
            f"{store.name} has no {split} sequences; prepare it with a larger split.{split}_fraction or a {split} file"
        )
    return some_of(rows, most, seed, version)


def find_held_out_leaks(
    config: TrainConfig, store: StoreGroup, run_folder: Path, held_rows: dict[str, np.ndarray]
) -> dict[str, Leaks]:
    """For each split of {split: rows}, which of its proteins train this run or have trained the models that it begins
    from (`from=`); says so. One store in which `prepare` kept no sequence twice need not be looked through.
    """
    own, before = Source("this run", store), list(sources_before(config, run_folder, store.stores))
    repeats, found = may_repeat(store), {}
    for split, rows in held_rows.items():
        places = store.places(rows)
        proteins = [
            store.stores[number].tokens[begin : begin + residues + 2]
            for number, begin, residues in zip(*(column.tolist() for column in places), strict=True)
        ]
        leaks = find_leaks(proteins, [own, *before] if repeats else before, near=None)
        if not repeats:
            known = np.full(len(rows), split == "train")
            leaks = replace(leaks, sources=[own, *before], copies=[known, *leaks.copies])
        if before or leaks.copied.any():
            console.print("\n".join(leaks.lines(f"{split} proteins")))
        found[split] = leaks
    return found


def in_training(leaks: Leaks, rows: np.ndarray, held: HeldOut) -> dict[str, Any]:
    """What the report says of held-out proteins that have trained the model, with the bound of the others.

    Args:
        rows: those that `leaks` tells of; `held` may have fewer.
    """
    known = np.isin(rows, held.rows)
    leaks = replace(leaks, copies=[found[known] for found in leaks.copies])
    figures = None
    others = ~leaks.copied if len(leaks.copied) else np.zeros(0, bool)
    if leaks.copied.any() and others.sum() >= FEWEST and held.residues[others].sum():
        columns = {name: getattr(held, name)[others] for name in ("rows", "nats", "residues", "unigram_nats")}
        figures = without_nan(replace(held, **columns).summary())
    return {**leaks.report(), "others": figures}


@dataclass(frozen=True)
class Samples:
    """Amino-acid ids of what the model gives, and of what the untrained network gives where that was asked for."""

    trained: list[np.ndarray]
    untrained: list[np.ndarray] | None
    clamped_draws: float
    """The share of the draws that had a negative probability."""


def draw_samples(
    config: TrainConfig,
    store: StoreGroup,
    score_fn: ScoreFn,
    untrained: ScoreFn | None,
    noise: Noise,
    device: torch.device,
    processes: Processes,
) -> Samples | None:
    """Proteins of lengths of the training split, sampled by all ranks together; the same on each. None where no
    training protein is whole."""
    wanted, max_len = config.report, config.data.max_len
    lengths = lengths_of(*length_counts(store, max_len), max_len)
    if lengths is None or not sum(lengths.counts):
        announce(f"no samples: every training protein has more than data.max_len={max_len} residues", processes)
        return None
    announce(f"samples get lengths of {lengths.told}", processes)
    chosen = draw_lengths(lengths.counts, wanted.samples, config.seed)
    draw = partial(
        generate,
        noise=noise,
        lengths=chosen,
        steps=wanted.steps,
        predictor=wanted.predictor,
        tokens_per_pack=min(config.data.tokens_per_pack, -(-sum(chosen) // processes.world_size)),
        seed=config.seed,
        device=device,
        processes=processes,
    )
    samples, counts = draw(score_fn, description="sampling")
    others = None if untrained is None else draw(untrained, description="untrained")[0]
    return Samples(samples, others, counts["clamped"] / counts["draws"])


def sample_report(
    config: TrainConfig,
    store: StoreGroup,
    run_folder: Path,
    step: int,
    drawn: Samples,
    metrics: MetricsLog,
    version: int,
) -> dict[str, Any]:
    """Write samples/step_N.fasta and log them, and compare them with the training split's composition and with
    proteins of a split, chosen by this version."""
    wanted, max_len = config.report, config.data.max_len
    samples, frequencies = drawn.trained, training_frequencies(store)
    file = run_folder / "samples" / f"step_{step:08d}.fasta"
    names = [f"{run_folder.name}_{i}" for i in range(1, len(samples) + 1)]
    text = designs_fasta(
        samples,
        names=names,
        run=run_folder.name,
        step=step,
        seed=config.seed,
        predictor=wanted.predictor,
        steps=wanted.steps,
    )
    write_atomic(file, text)
    decoded = [ProteinTokenizer().decode(ids) for ids in samples]
    metrics.write_samples(step, dict(zip(names[:LOGGED_SAMPLES], decoded, strict=False)))
    metrics.write_histogram(step, "samples/length", np.array([len(ids) for ids in samples]))
    metrics.write_histogram(step, "samples/amino_acid", np.concatenate(samples), np.arange(N_STATES + 1) - 0.5)
    result = {
        "samples": str(file.relative_to(run_folder)),
        "shown": decoded[:SHOWN_SAMPLES],
        "clamped_draws": drawn.clamped_draws,
        "composition_kl": composition_kl(samples, frequencies),
    }
    most = max(wanted.max_sequences, 4 * len(samples))  # for as many controls, and a reference
    places = store.places(subset(store, wanted.split, most, config.seed, version))
    natural = [
        store.stores[number].tokens[begin + 1 : begin + 1 + residues]
        for number, begin, residues in zip(*(column.tolist() for column in places), strict=True)
        if residues <= max_len  # as the samples are
    ]
    if len(judged := samples[: len(natural) // 2]) > 1:  # fewer have no standard errors
        controls = with_controls(judged, natural, config.seed)
        judges = cheap_judges(controls, bootstrap=BOOTSTRAP, seed=config.seed)
        rows = {name: [ask(some) for some in sets] for name, (ask, sets) in judges.items()}
        found = verdicts(rows, len(controls.others), "they were drawn from those of the training set")
        result |= {"judges": for_json(rows), "verdicts": [one._asdict() for one in found]}
    if drawn.untrained is not None:
        result["untrained_composition_kl"] = composition_kl(drawn.untrained, frequencies)
    return result


def without_copies(others: dict[str, Any] | None) -> list[str]:
    """The lines of a report's figures over the proteins that have not trained the model."""
    if others is None:
        return ["  none, or too few for a bound"]
    found = with_nan(others)
    return [
        f"  NLL bound            {found['nll']:.4f} ± {found['nll_se']:.4f}",
        f"  unigram NLL          {found['unigram_nll']:.4f} ± {found['unigram_nll_se']:.4f}",
        f"  paired difference    {found['difference']:+.4f} ± {found['difference_se']:.4f}",
    ]


def print_report(run_folder: Path, step: int, report: dict[str, Any], data: str) -> None:
    """The run's last words: where it is, how good it is, what it makes.

    Args:
        data: the store whose training split gives the unigram model.
    """
    lines = [
        "",
        f"run folder             {run_folder}",
        f"report page            {run_folder / PAGE}",
        f"{report['split']} set, {report['sequences']} proteins, {report['residues']:,} residues (the first "
        f"{report['max_len']} of each), "
        f"step {step}, averaged weights, {report['estimator']} estimator; nats/residue:",
        f"  NLL bound            {report['nll']:.4f} ± {report['nll_se']:.4f}",
        f"  unigram NLL          {report['unigram_nll']:.4f} ± {report['unigram_nll_se']:.4f}, of the training split "
        f"of {data}",
        f"  paired difference    {report['difference']:+.4f} ± {report['difference_se']:.4f}",
    ]
    if copies := report["in_training"]["copies"]:
        lines.append(f"{copies} of these proteins have trained the model; without them:")
        lines += without_copies(report["in_training"]["others"])
    if "samples" in report:
        lines.append("composition, KL to the training set in nats:")
        lines.append(f"  samples              {report['composition_kl']:.4f}")
        if "untrained_composition_kl" in report:
            lines.append(f"  untrained model      {report['untrained_composition_kl']:.4f}")
        lines.append(f"samples                {run_folder / report['samples']}")
        lines += [f"  {sequence}" for sequence in report["shown"]]
    console.print("\n".join(lines))
