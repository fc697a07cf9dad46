"""Sequences as users write them: letters, and `_` for a free (masked) position. Does not use Hydra or HDF5."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protlig_dd.tokenizer import AMINO_ACIDS, BOS, EOS, MASK, N_STATES, ProteinTokenizer

FREE = "_"

LogBias = Mapping[str, float] | str | Path | Tensor | Sequence[Tensor] | None
"""Nats that are added to the log-probabilities of amino acids in sampling, in one of these forms: a mapping such as
{"C": -inf}; a CSV file (see `read_log_bias`); a tensor (20,) for all positions; a tensor (length, 20) for proteins of
this length; or a list with one tensor (length_i, 20) for each protein."""


def check_list(items: Sequence[object], expected: str) -> None:
    """Raise a ValueError if `items` is empty or is not a list, for example a single string, a number or a mapping.

    Args:
        expected: the start of the message, such as `embed takes a list of sequences`.
    """
    listed = hasattr(items, "__getitem__") and hasattr(items, "__len__")
    if isinstance(items, str):
        raise ValueError(f"{expected}, got the string {items[:20]!r}; write it in brackets, as a list")
    if isinstance(items, Mapping) or not listed or getattr(items, "ndim", None) == 0:
        raise ValueError(f"{expected}, got {items!r:.40}")
    if not len(items):
        raise ValueError(f"{expected}, got {items!r:.40}, which is empty")


def check_whole(value: object, expected: str) -> None:
    """Raise a ValueError unless the value is a whole number of Python or numpy."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{expected}, got {value!r:.40}")


def check_seed(seed: object) -> None:
    """Raise a ValueError unless the seed is a whole number of at least 0."""
    check_whole(seed, "seed is a whole number")
    if int(seed) < 0:  # type: ignore[call-overload]
        raise ValueError(f"seed must be at least 0, got {seed}")


def check_trained_length(residues: int, name: str, max_len: int) -> None:
    """Raise a ValueError if a protein is empty, or longer than the model was trained on."""
    if not 1 <= residues <= max_len:
        raise ValueError(f"{name} has {residues} residues; this model was trained on 1 to {max_len}")


def encode_whole(sequence: str, name: str) -> np.ndarray:
    """Return the ids of `<bos> residues <eos>`, (length + 2,) uint8. Lower-case letters are read as upper-case.

    Raises:
        ValueError: not a string, an empty sequence or an illegal letter. The message names the sequence and the
            position.
    """
    check_letters(sequence, name)
    return ProteinTokenizer().encode(sequence.upper(), name)


def encode_with_free(sequence: str, name: str) -> np.ndarray:
    """Return the ids of `<bos> residues <eos>`, (length + 2,) uint8, with MASK at each `_`.

    Lower-case letters are read as upper-case.

    Raises:
        ValueError: not a string, an empty sequence or an illegal letter. The message names the sequence and the
            position.
    """
    check_letters(sequence, name)
    free = np.array([letter == FREE for letter in sequence.removesuffix("*")], bool)
    try:  # put a legal letter at free positions, so that encode rejects only other positions
        tokens = ProteinTokenizer().encode(sequence.upper().replace(FREE, "A"), name)
    except ValueError as error:
        raise ValueError(f"{error}; `{FREE}` marks a free position") from error
    tokens[1:-1][free] = MASK
    return tokens


def check_letters(sequence: object, name: str) -> None:
    """Raise a ValueError unless the sequence is a string of ASCII characters.

    `upper` would turn some non-ASCII characters into legal letters, such as a sharp s into SS.
    """
    if not isinstance(sequence, str):
        raise ValueError(f"{name}: a sequence is a string of letters, got {sequence!r:.40}")
    for position, character in enumerate(sequence, start=1):
        if not character.isascii():
            raise ValueError(f"{name}: illegal character {character!r} at position {position} of {len(sequence)}")


def check_biases(log_bias: Tensor | Sequence[Tensor] | None, lengths: Sequence[int]) -> None:
    """Check that a list of biases has one tensor (length_i, 20) for each design of length_i residues.

    A single tensor is not checked here, because the sampler checks it. The sampler receives a list as one concatenated
    tensor and checks only the total number of rows. If that number happened to be right, wrong shapes in the list would
    go unnoticed, and residues would be sampled with the rows of other designs.

    Raises:
        ValueError: the number of tensors is wrong, or a tensor has another shape. The message names the design.
    """
    if log_bias is None or isinstance(log_bias, Tensor):
        return
    if isinstance(log_bias, str | Mapping) or not all(isinstance(bias, Tensor) for bias in log_bias):
        raise ValueError(
            f"log_bias is a tensor ({N_STATES},) or a list of tensors, for the amino acids {AMINO_ACIDS}, "
            f"got {log_bias!r:.40}"
        )
    if len(log_bias) != len(lengths):
        raise ValueError(
            f"log_bias is a list of {len(log_bias)} tensors for {len(lengths)} designs; give one tensor for each "
            f"design, or a single tensor ({N_STATES},) for all"
        )
    for number, (bias, length) in enumerate(zip(log_bias, lengths, strict=True)):
        if tuple(bias.shape) != (length, N_STATES):
            raise ValueError(
                f"log_bias[{number}] has shape {tuple(bias.shape)}, but designs[{number}] has {length} residues; "
                f"give ({length}, {N_STATES})"
            )


def fix_residues(templates: Sequence[np.ndarray]) -> Callable[[Tensor], Tensor]:
    """Return a function that writes the templates' fixed residues into a pack's tokens: the `project` of `sample`."""
    fixed_T = torch.from_numpy(np.concatenate([[BOS, *ids.tolist(), EOS] for ids in templates]))

    def project(tokens: Tensor) -> Tensor:
        template_T = fixed_T.to(tokens.device)
        return torch.where(template_T == MASK, tokens, template_T)

    return project
