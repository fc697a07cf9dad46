"""Parse, encode, hash and filter records. Workers import this module, so it imports no library that starts slowly."""

import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
import xxhash

from protlig_dd.data.encode import LOWER, EncodedBlock, encode_block
from protlig_dd.data.fasta import FastaText, parse_text
from protlig_dd.data.prepare.filters import Filters, failures

# The columns of the spool. `tokens` has token ids; LOWER is added to the ids of lower-case letters (see encode.py).
COLUMNS = {
    "tokens": np.uint8,
    "headers": np.uint8,
    "length": np.int32,
    "header_length": np.int32,
    "id_hash": np.uint64,
    "hash_high": np.uint64,
    "hash_low": np.uint64,
    "file": np.int32,
    "record": np.int32,
    "split": np.uint8,
    # these three columns have values only for the rows that have a lower-case letter (see data/case.py)
    "case_row": np.int64,
    "case_letters": np.int32,
    "case_hash": np.uint64,
}


class Batch(NamedTuple):
    """Consecutive records of one file."""

    file: int
    """Index of the file in the list of inputs."""
    split: int
    """Index into SPLITS; 0 if the sequences are split by hash."""
    texts: list[FastaText]


class Parsed(NamedTuple):
    """What the spool keeps of a batch, and the batch's counts for the manifest."""

    rows: int
    columns: dict[str, np.ndarray]
    """The values of COLUMNS. `case_row` counts from the first row of the batch."""
    counts: dict[str, int]


def parse(filters: Filters, taxa: np.ndarray | None, batch: Batch) -> Parsed:
    """Parse and filter the records of a batch.

    Raises:
        ValueError: an error of parse_text or encode_block.
    """
    parts = [_parse(filters, taxa, batch, text) for text in batch.texts]
    for part, first in zip(parts, itertools.accumulate((part.rows for part in parts), initial=0), strict=False):
        part.columns["case_row"] += first
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in COLUMNS}
    return Parsed(sum(part.rows for part in parts), columns, counts)


def _parse(filters: Filters, taxa: np.ndarray | None, batch: Batch, text: FastaText) -> Parsed:
    block = parse_text(text)
    encoded = encode_block(block)
    counts = {"records": len(block.ids), "lower_case": encoded.lower_case, "nucleotides": encoded.nucleotides}
    keep = np.ones(len(block.ids), dtype=bool)
    for name, failed in failures(block, encoded, filters, taxa):
        counts[name] = int((keep & failed).sum())
        keep &= ~failed
    encoded = encoded.select(keep)
    headers = block.headers if keep.all() else list(itertools.compress(block.headers, keep.tolist()))
    digests = encoded.sequence_hashes()
    tokens, case = tokens_and_case(encoded)
    columns = {
        "tokens": tokens,
        "headers": np.frombuffer(b"".join(headers), np.uint8),
        "length": encoded.lengths,
        "header_length": np.array([len(header) for header in headers]),
        "id_hash": encoded.id_hashes,
        "hash_high": digests[:, 0],
        "hash_low": digests[:, 1],
        "file": np.full(len(headers), batch.file),
        "record": block.first_record + np.flatnonzero(keep),
        "split": np.full(len(headers), batch.split),
    } | case
    return Parsed(
        len(headers), {name: column.astype(COLUMNS[name], copy=False) for name, column in columns.items()}, counts
    )


def tokens_and_case(encoded: EncodedBlock) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the tokens, with LOWER added for lower-case letters, and the columns `case_*` of the spool.

    The columns describe the records that have a lower-case letter. `case_row` counts from the first record.
    """
    rows, letters, hashes = np.empty(0, np.int64), np.empty(0, np.int64), []
    tokens, is_lower = encoded.tokens, encoded.is_lower
    if is_lower is not None and is_lower.any():  # else the filters have dropped all records with a lower-case letter
        ends = np.cumsum(encoded.lengths)
        starts = ends - encoded.lengths
        letters = np.add.reduceat(is_lower, starts, dtype=np.int64)
        rows = np.flatnonzero(letters)
        letters = letters[rows]
        bounds = zip(starts[rows].tolist(), ends[rows].tolist(), strict=True)
        hashes = [xxhash.xxh3_64_intdigest(is_lower[start:end].data) for start, end in bounds]
        tokens = tokens | (is_lower * np.uint8(LOWER))
    return tokens, {"case_row": rows, "case_letters": letters, "case_hash": np.array(hashes, dtype=np.uint64)}
