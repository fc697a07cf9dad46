"""Sample any number of proteins in packs, with a progress bar, and format them as FASTA.

The random draws of a protein depend only on the seed and the protein's number.
"""

from collections import Counter
from collections.abc import Sequence
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
from protlig_dd.inference.sequences import check_biases, fix_residues
from protlig_dd.inference.sharing import Tick, Work, gather, share
from protlig_dd.inference.steering import Steering, describe_steering
from protlig_dd.system.random import keyed_generator
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import BOS, EOS, ProteinTokenizer

CPU = torch.device("cpu")


@runtime_checkable
class SamplingConfig(Steering, Protocol):
    """The config keys that all sampling commands share."""

    steps: int
    predictor: str
    seed: int
    tokens_per_pack: int
    nll_draws: int


def options_of(config: SamplingConfig) -> SamplerOptions:
    """Return the sampler options of a command's config."""
    return SamplerOptions(config.steps, config.predictor, config.temperature, config.top_p)


class Origin(NamedTuple):
    """How a sample was made, for FASTA headers."""

    run: str
    step: int
    seed: int
    options: SamplerOptions
    steering: str = ""
    """The text that `describe_steering` returns."""


def sample_designs(
    trained: TrainedModel,
    config: SamplingConfig,
    *,
    lengths: Sequence[int],
    numbers: Sequence[int] | None = None,
    templates: Sequence[np.ndarray] | None = None,
    log_bias: Tensor | Sequence[Tensor] | None = None,
) -> list[np.ndarray]:
    """Call `generate` with a command's config and return the samples on every rank."""
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
        f"{counts['clamped'] / counts['draws']:.2%} of draws had a negative probability, which was set to 0",
        processes,
    )
    if counts["skipped"]:
        skipped = counts["skipped"] / (counts["skipped"] + counts["evaluated"])
        announce(
            f"{skipped:.1%} of the network's evaluations were skipped, because their sequences had not changed",
            processes,
        )
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
    """Return the samples as FASTA. Every rank returns the same text.

    Each header ends with the sample's note, if there are notes, and with the model's bound on the sample's NLL, unless
    nll_draws is 0. The ranks share the computation of the bounds.
    """
    bounds = bound_notes(trained, samples, numbers, config)
    notes = bounds if notes is None else [note + bound for note, bound in zip(notes, bounds, strict=True)]
    origin = Origin(trained.run, trained.step, config.seed, options_of(config), describe_steering(config))
    return designs_fasta(samples, names, origin, notes)


def bound_notes(
    trained: TrainedModel, samples: Sequence[np.ndarray], numbers: Sequence[int] | None, config: SamplingConfig
) -> list[str]:
    """Return a text such as ` nll=2.8512 nll_se=0.0113` for each protein.

    The text gives the model's bound on the protein's NLL and its standard error, in nats/residue. It is empty if
    nll_draws is 0. The bound of each protein is computed separately, with draws keyed by (seed, "bound", the protein's
    number), so that the bound does not depend on other proteins.
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
        residues = max(1, int(bound.residues))  # context letters such as X do not count
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
    """Sample sequences of these lengths, one pack at a time.

    The random draws of a sequence are keyed by (seed, "sample", the sequence's number) and made on the CPU.

    Args:
        work: the size of the packs, and the ranks that share the packs.
        log_bias: nats for each amino acid (see `sample`): (20,) for all positions of all sequences, or one tensor
            (length_i, 20) for each sequence.
        numbers: the number of each sequence, which keys its draws; 0, 1, 2, ... by default.
        templates: ids (length_i,) of each sequence's residues, MASK at free positions; other residues are fixed.

    Returns:
        uint8 arrays of amino-acid ids in the order of `lengths`, and the sampler's counts; the same on every rank.

    Raises:
        ValueError: the list of biases does not match `lengths`, or an error of `sample`.
    """
    check_biases(log_bias, lengths)
    counts: Counter[str] = Counter()

    def sample_pack(indices: range, tick: Tick) -> dict[int, np.ndarray]:
        keys = [i if numbers is None else numbers[i] for i in indices]
        bias = log_bias
        if bias is not None and not isinstance(bias, Tensor):
            bias = torch.cat([bias[i] for i in indices])
        sampled = sample(
            score_fn,
            [lengths[i] for i in indices],
            options,
            [keyed_generator(seed, "sample", key, CPU) for key in keys],
            None if templates is None else fix_residues([templates[i] for i in indices]),
            log_bias=bias,
            on_step=tick,
            counts=counts,
        )
        return dict(zip(indices, sampled, strict=True))

    samples = work.share(lengths, sample_pack, ticks=options.steps + 1)
    counts = sum(gather(counts, work.processes), Counter())
    return [samples[i] for i in range(len(lengths))], counts


def designs_fasta(
    samples: Sequence[np.ndarray], names: Sequence[str], origin: Origin, notes: Sequence[str] | None = None
) -> str:
    """Return FASTA of samples, wrapped at 60 columns. Each header has the origin and the sample's note."""
    decode = ProteinTokenizer().decode
    lines = []
    for name, ids, note in zip(names, samples, notes or [""] * len(samples), strict=True):
        sequence = decode(ids)
        source = f"run={origin.run} step={origin.step} seed={origin.seed} length={len(sequence)}"
        sampler = f"sampler={origin.options.predictor} steps={origin.options.steps}{origin.steering}"
        lines.append(f">{name} {source} {sampler}{note}")
        lines.extend(sequence[start : start + 60] for start in range(0, len(sequence), 60))
    return "\n".join(lines) + "\n"
