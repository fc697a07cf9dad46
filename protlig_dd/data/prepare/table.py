"""Read a table of cluster ids and member ids."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal.igzip import IGzipFile

from protlig_dd.data.fasta import GZIP_MAGIC, STDIN, CountingReader, read_block
from protlig_dd.system.workers import Background

BLOCK_BYTES = 1 << 25  # a block of UniRef ids has about a million lines
SHOWN_BYTES = 80  # a wrong line is shown up to this length


class Lines(NamedTuple):
    """Consecutive lines of a table."""

    numbers: np.ndarray
    """(n,) line numbers, counted from 1."""
    clusters: list[bytes]
    members: list[bytes]


class Table:
    """A tab-separated table with two columns, `cluster id <TAB> member id`, and no header line. Iterate over it once.

    Args:
        path: a plain or gzipped file (recognised by its first two bytes), or `-` for stdin.
        on_bytes: called after each read with the number of bytes read.

    Raises:
        ValueError: the file does not exist or cannot be read, is truncated or damaged gzip, or has a line without
            exactly two ids. The message names the file and the line. Blank lines are skipped.
    """

    def __init__(self, path: str, on_bytes: Callable[[int], None] | None = None) -> None:
        self.name = "stdin" if path == STDIN else path
        self.path = None if path == STDIN else Path(path)
        if self.path is not None and (not self.path.exists() or self.path.is_dir()):
            raise ValueError(
                f"members.table={path}: {'a folder, not a table' if self.path.is_dir() else 'no such file'}"
            )
        self.on_bytes = on_bytes

    def __iter__(self) -> Iterator[Lines]:
        try:
            opened = sys.stdin.buffer if self.path is None else self.path.open("rb", buffering=0)
            with opened as source, Background(enabled=False) as background:
                self._raw = CountingReader(source, self.on_bytes, background)
                yield from self._lines(io.BufferedReader(self._raw, 1 << 20))
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read: {error.strerror or error}") from error

    def described(self) -> dict[str, Any]:
        """Return the table's name, size and SHA-256, for the manifest."""
        return {"name": Path(self.name).name, "bytes": self._raw.size, "sha256": self._raw.digest.hexdigest()}

    def _lines(self, buffered: io.BufferedReader) -> Iterator[Lines]:
        zipped = buffered.peek(2)[:2] == GZIP_MAGIC
        stream: io.BufferedIOBase = IGzipFile(fileobj=buffered) if zipped else buffered
        rest, first, damage = b"", 1, None
        while True:
            pieces, read = [rest], b" "
            while read and damage is None and sum(map(len, pieces[1:])) < BLOCK_BYTES:
                read, damage = read_block(stream)
                pieces.append(read)
            end = not read and damage is None
            text = b"".join(pieces)
            size = len(text) if end else text.rfind(b"\n") + 1
            text, rest = text[:size], text[size:]
            if text:
                yield self._parsed(text.replace(b"\r\n", b"\n"), first)
            first += text.count(b"\n")
            if damage is not None:
                raise ValueError(f"{self.name}: truncated or damaged gzip after line {first - 1}: {damage}")
            if end:
                return

    def _parsed(self, text: bytes, first: int) -> Lines:
        """Return the ids of these lines; `first` is the number of the first line."""
        text = text if text.endswith(b"\n") else text + b"\n"
        codes = np.frombuffer(text, np.uint8)
        separators = codes[(codes == ord("\t")) | (codes == ord("\n"))]
        ids = text.replace(b"\n", b"\t").split(b"\t")[:-1]
        if len(separators) % 2 == 0 and (separators.reshape(-1, 2) == list(b"\t\n")).all() and all(ids):
            return Lines(np.arange(first, first + len(ids) // 2), ids[::2], ids[1::2])
        lines = [(first + i, line.split(b"\t")) for i, line in enumerate(text.split(b"\n")) if line.strip(b" ")]
        for number, fields in lines:
            if len(fields) != 2 or not all(fields):
                shown = b"\t".join(fields)[:SHOWN_BYTES].decode("utf-8", "replace")
                raise ValueError(f"{self.name}, line {number}: expected `cluster id <TAB> member id`, got {shown!r}")
        numbers = np.array([number for number, _ in lines], np.int64)
        return Lines(numbers, [fields[0] for _, fields in lines], [fields[1] for _, fields in lines])
