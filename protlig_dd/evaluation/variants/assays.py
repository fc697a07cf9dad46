"""Assays of protein variants, by ProteinGym's conventions: what their files say, and how predictions are judged.

`A24P:D30N` changes residue 24 (from 1) of the target from A to P and residue 30 from D to N.
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
from protlig_dd.system.tables import csv_lines
from protlig_dd.tokenizer import N_STATES

CLINICAL = {"BENIGN": "1", "PATHOGENIC": "0"}  # what ProteinGym's clinical files have for DMS_score_bin
NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Assay:
    header: list[str]
    rows: list[list[str]]
    variants: list[Variant]
    where: list[str]
    """What error messages call each row: file and line."""
    measured: np.ndarray
    """(rows,) DMS_score; NaN where there is none."""
    fit: np.ndarray
    """(rows,) 1 or 0: DMS_score_bin, else whether DMS_score is above its median; NaN where there is none."""
    bad: Sequence[str] = ()
    """What was wrong with rows that were left out."""

    @property
    def most_changed(self) -> int:
        """Substitutions of the row that has most."""
        return max(len(variant.substitutions) for variant in self.variants)

    @property
    def first_indel(self) -> int | None:
        """The first row with insertions or deletions."""
        return next((i for i, variant in enumerate(self.variants) if variant.indel), None)

    def only(self, rows: np.ndarray) -> "Assay":
        """The assay of these rows alone; what was left out of it is not said again."""
        chosen = rows.tolist()
        return Assay(
            self.header,
            [self.rows[i] for i in chosen],
            [self.variants[i] for i in chosen],
            [self.where[i] for i in chosen],
            self.measured[rows],
            self.fit[rows],
        )

    def judge(self, scores: np.ndarray) -> dict[str, Any]:
        """How scores agree with DMS_score and DMS_score_bin, see protlig_dd.evaluation.variants.measurements."""
        return judge(scores, self.measured, self.fit, [len(variant.substitutions) for variant in self.variants])


def read_target(given: str) -> np.ndarray:
    """The ids (length,) of a wild type: of a FASTA file's only record, or of a bare sequence.

    Raises:
        ValueError: no such file and no sequence either, more than one record, or an illegal letter; named.
    """
    path = Path(given)
    if 0 < len(given) < 256 and path.exists():
        records = list(read_fasta(path))
        if len(records) != 1:
            raise ValueError(f"{path}: the target is one protein, but there are {len(records)} records")
        return encode(records[0].sequence.upper(), records[0].name)
    if not given.isalpha():
        raise ValueError(f"target={given}: no such file, and no sequence of letters either")
    return encode(given.upper(), "target")


def read_assay(
    path: Path, target: np.ndarray, *, numbering: Numbering = AS_THE_TARGET, skip_bad: bool = False
) -> Assay:
    """An assay's CSV file.

    Args:
        numbering: of the positions in `mutant`.
        skip_bad: leave out rows that cannot be read, and list them; otherwise the first is an error.

    Raises:
        ValueError: names the file and, where there is one, the line: no such file, none of the columns, no rows, a
            mutant that is malformed, out of range or not of this target, a `mutated_sequence` with illegal letters or
            another one than `mutant` makes, a measurement that is no number.
    """
    header, lines = read_csv(path)
    if not {"mutant", "mutated_sequence"} & set(header):
        raise ValueError(f"{path}: no column mutant or mutated_sequence; there are {', '.join(header)}")
    if not lines:
        raise ValueError(f"{path}: no rows under the header")
    variants, kept, bad = [], [], []
    for where, row in lines:
        cells = dict(zip(header, row, strict=True))
        mutant, sequence = (cells.get(name, "").strip().upper() for name in ("mutant", "mutated_sequence"))
        try:
            variant = read_variant(mutant, sequence, target, where, numbering)
            if skip_bad:
                measurements(header, [(where, row)])
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error} (bad_rows=skip leaves such rows out)") from error
            bad.append(str(error))
        else:
            variants.append(variant)
            kept.append((where, row))
    if not kept:
        raise ValueError(f"{bad[0]}; nor can any other row of {path} be read")
    measured, labels = measurements(header, kept)
    fit = above_median(measured) if labels is None else labels
    return Assay(header, [row for _, row in kept], variants, [where for where, _ in kept], measured, fit, bad)


def measurements(header: list[str], rows: list[tuple[str, list[str]]]) -> tuple[np.ndarray, np.ndarray | None]:
    """DMS_score of each row, and whether it is fit (0 or 1) where a column says so; NaN where nothing was measured.

    Raises:
        ValueError: a measurement that is no number, or no 0 or 1; names the row.
    """
    binary = "DMS_bin_score" if "DMS_bin_score" in header else "DMS_score_bin"
    measured, labels = numbers(header, rows, "DMS_score"), numbers(header, rows, binary, CLINICAL)
    wrong = np.flatnonzero(~np.isnan(labels) & (labels != 0) & (labels != 1))
    if len(wrong):
        raise ValueError(f"{rows[wrong[0]][0]}: {binary} is 0 or 1, got {labels[wrong[0]]:g}")
    return measured, labels if binary in header else None


def read_csv(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The header, and each further row with what error messages call it; empty lines are left out."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines = csv_lines(path)
    if not lines:
        raise ValueError(f"{path}: empty")
    header = [cell.strip() for cell in lines[0][1]]
    for name in header:
        if name and header.count(name) > 1:  # a spreadsheet may leave empty columns without a name
            raise ValueError(f"{path}: the column {name} is there {header.count(name)} times")
    for where, row in lines[1:]:
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} cells for {len(header)} columns")
    return header, lines[1:]


def numbers(
    header: list[str], lines: Sequence[tuple[str, list[str]]], column: str, words: Mapping[str, str] = NOTHING
) -> np.ndarray:
    """(rows,) float64; NaN where the cell is empty, NA or NaN, or there is no such column.

    Args:
        words: and the numbers that they stand for.
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
                raise ValueError(f"{where}: {column} {text!r} is no finite number")
    return values


def above_median(measured: np.ndarray) -> np.ndarray:
    """1 above the median of what was measured, 0 elsewhere; NaN where nothing was."""
    if np.isnan(measured).all():
        return measured
    return np.where(np.isnan(measured), np.nan, measured > np.nanmedian(measured))


def all_substitutions(target: np.ndarray) -> Assay:
    """A deep mutational scan: every amino acid but the wild type's at every position that has one."""
    variants = [
        Variant(((site, residue),))
        for site in range(len(target))
        for residue in range(N_STATES)
        if target[site] < N_STATES and residue != target[site]
    ]
    if not variants:
        raise ValueError("the target has no amino acid that could be substituted")
    names = [name_of(variant, target) for variant in variants]
    nothing = np.full(len(variants), np.nan)
    return Assay(["mutant"], [[name] for name in names], variants, names, nothing, nothing)
