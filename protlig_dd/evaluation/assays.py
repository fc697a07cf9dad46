"""Assays of protein variants, by ProteinGym's conventions: what their files say, and how predictions are judged.

`A24P:D30N` changes residue 24 (from 1) of the target from A to P and residue 30 from D to N.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.data.fasta import read_fasta
from protlig_dd.runtime.tables import csv_lines
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES, ProteinTokenizer

MUTATION = re.compile(r"([A-Z])([0-9]+)([A-Z])")
REFERENCE = ("DMS_id", "target_seq", "UniProt_ID", "coarse_selection_type")
METRICS = ("spearman", "auc")


class Indel(NamedTuple):
    """The residues start..stop (from 0, stop not among them) of the wild type become `ids`, of another number."""

    start: int
    stop: int
    ids: tuple[int, ...]


class Variant(NamedTuple):
    """What differs from the wild type: substitutions, by position, or one block that holds all the differences."""

    substitutions: tuple[tuple[int, int], ...] = ()
    """(position from 0, amino-acid id)."""
    indel: Indel | None = None


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

    @property
    def most_changed(self) -> int:
        """Substitutions of the row that has most."""
        return max(len(variant.substitutions) for variant in self.variants)

    @property
    def first_indel(self) -> int | None:
        """The first row with insertions or deletions."""
        return next((i for i, variant in enumerate(self.variants) if variant.indel), None)

    def judge(self, scores: np.ndarray) -> dict[str, float | None]:
        """Spearman's rank correlation with DMS_score and the AUC for DMS_score_bin; None where there is none."""
        return {"spearman": spearman(scores, self.measured), "auc": auc(scores, self.fit)}


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


def encode(sequence: str, name: str) -> np.ndarray:
    """Ids (length,) without <bos> and <eos>."""
    return ProteinTokenizer().encode(sequence, name)[1:-1]


def all_substitutions(target: np.ndarray) -> Assay:
    """A deep mutational scan: every amino acid but the wild type's at every position that has one."""
    variants = [
        Variant(((site, residue),))
        for site in range(len(target))
        for residue in range(N_STATES)
        if target[site] < N_STATES and residue != target[site]
    ]
    names = [name_of(variant, target) for variant in variants]
    nothing = np.full(len(variants), np.nan)
    return Assay(["mutant"], [[name] for name in names], variants, names, nothing, nothing)


def name_of(variant: Variant, target: np.ndarray) -> str:
    """`A24P:D30N`."""
    decode = ProteinTokenizer().decode
    return ":".join(
        f"{decode(target[site : site + 1])}{site + 1}{AMINO_ACIDS[residue]}" for site, residue in variant.substitutions
    )


def read_assay(path: Path, target: np.ndarray) -> Assay:
    """An assay's CSV file.

    Raises:
        ValueError: names the file and, where there is one, the line: no such file, none of the columns, no rows, a
            mutant that is malformed, out of range or not of this target, a `mutated_sequence` with illegal letters or
            another one than `mutant` makes, a protein that is there twice, a measurement that is no number.
    """
    header, lines = read_csv(path)
    if not {"mutant", "mutated_sequence"} & set(header):
        raise ValueError(f"{path}: no column mutant or mutated_sequence; there are {', '.join(header)}")
    if not lines:
        raise ValueError(f"{path}: no rows under the header")
    variants, seen = [], dict[Variant, str]()
    for where, row in lines:
        cells = dict(zip(header, row, strict=True))
        variant = read_variant(
            cells.get("mutant", "").strip().upper(), cells.get("mutated_sequence", "").strip().upper(), target, where
        )
        if variant in seen:
            raise ValueError(f"{where}: the same protein as {seen[variant]}")
        seen[variant] = where
        variants.append(variant)
    measured = numbers(header, lines, "DMS_score")
    labels = numbers(header, lines, "DMS_score_bin")
    wrong = np.flatnonzero(~np.isnan(labels) & (labels != 0) & (labels != 1))
    if len(wrong):
        raise ValueError(f"{lines[wrong[0]][0]}: DMS_score_bin is 0 or 1, got {labels[wrong[0]]:g}")
    fit = labels if "DMS_score_bin" in header else above_median(measured)
    return Assay(header, [row for _, row in lines], variants, [where for where, _ in lines], measured, fit)


