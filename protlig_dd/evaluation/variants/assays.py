"""Read assays of protein variants in ProteinGym's file format, and evaluate predictions against them.

The target of an assay is its wild type. The mutant `A24P:D30N` changes residue 24 (counted from 1) of the target from A
to P, and residue 30 from D to N.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.data.fasta import read_fasta
from protlig_dd.evaluation.variants.measurements import judge
from protlig_dd.evaluation.variants.mutants import AS_THE_TARGET, Numbering, Variant, encode, name_of, read_variant
from protlig_dd.inference.sequences import check_list
from protlig_dd.system.tables import csv_lines
from protlig_dd.tokenizer import N_STATES

CLINICAL = {"BENIGN": "1", "PATHOGENIC": "0"}  # labels for the words in DMS_score_bin of ProteinGym's clinical files
NO_WORDS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Assay:
    """The rows of an assay; `rows`, `variants`, `where`, `measured` and `fit` have one entry per row."""

    header: list[str]
    rows: list[list[str]]
    variants: list[Variant]
    where: list[str]
    """File and line of each row, for error messages."""
    measured: np.ndarray
    """(rows,) DMS_score; NaN where it is missing."""
    fit: np.ndarray
    """(rows,) the column DMS_bin_score or DMS_score_bin: 1 for a fit variant, 0 for an unfit one. If the file has
    neither column: 1 where DMS_score is above its median, else 0. A missing value is NaN."""
    bad: Sequence[str] = ()
    """Error messages of the rows that were skipped."""

    @property
    def most_changed(self) -> int:
        """The maximum number of substitutions in one row."""
        return max(len(variant.substitutions) for variant in self.variants)

    @property
    def first_indel(self) -> int | None:
        """Index of the first row with an insertion or deletion, or None."""
        return next((i for i, variant in enumerate(self.variants) if variant.indel), None)

    def subset(self, rows: np.ndarray) -> "Assay":
        """Return an assay with only the rows at these indices, and without the messages in `bad`."""
        selected = rows.tolist()
        return Assay(
            self.header,
            [self.rows[i] for i in selected],
            [self.variants[i] for i in selected],
            [self.where[i] for i in selected],
            self.measured[rows],
            self.fit[rows],
        )

    def judge(self, scores: np.ndarray) -> dict[str, Any]:
        """Return the metrics of protlig_dd.evaluation.variants.measurements for these scores."""
        return judge(scores, self.measured, self.fit, [len(variant.substitutions) for variant in self.variants])


def read_target(file_or_sequence: str) -> np.ndarray:
    """Return the token ids (length,) of a wild type, read from a FASTA file with one record or from a bare sequence.

    Raises:
        ValueError: the argument is neither a file nor a sequence of letters, the file does not have exactly one record,
            or a letter is illegal.
    """
    path = Path(file_or_sequence)
    if 0 < len(file_or_sequence) < 256 and path.exists():
        records = list(read_fasta(path))
        if len(records) != 1:
            raise ValueError(f"{path}: the target must be one protein, but the file has {len(records)} records")
        return encode(records[0].sequence.upper(), records[0].name)
    if not file_or_sequence.isalpha():
        raise ValueError(f"target={file_or_sequence}: no such file, and not a sequence of letters")
    return encode(file_or_sequence.upper(), "target")


def read_assay(
    path: Path, target: np.ndarray, *, numbering: Numbering = AS_THE_TARGET, skip_bad: bool = False
) -> Assay:
    """Read an assay's CSV file.

    Args:
        numbering: how the positions in `mutant` are numbered.
        skip_bad: skip invalid rows and collect their error messages in `Assay.bad`. If False, the first invalid row is
            an error.

    Raises:
        ValueError: the file is missing, has no rows, or has neither a column `mutant` nor `mutated_sequence`; a mutant
            is malformed, out of range or does not match the target; a `mutated_sequence` has illegal letters or
            contradicts `mutant`; a measurement is not a number. The message names the file and the line.
    """
    header, lines = read_csv(path)
    if not {"mutant", "mutated_sequence"} & set(header):
        raise ValueError(f"{path}: no column mutant or mutated_sequence; its columns are {', '.join(header)}")
    if not lines:
        raise ValueError(f"{path}: no rows below the header")
    variants, kept, bad = [], [], []
    for where, row in lines:
        cells = dict(zip(header, row, strict=True))
        mutant, sequence = (cells.get(name, "").strip().upper() for name in ("mutant", "mutated_sequence"))
        try:
            variant = read_variant(mutant, sequence, target, where, numbering)
            if skip_bad:
                read_measurements(header, [(where, row)])
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error} (bad_rows=skip skips such rows)") from error
            bad.append(str(error))
        else:
            variants.append(variant)
            kept.append((where, row))
    if not kept:
        raise ValueError(f"{bad[0]}; every row of {path} is invalid")
    measured, labels = read_measurements(header, kept)
    fit = above_median(measured) if labels is None else labels
    return Assay(header, [row for _, row in kept], variants, [where for where, _ in kept], measured, fit, bad)


def read_measurements(header: list[str], rows: list[tuple[str, list[str]]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the column DMS_score and the binary labels (1: fit), with NaN where a value is missing.

    The labels are None if the file has no column of labels (DMS_bin_score or DMS_score_bin).

    Raises:
        ValueError: a score is not a number, or a label is not 0 or 1. The message names the row.
    """
    binary = "DMS_bin_score" if "DMS_bin_score" in header else "DMS_score_bin"
    measured, labels = read_numbers(header, rows, "DMS_score"), read_numbers(header, rows, binary, CLINICAL)
    wrong = np.flatnonzero(~np.isnan(labels) & (labels != 0) & (labels != 1))
    if len(wrong):
        raise ValueError(f"{rows[wrong[0]][0]}: {binary} must be 0 or 1, got {labels[wrong[0]]:g}")
    return measured, labels if binary in header else None


