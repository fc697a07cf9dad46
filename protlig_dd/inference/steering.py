"""Steering options of the verbs that sample: what they read, and how headers name it."""

import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from protlig_dd.system.tables import csv_lines
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES


@runtime_checkable  # for beartype
class Steering(Protocol):
    """A config with these keys."""

    temperature: float
    top_p: float
    log_bias: Any


def describe_steering(config: Steering) -> str:
    """` temperature=0.9 log_bias=C:-inf,K:0.5`: what is not the default, for the headers."""
    bias = config.log_bias
    if isinstance(bias, dict):
        bias = ",".join(f"{letter}:{nats}" for letter, nats in bias.items())
    options = {"temperature": (config.temperature, 1), "top_p": (config.top_p, 1), "log_bias": (bias or None, None)}
    return "".join(f" {name}={value}" for name, (value, default) in options.items() if value != default)


def read_log_bias(wanted: Any, lengths: list[int]) -> torch.Tensor | list[torch.Tensor] | None:
    """Nats for each amino acid: (20,) from {letter: nats}, or (length, 20) for each protein from a CSV file.

    The file has a header of letters and a row for each position. Letters that are not named have 0.

    Raises:
        ValueError: a letter that is none of the 20 amino acids, something that is no number, nothing left to choose
            from, or a file with another number of rows than a protein has residues; names the file and line.
    """
    if wanted is None or wanted == {}:
        return None
    if isinstance(wanted, dict):
        return bias_row(letters_of(list(wanted), "log_bias"), list(wanted.values()), "log_bias")
    path = Path(str(wanted))
    if not path.is_file():
        raise ValueError(f"log_bias={wanted}: no such file; for amino acids, in quotes, 'log_bias={{C:-inf,K:0.5}}'")
    lines = csv_lines(path)
    if len(lines) < 2:
        raise ValueError(f"{path}: give a line of amino acids, then a row of numbers for each position")
    (where, header), *rows = lines
    letters = letters_of([cell.strip() for cell in header], where)
    bias = torch.stack([bias_row(letters, row, where) for where, row in rows])
    for number, length in enumerate(lengths, start=1):
        if length != len(bias):
            raise ValueError(
                f"{path} has {len(bias)} rows but protein {number} has {length} residues; "
                f"give a row for each, or lengths={len(bias)} (infill takes it beside contig=)"
            )
    return [bias] * len(lengths)


def letters_of(names: list[str], where: str) -> list[int]:
    """The ids of different amino acids."""
    for name in names:
        if name not in tuple(AMINO_ACIDS):
            raise ValueError(f"{where}: {name!r} is none of the amino acids {AMINO_ACIDS}")
        if names.count(name) > 1:
            raise ValueError(f"{where}: {name} is there {names.count(name)} times")
    return [AMINO_ACIDS.index(name) for name in names]


def bias_row(ids: list[int], values: list[Any], where: str) -> torch.Tensor:
    """(20,) float64, 0 for the amino acids that are not named."""
    if len(values) != len(ids):
        raise ValueError(f"{where}: {len(values)} numbers for the {len(ids)} amino acids of the first line")
    row = [0.0] * N_STATES
    for index, value in zip(ids, values, strict=True):
        try:
            row[index] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {value!r} for {AMINO_ACIDS[index]} is no number") from error
        if math.isnan(row[index]) or row[index] == math.inf:
            raise ValueError(f"{where}: {AMINO_ACIDS[index]} must be finite or -inf, got {value}")
    if set(row) == {-math.inf}:
        raise ValueError(f"{where} forbids every amino acid")
    return torch.tensor(row, dtype=torch.float64)
