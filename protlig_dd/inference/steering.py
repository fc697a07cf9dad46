"""Steering options of the sampling commands: read log_bias, and describe the options in FASTA headers."""

import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from protlig_dd.system.tables import csv_lines
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES


@runtime_checkable  # for beartype
class Steering(Protocol):
    """A config with the steering keys."""

    temperature: float
    top_p: float
    log_bias: Any


def describe_steering(config: Steering) -> str:
    """Return a text with the options that differ from their defaults: ` temperature=0.9 log_bias=C:-inf,K:0.5`."""
    bias = config.log_bias
    if isinstance(bias, dict):
        bias = ",".join(f"{letter}:{nats}" for letter, nats in bias.items())
    options = {"temperature": (config.temperature, 1), "top_p": (config.top_p, 1), "log_bias": (bias or None, None)}
    return "".join(f" {name}={value}" for name, (value, default) in options.items() if value != default)


def read_log_bias(log_bias: Any, lengths: list[int]) -> torch.Tensor | list[torch.Tensor] | None:
    """Return the bias of amino acids in nats: (20,) from {letter: nats}, or (length, 20) per protein from a CSV file.

    The file has a header of letters and one row for each position. Letters that are not in the header or the mapping
    have a bias of 0.

    Raises:
        ValueError: a letter that is not one of the 20 amino acids, a value that is not a number, a row that forbids
            every amino acid, or a file whose number of rows differs from a protein's length. The message names the
            file and line.
    """
    if log_bias is None or log_bias == {}:
        return None
    if isinstance(log_bias, dict):
        return bias_row(amino_acid_ids(list(log_bias), "log_bias"), list(log_bias.values()), "log_bias")
    path = Path(str(log_bias))
    if not path.is_file():
        raise ValueError(
            f"log_bias={log_bias}: no such file; to bias amino acids, give them in quotes: 'log_bias={{C:-inf,K:0.5}}'"
        )
    lines = csv_lines(path)
    if len(lines) < 2:
        raise ValueError(f"{path}: give a line of amino acids, then a row of numbers for each position")
    (where, header), *rows = lines
    letters = amino_acid_ids([cell.strip() for cell in header], where)
    bias = torch.stack([bias_row(letters, row, where) for where, row in rows])
    for number, length in enumerate(lengths, start=1):
        if length != len(bias):
            raise ValueError(
                f"{path} has {len(bias)} rows but protein {number} has {length} residues; "
                f"the file needs one row per residue, so set lengths={len(bias)} (in infill, lengths= needs contig=)"
            )
    return [bias] * len(lengths)


def amino_acid_ids(names: list[str], where: str) -> list[int]:
    """Return the ids of amino acids. Raise a ValueError if a name is not an amino acid or is repeated."""
    for name in names:
        if name not in tuple(AMINO_ACIDS):
            raise ValueError(f"{where}: {name!r} is not one of the amino acids {AMINO_ACIDS}")
        if names.count(name) > 1:
            raise ValueError(f"{where}: {name} appears {names.count(name)} times")
    return [AMINO_ACIDS.index(name) for name in names]


def bias_row(ids: list[int], values: list[Any], where: str) -> torch.Tensor:
    """Return (20,) float64 with the values at these ids and 0 elsewhere."""
    if len(values) != len(ids):
        raise ValueError(f"{where}: {len(values)} numbers for the {len(ids)} amino acids of the first line")
    row = [0.0] * N_STATES
    for index, value in zip(ids, values, strict=True):
        try:
            row[index] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {value!r} for {AMINO_ACIDS[index]} is not a number") from error
        if math.isnan(row[index]) or row[index] == math.inf:
            raise ValueError(f"{where}: {AMINO_ACIDS[index]} must be finite or -inf, got {value}")
    if set(row) == {-math.inf}:
        raise ValueError(f"{where} forbids every amino acid")
    return torch.tensor(row, dtype=torch.float64)
