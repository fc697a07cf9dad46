"""FASTA reading, plain or gzipped, with errors that name the file and the record."""

import gzip
import zlib
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import NamedTuple

from Bio.SeqIO.FastaIO import SimpleFastaParser

GZIP_MAGIC = b"\x1f\x8b"


class FastaRecord(NamedTuple):
    id: str
    """The header's first word."""
    description: str
    """The rest of the header."""
    sequence: str
    file: str = ""

    @property
    def name(self) -> str:
        """What error messages call this record."""
        return f"{self.file}: record {self.id}" if self.file else f"record {self.id}"


def read_fasta(path: Path | str) -> Iterator[FastaRecord]:
    """Stream the records of a FASTA file (gzip is recognised by its first two bytes, not by the name).

    Raises:
        ValueError: naming the file and, where there is one, the record: no such file, no records, text before the
            first `>`, a header without an id, truncated or damaged gzip, bytes that are not text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a FASTA file' if path.is_dir() else 'no such FASTA file'}")
    last = "before the first record"
    try:
        with _open_text(path) as handle:
            _check_start(path, handle)
            for header, sequence in SimpleFastaParser(handle):
                id_, description = [*header.split(None, 1), "", ""][:2]
                if not id_ or header[0].isspace():
                    raise ValueError(f"{path}: a record has no id in its header '>{header}' ({last})")
                last = f"after record {id_}"
                yield FastaRecord(id_, description.strip(), sequence, str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged gzip, {last}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file, {last}: {error}") from error


def _open_text(path: Path) -> TextIOBase:
    with path.open("rb") as handle:
        zipped = handle.read(2) == GZIP_MAGIC
    return gzip.open(path, "rt", encoding="utf-8") if zipped else path.open(encoding="utf-8")


def _check_start(path: Path, handle: TextIOBase) -> None:
    for number, line in enumerate(handle, start=1):
        if line.strip():
            if not line.startswith(">"):
                raise ValueError(f"{path}: line {number} is not a FASTA header: {line.strip()[:40]!r}")
            handle.seek(0)
            return
    raise ValueError(f"{path}: empty, no FASTA records in it")
