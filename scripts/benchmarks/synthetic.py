"""Write large stores, to measure planning and reading: one without letters, and one that repeats proteins."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from protlig_dd.data.datasets import create_dataset
from protlig_dd.data.prepare.write import write_columns
from protlig_dd.data.store import COLUMNS, FORMAT_VERSION, SPLITS, SequenceStore
from protlig_dd.tokenizer import LETTERS, VOCAB_SIZE


def write_store_of_lengths(path: Path, lengths: np.ndarray, sequences: int) -> SequenceStore:
    """Write a store of `sequences` training sequences without letters, whose lengths repeat `lengths`.

    The offsets are written. The other datasets have their size in the file, but take no space on disk: their bytes are
    never written and read as 0. So rows, lengths and packs of row numbers are valid, but the tokens are not.
    """
    repeats, rest = divmod(sequences, len(lengths))
    total = repeats * int(lengths.sum(dtype=np.int64)) + int(lengths[:rest].sum(dtype=np.int64)) + 2 * sequences
    sizes = {
        "tokens": total,
        "offsets": sequences + 1,
        "headers": sequences,
        "header_offsets": sequences + 1,
        "split": sequences,  # zeros: every sequence is in the training split
        "token_counts": len(SPLITS) * VOCAB_SIZE,
    }
    with h5py.File(path, "w", libver=("v108", "v108"), locking=False) as file:
        for name, size in sizes.items():
            create_dataset(file, name, COLUMNS[name], size).attrs["xxh3"] = np.bytes_("0" * 32)
        offsets, start = file["offsets"], 0
        for block in offset_blocks(lengths, sequences):
            offsets[start : start + len(block)] = block
            start += len(block)
        file["manifest"] = np.frombuffer(b"{}", np.uint8)
        file["manifest"].attrs["xxh3"] = np.bytes_("0" * 32)
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["alphabet"] = np.bytes_(LETTERS)
        file.attrs["fingerprint"] = np.bytes_(f"{sequences:032d}")
    return SequenceStore(path)


def offset_blocks(lengths: np.ndarray, sequences: int) -> Iterator[np.ndarray]:
    """Yield consecutive blocks of the (sequences + 1,) offsets."""
    ends, start, done = np.cumsum(lengths.astype(np.int64) + 2), 0, 0
    yield np.zeros(1, np.int64)
    while done < sequences:
        block = start + ends[: sequences - done]
        yield block
        start, done = int(block[-1]), done + len(block)


def repeat_store(store: SequenceStore, path: Path, times: int) -> SequenceStore:
    """Write a store that has the sequences of another store several times, all in the training split."""
    n, residues = times * len(store), store.lengths[:]
    columns = {
        "tokens": (times * len(store.tokens), [store.tokens] * times),
        "offsets": (n + 1, offset_blocks(residues, n)),
        "headers": (1, [np.zeros(1, np.uint8)]),  # all headers are empty, but HDF5 gives no place to 0 bytes
        "header_offsets": (n + 1, [np.zeros(n + 1, np.int64)]),
        "split": (n, [np.zeros(n, np.uint8)]),
        "token_counts": (store.token_counts.size, [times * store.token_counts.reshape(-1)]),
    }
    write_columns(path, columns, dict)
    return SequenceStore(path)
