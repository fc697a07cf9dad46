"""Count tokens. Workers import this module, so it imports no library that starts slowly."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from protlig_dd.data.encode import LOWER
from protlig_dd.data.prepare.spool import ROWS_AT_ONCE, select_rows
from protlig_dd.tokenizer import VOCAB_SIZE


class Rows(NamedTuple):
    """Consecutive rows of the spool."""

    path: Path
    """The spool's file of tokens."""
    start: int
    """Position of the first row's tokens in the file."""
    lengths: np.ndarray
    """(n,) number of tokens of each row."""
    groups: np.ndarray
    """(n,) index of the group in which the row's tokens are counted."""


def count_rows(n_groups: int, rows: Rows) -> np.ndarray:
    """Return (n_groups, 30) int64, how often each token id occurs in each group of rows.

    Group 0 is counted by subtraction, so that its rows are not copied. It should have most of the rows.
    """
    tokens = np.fromfile(rows.path, np.uint8, int(rows.lengths.sum(dtype=np.int64)), offset=rows.start)
    tokens &= ~np.uint8(LOWER)
    counts = np.zeros((n_groups, VOCAB_SIZE), np.int64)
    for group in range(1, n_groups):
        counts[group] = count_tokens(select_rows(tokens, rows.lengths, rows.groups == group))
    counts[0] = count_tokens(tokens) - counts.sum(0)
    return counts


def count_tokens(tokens: np.ndarray) -> np.ndarray:
    """Return (30,) int64, how often each token id occurs.

    Counting pairs of ids is twice as fast as np.bincount of single ids.
    """
    counts = np.zeros(VOCAB_SIZE, np.int64)
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        piece = tokens[start : start + ROWS_AT_ONCE]
        even = len(piece) // 2 * 2
        pairs = np.bincount(piece[:even].view(np.uint16), minlength=VOCAB_SIZE << 8)[: VOCAB_SIZE << 8].reshape(-1, 256)
        counts += pairs[:, :VOCAB_SIZE].sum(0) + pairs.sum(1)
        counts[piece[even:]] += 1
    return counts
