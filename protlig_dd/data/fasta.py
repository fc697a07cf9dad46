"""Stream FASTA from a plain file, a gzipped file or stdin. Errors name the file, the record and the line.

There is only one parser. It cuts the bytes into blocks of whole records. For speed, the inner loops run in C: numpy
finds the records, and `bytes.partition` splits off their headers. `read_fasta` yields single records; `prepare` reads
whole blocks.
"""

import gzip
import hashlib
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib
from isal.igzip import IGzipFile  # same interface as gzip.GzipFile, three times as fast

from protlig_dd.system.workers import Background

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # UTF-8
OTHER_FORMATS = {  # first bytes of files that are not FASTA
    b"\x89HDF": "is an HDF5 file, perhaps a store already, not FASTA",
    b"\xff\xfe": "is UTF-16, not UTF-8; save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; save it as UTF-8",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; only gzip is read",
    b"BZh": "is compressed by bzip2; only gzip is read",
    b"\xfd7zXZ": "is compressed by xz; only gzip is read",
    b"PK\x03\x04": "is a zip archive; only gzip is read",
}
PIR_CODES = {b"P1", b"F1", b"DL", b"DC", b"RL", b"RC", b"N1", b"N3", b"XX"}  # molecule types in PIR's `>P1;id`
BLOCK_BYTES = 1 << 18  # small enough that the slices of a block stay in the processor's cache
PIECE_BYTES = 1 << 16  # if a gzip file is damaged, up to this many bytes before the damage may be lost
LONGEST_RECORD = 16 << 20  # bytes; the longest known protein has some 45,000 residues
WHITESPACE = b" \t\r\n\v\f"
NEWLINE, SIGN, SEMICOLON = b"\n>;"
STDIN = "-"


class FastaRecord(NamedTuple):
    id: str
    """The header's first word."""
    description: str
    """The rest of the header."""
    sequence: str
    file: str = ""

    @property
    def name(self) -> str:
        """Name of this record in error messages."""
        return f"{self.file}: record {self.id}" if self.file else f"record {self.id}"


class Header(NamedTuple):
    """Fields of a UniRef, UniProt or plain header. A field that the header lacks is None."""

    id: str
    description: str
    n: int | None
    """Number of cluster members (UniRef's n=)."""
    tax: str | None
    """Name of the taxon (UniRef's Tax=, UniProt's OS=)."""
    tax_id: int | None
    """TaxID of the taxon (UniRef's TaxID=, UniProt's OX=); None also for N/A."""
    rep_id: str | None


# The description (d) matches as much as possible: if a protein name contains `n=2 Tax=`, the last such fields count.
_UNIREF = re.compile(r"(?:(?P<d>.*) )?n=(?P<n>\d+) Tax=(?P<tax>.*?)(?: TaxID=(?P<id>\d+|N/A))?(?: RepID=(?P<rep>\S+))?")
_UNIPROT = re.compile(r"(?:(?P<d>.*) )?OS=(?P<tax>.*?) OX=(?P<id>\d+)(?: .*)?")


def id_of(header: str) -> str:
    """Return the first word of a header."""
    return re.split("[ \t]", header, maxsplit=1)[0]


def parse_header(header: str) -> Header:
    """Split a header line (without `>`) into its fields.

    >>> parse_header("UniRef50_P1 Kinase n=3 Tax=Homo TaxID=9605 RepID=P1_HUMAN").tax_id
    9605
    """
    id_ = id_of(header)
    rest = header[len(id_) :].strip()
    if (found := _UNIREF.fullmatch(rest)) is not None:
        tax_id = found["id"]
        number = int(tax_id) if tax_id and tax_id != "N/A" else None
        return Header(id_, found["d"] or "", int(found["n"]), found["tax"], number, found["rep"])
    if (found := _UNIPROT.fullmatch(rest)) is not None:
        return Header(id_, found["d"] or "", None, found["tax"], int(found["id"]), None)
    return Header(id_, rest, None, None, None, None)


class FastaText(NamedTuple):
    """Whole records of a file, as bytes that are not split into records yet."""

    file: str
    first_record: int
    """Number of the first of these records in the file, counted from 1."""
    first_line: int
    """Line number of the first record's header, counted from 1."""
    text: bytes
    """The records' bytes, with every line end normalised to a newline."""


