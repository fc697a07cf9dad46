"""Sample and redesign proteins in Python, with the results of `protlig_dd.sample` and `protlig_dd.infill`.

The methods `sample` and `infill` of `protlig_dd.hub.ProteinDiffusion` call these functions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import check_sampler
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.generate import generate
from protlig_dd.inference.layouts import check_number_of_designs, designs_of_template
from protlig_dd.inference.lengths import Lengths, choose_lengths, longest_of
from protlig_dd.inference.sequences import (
    FREE,
    LogBias,
    check_biases,
    check_letters,
    check_list,
    check_seed,
    check_trained_length,
    check_whole,
)
from protlig_dd.inference.sharing import QUIET
from protlig_dd.inference.steering import read_log_bias
from protlig_dd.inference.steps import template_of
from protlig_dd.tokenizer import ProteinTokenizer


def sample_sequences(
    score_fn: ScoreFn, lengths: Sequence[int], options: SamplerOptions, *, seed: int, log_bias: LogBias
) -> list[str]:
    """Sample proteins of these lengths.

    Raises:
        ValueError: an error of `read_log_bias`, `check_biases` or `sample`.
    """
    check_sampler(score_fn.graph, options)
    check_seed(seed)
    samples, _ = generate(score_fn, lengths, options, QUIET, seed=seed, log_bias=bias_of(log_bias, lengths))
    return [ProteinTokenizer().decode(ids) for ids in samples]


def infill_sequences(
    score_fn: ScoreFn,
    sequences: Sequence[str],
    options: SamplerOptions,
    *,
    n: int,
    seed: int,
    log_bias: LogBias,
    max_len: int,
) -> list[list[str]]:
    """Return n designs of each sequence, in which residues are sampled at the positions of `_`.

    Args:
        log_bias: a list has one tensor for each sequence.
        max_len: largest number of residues that the model was trained on.

    Raises:
        ValueError: an illegal letter; a sequence without free positions or with more than max_len residues; or an error
            of `read_log_bias`, `check_biases` or `sample`.
    """
    check_sampler(score_fn.graph, options)
    check_list(sequences, f"infill takes a list of sequences with `{FREE}` at free positions")
    check_count(n)
    check_number_of_designs(n)
    check_seed(seed)
    templates = []
    for i, sequence in enumerate(sequences):
        check_letters(sequence, f"sequences[{i}]")
        templates.append(template_of(sequence, f"sequences[{i}]", max_len))
    bias = bias_of(log_bias, [len(template) for template in templates])
    check_biases(bias, [len(template) for template in templates])
    designs = [design for i, template in enumerate(templates) for design in designs_of_template("", i, template, n)]
    samples, _ = generate(
        score_fn,
        [len(design.template) for design in designs],
        options,
        QUIET,
        seed=seed,
        log_bias=[bias[design.protein] for design in designs] if isinstance(bias, list) else bias,
        numbers=[design.number for design in designs],
        templates=[design.template for design in designs],
    )
    decoded = [ProteinTokenizer().decode(ids) for ids in samples]
    return [decoded[start : start + n] for start in range(0, len(decoded), n)]


def lengths_to_sample(
    lengths: int | str | Sequence[int], n: int, seed: int, training_lengths: Lengths | None, max_len: int
) -> list[int]:
    """Return the number of residues of each of n proteins.

    Args:
        lengths: one number, one number for each protein, or a text as for `protlig_dd.sample`: `empirical` (drawn like
            the training lengths), or a range such as `100-300`.

    Raises:
        ValueError: another kind of `lengths`, a list of another length than n, or a length that is not in 1..max_len.
    """
    check_count(n)
    check_seed(seed)
    expected = "lengths is a number, a list of numbers or a text such as 100-300"
    if isinstance(lengths, Sequence) and not isinstance(lengths, str):
        check_list(lengths, expected)
        for i, length in enumerate(lengths):
            check_whole(length, f"lengths[{i}] is a whole number")
            check_trained_length(int(length), f"lengths[{i}]: the protein", max_len)
        if len(lengths) != n:
            raise ValueError(f"lengths has {len(lengths)} numbers for n={n} proteins; give one number for each protein")
        return [int(length) for length in lengths]
    if not isinstance(lengths, str):
        check_whole(lengths, expected)
    chosen = choose_lengths(str(lengths), n, seed, training_lengths)
    check_trained_length(longest_of(str(lengths), chosen), f"lengths={lengths}: the longest protein", max_len)
    return chosen


def check_count(n: int) -> None:
    """Raise a ValueError unless n is a whole number of at least 1."""
    check_whole(n, "n is a whole number")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")


def bias_of(log_bias: LogBias, lengths: Sequence[int]) -> Tensor | list[Tensor] | None:
    """Return a bias as `generate` takes it: (20,) for all proteins, or a list with one tensor for each protein."""
    if isinstance(log_bias, Mapping):
        return read_log_bias(dict(log_bias), list(lengths))
    if isinstance(log_bias, str | Path):
        return read_log_bias(str(log_bias), list(lengths))
    if isinstance(log_bias, Tensor) and log_bias.ndim == 2:
        return [log_bias] * len(lengths)
    if log_bias is None or isinstance(log_bias, Tensor):
        return log_bias
    check_list(log_bias, "log_bias is a mapping such as {'C': -inf}, a CSV file, a tensor or a list of tensors")
    return list(log_bias)
