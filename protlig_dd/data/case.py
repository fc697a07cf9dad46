"""The case of residues, which marks those that are context: given to the network, never noised, not in the loss.

A store keeps the case of its records if any record has both upper-case and lower-case letters (`m` records have a
lower-case letter). Otherwise it has none of these datasets:

    case_rows     (m,) int64      rows of the records that have a lower-case letter, ascending
    case_offsets  (m + 1,) int64  the bits of record j are case_bits[case_offsets[j]:case_offsets[j + 1]]
    case_bits     (b,) uint8      one bit a residue, 1 for a lower-case letter, the first residue in the highest bit;
                                  a record has whole bytes, and none if all its letters are lower-case
    case_counts   (90,) int64     how often each token id occurs in lower case in each split, (3, 30) row by row
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from protlig_dd.tokenizer import CONTEXT, N_STATES

Context = Literal["none", "lower", "upper"]
CASE_COLUMNS = {"case_rows": np.int64, "case_offsets": np.int64, "case_bits": np.uint8, "case_counts": np.int64}


class CaseIndex(NamedTuple):
    """The case of a store's records."""

    rows: np.ndarray
    """(m,)"""
    offsets: np.ndarray
    """(m + 1,)"""
    bits: np.ndarray

    def lower_case(self, row: int, residues: int) -> np.ndarray | None:
        """Return (residues,) bool, which residues of a row are lower-case letters; None if none is.

        Raises:
            ValueError: the row has another number of bytes than its residues need.
        """
        j = int(np.searchsorted(self.rows, row))
        if j == len(self.rows) or self.rows[j] != row:
            return None
        start, end = self.offsets[j : j + 2].tolist()
        if start == end:
            return np.ones(residues, bool)
        if end - start != (expected := -(-residues // 8)):
            raise ValueError(
                f"row {row}: {end - start} bytes of case_bits for {residues} residues, expected {expected}"
            )
        return np.unpackbits(self.bits[start:end], count=residues).view(bool)


def lower_case_of(sequence: str) -> np.ndarray | None:
    """Return (residues,) bool, which letters of a FASTA sequence are lower-case; None if none is."""
    lower = np.frombuffer(sequence.removesuffix("*").encode("ascii", "replace"), np.uint8) >= ord("a")
    return lower if lower.any() else None


def context_tokens(lower: np.ndarray | None, residues: int, context: Context) -> np.ndarray | None:
    """Return (residues + 2,) bool, which tokens of `<bos> residues <eos>` are context; None if none is.

    Args:
        lower: which residues are lower-case letters; None if none is.
        context: the case of the context.
    """
    if context == "none" or (context == "lower" and lower is None):
        return None
    is_context = np.zeros(residues + 2, bool)
    is_context[1:-1] = context == "upper" if lower is None else lower == (context == "lower")
    return is_context


def targets_of(tokens: np.ndarray, is_context: np.ndarray | None) -> np.ndarray:
    """Return tokens (length,) in which X replaces the context residues, so that only designed ones are amino acids."""
    return tokens if is_context is None else np.where(is_context, np.uint8(CONTEXT), tokens)


def has_only_context(tokens: np.ndarray, is_context: np.ndarray | None) -> bool:
    """Whether a sequence has amino acids, and all of them are context."""
    return bool((tokens < N_STATES).any()) and not bool((targets_of(tokens, is_context) < N_STATES).any())


def check_has_case(path: Path, has_case: bool, context: Context) -> None:
    """Raise ValueError if the store keeps no case, although the context is marked by it."""
    if context != "none" and not has_case:
        raise ValueError(
            f"{path}: data.context={context} needs the case of its residues, but the store keeps none: it was prepared "
            "by an earlier version, or no record has both upper-case and lower-case letters; prepare it again from "
            "FASTA with such records, or set data.context=none"
        )


def nothing_to_design(name: str, context: Context, others: str = "") -> str:
    """Return the message for a record all of whose amino acids are context."""
    return (
        f"{name}: context={context} leaves nothing to design: all amino acids are {context}-case letters{others}; "
        "remove such records, or change the case of what is to be designed"
    )
