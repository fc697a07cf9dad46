"""What a mutant's name or sequence says of its difference to the wild type."""

import re
from typing import NamedTuple

import numpy as np

from protlig_dd.tokenizer import AMINO_ACIDS, N_STATES, ProteinTokenizer

MUTATION = re.compile(r"([A-Z])([0-9]+)([A-Z*=]|DEL)")
WILD_TYPES = ("WT", "WILDTYPE", "WILD-TYPE", "P.=", "P.(=)")


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


class Numbering(NamedTuple):
    """How the positions of an assay's mutants are to be read."""

    offset: int = 0
    """What they are too large by; with 100, M101A changes the target's first residue."""
    note: str = ""
    """What else error messages about a position say."""

    def __str__(self) -> str:
        return f" (offset={self.offset}{self.note})" if self.offset or self.note else ""


AS_THE_TARGET = Numbering()


def encode(sequence: str, name: str) -> np.ndarray:
    """Ids (length,) without <bos> and <eos>."""
    return ProteinTokenizer().encode(sequence, name)[1:-1]


def name_of(variant: Variant, target: np.ndarray) -> str:
    """`A24P:D30N`."""
    decode = ProteinTokenizer().decode
    return ":".join(
        f"{decode(target[site : site + 1])}{site + 1}{AMINO_ACIDS[residue]}" for site, residue in variant.substitutions
    )


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
