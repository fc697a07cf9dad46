"""Contiguous HDF5 datasets with checksums, which processes map into memory instead of reading them through HDF5.

Each dataset has an attribute `xxh3`, the 128-bit XXH3 of its bytes.
"""

import contextlib
import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from functools import cache
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


def write_datasets(
    path: Path,
    columns: Mapping[str, tuple[Any, int, Iterable[np.ndarray]]],
    finish: Callable[[h5py.File, dict[str, str]], None],
    *,
    present: str | None = None,
) -> None:
    """Write an HDF5 file of contiguous datasets.

    HDF5 writes only its own metadata, into a second file, `<path>.layout`. There the datasets have places, but no
    values: they are holes of the file. The values are written to the same places of `path`, and at the end the metadata
    are copied between them. So `path` may already have the values of the first dataset, however many they are.

    Args:
        columns: {name: (dtype, number of values, consecutive blocks of values)}, in the order of writing.
        finish: called with the HDF5 file and {name: checksum} after the values have been written. It adds the
            attributes, and datasets that depend on the values.
        present: the first dataset, if `path` already has its values, from `first_offset()` on. Its blocks are then only
            read, for the checksum.

    Raises:
        ValueError: a dataset has no values, because HDF5 gives no place to 0 bytes; or its blocks have another dtype,
            or more or fewer values than its number.
    """
    layout, checksums = path.with_name(f"{path.name}.layout"), {}
    # since format 1.8, HDF5 checksums its own metadata
    with (
        h5py.File(layout, "w", libver=("v108", "v108"), locking=False) as file,
        path.open("wb" if present is None else "r+b") as target,
    ):
        datasets = {name: create_dataset(file, name, dtype, size) for name, (dtype, size, _) in columns.items()}
        for name, (dtype, size, blocks) in columns.items():
            digest, count, offset = xxhash.xxh3_128(), 0, datasets[name].id.get_offset()
            if offset is None or (name == present and offset != first_offset()):
                raise ValueError(f"{path}: HDF5 places {name}, which has {size} values, at {offset}")
            target.seek(offset)
            for block in blocks:
                if block.dtype != dtype:
                    raise ValueError(f"{path}: values of {name} are {block.dtype}, expected {np.dtype(dtype)}")
                if name != present:
                    target.write(block.data)
                digest.update(block.data)
                count += len(block)
            if count != size:
                raise ValueError(f"{path}: {count} values of {name}, expected {size}")
            checksums[name] = _set_checksum(datasets[name], digest.hexdigest())
        places = sorted((dataset.id.get_offset(), dataset.nbytes) for dataset in datasets.values())
        finish(file, checksums)
    with layout.open("rb") as source, path.open("r+b") as target:
        begin, end = 0, layout.stat().st_size
        for offset, size in (*places, (end, 0)):
            source.seek(begin)
            target.seek(begin)
            target.write(source.read(offset - begin))
            begin = offset + size
        target.truncate(end)
    layout.unlink()


def write_manifest(file: h5py.File, manifest: Mapping[str, Any]) -> str:
    """Add the dataset `manifest`, which has the JSON text of a dictionary, and return its checksum."""
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    dataset = file.create_dataset("manifest", data=text)
    return _set_checksum(dataset, xxhash.xxh3_128_hexdigest(text.data))


@cache
def first_offset() -> int:
    """Return the position of the first dataset of a file that `write_datasets` writes."""
    with h5py.File("probe", "w", libver=("v108", "v108"), driver="core", backing_store=False) as file:
        return int(create_dataset(file, "first", np.uint8, 1).id.get_offset())


def create_dataset(file: h5py.File, name: str, dtype: Any, size: int) -> h5py.Dataset:
    """Create a dataset that has a place in the file at once, and is not filled."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same values give the same bytes at any time
    kind, space = h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple((size,))
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=properties))


def _set_checksum(dataset: h5py.Dataset, checksum: str) -> str:
    # np.bytes_ has a fixed length; the checksums of HDF5's metadata do not cover variable-length text
    dataset.attrs["xxh3"] = np.bytes_(checksum)
    return checksum
