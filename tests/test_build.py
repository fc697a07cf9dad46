import gzip
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data.build import SAMPLE_FOLDER, build_store, bundled_store, hashed_split, sha256
from protlig_dd.data.store import SPLITS, SequenceStore

from .conftest import Command, assert_one_line_error, require_program


def test_hashed_splits_have_their_shares_and_stay_put(tmp_path: Path) -> None:
    ids = [f"UniRef50_{i}" for i in range(20000)]
    splits = [hashed_split(id_, 0.1, 0.05) for id_ in ids]
    for split, share in (("validation", 0.1), ("test", 0.05), ("train", 0.85)):
        assert abs(splits.count(split) / len(ids) - share) < 0.01


@given(st.text(min_size=1), st.floats(0, 0.4), st.floats(0, 0.4))
def test_growing_the_test_share_never_moves_a_test_sequence_out(id_: str, validation: float, test: float) -> None:
    if hashed_split(id_, validation, test) == "test":
        assert hashed_split(id_, validation, test + 0.1) == "test"


def test_the_source_is_recorded(store: SequenceStore) -> None:
    source = json.loads(store.attrs["source"])
    assert [file["name"] for file in source["files"]] == ["train.fasta", "validation.fasta", "test.fasta"]
    assert source["files"][0]["sha256"] == sha256(store.path.parent / "train.fasta")


def test_the_bundled_store_is_built_once(tmp_path: Path) -> None:
    built = bundled_store(tmp_path)
    before = built.path.stat().st_mtime_ns
    assert bundled_store(tmp_path).path.stat().st_mtime_ns == before
    assert min(len(built.split(split)) for split in SPLITS) > 300
    assert 3_000_000 < built.lengths.sum() < 4_000_000


def test_bundled_held_out_proteins_have_no_homolog_in_training(tmp_path: Path) -> None:
    """Search validation and test against train, and test against validation: no hit at E < 1e-3 at any identity."""
    require_program("mmseqs")
    for held_out, target in (("validation", "train"), ("test", "train"), ("test", "validation")):
        hits = tmp_path / f"{held_out}_{target}.m8"
        command = [
            "mmseqs",
            "easy-search",
            SAMPLE_FOLDER / f"{held_out}.fasta.gz",
            SAMPLE_FOLDER / f"{target}.fasta.gz",
        ]
        subprocess.run([*command, hits, tmp_path / "tmp", "-s", "7.5", "-e", "1e-3"], check=True, capture_output=True)
        assert hits.read_text() == ""


def test_prepare_from_the_command_line(run_python: Command, tmp_path: Path) -> None:
    (tmp_path / "my.fasta").write_text("".join(f">p{i}\nMKV{'ACDEFGHIKL'[i % 10] * 9}\n" for i in range(300)))
    process = run_python("-m", "protlig_dd.prepare", "input=my.fasta", "output=d/my.h5", "validation_fraction=0.2")
    assert process.returncode == 0, process.stderr
    assert "300 sequences, 3,600 residues" in process.stdout
    assert 30 < len(SequenceStore(tmp_path / "d/my.h5").split("validation")) < 90
    again = run_python("-m", "protlig_dd.prepare", "input=my.fasta", "output=d/my.h5")
    assert_one_line_error(again, "d/my.h5 exists already")


MANY = "".join(f">p{i}\nMKV\n" for i in range(9000)).encode()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["bad.fasta", "empty"]),
        (gzip.compress(MANY)[:2000], ["bad.fasta", "gzip", "record"]),
        (b">good\nMKV\n>P2 x\nMK1V\n", ["bad.fasta", "record P2", "'1'", "position 3"]),
    ],
    ids=["empty", "truncated", "illegal"],
)
def test_bad_fasta_on_the_command_line(run_python: Command, tmp_path: Path, content: bytes, parts: list[str]) -> None:
    (tmp_path / "bad.fasta").write_bytes(content)
    process = run_python("-m", "protlig_dd.prepare", "input=bad.fasta", "output=bad.h5")
    assert_one_line_error(process, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.fasta"]


def test_missing_and_misnamed_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.fasta: no such file"):
        build_store([tmp_path / "none.fasta"], tmp_path / "a.h5")
    with pytest.raises(ValueError, match="no split 'dev'"):
        build_store({"dev": tmp_path / "none.fasta"}, tmp_path / "a.h5")
    with pytest.raises(ValueError, match="leave some to train on"):
        build_store([tmp_path / "none.fasta"], tmp_path / "a.h5", validation_fraction=0.6, test_fraction=0.4)
