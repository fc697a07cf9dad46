"""Assays of protein variants, by ProteinGym's conventions: what their files say, and how predictions are judged.

`A24P:D30N` changes residue 24 (from 1) of the target from A to P and residue 30 from D to N.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protlig_dd.data.fasta import read_fasta
from protlig_dd.evaluation.measurements import judge
from protlig_dd.runtime.tables import csv_lines
from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES, ProteinTokenizer

MUTATION = re.compile(r"([A-Z])([0-9]+)([A-Z*=]|DEL)")
WILD_TYPES = ("WT", "WILDTYPE", "WILD-TYPE", "P.=", "P.(=)")
REFERENCE = ("DMS_id", "target_seq")
CLINICAL = {"BENIGN": "1", "PATHOGENIC": "0"}  # what ProteinGym's clinical files have for DMS_score_bin
NOTHING: Mapping[str, str] = {}
BREAKDOWNS = ("MSA_Neff_L_category", "taxon")  # of a reference file, where it has them


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
        """How scores agree with DMS_score and DMS_score_bin, see protlig_dd.evaluation.measurements."""
        return judge(scores, self.measured, self.fit, [len(variant.substitutions) for variant in self.variants])


class Numbering(NamedTuple):
    """How the positions of an assay's mutants are to be read."""

    offset: int = 0
    """What they are too large by; with 100, M101A changes the target's first residue."""
    note: str = ""
    """What else error messages about a position say."""

    def __str__(self) -> str:
        return f" (offset={self.offset}{self.note})" if self.offset or self.note else ""


AS_THE_TARGET = Numbering()


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
    if not variants:
        raise ValueError("the target has no amino acid that could be substituted")
    names = [name_of(variant, target) for variant in variants]
    nothing = np.full(len(variants), np.nan)
    return Assay(["mutant"], [[name] for name in names], variants, names, nothing, nothing)


def name_of(variant: Variant, target: np.ndarray) -> str:
    """`A24P:D30N`."""
    decode = ProteinTokenizer().decode
    return ":".join(
        f"{decode(target[site : site + 1])}{site + 1}{AMINO_ACIDS[residue]}" for site, residue in variant.substitutions
    )


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


def read_variant(
    mutant: str, sequence: str, target: np.ndarray, where: str, numbering: Numbering = AS_THE_TARGET
) -> Variant:
    """What a row says, in upper case; `mutant` may repeat the sequence, as ProteinGym's files of indels do."""
    if not mutant and not sequence:
        raise ValueError(f"{where}: neither a mutant nor a mutated_sequence")
    by_name = read_mutant(mutant, target, where, numbering) if mutant and mutant != sequence else None
    if not sequence:
        assert by_name is not None
        return by_name
    by_sequence = compare(encode(sequence, f"{where}, mutated_sequence"), target, where)
    if by_name is not None and by_name != by_sequence:
        raise ValueError(f"{where}: mutant {mutant} and mutated_sequence do not make the same protein of this target")
    return by_sequence


