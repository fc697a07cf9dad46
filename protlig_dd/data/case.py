"""The case of letters, which can mark residues as context.

Context residues are given to the network. They are never noised and not in the loss. All other amino acids are
designed, that is, noised in training and generated in sampling.

A store keeps the case of its records only if at least one record has both upper-case and lower-case letters. It then
has these datasets, where m is the number of records that have a lower-case letter:

    case_rows     (m,) int64      rows of the records that have a lower-case letter, ascending
    case_offsets  (m + 1,) int64  the bytes of row case_rows[j] are case_bits[case_offsets[j]:case_offsets[j + 1]]
    case_bits     (b,) uint8      one bit per residue: 1 for a lower-case letter. The first residue of a record is the
                                  highest bit of its first byte. The last byte of a record is filled up with zeros.
                                  A record with only lower-case letters has no bytes, as all its bits would be 1.
    case_counts   (90,) int64     how often each token id occurs in lower case in each split: a (3, 30) array of
                                  splits and token ids, flattened row by row
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from protlig_dd.tokenizer import CONTEXT, N_STATES

Context = Literal["none", "lower", "upper"]
CASE_COLUMNS = {"case_rows": np.int64, "case_offsets": np.int64, "case_bits": np.uint8, "case_counts": np.int64}


class CaseIndex(NamedTuple):
    """The datasets case_rows, case_offsets and case_bits of a store (see the module's docstring)."""

    rows: np.ndarray
    """(m,)"""
    offsets: np.ndarray
    """(m + 1,)"""
    bits: np.ndarray
    path: Path
    """The store, for error messages."""

    def lower_case(self, row: int, residues: int) -> np.ndarray | None:
        """Return which residues of a row are lower-case letters: (residues,) bool, or None if none is.

        Raises:
            ValueError: the number of bytes in case_bits does not match the number of residues.
        """
        j = int(np.searchsorted(self.rows, row))
        if j == len(self.rows) or self.rows[j] != row:
            return None
        start, end = self.offsets[j : j + 2].tolist()
        if start == end:
            return np.ones(residues, bool)
        if end - start != (expected := -(-residues // 8)):
            raise ValueError(
                f"{self.path}, row {row}: {end - start} bytes of case_bits for {residues} residues, expected {expected}"
            )
        return np.unpackbits(self.bits[start:end], count=residues).view(bool)


def lower_case_of(sequence: str) -> np.ndarray | None:
    """Return which letters of a FASTA sequence are lower-case: (residues,) bool, or None if none is."""
    lower = np.frombuffer(sequence.removesuffix("*").encode("ascii", "replace"), np.uint8) >= ord("a")
    return lower if lower.any() else None


def context_tokens(lower: np.ndarray | None, residues: int, context: Context) -> np.ndarray | None:
    """Return which tokens of `<bos> residues <eos>` are context, (residues + 2,) bool.

    If no token is context, the result is None or an array in which every value is False.

    Args:
        lower: which residues are lower-case letters; None if none is.
        context: the case that marks residues as context; `none` if no residue is context.
    """
    if context == "none" or (context == "lower" and lower is None):
        return None
    is_context = np.zeros(residues + 2, bool)
    is_context[1:-1] = context == "upper" if lower is None else lower == (context == "lower")
    return is_context


def targets_of(tokens: np.ndarray, is_context: np.ndarray | None) -> np.ndarray:
    """Return the (length,) tokens with X in place of context residues. All amino acids in the result are designed."""
    return tokens if is_context is None else np.where(is_context, np.uint8(CONTEXT), tokens)


def has_only_context(tokens: np.ndarray, is_context: np.ndarray | None) -> bool:
    """Whether a sequence has amino acids and all these amino acids are context."""
    return bool((tokens < N_STATES).any()) and not bool((targets_of(tokens, is_context) < N_STATES).any())


def check_has_case(path: Path, has_case: bool, context: Context) -> None:
    """Raise ValueError if `context` is `lower` or `upper` but the store does not keep the case of its letters."""
    if context != "none" and not has_case:
        raise ValueError(
            f"{path}: data.context={context} needs the case of the letters, but the store does not keep it, because it "
            "was prepared by an earlier version, or no record has both upper-case and lower-case letters; prepare it "
            "again from FASTA with such records, or set data.context=none"
        )


def nothing_to_design(name: str, context: Context, others: str = "") -> str:
    """Return the error message for a record in which all amino acids are context."""
    return (
        f"{name}: context={context} leaves nothing to design: all amino acids are {context}-case letters{others}; "
        "remove such records, or change the case of the residues to design"
    )
