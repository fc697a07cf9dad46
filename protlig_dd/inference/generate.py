"""Sampling any number of proteins: packs, keyed draws, a progress bar, FASTA."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.likelihood import nll_bound
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.model import TrainedModel
from protlig_dd.inference.sharing import Tick, Work, share
from protlig_dd.inference.steering import Steering, describe_steering
from protlig_dd.system.distributed import gather_objects
from protlig_dd.system.random import keyed_generator
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import BOS, EOS, MASK, ProteinTokenizer

CPU = torch.device("cpu")


@runtime_checkable
class SamplingConfig(Steering, Protocol):
    """What the configs of the verbs that sample have in common."""

    steps: int
    predictor: str
    seed: int
    tokens_per_pack: int
    nll_draws: int


def options_of(config: SamplingConfig) -> SamplerOptions:
    """The sampler that a verb's config describes."""
    return SamplerOptions(config.steps, config.predictor, config.temperature, config.top_p)


class Origin(NamedTuple):
    """What made a sample, for the headers of FASTA."""

    run: str
    step: int
    seed: int
    options: SamplerOptions
    steering: str = ""
    """What `describe_steering` says."""


def sample_designs(
    trained: TrainedModel,
    config: SamplingConfig,
    *,
    lengths: Sequence[int],
    numbers: Sequence[int] | None = None,
    templates: Sequence[np.ndarray] | None = None,
    log_bias: Tensor | Sequence[Tensor] | None = None,
) -> list[np.ndarray]:
    """`generate` as a verb's config says; the samples, on every rank."""
    processes = trained.processes
    samples, counts = generate(
        trained.score_fn,
        lengths,
        options_of(config),
        Work(config.tokens_per_pack, "sampling", processes),
        seed=config.seed,
        log_bias=log_bias,
        numbers=numbers,
        templates=templates,
    )
    announce(
        f"{len(samples)} proteins, {np.mean(lengths):.0f} residues on average; "
        f"{counts['clamped'] / counts['draws']:.2%} of draws clamped",
        processes,
    )
    if counts["skipped"]:
        skipped = counts["skipped"] / (counts["skipped"] + counts["evaluated"])
        announce(f"{skipped:.1%} of the network's evaluations were skipped: nothing had changed", processes)
    return samples


def describe_designs(
    trained: TrainedModel,
    config: SamplingConfig,
    samples: Sequence[np.ndarray],
    *,
    names: Sequence[str],
    numbers: Sequence[int] | None = None,
    notes: Sequence[str] | None = None,
) -> str:
    """FASTA of samples, with the model's bound on the NLL of each after what else there is to note; on every rank,
    which share the bounds.
    """
    bounds = describe_bounds(trained, samples, numbers, config)
    notes = bounds if notes is None else [note + bound for note, bound in zip(notes, bounds, strict=True)]
    origin = Origin(trained.run, trained.step, config.seed, options_of(config), describe_steering(config))
    return designs_fasta(samples, names, origin, notes)


def describe_bounds(
    trained: TrainedModel, samples: Sequence[np.ndarray], numbers: Sequence[int] | None, config: SamplingConfig
) -> list[str]:
    """` nll=2.8512 nll_se=0.0113` for each protein: the model's own bound, nats a residue; nothing without draws.

    A protein draws from (seed, "bound", its number), by itself, so that its bound does not depend on the others.
    """
    if not config.nll_draws:
        return [""] * len(samples)

    def bound_of(i: int, tick: Tick) -> dict[int, str]:
        batch = PackedBatch.pack([torch.tensor([BOS, *samples[i].tolist(), EOS])]).to(trained.device)
        number = i if numbers is None else numbers[i]
        bound = nll_bound(
            trained.score_fn,
            batch,
            generator=keyed_generator(config.seed, "bound", number, trained.device),
            draws=config.nll_draws,
            tokens_at_once=config.tokens_per_pack,
        )
        residues = max(1, int(bound.residues))  # a design may consist of context letters alone
        tick()
        return {i: f" nll={float(bound.nats) / residues:.4f} nll_se={float(bound.standard_error) / residues:.4f}"}

    found = share(range(len(samples)), bound_of, description="NLL bounds", processes=trained.processes)
    return [found[i] for i in range(len(samples))]


def generate(
    score_fn: ScoreFn,
    lengths: Sequence[int],
    options: SamplerOptions,
    work: Work,
    *,
    seed: int,
    log_bias: Tensor | Sequence[Tensor] | None = None,
    numbers: Sequence[int] | None = None,
    templates: Sequence[np.ndarray] | None = None,
) -> tuple[list[np.ndarray], Counter[str]]:
    """Sample sequences of these lengths, a pack at a time; a sequence draws from (seed, "sample", its number) on the
    CPU.

    Args:
        work: packs and the processes that share them.
        log_bias: nats for each amino acid (see `sample`): (20,) for all positions of all sequences, or one tensor
            (length_i, 20) for each sequence.
        numbers: of the sequences; 0, 1, 2, ... when left out.
        templates: ids (length_i,) of each sequence's residues, MASK where they are free; the others are held fixed.

    Returns:
        uint8 arrays of amino-acid ids in the order of `lengths`, and the sampler's counts; the same on every rank.
    """
    counts: Counter[str] = Counter()

    def sample_pack(indices: range, tick: Tick) -> dict[int, np.ndarray]:
        keys = [i if numbers is None else numbers[i] for i in indices]
        bias = log_bias
        if bias is not None and not isinstance(bias, Tensor):
            bias = torch.cat([bias[i] for i in indices])
        drawn = sample(
            score_fn,
            [lengths[i] for i in indices],
            options,
            [keyed_generator(seed, "sample", key, CPU) for key in keys],
            None if templates is None else held_fixed([templates[i] for i in indices]),
            log_bias=bias,
            on_step=tick,
            counts=counts,
        )
        return dict(zip(indices, drawn, strict=True))

    samples = work.share(lengths, sample_pack, ticks=options.steps + 1)
    counts = sum(gather_objects(counts), Counter())
    return [samples[i] for i in range(len(lengths))], counts


def held_fixed(templates: Sequence[np.ndarray]) -> Callable[[Tensor], Tensor]:
    """`project` of `sample`: tokens of a pack -> the same, with the residues that the templates fix."""
    fixed_T = torch.from_numpy(np.concatenate([[BOS, *ids.tolist(), EOS] for ids in templates]))

    def project(tokens: Tensor) -> Tensor:
        wanted = fixed_T.to(tokens.device)
        return torch.where(wanted == MASK, tokens, wanted)

    return project


def designs_fasta(
    samples: Sequence[np.ndarray], names: Sequence[str], origin: Origin, notes: Sequence[str] | None = None
) -> str:
    """FASTA of samples, wrapped at 60 columns; each header says what made it, and what else there is to note."""
    decode = ProteinTokenizer().decode
    lines = []
    for name, ids, note in zip(names, samples, notes or [""] * len(samples), strict=True):
        sequence = decode(ids)
        made = f"run={origin.run} step={origin.step} seed={origin.seed} length={len(sequence)}"
        sampler = f"sampler={origin.options.predictor} steps={origin.options.steps}{origin.steering}"
        lines.append(f">{name} {made} {sampler}{note}")
        lines.extend(sequence[start : start + 60] for start in range(0, len(sequence), 60))
    return "\n".join(lines) + "\n"
