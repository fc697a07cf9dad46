"""Write the case of letters to a store, if a record has both upper-case and lower-case letters (see data/case.py)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from protlig_dd.data.encode import LOWER
from protlig_dd.data.prepare.duplicates import SHOWN_IDS, id_of_row
from protlig_dd.data.prepare.spool import Spool
from protlig_dd.data.store import SPLITS
from protlig_dd.tokenizer import N_STATES, VOCAB_SIZE

FOLD = ~np.uint8(LOWER)


def repeats_in_other_case(spool: Spool, repeats: np.ndarray) -> int:
    """Count the repeated sequences in which other letters are lower-case than in the first row with the same sequence.

    The count is 0 if no record in the spool has both upper-case and lower-case letters.

    Args:
        repeats: (k, 2) row numbers. Column 0 has the rows whose sequence occurs in an earlier row, and column 1 the
            first row with this sequence.
    """
    rows = spool.load("case_row")
    if not len(rows) or not len(repeats) or not (spool.load("case_letters") < spool.load("length")[rows] - 2).any():
        return 0
    j = np.searchsorted(rows, repeats).clip(max=len(rows) - 1)
    hashes = np.where(rows[j] == repeats, spool.load("case_hash")[j], 0)  # 0: no lower-case letter
    return int((hashes[:, 0] != hashes[:, 1]).sum())


def kept_case(spool: Spool, lengths: np.ndarray, keep: np.ndarray) -> "KeptCase | None":
    """Return the case of the kept rows; None if no kept row has both upper-case and lower-case letters.

    Args:
        lengths: (rows,) number of tokens of each row.
        keep: (rows,) bool, whether each row is kept.
    """
    case = KeptCase(spool, lengths, keep)
    return case if case.mixed.any() else None


class KeptCase:
    """Collects the case of the kept rows while the columns of the store are written.

    Args:
        lengths: (rows,) number of tokens of each row.
        keep: (rows,) bool, whether each row is kept.
    """

    def __init__(self, spool: Spool, lengths: np.ndarray, keep: np.ndarray) -> None:
        self.spool, self.lengths, self.keep = spool, lengths, keep
        rows, letters = spool.load("case_row"), spool.load("case_letters")
        kept = keep[rows]
        self.rows, self.letters = rows[kept], letters[kept]
        residues = lengths[self.rows] - 2
        self.mixed = self.letters < residues
        self.bytes = np.where(self.mixed, -(-residues // 8), 0)
        self.counts = np.zeros((len(SPLITS), VOCAB_SIZE), np.int64)
        self.only_context: dict[str, dict[str, Any]] = {
            context: {"sequences": 0, "first": []} for context in ("lower", "upper")
        }

    def count(self, first: int, end: int, block: np.ndarray, row_splits: np.ndarray) -> None:
        """Count the lower-case letters in a block of the spool, and find records whose amino acids all have one case.

        Args:
            block: tokens of rows first .. end - 1, with LOWER added for lower-case letters.
            row_splits: (end - first,) index of each row's split in SPLITS; a larger number for rows that are not kept.
        """
        lengths, tokens, is_lower = self.lengths[first:end], block & FOLD, block >= LOWER
        in_split = np.repeat(row_splits, lengths)[is_lower]
        for code in range(len(SPLITS)):
            self.counts[code] += np.bincount(tokens[is_lower][in_split == code], minlength=VOCAB_SIZE)
        starts = np.cumsum(lengths) - lengths
        lower, upper = (
            np.add.reduceat((tokens < N_STATES) & (is_lower == case), starts, dtype=np.int64) for case in (True, False)
        )
        for context, designed, given in (("lower", upper, lower), ("upper", lower, upper)):
            rows = first + np.flatnonzero(self.keep[first:end] & (designed == 0) & (given > 0))
            found = self.only_context[context]
            shown = rows[: SHOWN_IDS - len(found["first"])].tolist()
            found["sequences"] += len(rows)
            found["first"] += [id_of_row(self.spool, row) for row in shown]

    def columns(self) -> dict[str, tuple[int, Any]]:
        """Return {name: (size, blocks)} of the store's case columns.

        They must be written after the tokens, because `count` is called while the tokens are written.
        """
        return {
            "case_rows": (len(self.rows), [np.cumsum(self.keep)[self.rows] - 1]),
            "case_offsets": (len(self.rows) + 1, [np.append(0, np.cumsum(self.bytes, dtype=np.int64))]),
            "case_bits": (int(self.bytes.sum(dtype=np.int64)), self._bits()),
            "case_counts": (self.counts.size, [self.counts.reshape(-1)]),
        }

    def _bits(self) -> Iterator[np.ndarray]:
        rows = self.rows[self.mixed]
        for first, end, block in self.spool.pieces("tokens", self.lengths):
            ends = np.cumsum(self.lengths[first:end], dtype=np.int64)
            selected = rows[slice(*np.searchsorted(rows, [first, end]))]
            residue_ends = ends[selected - first] - 1
            bounds = zip((residue_ends - self.lengths[selected] + 2).tolist(), residue_ends.tolist(), strict=True)
            packed = [np.packbits(block[start:end] >= LOWER) for start, end in bounds]
            if packed:  # written together: each write to the file takes longer than packing a record
                yield np.concatenate(packed)

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry `case`."""
        splits = {name: int(counts.sum()) for name, counts in zip(SPLITS, self.counts, strict=True)}
        return {"case": {"sequences": int(self.mixed.sum()), "lower_case": splits, "only_context": self.only_context}}
