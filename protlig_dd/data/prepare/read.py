"""Read FASTA, let workers parse and filter it, and append the records to the spool."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from protlig_dd.data.fasta import FastaFile
from protlig_dd.data.prepare.filters import FILTERS, Filters
from protlig_dd.data.prepare.parse import Batch, parse
from protlig_dd.data.prepare.spool import Spool
from protlig_dd.system.workers import Background, Workers

BATCH_BYTES = 2 << 20  # so large that sending a batch takes little time, and so small that it stays in the caches


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
    workers: Workers,
) -> dict[str, Any]:
    """Parse and filter every input, and append the records to the spool. Return the counts for the manifest.

    Args:
        codes: the split of each file as an index into SPLITS; None if the sequences are split by hash.
        taxa: the TaxIDs to keep, ascending; None keeps all.
    """
    counts: Counter[str] = Counter()
    # this process can keep two workers busy without threads, which would take processor time from the workers
    threads = workers.number > 2
    batches = read_batches(files, codes, hash_in_thread=threads)
    with Background(threads) as writer:
        for parsed in workers.map(partial(parse, filters, taxa), batches):
            writer.call(spool.append, parsed.rows, parsed.columns)
            counts.update(parsed.counts)
    return {
        "records": counts["records"],
        "lower_case_letters": counts["lower_case"],
        "nucleotide_like": counts["nucleotides"],
        "dropped": {name: counts[name] for name in FILTERS},
    }


def read_batches(
    files: Sequence[FastaFile], codes: Sequence[int | None], *, hash_in_thread: bool = False
) -> Iterator[Batch]:
    """Read the files, and yield their texts in batches of BATCH_BYTES or a little more.

    Raises:
        ValueError: an error of FastaFile. All texts before the error have been yielded.
    """
    for number, (file, code) in enumerate(zip(files, codes, strict=True)):
        batch, error = Batch(number, code or 0, []), None
        try:
            for text in file.texts(hash_in_thread=hash_in_thread):
                batch.texts.append(text)
                if sum(len(text.text) for text in batch.texts) >= BATCH_BYTES:
                    yield batch
                    batch = Batch(number, code or 0, [])
        except ValueError as raised:
            error = raised
        if batch.texts:
            yield batch
        if error is not None:
            raise error
