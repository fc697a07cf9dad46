"""Write the report at the end of a run."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protlig_dd.config.train import TrainConfig
from protlig_dd.data.store import StoreGroup
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.likelihood.held_out import (
    HeldOut,
    composition_kl,
    length_counts,
    per_sequence_csv,
    training_frequencies,
    training_statistics,
)
from protlig_dd.evaluation.likelihood.leaks import Leaks
from protlig_dd.evaluation.report.page import write_run_page
from protlig_dd.evaluation.report.run import PAGE
from protlig_dd.evaluation.samples.statistics import cheap_judges, for_json, with_controls
from protlig_dd.evaluation.samples.verdicts import verdicts
from protlig_dd.inference.generate import Origin, designs_fasta, generate
from protlig_dd.inference.lengths import draw_lengths, lengths_of
from protlig_dd.inference.sharing import Work
from protlig_dd.model.lora import base_weights
from protlig_dd.runs.metrics import MetricsLog, with_nan, without_nan
from protlig_dd.system.distributed import busy
from protlig_dd.system.files import write_atomic
from protlig_dd.system.tables import as_json
from protlig_dd.system.terminal import announce, console
from protlig_dd.tokenizer import N_STATES, ProteinTokenizer
from protlig_dd.training.context import RunContext
from protlig_dd.training.held_out import leak_report
from protlig_dd.training.packs import Packs, subset
from protlig_dd.training.trainer import Trainer, make_model

BOOTSTRAP = 100  # bootstrap draws for the standard errors of the samples' divergences
SHOWN_SAMPLES = 3
LOGGED_SAMPLES = 8  # number of samples that are sent to TensorBoard and Weights & Biases


@dataclass(frozen=True)
class Samples:
    """Amino-acid ids of proteins sampled from the trained model and, if requested, from the untrained network."""

    trained: list[np.ndarray]
    untrained: list[np.ndarray] | None
    clamped_draws: float
    """Fraction of the sampler's draws in which a probability was negative and was set to 0."""


def report_run(
    trainer: Trainer,
    packs: Packs,
    store: StoreGroup,
    held: HeldOut,
    leaks: dict[str, Leaks],
    metrics: MetricsLog | None,
    context: RunContext,
) -> None:
    """Sample proteins from the model on all ranks. Rank 0 writes the report, the report page and the samples.

    Args:
        trainer: its model must have the averaged weights (see `Trainer.averaged`).
        held: bounds on the NLL of the proteins of the report's split.
        leaks: which held-out proteins are in the model's training data, by split. Empty on all ranks but rank 0.
        metrics: log of samples and histograms. None on all ranks but rank 0.
    """
    config, noise = trainer.config, trainer.objective.noise
    split, sigma_max = config.report.split, float(noise(torch.ones(1))[0])
    report: dict[str, Any] = {"split": split, "max_len": config.data.max_len, **held.summary()}
    report |= {"step": trainer.max_steps, "draws": config.report.draws, "t_min": noise.t_min, "sigma_max": sigma_max}
    report["precision"] = context.precision
    if store.context != "none":
        report["context"] = store.context
    if context.processes.first:
        parameters = sum(parameter.numel() for parameter in base_weights(trainer.model).values())
        report |= {"parameters": parameters, "training": training_statistics(store, config.data.max_len)}
        report["in_training"] = leak_report(leaks[split], packs.held_out[split], held)
    if config.report.samples:
        with busy("samples proteins for the report"):
            samples = draw_samples(trainer, store, context)
        if metrics is not None and samples is not None:
            report |= sample_report(trainer, store, samples, metrics, context)
    if context.processes.first:
        write_atomic(context.folder / "report.csv", per_sequence_csv(store, held))
        write_atomic(context.folder / "report.json", as_json(without_nan(report)))
        write_run_page(context.folder)
        print_report(context.folder, trainer.max_steps, report, store.name)


