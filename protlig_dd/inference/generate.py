"""Sampling any number of proteins: lengths, packs, keyed draws, a progress bar, FASTA."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from protlig_dd.batch import PackedBatch, split_lengths
from protlig_dd.diffusion.likelihood import nll_bound, pick_estimator
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.model import Trained
from protlig_dd.inference.steering import Steering, describe_steering
from protlig_dd.system.distributed import Processes, gather_objects
from protlig_dd.system.random import keyed_generator
from protlig_dd.system.terminal import ProgressBar, announce
from protlig_dd.tokenizer import BOS, EOS, MASK, ProteinTokenizer

ALONE = Processes(0, 1, 0)


@runtime_checkable
class SamplerOptions(Steering, Protocol):
    """What the configs of the verbs that sample have in common."""

    steps: int
    predictor: str
    seed: int
    tokens_per_pack: int
    nll_draws: int


def sample_designs(
    trained: Trained,
    options: SamplerOptions,
    *,
    lengths: Sequence[int],
    numbers: Sequence[int] | None = None,
    templates: Sequence[np.ndarray] | None = None,
    log_bias: Tensor | Sequence[Tensor] | None = None,
) -> list[np.ndarray]:
    """`generate` as a verb's options say; the samples, on every rank."""
    processes = trained.processes
    samples, counts = generate(
        trained.score_fn,
        trained.noise,
        lengths=lengths,
        steps=options.steps,
        predictor=options.predictor,
        tokens_per_pack=options.tokens_per_pack,
        seed=options.seed,
        device=trained.device,
        description="sampling",
        temperature=options.temperature,
        top_p=options.top_p,
        log_bias=log_bias,
        numbers=numbers,
        templates=templates,
        processes=processes,
    )
    announce(
        f"{len(samples)} proteins, {np.mean(lengths):.0f} residues on average; "
        f"{counts['clamped'] / counts['draws']:.2%} of draws clamped",
        processes,
    )
    if counts["skipped"]:
        share = counts["skipped"] / (counts["skipped"] + counts["evaluated"])
        announce(f"{share:.1%} of the network's evaluations were skipped: nothing had changed", processes)
    return samples


def describe_designs(
    trained: Trained,
    options: SamplerOptions,
    samples: Sequence[np.ndarray],
    *,
    names: Sequence[str],
    numbers: Sequence[int] | None = None,
    notes: Sequence[str] | None = None,
) -> str:
    """FASTA of samples, with the model's bound on the NLL of each after what else there is to note; on every rank,
    which share the bounds.
    """
    bounds = describe_bounds(trained, samples, numbers, options)
    return designs_fasta(
        samples,
        names=names,
        run=trained.run,
        step=trained.step,
        seed=options.seed,
        predictor=options.predictor,
        steps=options.steps,
        more=describe_steering(options),
        notes=bounds if notes is None else [note + bound for note, bound in zip(notes, bounds, strict=True)],
    )


def describe_bounds(
    trained: Trained, samples: Sequence[np.ndarray], numbers: Sequence[int] | None, options: SamplerOptions
) -> list[str]:
    """` nll=2.8512 nll_se=0.0113` for each protein: the model's own bound, nats a residue; nothing without draws.

    A protein draws from (seed, "bound", its number), by itself, so that its bound does not depend on the others.
    """
    if not options.nll_draws:
        return [""] * len(samples)
    processes, score_fn = trained.processes, trained.score_fn
    estimator = pick_estimator(trained.graph, score_fn.parametrisation, score_fn.time_conditioning)
    mine, notes = range(processes.rank, len(samples), processes.world_size), {}
    with ProgressBar("NLL bounds", len(mine), shown=processes.first) as bar:
        for i in mine:
            batch = PackedBatch.pack([torch.tensor([BOS, *samples[i].tolist(), EOS])]).to(trained.device)
            number = i if numbers is None else numbers[i]
            bound = nll_bound(
                score_fn,
                batch,
                trained.graph,
                trained.noise,
                generator=keyed_generator(options.seed, "bound", number, trained.device),
                draws=options.nll_draws,
                estimator=estimator,
                tokens_at_once=options.tokens_per_pack,
            )
            residues = max(1, int(bound.residues))  # a design may consist of context letters alone
            notes[i] = f" nll={float(bound.nats) / residues:.4f} nll_se={float(bound.standard_error) / residues:.4f}"
            bar.advance()
    found = {i: note for part in gather_objects(notes) for i, note in part.items()}
    return [found[i] for i in range(len(samples))]