class FastaBlock(NamedTuple):
    """n whole records of a file. The first four fields are those of FastaText."""

    file: str
    first_record: int
    first_line: int
    text: bytes
    starts: list[int]
    """n + 1 offsets in `text`: each record's `>`, and the end of the last record."""
    ids: list[bytes]
    headers: list[bytes]
    """The records' first lines without `>`, checked to be UTF-8."""
    bodies: list[bytes]
    """The records' other lines, with their line ends."""

    def location(self, i: int, position: int | None = None) -> str:
        """Return file, number, id and line of record i, for error messages.

        Args:
            position: residue (counted from 1) whose line is returned; None returns the line of the header.
        """
        line = self.first_line + self.text.count(b"\n", 0, self.starts[i])
        if position is not None:
            for text in self.bodies[i].split(b"\n"):
                line, position = line + 1, position - len(text.translate(None, WHITESPACE))
                if position <= 0:
                    break
        return f"{self.file}: record {self.first_record + i} ({self.ids[i].decode('utf-8', 'replace')}), line {line}"


class FastaFile:
    """One input file. Iterate over `blocks()` or `texts()` once. Then `sha256`, `size` and `records` describe the file.

    Args:
        path: a plain or gzipped file (recognised by its first two bytes, not by its name), or `-` for stdin.
        on_bytes: called after each read with the number of bytes read (compressed bytes if the file is gzipped).

    Raises:
        ValueError: the file does not exist, is not FASTA, has no records, has text before the first `>`, has a header
            without id or not in UTF-8, has a record that is longer than LONGEST_RECORD or in PIR format, or is
            truncated or damaged gzip. The message names the file and, if known, the record and the line.
    """

    def __init__(self, path: Path | str, on_bytes: Callable[[int], None] | None = None) -> None:
        self.name = "stdin" if str(path) == STDIN else str(path)
        self.path = None if str(path) == STDIN else Path(path)
        if self.path is not None and (not self.path.exists() or self.path.is_dir()):
            raise ValueError(f"{self.name}: {'a folder, not a FASTA file' if self.path.is_dir() else 'no such file'}")
        self.on_bytes = on_bytes
        self.records = 0

    @property
    def sha256(self) -> str:
        return self._raw.digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes read from the file (compressed bytes if it is gzipped)."""
        return self._raw.size

    def blocks(self) -> Iterator[FastaBlock]:
        for text in self.texts():
            yield parse_text(text)

    def texts(self, *, hash_in_thread: bool = False) -> Iterator[FastaText]:
        """Yield the texts of the blocks. Reading them is much faster than parsing, because only their ends are checked.

        Args:
            hash_in_thread: whether SHA-256 is computed in another thread, beside reading.
        """
        try:
            # unbuffered: a pipe (stdin, or the shell's <(...)) is read as data arrives
            opened = sys.stdin.buffer if self.path is None else self.path.open("rb", buffering=0)
            with opened as source, Background(hash_in_thread) as background:
                self._raw = CountingReader(source, self.on_bytes, background)
                yield from self._texts(io.BufferedReader(self._raw, 1 << 20))
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read: {error.strerror or error}") from error

    def _texts(self, buffered: io.BufferedReader) -> Iterator[FastaText]:
        zipped = buffered.peek(2)[:2] == GZIP_MAGIC
        stream: io.BufferedIOBase = IGzipFile(fileobj=buffered) if zipped else buffered
        rest, held, line, started = b"", b"", 1, False
        while True:
            read, damage = read_block(stream)
            last = not read and damage is None
            chunk, held = _line_ends(held + read, last)
            text = rest + chunk
            if not started:
                text = text.removeprefix(BYTE_ORDER_MARK)
                stripped = text.lstrip(WHITESPACE)
                line += text.count(b"\n", 0, len(text) - len(stripped))
                text = stripped
                started = bool(text)
                for magic, problem in OTHER_FORMATS.items():
                    if text.startswith(magic):
                        raise ValueError(f"{self.name} {problem}")
                if started and text[:1] != b">":
                    shown = text.partition(b"\n")[0][:40].decode("utf-8", "replace").strip()
                    raise ValueError(f"{self.name}: line {line} is not a FASTA header: {shown!r}")
            cut = len(text) if last else text.rfind(b"\n>") + 1
            block, rest = text[:cut], text[cut:]
            if block:
                first_record = self.records + 1
                letters = np.frombuffer(block, np.uint8)  # numpy counts faster than bytes.count()
                newline = letters == NEWLINE
                self.records += 1 + int(np.count_nonzero(newline[:-1] & (letters[1:] == SIGN)))
                yield FastaText(self.name, first_record, line, block)
                line += int(np.count_nonzero(newline))
            if len(rest) > LONGEST_RECORD:
                raise ValueError(_too_long(f"{self.name}: record {self.records + 1}, line {line}"))
            if damage is not None:
                raise ValueError(
                    f"{self.name}: truncated or damaged gzip; the last record that was read is {self.records}: {damage}"
                )
            if last:
                break
        if not self.records:
            raise ValueError(f"{self.name}: empty, no FASTA records in it")


def parse_text(whole: FastaText) -> FastaBlock:
    """Split `>id ...\n...\n>id ...\n` into records and check them.

    Raises:
        ValueError: see FastaFile.
    """
    text = whole.text
    letters = np.frombuffer(text, np.uint8)
    signs = np.flatnonzero(letters[1:] == SIGN) + 1
    starts = [0, *signs[letters[signs - 1] == NEWLINE].tolist(), len(text)]
    headers, bodies = [], []
    for start, end in itertools.pairwise(starts):
        header, _, body = text[start + 1 : end].partition(b"\n")
        headers.append(header)
        bodies.append(body)
    ids = [header.partition(b" ")[0] for header in headers]
    if b"\t" in text:
        ids = [id_.partition(b"\t")[0] for id_ in ids]
    block = FastaBlock(*whole, starts, ids, headers, bodies)
    if len(text) > LONGEST_RECORD and (np.diff(starts) > LONGEST_RECORD).any():
        raise ValueError(_too_long(block.location(int(np.argmax(np.diff(starts) > LONGEST_RECORD)))))
    if not all(ids):
        i = ids.index(b"")
        shown = ">" + headers[i].decode("utf-8", "replace")
        raise ValueError(f"{block.location(i)}: no id in the header {shown!r}")
    codes_end = np.array(starts[:-1]) + 3
    for i in np.flatnonzero(letters[np.minimum(codes_end, len(text) - 1)] == SEMICOLON).tolist():
        if ids[i][:2] in PIR_CODES and b"*" in bodies[i]:  # else PIR's description would be read as residues
            raise ValueError(
                f"{block.location(i)} looks like PIR, not FASTA: its id starts with `{ids[i][:3].decode()}`, a "
                "line of description follows, and * ends its sequence. Convert PIR to FASTA with "
                'Bio.SeqIO.convert("in.pir", "pir", "out.fasta", "fasta"); if the file is FASTA, remove '
                f"`{ids[i][:3].decode()}` from its ids"
            )
    if not text.isascii():
        for i, header in enumerate(headers):
            try:
                header.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{block.location(i)}: the header is not UTF-8: {error.reason}") from error
    return block


def _line_ends(text: bytes, last: bool) -> tuple[bytes, bytes]:
    """Normalise the line ends CR LF, CR CR LF and CR to newlines.

    Args:
        last: whether no more text follows.

    Returns:
        The normalised text, and the carriage returns at the end of `text`. They are held back, because the next byte of
        the file may be the newline of the same line end.
    """
    if b"\r" not in text:
        return text, b""
    whole = text if last else text.rstrip(b"\r")
    held, text = text[len(whole) :], whole
    while b"\r\n" in text:
        text = text.replace(b"\r\n", b"\n")
    return text.replace(b"\r", b"\n"), held


def _too_long(where: str) -> str:
    return f"{where} is longer than {LONGEST_RECORD:,} bytes, the limit for one record"


class CountingReader(io.RawIOBase):
    """A raw file that counts and hashes its bytes as they are read."""

    def __init__(self, source: Any, on_bytes: Callable[[int], None] | None, background: Background) -> None:
        self.source, self.on_bytes, self.background = source, on_bytes, background
        self.digest, self.size = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self.source.readinto(buffer)
        read = memoryview(buffer)[:count]
        self.background.call(self.digest.update, bytes(read) if self.background.enabled else read)
        self.size += count
        if count and self.on_bytes is not None:
            self.on_bytes(count)
        return count


def read_block(stream: io.BufferedIOBase) -> tuple[bytes, Exception | None]:
    """Return about BLOCK_BYTES bytes (b"" at the end), and the gzip error that occurred after these bytes, or None."""
    pieces: list[bytes] = []
    size = 0
    try:
        while size < BLOCK_BYTES and (piece := stream.read1(PIECE_BYTES)):
            pieces.append(piece)
            size += len(piece)
    except (EOFError, gzip.BadGzipFile, isal_zlib.IsalError) as error:  # type: ignore[misc]
        return b"".join(pieces), error
    return b"".join(pieces), None


def read_fasta(path: Path | str) -> Iterator[FastaRecord]:
    """Yield the records of one FASTA file (see FastaFile).

    Raises:
        ValueError: an error of FastaFile, or a sequence that is not ASCII.
    """
    for block in FastaFile(path).blocks():
        for i, (header, id_, body) in enumerate(zip(block.headers, block.ids, block.bodies, strict=True)):
            description = header[len(id_) :].decode().strip()
            try:
                sequence = body.translate(None, WHITESPACE).decode("ascii")
            except UnicodeDecodeError as error:
                raise ValueError(f"{block.location(i, error.start + 1)}: the sequence is not ASCII") from error
            yield FastaRecord(id_.decode(), description, sequence, block.file)