def read_csv(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The header, and each further row with what error messages call it; empty lines are left out."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    lines = csv_lines(path)
    if not lines:
        raise ValueError(f"{path}: empty")
    header = [cell.strip() for cell in lines[0][1]]
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path}: the column {name} is there {header.count(name)} times")
    for where, row in lines[1:]:
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} cells for {len(header)} columns")
    return header, lines[1:]


def numbers(header: list[str], lines: Sequence[tuple[str, list[str]]], column: str) -> np.ndarray:
    """(rows,) float64; NaN where the cell is empty, NA or NaN, or there is no such column."""
    values = np.full(len(lines), np.nan)
    if column in header:
        index = header.index(column)
        for i, (where, row) in enumerate(lines):
            text = row[index].strip()
            if text in ("", "NA"):
                continue
            try:
                values[i] = float(text)
            except ValueError:
                values[i] = math.inf
            if math.isinf(values[i]) or "_" in text:  # Python reads 1_0 as 10
                raise ValueError(f"{where}: {column} {text!r} is no finite number")
    return values


def read_variant(mutant: str, sequence: str, target: np.ndarray, where: str) -> Variant:
    """What a row says; `mutant` may repeat the sequence, as ProteinGym's files of indels do."""
    if not mutant and not sequence:
        raise ValueError(f"{where}: neither a mutant nor a mutated_sequence")
    by_name = read_mutant(mutant, target, where) if mutant and mutant != sequence else None
    if not sequence:
        assert by_name is not None
        return by_name
    by_sequence = compare(encode(sequence, f"{where}, mutated_sequence"), target, where)
    if by_name is not None and by_name != by_sequence:
        raise ValueError(f"{where}: mutant {mutant} and mutated_sequence do not make the same protein of this target")
    return by_sequence


def read_mutant(mutant: str, target: np.ndarray, where: str) -> Variant:
    """The substitutions of `A24P:D30N`; `A24A` is none."""
    found: dict[int, int] = {}
    for mutation in mutant.split(":"):
        if (match := MUTATION.fullmatch(mutation)) is None:
            raise ValueError(
                f"{where}: {mutation!r} is no mutation; write them as A24P or A24P:D30N, "
                "and whole proteins in a column mutated_sequence"
            )
        wild, position, letter = match[1], int(match[2]), match[3]
        if not 1 <= position <= len(target):
            raise ValueError(f"{where}: {mutation} is at position {position}, but the target has 1 to {len(target)}")
        site = position - 1
        expected = ProteinTokenizer().decode(target[site : site + 1])
        if wild != expected:
            raise ValueError(f"{where}: {mutation} has {wild} at position {position}, but the target has {expected}")
        if site in found:
            raise ValueError(f"{where}: {mutant} changes position {position} twice")
        if letter not in AMINO_ACIDS:
            raise ValueError(f"{where}: {mutation}: {letter} is none of the amino acids {AMINO_ACIDS}")
        if wild not in AMINO_ACIDS:
            raise ValueError(f"{where}: {mutation} is at {wild} of the target, to which models give no probability")
        found[site] = AMINO_ACIDS.index(letter)
    return Variant(tuple((site, residue) for site, residue in sorted(found.items()) if residue != target[site]))


def compare(sequence: np.ndarray, target: np.ndarray, where: str) -> Variant:
    """What differs between a sequence and the target: positions where they are of one length, else the block between
    the longest beginning and then the longest end that they share.
    """
    if not np.array_equal(sequence[sequence >= N_STATES], target[target >= N_STATES]):
        raise ValueError(
            f"{where}: mutated_sequence has other letters beside the amino acids {AMINO_ACIDS} than the target, "
            "and models give those no probability"
        )
    if len(sequence) == len(target):
        sites = np.flatnonzero(sequence != target)
        context = [site for site in sites if max(sequence[site], target[site]) >= N_STATES]
        if context:
            raise ValueError(f"{where}: at position {context[0] + 1} one of the two is no amino acid")
        return Variant(tuple((int(site), int(sequence[site])) for site in sites))
    shared = min(len(sequence), len(target))
    start = leading(sequence[:shared] == target[:shared])
    same = sequence[::-1][: shared - start] == target[::-1][: shared - start]
    end = leading(same)
    return Variant(indel=Indel(start, len(target) - end, tuple(sequence[start : len(sequence) - end].tolist())))