def generate(
    score_fn: ScoreFn,
    noise: Noise,
    *,
    lengths: Sequence[int],
    steps: int,
    predictor: str,
    tokens_per_pack: int,
    seed: int,
    device: torch.device,
    description: str,
    temperature: float = 1.0,
    top_p: float = 1.0,
    log_bias: Tensor | Sequence[Tensor] | None = None,
    numbers: Sequence[int] | None = None,
    templates: Sequence[np.ndarray] | None = None,
    processes: Processes = ALONE,
) -> tuple[list[np.ndarray], Counter[str]]:
    """Sample sequences of these lengths, a pack at a time; a sequence draws from (seed, "sample", its number) on the
    CPU.

    Args:
        log_bias: nats for each amino acid (see `sample`): (20,) for all positions of all sequences, or one tensor
            (length_i, 20) for each sequence.
        numbers: of the sequences; 0, 1, 2, ... when left out.
        templates: ids (length_i,) of each sequence's residues, MASK where they are free; the others are held fixed.
        processes: that share the packs.

    Returns:
        uint8 arrays of amino-acid ids in the order of `lengths`, and the sampler's counts; the same on every rank.
    """
    packs = split_lengths(lengths, tokens_per_pack)
    firsts = np.cumsum([0, *map(len, packs)]).tolist()
    mine = range(processes.rank, len(packs), processes.world_size)

    def bias_of(indices: Sequence[int]) -> Tensor | None:
        if log_bias is None or isinstance(log_bias, Tensor):
            return log_bias
        return torch.cat([log_bias[i] for i in indices])

    samples: dict[int, np.ndarray] = {}
    counts: Counter[str] = Counter()
    with ProgressBar(description, len(mine) * (steps + 1), shown=processes.first) as bar:
        for number in mine:
            pack, indices = packs[number], range(firsts[number], firsts[number + 1])
            keys = [i if numbers is None else numbers[i] for i in indices]
            drawn = sample(
                score_fn,
                noise,
                pack,
                steps,
                predictor,
                [keyed_generator(seed, "sample", key, torch.device("cpu")) for key in keys],
                None if templates is None else held_fixed([templates[i] for i in indices]),
                temperature=temperature,
                top_p=top_p,
                log_bias=bias_of(indices),
                device=device,
                on_step=bar.advance,
                counts=counts,
            )
            samples.update(zip(indices, drawn, strict=True))
    if processes.world_size > 1:
        gathered = gather_objects((samples, counts))
        samples = {i: ids for part, _ in gathered for i, ids in part.items()}
        counts = sum((part for _, part in gathered), Counter())
    return [samples[i] for i in range(len(lengths))], counts


def held_fixed(templates: Sequence[np.ndarray]) -> Callable[[Tensor], Tensor]:
    """`project` of `sample`: tokens of a pack -> the same, with the residues that the templates fix."""
    fixed_T = torch.from_numpy(np.concatenate([[BOS, *ids.tolist(), EOS] for ids in templates]))

    def project(tokens: Tensor) -> Tensor:
        wanted = fixed_T.to(tokens.device)
        return torch.where(wanted == MASK, tokens, wanted)

    return project


def designs_fasta(
    samples: Sequence[np.ndarray],
    *,
    names: Sequence[str],
    run: str,
    step: int,
    seed: int,
    predictor: str,
    steps: int,
    more: str = "",
    notes: Sequence[str] | None = None,
) -> str:
    """FASTA of samples, wrapped at 60 columns; each header says what made it, and what else there is to note."""
    decode = ProteinTokenizer().decode
    lines = []
    for name, ids, note in zip(names, samples, notes or [""] * len(samples), strict=True):
        sequence = decode(ids)
        made = f"run={run} step={step} seed={seed} length={len(sequence)} sampler={predictor} steps={steps}{more}"
        lines.append(f">{name} {made}{note}")
        lines.extend(sequence[start : start + 60] for start in range(0, len(sequence), 60))
    return "\n".join(lines) + "\n"
