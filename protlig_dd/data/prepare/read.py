"""Parse and filter FASTA, and append the records to the spool."""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from protlig_dd.data.encode import encode_block
from protlig_dd.data.fasta import FastaFile
from protlig_dd.data.prepare.case import spool_case
from protlig_dd.data.prepare.filters import Filters, failures
from protlig_dd.data.prepare.spool import Spool


class Progress(Protocol):
    """A progress bar."""

    def __enter__(self) -> "Progress": ...
    def __exit__(self, *exception: object) -> None: ...
    def advance(self, count: int) -> None: ...


class NoProgress:
    """A progress bar that shows nothing."""

    def __init__(self, description: str, total: int | None) -> None: ...
    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(self, *exception: object) -> None: ...
    def advance(self, count: int) -> None: ...


def read_inputs(
    files: Sequence[FastaFile],
    codes: Sequence[int | None],
    spool: Spool,
    filters: Filters,
    taxa: np.ndarray | None,
) -> dict[str, Any]:
    """Parse and filter every input, and append the records to the spool. Return the counts for the manifest.

    Args:
        codes: the split of each file as an index into SPLITS; None if the sequences are split by hash.
        taxa: the TaxIDs to keep, ascending; None keeps all.
    """
    dropped = dict.fromkeys(("min_length", "max_length", "max_unknown", "fragments", "taxa", "duplicates"), 0)
    records = lower_case = nucleotides = 0
    for number, (file, code) in enumerate(zip(files, codes, strict=True)):
        for block in file.blocks():
            encoded = encode_block(block)
            records += len(block.ids)
            lower_case += encoded.lower_case
            nucleotides += encoded.nucleotides
            keep = np.ones(len(block.ids), dtype=bool)
            for name, failed in failures(block, encoded, filters, taxa):
                dropped[name] += int((keep & failed).sum())
                keep &= ~failed
            encoded = encoded.select(keep)
            headers = block.headers if keep.all() else list(itertools.compress(block.headers, keep.tolist()))
            digests = encoded.sequence_hashes()
            tokens = encoded.tokens if encoded.is_lower is None else spool_case(spool, encoded)
            spool.append(
                len(headers),
                tokens=tokens,
                headers=b"".join(headers),
                length=encoded.lengths,
                header_length=np.array([len(header) for header in headers], np.int32),
                id_hash=encoded.id_hashes,
                hash_high=digests[:, 0],
                hash_low=digests[:, 1],
                file=np.full(len(headers), number),
                record=block.first_record + np.flatnonzero(keep),
                split=np.full(len(headers), code or 0),
            )
    return {
        "records": records,
        "lower_case_letters": lower_case,
        "nucleotide_like": nucleotides,
        "dropped": dropped,
    }
