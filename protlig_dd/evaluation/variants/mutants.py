"""Parsing of mutant names and sequences into differences from the wild type."""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES, ProteinTokenizer

MUTATION = re.compile(r"([A-Z])([0-9]+)([A-Z*=]|DEL)")
WILD_TYPES = ("WT", "WILDTYPE", "WILD-TYPE", "P.=", "P.(=)")


class Indel(NamedTuple):
    """Residues start..stop of the wild type (from 0, `stop` excluded), which are replaced by more or fewer residues."""

    start: int
    stop: int
    ids: tuple[int, ...]
    """Token ids of the new residues."""


class Variant(NamedTuple):
    """Differences from the wild type.

    If the variant is as long as the wild type, they are substitutions in order of position. Otherwise they are one
    indel, which spans all differences.
    """

    substitutions: tuple[tuple[int, int], ...] = ()
    """(position from 0, amino-acid id)."""
    indel: Indel | None = None


class Numbering(NamedTuple):
    """Numbering of the positions in an assay's `mutant` column."""

    offset: int = 0
    """Number that is subtracted from each position. With 100, M101A changes the target's first residue."""
    note: str = ""
    """Text that is appended to error messages about a position."""

    def __str__(self) -> str:
        return f" (offset={self.offset}{self.note})" if self.offset or self.note else ""


AS_THE_TARGET = Numbering()


class MutantScores(NamedTuple):
    """Scores of mutants of one protein, in the order of `mutants`, on the CPU."""

    mutants: list[str]
    """Names such as A24P or A24P:D30N."""
    scores: Float64[Tensor, " n"]
    """log p(mutant) - log p(wild type), nats; higher is fitter."""
    standard_error: Float64[Tensor, " n"] | None
    """Monte Carlo standard error of the scores by the strategy `bound`, NaN for other strategies; None if no mutant is
    scored by `bound`."""


def encode(sequence: str, name: str) -> np.ndarray:
    """Return token ids (length,) without <bos> and <eos>."""
    return ProteinTokenizer().encode(sequence, name)[1:-1]


def name_of(variant: Variant, target: np.ndarray) -> str:
    """Return the substitutions as `A24P:D30N`."""
    decode = ProteinTokenizer().decode
    return ":".join(
        f"{decode(target[site : site + 1])}{site + 1}{AMINO_ACIDS[residue]}" for site, residue in variant.substitutions
    )


def read_variant(
    mutant: str, sequence: str, target: np.ndarray, where: str, numbering: Numbering = AS_THE_TARGET
) -> Variant:
    """Parse one row of an assay.

    Args:
        mutant: the cell of the column `mutant`, in upper case. It may be empty, or repeat `sequence` as in ProteinGym's
            indel files.
        sequence: the cell of the column `mutated_sequence`, in upper case; may be empty.
        where: file and line, for error messages.
    """
    if not mutant and not sequence:
        raise ValueError(f"{where}: both mutant and mutated_sequence are empty; give one of them")
    by_name = read_mutant(mutant, target, where, numbering) if mutant and mutant != sequence else None
    if not sequence:
        assert by_name is not None
        return by_name
    by_sequence = compare(encode(sequence, f"{where}, mutated_sequence"), target, where)
    if by_name is not None and by_name != by_sequence:
        raise ValueError(f"{where}: mutant {mutant} and mutated_sequence do not describe the same protein")
    return by_sequence


def read_mutant(mutant: str, target: np.ndarray, where: str, numbering: Numbering = AS_THE_TARGET) -> Variant:
    """Parse a name such as `A24P:D30N`.

    The separators are `:`, `;` and `,`. Three-letter names and HGVS' `p.` prefix are accepted. `WT` and `A24A` are the
    wild type; `A24DEL` deletes a residue.
    """
    if mutant.strip("_") in WILD_TYPES:
        return Variant()
    found: dict[int, int] = {}
    mutations = re.split("[:;,]", mutant.removeprefix("P.").strip("[]()"))
    hint = "; set offset= if the assay numbers its positions differently" if numbering == AS_THE_TARGET else ""
    for mutation in mutations:
        if (match := MUTATION.fullmatch(one_letter(mutation.strip().removeprefix("P.")))) is None:
            raise ValueError(
                f"{where}: {mutation!r} is not a mutation; write mutations as A24P or A24P:D30N, "
                "and whole proteins in a column mutated_sequence"
            )
        wild, number, letter = match[1], int(match[2]), match[3]
        position = number - numbering.offset
        if not 1 <= position <= len(target):
            raise ValueError(
                f"{where}: {mutation} is at position {position}{numbering}, "
                f"outside the target's positions 1 to {len(target)}{hint}"
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
            kind = "a deletion combined with other changes" if letter == "DEL" else "a stop codon"
            raise ValueError(f"{where}: {mutation} is {kind}; give the whole protein in a column mutated_sequence")
        if site in found:
            raise ValueError(f"{where}: {mutant} changes position {position} twice")
        letter = wild if letter == "=" else letter
        if letter not in AMINO_ACIDS:
            raise ValueError(f"{where}: {mutation}: {letter} is not one of the amino acids {AMINO_ACIDS}")
        if wild not in AMINO_ACIDS:
            raise ValueError(f"{where}: {mutation} changes {wild}, which is not one of the amino acids {AMINO_ACIDS}")
        found[site] = AMINO_ACIDS.index(letter)
    return Variant(tuple((site, residue) for site, residue in sorted(found.items()) if residue != target[site]))


def one_letter(mutation: str) -> str:
    """Return `G2A` for `GLY2ALA`; return any other text unchanged."""
    match = re.fullmatch(r"([A-Z]{3})([0-9]+)([A-Z]{3}|[*=])", mutation)
    if match is None:
        return mutation
    from Bio.Data.IUPACData import protein_letters_3to1

    names = {name.upper(): letter for name, letter in protein_letters_3to1.items()} | {"TER": "*"}
    wild, position, new = match.groups()
    return f"{names.get(wild, wild)}{position}{names.get(new, new)}"


def compare(sequence: np.ndarray, target: np.ndarray, where: str) -> Variant:
    """Return the differences between a sequence and the target.

    Sequences of equal length are compared position by position. Otherwise the difference is one block: what
    remains after removing the longest common prefix and then the longest common suffix.
    """
    if not np.array_equal(sequence[sequence >= N_STATES], target[target >= N_STATES]):
        raise ValueError(
            f"{where}: mutated_sequence and the target differ in letters other than the amino acids {AMINO_ACIDS}, "
            "and models give no probability for such letters"
        )
    if len(sequence) == len(target):
        sites = np.flatnonzero(sequence != target)
        context = [site for site in sites if max(sequence[site], target[site]) >= N_STATES]
        if context:
            raise ValueError(
                f"{where}: mutated_sequence and the target differ at position {context[0] + 1}, "
                "where one of the two letters is not an amino acid"
            )
        return Variant(tuple((int(site), int(sequence[site])) for site in sites))
    shared = min(len(sequence), len(target))
    start = count_leading(sequence[:shared] == target[:shared])
    same = sequence[::-1][: shared - start] == target[::-1][: shared - start]
    end = count_leading(same)
    return Variant(indel=Indel(start, len(target) - end, tuple(sequence[start : len(sequence) - end].tolist())))


def count_leading(same: np.ndarray) -> int:
    """Return the number of true values before the first false value."""
    return len(same) if same.all() else int(same.argmin())
