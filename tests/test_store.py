import fcntl
import multiprocessing
import pickle
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from protlig_dd.data import datasets
from protlig_dd.data import lengths as lengths_module
from protlig_dd.data import store as store_module
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.store import SPLITS, SequenceStore, StoreGroup, fingerprint_of
from protlig_dd.tokenizer import ProteinTokenizer

from .conftest import thorough


def test_datasets_are_contiguous_so_that_they_can_be_mapped(store: SequenceStore) -> None:
    with h5py.File(store.path) as file:
        assert all(dataset.chunks is None and dataset.id.get_offset() is not None for dataset in file.values())


def test_a_pickled_store_does_not_contain_its_data(store: SequenceStore) -> None:
    _ = store[0]
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled)[3], store[3])


def read_row(store: SequenceStore, row: int) -> list[int]:
    return store[row].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_other_processes_read_the_same_sequences(store: SequenceStore, method: str) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        rows = pool.starmap(read_row, [(store, row) for row in range(6)])
    assert rows == [store[row].tolist() for row in range(6)]


def test_a_locked_store_can_be_read(store: SequenceStore, tmp_path: Path) -> None:
    path = tmp_path / "copy.h5"
    shutil.copy(store.path, path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # like a process that writes, or a file system without locks
        with pytest.raises(OSError, match="lock"), h5py.File(path, "r", locking=True):
            pass
        assert SequenceStore(path)[0].tolist() == store[0].tolist()


def test_rows_outside_the_store_and_unknown_splits_are_errors(store: SequenceStore) -> None:
    for row in (400, -1):
        with pytest.raises(IndexError, match=f"no row {row}; the store has 400 rows"):
            store[row]
        with pytest.raises(IndexError, match=f"no row {row}; the store has 400 rows"):
            store.id(row)
    with pytest.raises(ValueError, match="no split 'dev'"):
        store.split("dev")


def with_attributes(path: Path, source: SequenceStore, **attributes: object) -> Path:
    path.write_bytes(source.path.read_bytes())
    with h5py.File(path, "r+", libver=("v108", "v108")) as file:
        for name, value in attributes.items():
            file.attrs[name] = value
    return path


def test_files_that_are_not_stores_of_this_version_are_rejected(tmp_path: Path, store: SequenceStore) -> None:
    with pytest.raises(ValueError, match=r"none\.h5: no such data file"):
        SequenceStore(tmp_path / "none.h5")
    with pytest.raises(ValueError, match="a folder, not a file"):
        SequenceStore(tmp_path)
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(
        ValueError,
        match=r"text\.h5: not a store \(not an HDF5 file\); build one from FASTA with `python -m protlig_dd\.prepare",
    ):
        SequenceStore(tmp_path / "text.h5")
    (tmp_path / "magic.h5").write_bytes(store.path.read_bytes()[:8])
    with pytest.raises(ValueError, match=r"magic\.h5: not a readable store"):
        SequenceStore(tmp_path / "magic.h5")
    with pytest.raises(ValueError, match=r"new\.h5 has format 99; this version of protlig_dd reads only format 2$"):
        SequenceStore(with_attributes(tmp_path / "new.h5", store, format_version=99))
    older = r"old\.h5 has format 1; this version of protlig_dd reads only format 2; build it again from FASTA"
    with pytest.raises(ValueError, match=older):
        SequenceStore(with_attributes(tmp_path / "old.h5", store, format_version=1))
    with pytest.raises(ValueError, match=r"abc\.h5: its alphabet is 'ABC', but this version reads only 'ACDEF"):
        SequenceStore(with_attributes(tmp_path / "abc.h5", store, alphabet=np.bytes_("ABC")))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["tokens"] = np.zeros(3, np.uint8)
    with pytest.raises(ValueError, match=r"other\.h5 has format None; this version of protlig_dd reads only format 2"):
        SequenceStore(tmp_path / "other.h5")
    with h5py.File(tmp_path / "chunked.h5", "w") as file, h5py.File(store.path) as original:
        for name, dataset in original.items():
            copy = file.create_dataset(name, data=dataset[:], chunks=(len(dataset),) if name == "tokens" else None)
            copy.attrs["xxh3"] = dataset.attrs["xxh3"]
        file.attrs.update(original.attrs)
    with pytest.raises(ValueError, match=r"chunked\.h5: tokens is not a contiguous uint8 array of \d+ values"):
        SequenceStore(tmp_path / "chunked.h5")


def test_a_truncated_store_is_rejected(tmp_path: Path, store: SequenceStore) -> None:
    content = store.path.read_bytes()
    for size in (0, 1, 100, 2000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.h5").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.h5: "):
            SequenceStore(tmp_path / "cut.h5")


def stored_values(store: SequenceStore) -> tuple[object, ...]:
    return (
        [store[row].tobytes() for row in range(len(store))],
        [store.header(row) for row in range(len(store))],
        [store.split(split).tolist() for split in SPLITS],
        store.token_counts.tolist(),
        store.manifest,
        store.fingerprint,
    )


@pytest.mark.slow
def test_any_flipped_bit_is_detected_or_changes_no_contents(tmp_path: Path, proteins: list[FastaRecord]) -> None:
    """Opening or verifying the store raises an error, or the bit is outside the stored data."""
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">{record.id} {i}\n{record.sequence[:9]}\n" for i, record in enumerate(proteins[:6])))
    whole = build_store([fasta], tmp_path / "whole.h5")
    content, expected = bytearray(whole.path.read_bytes()), stored_values(whole)
    extents = {name: (extent.offset, extent.size) for name, extent in whole._extents.items()}
    bits = random.Random(0).sample(range(8 * len(content)), 2000 if thorough() else 500)
    detected = undetected = 0
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.h5").write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            flipped = SequenceStore(tmp_path / "flipped.h5")
            flipped.verify()
        except ValueError as error:
            detected += str(error).startswith(f"{tmp_path / 'flipped.h5'}: ")
            continue
        undetected += 1
        assert stored_values(flipped) == expected, f"bit {bit}"
        assert not any(start <= bit // 8 < start + size for start, size in extents.values())
    assert detected + undetected == len(bits)
    assert detected > undetected


@pytest.mark.parametrize(
    "name", ["tokens", "offsets", "headers", "header_offsets", "split", "token_counts", "manifest"]
)
def test_the_error_names_the_damaged_part(tmp_path: Path, store: SequenceStore, name: str) -> None:
    content = bytearray(store.path.read_bytes())
    start, size, _ = store._extents[name]
    for position in random.Random(0).sample(range(size), 3):
        content[start + position] ^= 4
    if name == "manifest":  # keep its JSON valid: invalid JSON is already an error when the store is opened
        content = bytearray(store.path.read_bytes())
        content[content.rindex(b'"records"') + 1] ^= 1
    (tmp_path / "damaged.h5").write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged\.h5: {name} is damaged: checksum [0-9a-f]+, expected [0-9a-f]+"):
        SequenceStore(tmp_path / "damaged.h5").verify()
    store.verify()


def test_verify_reports_every_byte_it_reads(store: SequenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "COPY_BYTES", 1000)
    seen: list[int] = []
    store.verify(seen.append)
    assert sum(seen) == store.nbytes > store.lengths[:].sum()


def test_columns_read_in_blocks_of_any_size_are_complete(store: SequenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(store.path) as file:
        offsets, split = file["offsets"][:], file["split"][:]
    for size in (1, 7, len(store) - 1, len(store), 1 << 22):
        monkeypatch.setattr(store_module, "ROWS_AT_ONCE", size)
        monkeypatch.setattr(lengths_module, "ROWS_AT_ONCE", size)
        found = SequenceStore(store.path)
        for lengths in (found.lengths[:], found.lengths.in_memory(), found.lengths[np.arange(len(found))]):
            assert lengths.tolist() == (np.diff(offsets) - 2).tolist()
        for number, name in enumerate(SPLITS):
            assert found.split(name).tolist() == np.flatnonzero(split == number).tolist()


def test_wrong_columns_of_a_store_are_errors(tmp_path: Path) -> None:
    def write(*blocks: np.ndarray, size: int) -> None:
        datasets.write_datasets(tmp_path / "a.h5", {"x": (np.int64, size, blocks)}, lambda file, checksums: None)

    numbers = np.arange(3)
    with pytest.raises(ValueError, match=r"a.h5: values of x are int32, expected int64"):
        write(numbers.astype(np.int32), size=3)
    for size in (2, 4):
        with pytest.raises(ValueError, match=rf"a.h5: 3 values of x, expected {size}"):
            write(numbers, size=size)
    with pytest.raises(ValueError, match=r"a.h5: HDF5 places x, which has 0 values, at None"):
        write(size=0)
    write(numbers[:1], numbers[1:], size=3)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["x"][:].tolist() == [0, 1, 2]


def test_the_fingerprint_depends_on_every_column_except_the_manifest(store: SequenceStore) -> None:
    """The fingerprint identifies the contents of a store, whatever options the store was built with."""
    for name in store.checksums:
        other = fingerprint_of(store.checksums | {name: "0" * 32})
        assert (other == store.fingerprint) is (name == "manifest"), name


def test_a_group_numbers_the_rows_of_its_stores_consecutively(tmp_path: Path, store: SequenceStore) -> None:
    (tmp_path / "b.fasta").write_text(">x\nMKV\n>y\nMKVLA\n")
    second = build_store([tmp_path / "b.fasta"], tmp_path / "b.h5")
    group = StoreGroup([store, second])
    assert len(group) == 402
    assert group.lengths[:].tolist() == [*store.lengths[:].tolist(), 3, 5]
    assert group.split("train").tolist() == [*range(360), 400, 401]
    assert [group.id(row) for row in (0, 399, 400, 401)] == [store.id(0), store.id(399), "x", "y"]
    assert group.token_counts.tolist() == (store.token_counts + second.token_counts).tolist()
    assert group.fingerprint not in (store.fingerprint, second.fingerprint)
    assert StoreGroup([store]).fingerprint == store.fingerprint
    assert StoreGroup([second, store]).fingerprint != group.fingerprint
    with pytest.raises(ValueError, match=r"b\.h5 has the same contents as .*b\.h5; give each store once"):
        StoreGroup([store, second, SequenceStore(second.path)])
    numbers, begins, residues = group.locate(np.array([401, 2, 400]))
    assert numbers.tolist() == [1, 0, 1]
    assert residues.tolist() == [5, store.lengths[2], 3]
    assert second.tokens[begins[0] : begins[0] + 7].tolist() == ProteinTokenizer().encode("MKVLA").tolist()


def test_a_sequence_without_bos_or_eos_is_reported_as_damaged(tmp_path: Path, store: SequenceStore) -> None:
    content = bytearray(store.path.read_bytes())
    content[store._extents["tokens"][0] + store.offsets[8] - 1] = 3  # the <eos> of row 7
    (tmp_path / "damaged.h5").write_bytes(content)
    group = StoreGroup([SequenceStore(tmp_path / "damaged.h5")])
    group.locate(np.array([6, 8]))
    command = r"python -m protlig_dd\.prepare inspect=.*damaged\.h5"
    with pytest.raises(ValueError, match=rf"damaged\.h5: row 7 is damaged; check the whole store with `{command}`"):
        group.locate(np.array([6, 7, 8]))
    content[store._extents["offsets"][0] + 8 * 3 + 6] = 1  # the offset of row 3 is now far beyond the end of the file
    (tmp_path / "damaged.h5").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.h5: row [23] is damaged"):
        StoreGroup([SequenceStore(tmp_path / "damaged.h5")]).locate(np.array([2, 3]))