def draw_samples(trainer: Trainer, store: StoreGroup, context: RunContext) -> Samples | None:
    """Sample proteins on all ranks together, with lengths drawn from the training split.

    Returns:
        The same samples on every rank. None if every training protein was cropped.
    """
    config, processes = trainer.config, context.processes
    options, max_len = config.report, config.data.max_len
    lengths = lengths_of(*length_counts(store, max_len), max_len)
    if lengths is None or not sum(lengths.counts):
        announce(f"no samples: every training protein has more than data.max_len={max_len} residues", processes)
        return None
    announce(f"sample lengths are drawn from {lengths.description}", processes)
    if store.context != "none":
        announce(
            f"warning: this model is trained with data.context={store.context} ({store.context}-case residues are "
            "given, the others are predicted), but the report's samples are whole proteins; use infill with "
            f"context={store.context}",
            processes,
        )
    sample_lengths = draw_lengths(lengths.counts, options.samples, config.seed)
    tokens_per_pack = min(config.data.tokens_per_pack, -(-sum(sample_lengths) // processes.world_size))

    def sample_with(score_fn: ScoreFn, description: str) -> tuple[list[np.ndarray], Counter[str]]:
        work = Work(tokens_per_pack, description, processes)
        return generate(score_fn, sample_lengths, sampler_options(config), work, seed=config.seed)

    samples, counts = sample_with(trainer.eval_score_fn, "sampling")
    untrained = None
    if options.untrained and config.from_ is None:  # a fine-tuned run did not start from the untrained network
        network = make_model(config, context.device, context.attention_backend).eval()
        untrained, _ = sample_with(trainer.objective.score_fn(network), "untrained")
    return Samples(samples, untrained, counts["clamped"] / counts["draws"])


def sampler_options(config: TrainConfig) -> SamplerOptions:
    """Return the options of the report's sampler."""
    return SamplerOptions(config.report.steps, config.report.predictor)


def sample_report(
    trainer: Trainer, store: StoreGroup, drawn: Samples, metrics: MetricsLog, context: RunContext
) -> dict[str, Any]:
    """Write samples/step_N.fasta, log the samples, and return the report's entries about them.

    The samples are compared with the composition of the training split and with proteins of the report's split.
    """
    config, step, run_folder = trainer.config, trainer.max_steps, context.folder
    options, max_len = config.report, config.data.max_len
    samples, frequencies = drawn.trained, training_frequencies(store)
    file = run_folder / "samples" / f"step_{step:08d}.fasta"
    names = [f"{run_folder.name}_{i}" for i in range(1, len(samples) + 1)]
    origin = Origin(run_folder.name, step, config.seed, sampler_options(config))
    write_atomic(file, designs_fasta(samples, names, origin))
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
    most = max(options.max_sequences, 4 * len(samples))  # enough for one control per sample, and a reference set
    locations = store.locate(subset(store, options.split, most, config.seed, trainer.dataset.version))
    natural = [
        store.stores[number].tokens[begin + 1 : begin + 1 + residues]
        for number, begin, residues in zip(*(column.tolist() for column in locations), strict=True)
        if residues <= max_len  # the samples are not longer either
    ]
    if len(judged := samples[: len(natural) // 2]) > 1:  # a single sample has no standard error
        controls = with_controls(judged, natural, config.seed)
        judges = cheap_judges(controls, bootstrap=BOOTSTRAP, seed=config.seed)
        rows = {name: [judge(proteins) for proteins in sets] for name, (judge, sets) in judges.items()}
        found = verdicts(rows, len(controls.length_reference), "they were drawn from the lengths of the training set")
        result |= {"judges": for_json(rows), "verdicts": [verdict._asdict() for verdict in found]}
    if drawn.untrained is not None:
        result["untrained_composition_kl"] = composition_kl(drawn.untrained, frequencies)
    return result


def lines_without_copies(others: dict[str, Any] | None) -> list[str]:
    """Return the lines to print about the bound over the proteins that are not in the model's training data.

    Args:
        others: this bound as in report.json; None if there is no bound.
    """
    if others is None:
        return ["  too few proteins are left for a bound"]
    found = with_nan(others)
    return [
        f"  NLL bound            {found['nll']:.4f} ± {found['nll_se']:.4f}",
        f"  unigram NLL          {found['unigram_nll']:.4f} ± {found['unigram_nll_se']:.4f}",
        f"  bound - unigram NLL  {found['difference']:+.4f} ± {found['difference_se']:.4f}",
    ]


def print_report(run_folder: Path, step: int, report: dict[str, Any], data: str) -> None:
    """Print the run folder, the bound on the held-out proteins, and some samples.

    Args:
        data: name of the store whose training split gives the unigram model.
    """
    of_case, crops = "residues", f"the first {report['max_len']} of each"
    if "context" in report:
        of_case = f"designed residues given the {report['context']}-case residues"
        crops = f"in crops of at most {report['max_len']} residues"
    lines = [
        "",
        f"run folder             {run_folder}",
        f"report page            {run_folder / PAGE}",
        f"{report['split']} set, {report['sequences']} proteins, {report['residues']:,} {of_case} ({crops}), "
        f"step {step}, averaged weights, {report['estimator']} estimator; nats/residue:",
        f"  NLL bound            {report['nll']:.4f} ± {report['nll_se']:.4f}",
        f"  unigram NLL          {report['unigram_nll']:.4f} ± {report['unigram_nll_se']:.4f}, of the training split "
        f"of {data}",
        f"  bound - unigram NLL  {report['difference']:+.4f} ± {report['difference_se']:.4f}",
    ]
    if copies := report["in_training"]["copies"]:
        lines.append(f"{copies} of these proteins are in the model's training data; without them:")
        lines += lines_without_copies(report["in_training"]["others"])
    if "samples" in report:
        lines.append("composition, KL to the training set in nats:")
        lines.append(f"  samples              {report['composition_kl']:.4f}")
        if "untrained_composition_kl" in report:
            lines.append(f"  untrained model      {report['untrained_composition_kl']:.4f}")
        lines.append(f"samples                {run_folder / report['samples']}")
        lines += [f"  {sequence}" for sequence in report["shown"]]
    console.print("\n".join(lines))
