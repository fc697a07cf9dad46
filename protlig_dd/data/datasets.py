"""Contiguous HDF5 datasets with checksums, which processes map into memory instead of reading them through HDF5.

Each dataset has an attribute `xxh3`, the 128-bit XXH3 of its bytes.
"""

import contextlib
import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import xxhash

COPY_BYTES = 4 << 20


class Extent(NamedTuple):
    """Where the values of a dataset are in the file."""

    offset: int
    """Position of the first byte."""
    size: int
    """Number of values."""
    dtype: np.dtype[Any]


def read_extents(file: h5py.File, path: Path, columns: Mapping[str, Any]) -> tuple[dict[str, Extent], dict[str, str]]:
    """Return the extent and the checksum of each dataset.

    Args:
        columns: {name: dtype} of the expected datasets.

    Raises:
        KeyError: a dataset or its checksum is missing.
        ValueError: a dataset has another dtype, is not contiguous, or is longer than the file. The message names the
            file and the dataset.
    """
    file_bytes = path.stat().st_size
    extents, checksums = {}, {}
    for name, dtype in columns.items():
        dataset = file[name]
        offset = dataset.id.get_offset()
        if dataset.dtype != dtype or dataset.ndim != 1 or offset is None or offset + dataset.nbytes > file_bytes:
            raise ValueError(f"{path}: {name} is not a contiguous {np.dtype(dtype)} array of {dataset.size} values")
        extents[name] = Extent(offset, dataset.size, np.dtype(dtype))
        checksums[name] = dataset.attrs["xxh3"].decode()
    return extents, checksums


def map_extent(path: Path, extent: Extent, *, at_random: bool = False) -> np.ndarray:
    """Map the values of a dataset, (size,).

    Args:
        at_random: whether the values will be read in random order. The system then reads only needed pages, not their
            neighbours.
    """
    if not extent.size:  # an empty region cannot be mapped
        return np.empty(0, extent.dtype)
    mapped = np.memmap(path, mode="r", dtype=extent.dtype, offset=extent.offset, shape=(extent.size,))
    if at_random and hasattr(mmap, "MADV_RANDOM"):
        with contextlib.suppress(OSError):  # harmless: madvise only avoids needless reads from the disk
            mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return np.asarray(mapped)  # slicing a plain array takes a tenth of the time of slicing a memmap


def check_datasets(
    path: Path,
    extents: Mapping[str, Extent],
    checksums: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Read every dataset and compare it with its checksum.

    Raises:
        ValueError: a dataset does not match its checksum. The message names the file and the dataset.
    """
    for name, checksum in checksums.items():
        digest, column = xxhash.xxh3_128(), map_extent(path, extents[name]).view(np.uint8)
        for start in range(0, len(column), COPY_BYTES):
            block = column[start : start + COPY_BYTES]
            digest.update(block.data)
            on_bytes(len(block))
        if digest.hexdigest() != checksum:
            raise ValueError(f"{path}: {name} is damaged: checksum {digest.hexdigest()}, expected {checksum}")


def write_dataset(file: h5py.File, name: str, dtype: Any, size: int, blocks: Iterable[np.ndarray]) -> str:
    """Write a dataset of consecutive blocks of values, and return its checksum.

    Raises:
        ValueError: the blocks do not have `size` values in all.
    """
    dataset = file.create_dataset(name, shape=(size,), dtype=dtype)
    digest, start = xxhash.xxh3_128(), 0
    for block in blocks:
        dataset[start : start + len(block)] = block
        digest.update(block.data)
        start += len(block)
    if start != size:
        raise ValueError(f"{file.filename}: {start} values of {name}, expected {size}")
    # np.bytes_ has a fixed length; the checksums of HDF5's metadata do not cover variable-length text
    dataset.attrs["xxh3"] = np.bytes_(digest.hexdigest())
    return digest.hexdigest()
