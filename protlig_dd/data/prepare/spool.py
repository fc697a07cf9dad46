"""Temporary storage of parsed FASTA, as one file per column."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from protlig_dd.data.encode import LOWER
from protlig_dd.data.prepare.parse import COLUMNS
from protlig_dd.tokenizer import ProteinTokenizer

ROWS_AT_ONCE, COPY_BYTES = 1 << 16, 4 << 20


class Spool:
    """Columns stored as files in a folder. All rows are appended, then the files are closed and read back.

    parse.py describes the columns.

    Args:
        start: position of the first token in the file of tokens. If it is `first_offset()`, this file can become the
            store (see write.py).
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.folder, self.rows = folder, 0
        self.starts = {"tokens": start}
        self.files: dict[str, BinaryIO] = {name: self.path(name).open("wb") for name in COLUMNS}
        self.files["tokens"].seek(start)

    def path(self, name: str) -> Path:
        return self.folder / name

    def append(self, rows: int, columns: Mapping[str, np.ndarray]) -> None:
        """Append the values of all columns for some rows. `case_row` counts from the first of these rows."""
        columns = {**columns, "case_row": columns["case_row"] + self.rows}
        for name, dtype in COLUMNS.items():
            assert columns[name].dtype == dtype, name
            self.files[name].write(columns[name].data)
        self.rows += rows

    def close(self) -> None:
        """Close all files, even if closing one of them fails because the disk is full."""
        with contextlib.ExitStack() as stack:
            for file in self.files.values():
                stack.callback(file.close)

    def size(self, name: str) -> int:
        """Return the size of a column in bytes."""
        return max(0, self.path(name).stat().st_size - self.starts.get(name, 0))

    def load(self, name: str) -> np.ndarray:
        """Return all values of a column of numbers."""
        return np.fromfile(self.path(name), COLUMNS[name])

    def pieces(self, name: str, lengths: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (first row, end row, bytes of these rows) of `tokens` or `headers`, a few megabytes at a time.

        Each piece overwrites the bytes of the previous piece.
        """
        buffer = np.empty(COPY_BYTES, np.uint8)
        with self.path(name).open("rb") as file:
            file.seek(self.starts.get(name, 0))
            for first, end, _, size in piece_bounds(lengths):
                if size > len(buffer):
                    buffer = np.empty(size, np.uint8)
                if (count := file.readinto(buffer[:size].data)) != size:
                    raise ValueError(f"{self.path(name)}: read {count} bytes, expected {size}")
                yield first, end, buffer[:size]


def piece_bounds(lengths: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Divide rows into pieces of at most COPY_BYTES and ROWS_AT_ONCE. A longer row is a piece of its own.

    Yield (first row, end row, position of the first row's bytes, number of bytes) of each piece.
    """
    position = 0
    for first in range(0, len(lengths), ROWS_AT_ONCE):
        ends = np.cumsum(lengths[first : first + ROWS_AT_ONCE], dtype=np.int64)
        start = row = 0
        while row < len(ends):
            end = max(row + 1, int(np.searchsorted(ends, start + COPY_BYTES, side="right")))
            size = int(ends[end - 1]) - start
            yield first + row, first + end, position, size
            row, start, position = end, start + size, position + size


def write_fasta(path: Path, spool: Spool, selected: np.ndarray) -> None:
    """Write the selected rows as FASTA, with row numbers as ids.

    Args:
        selected: (rows,) bool, which rows to write.
    """
    decode, lengths = ProteinTokenizer().decode, spool.load("length")
    with path.open("w") as file:
        for first, end, tokens in spool.pieces("tokens", lengths):
            ends = np.cumsum(lengths[first:end])
            tokens &= ~np.uint8(LOWER)
            for i in np.flatnonzero(selected[first:end]).tolist():
                file.write(f">{first + i}\n{decode(tokens[ends[i] - lengths[first + i] : ends[i]])}\n")


def select_rows(block: np.ndarray, lengths: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Return the bytes of the selected rows of a block.

    Args:
        block: concatenated bytes of n rows.
        lengths: (n,) number of bytes of each row.
        selected: (n,) bool, which rows to return.
    """
    if selected.all():
        return block
    runs = np.flatnonzero(np.diff(selected, prepend=False, append=False)).reshape(-1, 2)  # (first row, end row)
    bounds = np.append(0, np.cumsum(lengths, dtype=np.int64))[runs].tolist()
    return np.concatenate([block[:0], *(block[start:end] for start, end in bounds)])


def offsets_of(lengths: np.ndarray, keep: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the offsets of the kept rows in blocks: 0, then the running total of the kept lengths."""
    total = np.zeros(1, np.int64)
    yield total
    for first in range(0, len(lengths), ROWS_AT_ONCE):
        block = slice(first, first + ROWS_AT_ONCE)
        ends = total[-1] + np.cumsum(lengths[block][keep[block]], dtype=np.int64)
        yield ends
        total = ends if len(ends) else total