def read_csv(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the header, and (file and line for error messages, cells) of each row. Empty lines are skipped."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines = csv_lines(path)
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    header = [cell.strip() for cell in lines[0][1]]
    for name in header:
        if name and header.count(name) > 1:  # a spreadsheet may leave empty columns without a name
            raise ValueError(f"{path}: column {name} occurs {header.count(name)} times")
    for where, row in lines[1:]:
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} cells, but the header has {len(header)}")
    return header, lines[1:]


def read_numbers(
    header: list[str], lines: Sequence[tuple[str, list[str]]], column: str, words: Mapping[str, str] = NO_WORDS
) -> np.ndarray:
    """Return a column as (rows,) float64. Cells that are empty, NA or NaN give NaN; so does a column that is missing.

    Args:
        words: the number (as text) that each upper-case word stands for.
    """
    values = np.full(len(lines), np.nan)
    if column in header:
        index = header.index(column)
        for i, (where, row) in enumerate(lines):
            text = row[index].strip()
            text = words.get(text.upper(), text)
            if text in ("", "NA"):
                continue
            try:
                values[i] = float(text)
            except ValueError:
                values[i] = math.inf
            if math.isinf(values[i]) or "_" in text:  # Python reads 1_0 as 10
                raise ValueError(f"{where}: {column} {text!r} is not a finite number")
    return values


def above_median(measured: np.ndarray) -> np.ndarray:
    """Return 1 above the median of the measurements and 0 otherwise; NaN where the measurement is missing."""
    if np.isnan(measured).all():
        return measured
    return np.where(np.isnan(measured), np.nan, measured > np.nanmedian(measured))


def assay_of(mutants: Sequence[str], target: np.ndarray, numbering: Numbering = AS_THE_TARGET) -> Assay:
    """Return an assay without measurements from mutants such as `A24P:D30N`, as in the column `mutant`.

    Raises:
        ValueError: not a list of strings, or a mutant is malformed, out of range or does not match the target. The
            message names the mutant by its index in `mutations`.
    """
    check_list(mutants, "mutations is a list such as ['A24P', 'A24P:D30N']")
    where = [f"mutations[{i}]" for i in range(len(mutants))]
    for name, mutant in zip(where, mutants, strict=True):
        if not isinstance(mutant, str):
            raise ValueError(f"{name}: a mutation is a string such as A24P, got {mutant!r:.40}")
    variants = [
        read_variant(mutant.strip().upper(), "", target, name, numbering)
        for name, mutant in zip(where, mutants, strict=True)
    ]
    missing = np.full(len(variants), np.nan)
    return Assay(["mutant"], [[mutant] for mutant in mutants], variants, where, missing, missing)


def all_substitutions(target: np.ndarray) -> Assay:
    """Return a deep mutational scan: every single substitution of the target's amino acids."""
    variants = [
        Variant(((site, residue),))
        for site in range(len(target))
        for residue in range(N_STATES)
        if target[site] < N_STATES and residue != target[site]
    ]
    if not variants:
        raise ValueError("the target has no amino acid to substitute")
    names = [name_of(variant, target) for variant in variants]
    missing = np.full(len(variants), np.nan)
    return Assay(["mutant"], [[name] for name in names], variants, names, missing, missing)