def leading(same: np.ndarray) -> int:
    """How many are true before the first that is not."""
    return len(same) if same.all() else int(same.argmin())


def above_median(measured: np.ndarray) -> np.ndarray:
    """1 above the median of what was measured, 0 elsewhere; NaN where nothing was."""
    if np.isnan(measured).all():
        return measured
    return np.where(np.isnan(measured), np.nan, measured > np.nanmedian(measured))


def spearman(scores: np.ndarray, measured: np.ndarray) -> float | None:
    """Spearman's rank correlation where something was measured; None where one of the two is constant."""
    known = ~np.isnan(measured)
    if not known.any() or np.ptp(scores[known]) == 0 or np.ptp(measured[known]) == 0:
        return None
    from scipy.stats import spearmanr  # takes a second

    return float(spearmanr(scores[known], measured[known]).statistic)


def auc(scores: np.ndarray, fit: np.ndarray) -> float | None:
    """How often a fit variant has a higher score than an unfit one, ties as a half; None without either."""
    positive, negative = fit == 1, fit == 0
    pairs = int(positive.sum()) * int(negative.sum())
    if not pairs:
        return None
    from scipy.stats import rankdata

    ranks = rankdata(scores[positive | negative])[positive[positive | negative]]
    return float((ranks.sum() - len(ranks) * (len(ranks) + 1) / 2) / pairs)


class Reference(NamedTuple):
    """One assay of a benchmark."""

    id: str
    path: Path
    target: np.ndarray
    protein: str
    """UniProt_ID."""
    type: str
    """coarse_selection_type."""


def read_reference(path: Path, folder: Path) -> list[Reference]:
    """The assays whose files lie in the folder, as ProteinGym's reference file describes them.

    Raises:
        ValueError: a missing column, an assay that is there twice, a CSV file of the folder that is not in the
            reference, a folder without any, an illegal letter of a target; named.
    """
    files = {
        file.name for file in folder.glob("*.csv") if file.name[0] != "." and file.resolve() != path.resolve()
    }  # macOS leaves ._A.csv beside A.csv
    header, lines = read_csv(path)
    missing = [name for name in REFERENCE if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}; there are {', '.join(header)}")
    found: dict[str, Reference] = {}
    for where, row in lines:
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        name, file = cells["DMS_id"], cells.get("DMS_filename") or f"{cells['DMS_id']}.csv"
        if file not in files:
            continue
        if not name or Path(name).name != name:
            raise ValueError(f"{where}: DMS_id {name!r} cannot name a file")
        if file in found or name in {reference.id for reference in found.values()}:
            raise ValueError(f"{where}: {name} is there twice")
        target = encode(cells["target_seq"].upper(), f"{where}, target_seq")
        found[file] = Reference(name, folder / file, target, cells["UniProt_ID"], cells["coarse_selection_type"])
    if not files:
        raise ValueError(f"{folder}: no CSV files in it")
    if unknown := sorted(files - found.keys()):
        raise ValueError(f"{folder / unknown[0]} is not in {path}")
    return list(found.values())


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """ProteinGym's average: over the assays of a protein within each type, over a type's proteins, over types.

    Args:
        results: of each assay: UniProt_ID, coarse_selection_type, spearman and auc (None is left out).
    """
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for result in results:
        groups.setdefault(result["coarse_selection_type"], {}).setdefault(result["UniProt_ID"], []).append(result)
    by_type = {
        kind: {metric: mean(mean(one[metric] for one in assays) for assays in proteins.values()) for metric in METRICS}
        | {"assays": sum(map(len, proteins.values())), "proteins": len(proteins)}
        for kind, proteins in sorted(groups.items())
    }
    overall = {metric: mean(values[metric] for values in by_type.values()) for metric in METRICS}
    return {**overall, "assays": len(results), "by_type": by_type}


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are; None of none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
