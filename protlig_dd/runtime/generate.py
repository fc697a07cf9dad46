"""Sampling any number of proteins: lengths, packs, keyed draws, a progress bar, FASTA."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.runtime.metrics import ProgressBar
from protlig_dd.runtime.random import keyed_generator, random_key
from protlig_dd.tokenizer import ProteinTokenizer


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
) -> tuple[list[np.ndarray], Counter[str]]:
    """Sample sequences of these lengths, a pack at a time; sequence i draws from (seed, "sample", i), on the CPU.

    Args:
        log_bias: nats for each amino acid (see `sample`): (20,) for all positions of all sequences, or one tensor
            (length_i, 20) for each sequence.

    Returns:
        uint8 arrays of amino-acid ids in the order of `lengths`, and the sampler's counts.
    """
    packs = split_lengths(lengths, tokens_per_pack)

    def bias_of(indices: Sequence[int]) -> Tensor | None:
        if log_bias is None or isinstance(log_bias, Tensor):
            return log_bias
        return torch.cat([log_bias[i] for i in indices])

    samples: list[np.ndarray] = []
    counts: Counter[str] = Counter()
    with ProgressBar(description, len(packs) * (steps + 1)) as bar:
        for pack in packs:
            first = len(samples)
            indices = range(first, first + len(pack))
            generators = [keyed_generator(seed, "sample", i, torch.device("cpu")) for i in indices]
            samples += sample(
                score_fn,
                noise,
                pack,
                steps,
                predictor,
                generators,
                temperature=temperature,
                top_p=top_p,
                log_bias=bias_of(indices),
                device=device,
                on_step=bar.advance,
                counts=counts,
            )
    return samples, counts


def split_lengths(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Cut a list of lengths, in order, into packs of at most tokens_per_pack tokens (each at least one sequence)."""
    packs: list[list[int]] = []
    room = 0
    for length in lengths:
        if length + 2 > room or not packs:
            packs.append([])
            room = tokens_per_pack
        packs[-1].append(length)
        room -= length + 2
    return packs


def draw_lengths(counts: Sequence[int], n: int, seed: int) -> list[int]:
    """n lengths, drawn as often as counts[length] says (inverse CDF)."""
    ends = np.cumsum(counts)
    return np.searchsorted(ends, length_draws(n, seed) * ends[-1], side="right").tolist()


def length_draws(n: int, seed: int) -> np.ndarray:
    """(n,) uniform draws on [0, 1); the first of many are those of few."""
    return np.random.default_rng(random_key(seed, "lengths", 0)).random(n)


def designs_fasta(
    samples: Sequence[np.ndarray], *, run: str, step: int, seed: int, predictor: str, steps: int, more: str = ""
) -> str:
    """FASTA of samples, wrapped at 60 columns; each header says what made it."""
    decode = ProteinTokenizer().decode
    lines = []
    for i, ids in enumerate(samples, start=1):
        sequence = decode(ids)
        made = f"run={run} step={step} seed={seed} length={len(sequence)} sampler={predictor} steps={steps}{more}"
        lines.append(f">{run}_{i} {made}")
        lines.extend(sequence[start : start + 60] for start in range(0, len(sequence), 60))
    return "\n".join(lines) + "\n"
