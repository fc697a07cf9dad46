"""The HDF5 sequence store: tokens, headers and splits of many sequences.

Layout of format version 2, for n sequences. Every dataset is contiguous, so that it can be memory-mapped.

    tokens          (total,) uint8         every sequence as `<bos> residues <eos>`
    offsets         (n + 1,) int64         sequence i is tokens[offsets[i]:offsets[i + 1]]
    headers         (header_total,) uint8  UTF-8 bytes of the FASTA headers without `>`, concatenated
    header_offsets  (n + 1,) int64         header i is headers[header_offsets[i]:header_offsets[i + 1]]
    split           (n,) uint8             index into SPLITS
    token_counts    (90,) int64            how often each token id occurs in each split: a (3, 30) array of
                                           splits and token ids, flattened row by row
    manifest        (k,) uint8             JSON text of k bytes: inputs, options, counts
    case_*          the case of letters; only if a record has both upper-case and lower-case letters (see case.py)
    attributes      format_version, alphabet, fingerprint; each dataset has an attribute `xxh3`, the 128-bit XXH3 of
                    its bytes
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import h5py
import numpy as np
import xxhash

from protlig_dd.data.case import CASE_COLUMNS, CaseIndex, Context, check_has_case
from protlig_dd.data.datasets import check_datasets, map_extent, read_extents
from protlig_dd.data.fasta import Header, id_of, parse_header
from protlig_dd.data.lengths import Lengths
from protlig_dd.tokenizer import BOS, EOS, LETTERS, VOCAB_SIZE

FORMAT_VERSION = 2
SPLITS = ("train", "validation", "test")
ROWS_AT_ONCE = 4 << 20
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
HOW_TO_BUILD = "build one from FASTA with `python -m protlig_dd.prepare input=... output=...`"
NOT_A_STORE = (OSError, RuntimeError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError)
COLUMNS = {
    "tokens": np.uint8,
    "offsets": np.int64,
    "headers": np.uint8,
    "header_offsets": np.int64,
    "split": np.uint8,
    "token_counts": np.int64,
    "manifest": np.uint8,
    **CASE_COLUMNS,
}


class SequenceStore:
    """Read access to a store. Only the path is pickled; each process maps the file itself, at its first read.

    `store[i]` is a read-only uint8 array `<bos> residues <eos>`. `store.lengths` are numbers of residues.

    Raises:
        ValueError: the file is missing, is not a store, is incomplete, or has another format version. The message
            names the file.
        IndexError: a row outside the store.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            problem = "a folder, not a file" if self.path.is_dir() else f"no such data file; {HOW_TO_BUILD}"
            raise ValueError(f"{self.path}: {problem}")
        with self.path.open("rb") as start:
            if start.read(len(HDF5_MAGIC)) != HDF5_MAGIC:
                raise ValueError(f"{self.path}: not a store (not an HDF5 file); {HOW_TO_BUILD}")
        try:
            with h5py.File(self.path, "r", locking=False) as file:  # locks fail on some network filesystems
                self._read_layout(file)
        except NOT_A_STORE as error:
            raise ValueError(f"{self.path}: not a readable store ({error})") from error

    def _read_layout(self, file: h5py.File) -> None:
        attrs = dict(file.attrs)
        version = attrs.get("format_version")
        if "members_version" in attrs:
            raise ValueError(f"{self.path}: a file of members (data.members), not a store; {HOW_TO_BUILD}")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} has format {version}; this version of protlig_dd reads only format {FORMAT_VERSION}"
                + ("; build it again from FASTA" if version is not None and version < FORMAT_VERSION else "")
            )
        alphabet, self.fingerprint = (attrs[name].decode() for name in ("alphabet", "fingerprint"))
        if alphabet != LETTERS:
            raise ValueError(f"{self.path}: its alphabet is {alphabet!r}, but this version reads only {LETTERS!r}")
        self.has_case = any(name in file for name in CASE_COLUMNS)  # whether the store keeps the case of its residues
        columns = {name: dtype for name, dtype in COLUMNS.items() if self.has_case or name not in CASE_COLUMNS}
        self._extents, self.checksums = read_extents(file, self.path, columns)
        n = self._extents["split"].size
        rows_of = {"offsets": n, "header_offsets": n}
        if self.has_case:
            rows_of["case_offsets"] = self._extents["case_rows"].size
        for name, rows in rows_of.items():
            if (size := self._extents[name].size) != rows + 1:
                raise ValueError(f"{self.path}: {size} values of {name} for {rows} rows, expected {rows + 1}")
        self.token_counts: np.ndarray = file["token_counts"][:].reshape(len(SPLITS), VOCAB_SIZE)
        self.manifest: dict[str, Any] = json.loads(file["manifest"][:].tobytes())
        self._length = n

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: SupportsIndex) -> np.ndarray:
        row = self._row(row)
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Lengths:
        """Number of residues of each sequence."""
        return Lengths([self.offsets])

    def header(self, row: SupportsIndex) -> str:
        """Return the FASTA header of a row, without `>`."""
        row = self._row(row)
        return self._headers[self._header_offsets[row] : self._header_offsets[row + 1]].tobytes().decode()

    def headers(self, first: int, end: int) -> tuple[bytes, list[int]]:
        """Return the joined headers of the rows first .. end - 1, in UTF-8, and the bounds of each header in them."""
        bounds = self._header_offsets[first : end + 1]
        return self._headers[bounds[0] : bounds[-1]].tobytes(), (bounds - bounds[0]).tolist()

    def fields(self, row: SupportsIndex) -> Header:
        """Return the fields of a row's header: id, description, n, tax, tax_id, rep_id."""
        return parse_header(self.header(row))

    def id(self, row: SupportsIndex) -> str:
        return id_of(self.header(row))

    def split(self, name: str) -> np.ndarray:
        """Return the row numbers of one split, ascending, as a 1-D int64 array."""
        return np.concatenate(list(self.split_blocks(name)))

    def split_blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the rows of one split in blocks. This takes less memory than `split`."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}; choose from {', '.join(SPLITS)}")
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield self.split_between(name, start, start + ROWS_AT_ONCE)

    def split_between(self, name: str, first: int, end: int) -> np.ndarray:
        """Return the rows of one split in first .. end - 1."""
        return first + np.flatnonzero(self._splits[first:end] == SPLITS.index(name))

    def lower_case(self, row: SupportsIndex) -> np.ndarray | None:
        """Return which residues of a row were lower-case letters, (residues,) bool.

        The result is None if no residue was a lower-case letter, or if the store does not keep the case.
        """
        row = self._row(row)
        return self._case.lower_case(row, int(self.offsets[row + 1] - self.offsets[row]) - 2) if self.has_case else None

    def verify(self, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Read every dataset and compare it with its checksum.

        Raises:
            ValueError: a dataset does not match its checksum, or the checksums do not match the fingerprint.
        """
        check_datasets(self.path, self._extents, self.checksums, on_bytes)
        if fingerprint_of(self.checksums) != self.fingerprint:
            raise ValueError(f"{self.path}: the fingerprint does not match the checksums")

    @property
    def nbytes(self) -> int:
        """Total size of all datasets, in bytes."""
        return sum(extent.size * extent.dtype.itemsize for extent in self._extents.values())

    def _row(self, row: SupportsIndex) -> int:
        row = index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: no row {row}; the store has {len(self)} rows")
        return row

    def _map(self, name: str, *, at_random: bool = False) -> np.ndarray:
        return map_extent(self.path, self._extents[name], at_random=at_random)

    def tokens_at_random(self) -> np.ndarray:
        """Map `tokens` again, for random access: the system then reads only needed pages, not their neighbours."""
        return self._map("tokens", at_random=True)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of all sequences, (total,) uint8, memory-mapped."""
        return self._map("tokens")

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n + 1,) int64, memory-mapped."""
        return self._map("offsets")

    @cached_property
    def _splits(self) -> np.ndarray:
        return self._map("split")

    @property
    def case_counts(self) -> np.ndarray:
        """(3, 30) int64: how often each token id occurs in lower case in each split. Only if `has_case` is True."""
        return self._map("case_counts").reshape(len(SPLITS), VOCAB_SIZE)

    @cached_property
    def _case(self) -> CaseIndex:
        rows, offsets, bits = (self._map(name) for name in ("case_rows", "case_offsets", "case_bits"))
        return CaseIndex(rows, offsets, bits, self.path)

    @cached_property
    def _headers(self) -> np.ndarray:
        return self._map("headers")

    @cached_property
    def _header_offsets(self) -> np.ndarray:
        return self._map("header_offsets")


class StoreGroup:
    """One or several stores with joint row numbers: the rows of the first store, then those of the second, and so on.

    Args:
        context: `lower` if lower-case letters are context, `upper` if upper-case letters are, or `none` (see case.py).

    Raises:
        ValueError: two stores have the same contents, or `context` is not `none` and a store does not keep the case of
            its letters.
    """

    def __init__(self, stores: Sequence[SequenceStore], context: Context = "none") -> None:
        self.stores, self.context = list(stores), context
        for i, store in enumerate(self.stores):
            if context != "none":
                check_has_case(store.path, store.has_case, context)
            for earlier in self.stores[:i]:
                if store.fingerprint == earlier.fingerprint:
                    raise ValueError(f"{store.path} has the same contents as {earlier.path}; give each store once")
        self.bases = np.cumsum([0, *(len(store) for store in self.stores[:-1])])
        self.name = ", ".join(str(store.path) for store in self.stores)
        fingerprints = [store.fingerprint for store in self.stores]
        self.fingerprint = (
            fingerprints[0] if len(fingerprints) == 1 else xxhash.xxh3_128_hexdigest(" ".join(fingerprints).encode())
        )
        self.token_counts = np.sum([store.token_counts for store in self.stores], axis=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stores, self.context)

    def __len__(self) -> int:
        return int(self.bases[-1]) + len(self.stores[-1])

    @property
    def row_type(self) -> type[np.integer]:
        """The integer type of row numbers: uint32 if it is large enough, else int64."""
        return np.uint32 if len(self) < 2**32 else np.int64

    @property
    def lengths(self) -> Lengths:
        """Number of residues of each sequence."""
        return Lengths([store.offsets for store in self.stores])

    def split(self, name: str) -> np.ndarray:
        """Return the (n,) rows of one split, ascending, as `row_type`. `SplitRows` takes less memory."""
        return np.concatenate(list(self.split_blocks(name)))

    def split_blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the rows of one split in blocks, as `row_type`."""
        for base, store in zip(self.bases, self.stores, strict=True):
            yield from ((rows + base).astype(self.row_type) for rows in store.split_blocks(name))

    def id(self, row: SupportsIndex) -> str:
        store, store_row = self.find(row)
        return store.id(store_row)

    def find(self, row: SupportsIndex) -> tuple[SequenceStore, int]:
        """Return the store that contains a row, and the row's number in it."""
        number = int(np.searchsorted(self.bases, index(row), side="right")) - 1
        return self.stores[number], index(row) - int(self.bases[number])

    def locate(
        self, rows: np.ndarray, tokens: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return three (n,) arrays: each row's store number, offset of the first token, and number of residues.

        The offset is the index in the tokens of the row's store.

        Args:
            tokens: the token array of each store, if the caller has mapped them separately; None uses `store.tokens`.

        Raises:
            ValueError: the store is damaged: the offsets of a row are invalid, or its tokens do not begin with <bos> or
                do not end with <eos>. The message names the store and the row.
        """
        numbers = np.searchsorted(self.bases, rows, side="right") - 1
        begins, residues = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for number in np.unique(numbers).tolist():
            store, in_store = self.stores[number], numbers == number
            flat = store.tokens if tokens is None else tokens[number]
            store_rows = rows[in_store] - self.bases[number]
            start, end = store.offsets[store_rows], store.offsets[store_rows + 1]
            valid = (start >= 0) & (end - start > 2) & (end <= len(flat))
            if valid.all():
                valid = (flat[start] == BOS) & (flat[end - 1] == EOS)
            if not valid.all():
                row = int(store_rows[np.argmin(valid)])
                raise ValueError(
                    f"{store.path}: row {row} is damaged; "
                    f"check the whole store with `python -m protlig_dd.prepare inspect={store.path}`"
                )
            begins[in_store], residues[in_store] = start, end - start - 2
        return numbers, begins, residues


def fingerprint_of(checksums: dict[str, str]) -> str:
    """Return a hash of the checksums of all datasets except the manifest. It identifies the contents of a store."""
    parts = [f"{name}={checksums[name]}" for name in COLUMNS if name != "manifest" and name in checksums]
    return xxhash.xxh3_128_hexdigest(" ".join(parts).encode())