def read_mutant(mutant: str, target: np.ndarray, where: str, numbering: Numbering = AS_THE_TARGET) -> Variant:
    """What `A24P:D30N` changes; `;` and `,` separate as well as `:`, three-letter names and HGVS' `p.` are read too.

    `WT` and `A24A` are the wild type, `A24DEL` lacks a residue.
    """
    if mutant.strip("_") in WILD_TYPES:
        return Variant()
    found: dict[int, int] = {}
    mutations = re.split("[:;,]", mutant.removeprefix("P.").strip("[]()"))
    hint = "; offset= tells of another numbering" if numbering == AS_THE_TARGET else ""
    for mutation in mutations:
        if (match := MUTATION.fullmatch(one_letter(mutation.strip().removeprefix("P.")))) is None:
            raise ValueError(
                f"{where}: {mutation!r} is no mutation; write them as A24P or A24P:D30N, "
                "and whole proteins in a column mutated_sequence"
            )
        wild, number, letter = match[1], int(match[2]), match[3]
        position = number - numbering.offset
        if not 1 <= position <= len(target):
            raise ValueError(
                f"{where}: {mutation} is at position {position}{numbering}, but the target has 1 to {len(target)}{hint}"
            )
        site = position - 1
        expected = ProteinTokenizer().decode(target[site : site + 1])
        if wild != expected:
            raise ValueError(
                f"{where}: {mutation} has {wild} at position {position}{numbering}, but the target has {expected}{hint}"
            )
        if letter == "DEL" and len(mutations) == 1:
            return compare(np.delete(target, site), target, where)
        if letter in ("DEL", "*"):
            what = "a deletion beside other changes" if letter == "DEL" else "a stop"
            raise ValueError(f"{where}: {mutation} is {what}: give the whole protein in a column mutated_sequence")
        if site in found:
            raise ValueError(f"{where}: {mutant} changes position {position} twice")
        letter = wild if letter == "=" else letter
        if letter not in AMINO_ACIDS:
            raise ValueError(f"{where}: {mutation}: {letter} is none of the amino acids {AMINO_ACIDS}")
        if wild not in AMINO_ACIDS:
            raise ValueError(f"{where}: {mutation} is at {wild} of the target, to which models give no probability")
        found[site] = AMINO_ACIDS.index(letter)
    return Variant(tuple((site, residue) for site, residue in sorted(found.items()) if residue != target[site]))


def one_letter(mutation: str) -> str:
    """`GLY2ALA` -> `G2A`; anything else as it is."""
    match = re.fullmatch(r"([A-Z]{3})([0-9]+)([A-Z]{3}|[*=])", mutation)
    if match is None:
        return mutation
    from Bio.Data.IUPACData import protein_letters_3to1

    names = {name.upper(): letter for name, letter in protein_letters_3to1.items()} | {"TER": "*"}
    wild, position, new = match.groups()
    return f"{names.get(wild, wild)}{position}{names.get(new, new)}"


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


class Reference(NamedTuple):
    """One assay of a benchmark."""

    id: str
    path: Path
    target: np.ndarray
    protein: str
    """UniProt_ID."""
    type: str
    """coarse_selection_type."""
    more: dict[str, str]
    """Those of BREAKDOWNS that the file has."""
    numbering: Numbering = AS_THE_TARGET


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
        more = {key: cells[key].capitalize() for key in BREAKDOWNS if cells.get(key)}
        # clinical files name neither: each assay is a protein of its own
        protein, kind = cells.get("UniProt_ID") or name, cells.get("coarse_selection_type") or "Clinical"
        numbering = numbering_of(cells, where, path)
        found[file] = Reference(name, folder / file, target, protein, kind, more, numbering)
    if not files:
        raise ValueError(f"{folder}: no CSV files in it")
    if unknown := sorted(files - found.keys()):
        raise ValueError(f"{folder / unknown[0]} is not in {path}")
    return list(found.values())


def numbering_of(cells: Mapping[str, str], where: str, path: Path) -> Numbering:
    """What a reference file says of the positions in an assay's `mutant`.

    ProteinGym numbers its assays as their target_seq. Its script for ESM reads a column start_idx, which its own files
    do not have: the number of the target's first residue. Their column raw_mut_offset is of the files that the assays
    were made from, whose positions are smaller by so many, and only explains letters that do not fit.
    """
    start, raw = cells.get("start_idx", ""), cells.get("raw_mut_offset", "")
    if start:
        try:
            offset = float(start) - 1  # spreadsheets write 101.0 where other rows have none
        except ValueError:
            offset = math.nan
        if not offset.is_integer():
            raise ValueError(f"{where}: start_idx is a whole number, got {start!r}")
        return Numbering(int(offset), f", as start_idx={start} in {path} says")
    if raw:
        return Numbering(0, f"; raw_mut_offset={raw} in {path} is of the raw file: if this is it, offset=-{raw}")
    return AS_THE_TARGET
