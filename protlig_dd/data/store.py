"""The HDF5 sequence store: flat tokens, offsets, ids and splits.

Layout, format version 1 (`n` sequences, `total` tokens, every dataset contiguous so that it can be memory-mapped):

    tokens      (total,) uint8     every sequence as `<bos> residues <eos>`
    offsets     (n + 1,) int64     sequence i is tokens[offsets[i]:offsets[i + 1]]
    id_bytes    (id_total,) uint8  the ids' UTF-8 bytes, end to end
    id_offsets  (n + 1,) int64
    split       (n,) uint8         index into SPLITS
    token_counts (3, 30) int64     how often each token id occurs in each split
    attributes  format_version, alphabet, fingerprint (SHA-256 of the datasets), source (JSON)
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, BinaryIO, SupportsIndex

import h5py
import numpy as np

from protlig_dd.data.fasta import FastaRecord
from protlig_dd.tokenizer import BOS, EOS, LETTERS, VOCAB_SIZE, ProteinTokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
COPY_BYTES = 64 << 20


class SequenceStore:
    """Read access to a store. Only the path is pickled; each process maps the file when it first reads.

    `store[i]` is a read-only uint8 array `<bos> residues <eos>`; `store.lengths` counts residues.

    Raises:
        ValueError: a missing file, one that is not a store, or another format version; named.
        IndexError: a row outside the store.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: {'a folder, not a file' if self.path.is_dir() else 'no such data file'}")
        try:
            file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            raise ValueError(f"{self.path}: not a readable HDF5 file ({error})") from error
        with file:
            self.attrs: dict[str, Any] = dict(file.attrs)
            version = self.attrs.get("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"{self.path}: store format {version}, this version reads {FORMAT_VERSION}")
            if self.attrs["alphabet"] != LETTERS:
                raise ValueError(f"{self.path}: alphabet {self.attrs['alphabet']!r}, this version uses {LETTERS!r}")
            self.token_counts: np.ndarray = file["token_counts"][:]
            self._places = {
                name: (dataset.id.get_offset(), dataset.dtype, dataset.shape)
                for name, dataset in file.items()
                if dataset.size
            }

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: SupportsIndex) -> np.ndarray:
        row = index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        return self._tokens[self._offsets[row] : self._offsets[row + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64, residues of each sequence."""
        return np.diff(self._offsets) - 2

    def id(self, row: SupportsIndex) -> str:
        row = index(row)
        start, end = self._id_offsets[row], self._id_offsets[row + 1]
        return self._id_bytes[start:end].tobytes().decode()

    def split(self, name: str) -> np.ndarray:
        """Rows of one split, ascending."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; the splits are {', '.join(SPLITS)}")
        return np.flatnonzero(self._map("split") == SPLITS.index(name))

    @property
    def fingerprint(self) -> str:
        return str(self.attrs["fingerprint"])

    def _map(self, name: str) -> np.ndarray:
        offset, dtype, shape = self._places[name]
        return np.memmap(self.path, mode="r", dtype=dtype, offset=offset, shape=shape)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self._map("tokens")

    @cached_property
    def _offsets(self) -> np.ndarray:
        return self._map("offsets")

    @cached_property
    def _id_bytes(self) -> np.ndarray:
        return self._map("id_bytes")

    @cached_property
    def _id_offsets(self) -> np.ndarray:
        return self._map("id_offsets")


def write_store(
    path: Path | str, records: Iterable[tuple[FastaRecord, str]], source: dict[str, Any]
) -> "SequenceStore":
    """Stream (record, split name) pairs into a new store.

    Tokens and ids go to a spool beside the output and are then copied into the HDF5 file, whose contiguous datasets
    cannot grow. The file appears under its name only when it is complete and synced.

    Args:
        source: what the store was made from; kept as JSON in the attribute `source`.

    Raises:
        ValueError: no records, a repeated id, an illegal residue, an unknown split, or an output that exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; give another output or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = ProteinTokenizer()
    offsets, id_offsets, splits = array("q", [0]), array("q", [0]), array("B")
    token_counts = np.zeros((len(SPLITS), VOCAB_SIZE), dtype=np.int64)
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        spool = Path(folder)
        with (spool / "tokens").open("wb") as tokens, (spool / "ids").open("wb") as ids:
            for record, split in records:
                if split not in SPLITS:
                    raise ValueError(f"{record.name}: no split {split!r}; the splits are {', '.join(SPLITS)}")
                id_ = record.id.encode()
                digest = hashlib.blake2b(id_, digest_size=16).digest()
                if digest in seen:
                    raise ValueError(f"{record.name}: this id occurs twice")
                seen.add(digest)
                encoded = tokenizer.encode(record.sequence, record.name)
                tokens.write(encoded.tobytes())
                ids.write(id_)
                offsets.append(offsets[-1] + len(encoded))
                id_offsets.append(id_offsets[-1] + len(id_))
                splits.append(SPLITS.index(split))
                token_counts[splits[-1]] += np.bincount(encoded, minlength=VOCAB_SIZE)
        if not splits:
            raise ValueError(f"{path}: no sequences to write")
        finished = spool / "store.h5"
        digest_all = hashlib.sha256()
        with h5py.File(finished, "w") as file:
            for name, values in (
                ("offsets", np.frombuffer(offsets, np.int64)),
                ("id_offsets", np.frombuffer(id_offsets, np.int64)),
                ("split", np.frombuffer(splits, np.uint8)),
                ("token_counts", token_counts),
            ):
                file.create_dataset(name, data=values)
                digest_all.update(values.tobytes())
            for name, spooled in (("tokens", spool / "tokens"), ("id_bytes", spool / "ids")):
                with spooled.open("rb") as handle:
                    _copy_bytes(handle, file, name, digest_all)
            file.attrs["format_version"] = FORMAT_VERSION
            file.attrs["alphabet"] = LETTERS
            file.attrs["fingerprint"] = digest_all.hexdigest()
            file.attrs["source"] = json.dumps(source, sort_keys=True)
        with finished.open("rb") as handle:
            os.fsync(handle.fileno())
        finished.replace(path)
    return SequenceStore(path)


def _copy_bytes(handle: BinaryIO, file: h5py.File, name: str, digest: Any) -> None:
    """Copy a spooled byte file into a contiguous uint8 dataset, and into the digest."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    dataset = file.create_dataset(name, shape=(size,), dtype=np.uint8)
    for start in range(0, size, COPY_BYTES):
        block = handle.read(COPY_BYTES)
        dataset[start : start + len(block)] = np.frombuffer(block, np.uint8)
        digest.update(block)


def crop(tokens: np.ndarray, start: int, max_len: int) -> np.ndarray:
    """Residues start .. start + max_len - 1 of `<bos> residues <eos>`; the crop lacks the end that was cut.

    Args:
        tokens: (residues + 2,) one stored sequence.
        start: first residue kept, 0 <= start <= residues - max_len.
        max_len: residues kept.
    """
    residues = len(tokens) - 2
    if tokens[0] != BOS or tokens[-1] != EOS:
        raise ValueError(f"crop wants <bos> residues <eos>, got ends {tokens[0]} and {tokens[-1]}")
    if not 0 <= start <= residues - max_len:
        raise ValueError(f"cannot crop {max_len} residues at {start} from {residues}")
    first = 0 if start == 0 else start + 1
    last = residues + 2 if start + max_len == residues else start + max_len + 1
    return tokens[first:last]
