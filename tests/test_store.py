import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.store import SPLITS, SequenceStore, crop, write_store
from protlig_dd.tokenizer import BOS, EOS, ProteinTokenizer


def test_what_is_written_is_read(store: SequenceStore, proteins: list[FastaRecord]) -> None:
    assert len(store) == len(proteins)
    decode = ProteinTokenizer().decode
    for row, record in enumerate(proteins):
        assert decode(store[row]) == record.sequence
        assert store.id(row) == record.id
    assert store.lengths.tolist() == [len(record.sequence) for record in proteins]
    assert [len(store.split(split)) for split in SPLITS] == [360, 20, 20]
    assert store.split("test").tolist() == list(range(380, 400))
    for split in SPLITS:
        tokens = np.concatenate([store[row] for row in store.split(split)])
        assert store.token_counts[SPLITS.index(split)].tolist() == np.bincount(tokens, minlength=30).tolist()


def test_datasets_are_contiguous_so_that_they_can_be_mapped(store: SequenceStore) -> None:
    with h5py.File(store.path) as file:
        assert all(dataset.chunks is None and dataset.id.get_offset() is not None for dataset in file.values())


def test_nothing_open_is_pickled(store: SequenceStore) -> None:
    _ = store[0]
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled)[3], store[3])


def read_row(store: SequenceStore, row: int) -> list[int]:
    return store[row].tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_other_processes_read_the_same(store: SequenceStore, method: str) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        rows = pool.starmap(read_row, [(store, row) for row in range(6)])
    assert rows == [store[row].tolist() for row in range(6)]


def test_the_same_records_give_the_same_bytes(proteins: list[FastaRecord], tmp_path: Path) -> None:
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path in paths:
        write_store(path, ((record, "train") for record in proteins), {"made": "here"})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    changed = [*proteins[:-1], proteins[-1]._replace(sequence="MKV")]
    other = write_store(tmp_path / "c.h5", ((record, "train") for record in changed), {"made": "here"})
    assert other.fingerprint != SequenceStore(paths[0]).fingerprint


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("a", "MKV", "train"), ("a", "MKA", "train")], "record a: this id occurs twice"),
        ([("a", "MKV", "train"), ("b", "MK?", "train")], r"record b: illegal character '\?' at position 3 of 3"),
        ([("a", "", "train")], "record a: no residues"),
        ([("a", "MKV", "holdout")], "record a: no split 'holdout'"),
        ([], "no sequences to write"),
    ],
)
def test_bad_records_leave_nothing_behind(tmp_path: Path, records: list[tuple[str, str, str]], message: str) -> None:
    rows = [(FastaRecord(id_, "", sequence), split) for id_, sequence, split in records]
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "bad.h5", rows, {})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.h5").write_text("precious")
    with pytest.raises(ValueError, match=r"mine\.h5 exists already"):
        write_store(tmp_path / "mine.h5", [(FastaRecord("a", "", "MKV"), "train")], {})
    assert (tmp_path / "mine.h5").read_text() == "precious"


def test_files_that_are_no_store_are_refused(tmp_path: Path, store: SequenceStore) -> None:
    with pytest.raises(ValueError, match=r"none\.h5: no such data file"):
        SequenceStore(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match=r"text\.h5: not a readable HDF5 file"):
        SequenceStore(tmp_path / "text.h5")
    (tmp_path / "old.h5").write_bytes(store.path.read_bytes())
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(ValueError, match=r"old\.h5: store format 99, this version reads 1"):
        SequenceStore(tmp_path / "old.h5")
    with pytest.raises(IndexError, match="row 400 of 400"):
        store[400]
    with pytest.raises(ValueError, match="no split 'dev'"):
        store.split("dev")


def test_a_crop_lacks_the_end_that_was_cut() -> None:
    tokens = ProteinTokenizer().encode("ACDEF")
    assert crop(tokens, 0, 5).tolist() == tokens.tolist()
    assert crop(tokens, 0, 3).tolist() == [BOS, 0, 1, 2]
    assert crop(tokens, 1, 3).tolist() == [1, 2, 3]
    assert crop(tokens, 2, 3).tolist() == [2, 3, 4, EOS]
    with pytest.raises(ValueError, match="cannot crop 3 residues at 3 from 5"):
        crop(tokens, 3, 3)
    with pytest.raises(ValueError, match="<bos> residues <eos>"):
        crop(tokens[1:], 0, 3)
