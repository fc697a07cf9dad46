"""What a run reports at its end."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protlig_dd.config.train import TrainConfig
from protlig_dd.data.store import StoreGroup
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.likelihood.held_out import composition_kl, length_counts, training_frequencies
from protlig_dd.evaluation.report.run import PAGE
from protlig_dd.evaluation.samples.statistics import cheap_judges, for_json, with_controls
from protlig_dd.evaluation.samples.verdicts import verdicts
from protlig_dd.inference.generate import designs_fasta, generate
from protlig_dd.inference.lengths import draw_lengths, lengths_of
from protlig_dd.runs.metrics import MetricsLog, with_nan
from protlig_dd.system.distributed import Processes
from protlig_dd.system.files import write_atomic
from protlig_dd.system.terminal import announce, console
from protlig_dd.tokenizer import N_STATES, ProteinTokenizer
from protlig_dd.training.held_out import subset

BOOTSTRAP = 100  # draws for the standard errors of the samples' divergences
SHOWN_SAMPLES = 3
LOGGED_SAMPLES = 8  # to the trackers


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
