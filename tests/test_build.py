import fcntl
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data import mmseqs
from protlig_dd.data.encode import EncodedBlock, encode_block
from protlig_dd.data.fasta import FastaFile, FastaRecord, read_fasta
from protlig_dd.data.prepare import build, counts, duplicates, parse, splits, spool
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER, bundled_store
from protlig_dd.data.prepare.counts import count_tokens
from protlig_dd.data.prepare.duplicates import repeated_rows
from protlig_dd.data.prepare.filters import Filters, taxa_below
from protlig_dd.data.prepare.output import manifest_path, partial_path
from protlig_dd.data.prepare.read import NoProgress
from protlig_dd.data.prepare.splits import Split, hashed_splits
from protlig_dd.data.store import SPLITS, SequenceStore
from protlig_dd.tokenizer import LETTERS, ProteinTokenizer

from .conftest import require_program
from .test_encode import block_of
from .warm import Server

decode = ProteinTokenizer().decode


def write_fasta(path: Path, *records: tuple[str, str]) -> Path:
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    return path


def test_a_hit_counts_as_similar_if_the_alignment_covers_either_sequence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The columns of MMseqs2's output are query, identity, coverage of the query, and coverage of the target.

    The best hit of each query comes first.
    """
    lines = ["0 0.95 0.9 0.3", "1 0.95 0.3 0.9", "2 0.95 0.79 0.79", "3 0.49 1 1", "4 0.5 0.8 0", "5 0.9 0.1 0.1",
            "5 0.6 0.9 0.9", "6 0.9 0.9 0.9", "6 0.2 0.1 0.1"]  # fmt: skip
    monkeypatch.setattr(mmseqs, "_search", lambda *arguments: [line.split() for line in lines])
    found = mmseqs.best_hits(tmp_path, tmp_path, tmp_path)
    assert {query: hit.near for query, hit in found.items()} == {0: True, 1: True, 2: False, 3: False, 4: True, 5: True,
                                                                6: True}  # fmt: skip
    assert [hit.identity for hit in found.values()] == [0.95, 0.95, 0.95, 0.49, 0.5, 0.9, 0.9]


def test_a_store_contains_the_records_of_its_fasta_files(proteins: list[FastaRecord], store: SequenceStore) -> None:
    assert [decode(store[row]) for row in range(len(store))] == [record.sequence for record in proteins]
    assert [store.id(row) for row in range(len(store))] == [record.id for record in proteins]
    assert store.lengths[:].tolist() == [len(record.sequence) for record in proteins]
    assert [len(store.split(split)) for split in SPLITS] == [360, 20, 20]
    assert store.split("test").tolist() == list(range(380, 400))
    for code, split in enumerate(SPLITS):
        tokens = np.concatenate([store[row] for row in store.split(split)])
        assert store.token_counts[code].tolist() == np.bincount(tokens, minlength=30).tolist()
        described = store.manifest["splits"][split]
        residues = store.lengths[store.split(split)]
        assert (described["sequences"], described["residues"]) == (len(residues), residues.sum())
        assert described["lengths"] == np.bincount(residues // 50).tolist()
        letters = "".join(decode(store[row]) for row in store.split(split))
        assert described["letters"] == {letter: letters.count(letter) for letter in LETTERS if letter != "_"}


@pytest.mark.slow
@pytest.mark.parametrize("rows_at_once", [2, 7, 1 << 16])
def test_building_in_pieces_of_any_size_gives_the_same_store(
    tmp_path: Path, proteins: list[FastaRecord], monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    file = write_fasta(tmp_path / "a.fasta", *((r.id, r.sequence) for p in (proteins, proteins[:90]) for r in p))
    text = file.read_text()
    for i, record in enumerate(proteins[:90]):  # the second copies of the first 90 proteins get other ids
        start = text.rindex(f">{record.id}\n")
        text = f"{text[:start]}>copy{i}\n{text[start + len(record.id) + 2 :]}"
    file.write_text(text)
    whole = build_store([file], tmp_path / "whole.h5", split=Split(0.2, 0.1))
    for module in (spool, duplicates, counts):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(spool, "COPY_BYTES", 700)
    pieces = build_store([file], tmp_path / "pieces.h5", split=Split(0.2, 0.1))
    assert whole.path.read_bytes() == pieces.path.read_bytes()
    assert whole.manifest["dropped"]["duplicates"] == 90
    assert [whole.id(row) for row in range(len(whole))] == [record.id for record in proteins]


def test_the_same_input_and_options_give_the_same_bytes(tmp_path: Path) -> None:
    record = ("UniRef50_A a kinase n=3 Tax=Homo TaxID=9605 RepID=A_HUMAN", "MKVX")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_fasta(tmp_path / folder / "a.fasta", record, ("B", "MKA"))
    stores = [build_store([tmp_path / f / "a.fasta"], tmp_path / f / "a.h5") for f in ("one", "two")]
    assert stores[0].path.read_bytes() == stores[1].path.read_bytes()
    other = build_store([tmp_path / "one/a.fasta"], tmp_path / "b.h5", filters=Filters(min_length=2))
    assert other.path.read_bytes() != stores[0].path.read_bytes()
    assert other.fingerprint == stores[0].fingerprint  # the options differ, the contents do not
    manifests = [json.loads(manifest_path(store.path).read_text()) for store in stores]
    assert {"created", "seconds", "software", "fingerprint"} == set(manifests[0]) - set(stores[0].manifest)
    assert {key: manifests[0][key] for key in stores[0].manifest} == stores[0].manifest
    assert stores[0].manifest["inputs"] == [
        {
            "name": "a.fasta",
            "bytes": (tmp_path / "one/a.fasta").stat().st_size,
            "sha256": build.sha256(tmp_path / "one/a.fasta"),
            "records": 2,
        }
    ]
    assert stores[0].header(0) == record[0]
    assert stores[0].fields(0).tax_id == 9605


@pytest.mark.parametrize("change", ["nothing", "dropped", "lower case"])
def test_tokens_are_written_only_once_if_nothing_is_dropped(
    tmp_path: Path, proteins: list[FastaRecord], change: str
) -> None:
    """The store is then the spool's file of tokens, and has the contents of a store that was copied."""
    records = [(record.id, record.sequence) for record in proteins[:40]]
    more = {"nothing": [], "dropped": [("again", records[3][1])], "lower case": []}[change]
    given = [(records[0][0], records[0][1].lower()), *records[1:]] if change == "lower case" else records
    fasta, output, seen = write_fasta(tmp_path / "a.fasta", *given, *more), tmp_path / "a.h5", set[int]()

    class Watch(NoProgress):
        def __init__(self, description: str, total: int | None) -> None:
            if description == "writing":
                seen.add((partial_path(output) / "tokens").stat().st_ino)

    store = build_store([fasta], output, progress=Watch)
    assert (output.stat().st_ino in seen) is (change == "nothing")
    with h5py.File(output) as file:  # HDF5 itself finds the values
        assert file["tokens"][:].tobytes() == store.tokens.tobytes()
        assert file["headers"][:].tobytes().decode() == "".join(id_ for id_, _ in records)
        assert json.loads(file["manifest"][:].tobytes()) == store.manifest
    assert [decode(store[row]) for row in range(len(store))] == [sequence for _, sequence in records]
    store.verify()
    copied = build_store([write_fasta(tmp_path / "b.fasta", *records, ("b", records[9][1]))], tmp_path / "b.h5")
    assert store.fingerprint == copied.fingerprint
    assert not list(tmp_path.glob("*layout*"))


def test_gzip_stdin_and_several_files_give_the_same_contents(tmp_path: Path, warm: Server) -> None:
    a = write_fasta(tmp_path / "a.fasta", ("A", "MKV"), ("B", "MKA"))
    b = write_fasta(tmp_path / "b.fasta", ("C", "MKC"))
    both = write_fasta(tmp_path / "both.fasta", ("A", "MKV"), ("B", "MKA"), ("C", "MKC"))
    zipped = tmp_path / "zipped"
    zipped.write_bytes(gzip.compress(both.read_bytes()))
    stores = [build_store(files, tmp_path / f"{i}.h5") for i, files in enumerate([[a, b], [both], [zipped]])]
    command = [warm.executable, "-m", "protlig_dd.prepare", "input=-", "output=stdin.h5", "split.test_fraction=0"]
    with zipped.open("rb") as stdin:
        subprocess.run([*command, "split.validation_fraction=0"], stdin=stdin, cwd=tmp_path, check=True)
    stores.append(SequenceStore(tmp_path / "stdin.h5"))
    assert len({store.fingerprint for store in stores}) == 1
    assert stores[3].manifest["inputs"][0]["sha256"] == build.sha256(zipped)
    assert [entry["records"] for entry in stores[0].manifest["inputs"]] == [2, 1]


FILTERED = (
    ("short", "MK"),
    ("long", "M" * 30),
    ("unknown", "MXXXK"),
    ("frag Kinase (Fragment) n=1 Tax=Homo TaxID=9605 RepID=X", "MKVLA"),
    ("frags Kinase (Fragments)", "MKVLC"),
    ("good Kinase n=1 Tax=Homo sapiens TaxID=9606 RepID=X", "MKVLD"),
    ("same Kinase n=1 Tax=Homo sapiens TaxID=9606 RepID=Y", "MKVLD"),
    ("bacterium Kinase OS=Escherichia coli OX=562 GN=x", "MKVLE"),
    ("nobody Kinase n=1 Tax=none TaxID=N/A RepID=Z", "MKVLF"),
)


@pytest.mark.parametrize(
    ("filters", "dropped", "kept"),
    [
        (Filters(), {"duplicates": 1}, "short long unknown frag frags good bacterium nobody"),
        (Filters(duplicates=True), {}, "short long unknown frag frags good same bacterium nobody"),
        (Filters(min_length=3), {"min_length": 1, "duplicates": 1}, "long unknown frag frags good bacterium nobody"),
        (
            Filters(min_length=3, max_length=29, max_unknown=0.5, fragments=False),
            {"min_length": 1, "max_length": 1, "max_unknown": 1, "fragments": 2, "duplicates": 1},
            "good bacterium nobody",
        ),
        (Filters(max_unknown=3 / 5), {"duplicates": 1}, "short long unknown frag frags good bacterium nobody"),
        (Filters(taxa=[9606, 562]), {"taxa": 6, "duplicates": 1}, "good bacterium"),
        # a record that fails two filters is counted once
        (Filters(taxa=[9606], fragments=False), {"fragments": 2, "taxa": 5, "duplicates": 1}, "good"),
    ],
)
def test_each_filter_reports_how_many_records_it_drops(
    tmp_path: Path, filters: Filters, dropped: dict[str, int], kept: str
) -> None:
    file = write_fasta(tmp_path / "a.fasta", *FILTERED)
    store = build_store([file], tmp_path / "a.h5", filters=filters)
    assert {name: count for name, count in store.manifest["dropped"].items() if count} == dropped
    assert " ".join(store.id(row) for row in range(len(store))) == kept
    assert store.manifest["records"] == len(FILTERED) == len(store) + sum(dropped.values())
    store.verify()


def test_sequences_with_lengths_at_the_limits_are_kept(tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "a.fasta", *((f"p{n}", "ACDEFG"[:n]) for n in range(1, 7)))
    store = build_store([file], tmp_path / "a.h5", filters=Filters(min_length=3, max_length=5))
    assert store.lengths[:].tolist() == [3, 4, 5]


def test_a_sequence_with_exactly_the_allowed_fraction_of_unknown_letters_is_kept(tmp_path: Path) -> None:
    records = [(f"p{n}", "X" * n + "A" * (100 - n)) for n in range(1, 100)]
    file = write_fasta(tmp_path / "a.fasta", *records)
    for n in (7, 14, 28, 29, 55, 57, 58):  # for some of these n, n / 100 * 100 is rounded to less than n
        store = build_store([file], tmp_path / f"{n}.h5", filters=Filters(max_unknown=n / 100))
        assert len(store) == n


def test_taxa_include_their_descendants(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes.dmp"
    tree = {1: 1, 2: 131567, 131567: 1, 562: 561, 561: 2, 9606: 9605, 9605: 131567}
    nodes.write_text("".join(f"{child}\t|\t{parent}\t|\trank\t|\t\n" for child, parent in tree.items()))
    assert taxa_below([2], nodes).tolist() == [2, 561, 562]
    assert taxa_below([131567], nodes).tolist() == [2, 561, 562, 9605, 9606, 131567]
    assert taxa_below([9606, 2], None).tolist() == [2, 9606]
    store = build_store(
        [write_fasta(tmp_path / "a.fasta", *FILTERED)],
        tmp_path / "a.h5",
        filters=Filters(taxa=[9605], taxa_nodes=nodes),
    )
    assert [store.id(row) for row in range(len(store))] == ["frag", "good"]
    assert store.manifest["options"]["filters"]["taxa_nodes"]["name"] == "nodes.dmp"
    with pytest.raises(ValueError, match=r"nodes\.dmp: no TaxID 3"):
        taxa_below([2, 3], nodes)
    nodes.write_text("not | a number\n")
    with pytest.raises(ValueError, match=r"nodes\.dmp: not a nodes\.dmp"):
        taxa_below([2], nodes)
    with pytest.raises(ValueError, match="no such file"):
        taxa_below([2], tmp_path / "none.dmp")


@given(st.lists(st.integers(0, 29), min_size=1, max_size=400))
def test_token_counts_are_exact(tokens: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "ROWS_AT_ONCE", 37)
        array = np.array(tokens, np.uint8)
        assert count_tokens(array).tolist() == np.bincount(array, minlength=30).tolist()


@given(st.lists(st.integers(0, 6), max_size=60))
def test_repeated_rows_are_found(values: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "ROWS_AT_ONCE", 7)
        rows = repeated_rows(np.array(values, np.uint64))
    assert rows.tolist() == [row for row, value in enumerate(values) if values.count(value) > 1]


def test_sequences_that_share_half_a_hash_are_not_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences are duplicates only if both halves of their hashes are equal.

    If the hashes of two ids collide, the ids themselves are compared.
    """

    def colliding_sequences(encoded: EncodedBlock) -> np.ndarray:
        digests = original(encoded)
        return np.stack([digests[:, 0] % 2, digests[:, 1]], axis=1)

    def colliding_ids(block: object) -> object:
        encoded = encode_block(block)
        return encoded._replace(id_hashes=encoded.id_hashes % 2)

    original = EncodedBlock.sequence_hashes
    monkeypatch.setattr(EncodedBlock, "sequence_hashes", colliding_sequences)
    monkeypatch.setattr(parse, "encode_block", colliding_ids)
    records = [(f"p{i}", "MKV" + "ACDEFGHIKL"[i % 10]) for i in range(30)]
    store = build_store([write_fasta(tmp_path / "a.fasta", *records)], tmp_path / "a.h5")
    assert [store.id(row) for row in range(len(store))] == [f"p{i}" for i in range(10)]


def test_no_store_is_written_if_the_spool_lost_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncate_tokens(spooled: spool.Spool, *others: object, **options: object) -> np.ndarray:
        os.truncate(spooled.path("tokens"), spooled.path("tokens").stat().st_size - 3)
        return original(spooled, *others, **options)

    original = build.kept_rows
    monkeypatch.setattr(build, "kept_rows", truncate_tokens)
    monkeypatch.setattr(spool, "COPY_BYTES", 50)
    records = [(f"p{i}", "MKV" + "ACDEFGHIKL"[i % 10] * i) for i in range(1, 30)]
    with pytest.raises(ValueError, match=r"tokens: read 31 bytes, expected 34"):
        build_store([write_fasta(tmp_path / "a.fasta", *records)], tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


def hashes_of(ids: list[str]) -> np.ndarray:
    return encode_block(block_of(*[b"M"] * len(ids), ids=[id_.encode() for id_ in ids])).id_hashes


def test_hashed_splits_have_the_requested_fractions_and_never_change() -> None:
    hashes = hashes_of([f"UniRef50_{i}" for i in range(20000)])
    splits = hashed_splits(hashes, Split(0.1, 0.05))
    for code, fraction in enumerate((0.85, 0.1, 0.05)):
        assert abs((splits == code).mean() - fraction) < 0.01
    assert np.array_equal(hashed_splits(hashes[:100], Split(0.1, 0.05)), splits[:100])
    assert set(hashed_splits(hashes, Split(0.0, 0.0))) == {0}
    # an id keeps its split in all later versions of protlig_dd
    assert hashed_splits(hashes_of(["UniRef50_A0A009", "P31007", "a"]), Split(0.4, 0.3)).tolist() == [1, 0, 0]


@given(st.text("ABC0123_", min_size=1), st.floats(0, 0.4), st.floats(0, 0.4))
def test_a_larger_test_fraction_keeps_every_test_sequence_in_test(id_: str, validation: float, test: float) -> None:
    hashes = hashes_of([id_])
    if hashed_splits(hashes, Split(validation, test))[0] == splits.TEST:
        assert hashed_splits(hashes, Split(validation, test + 0.1))[0] == splits.TEST


def test_a_duplicate_of_a_training_sequence_is_not_held_out(tmp_path: Path) -> None:
    inputs = {
        "train": write_fasta(tmp_path / "a.fasta", ("a", "MKV"), ("b", "MKA")),
        "validation": write_fasta(tmp_path / "b.fasta", ("c", "MKV"), ("d", "MKC")),
        "test": write_fasta(tmp_path / "c.fasta", ("e", "mkc"), ("f", "MKD")),
    }
    store = build_store(inputs, tmp_path / "a.h5")
    assert {split: [store.id(row) for row in store.split(split)] for split in SPLITS} == {
        "train": ["a", "b"],
        "validation": ["d"],
        "test": ["f"],
    }
    assert store.manifest["lower_case_letters"] == 3
    assert [entry["split"] for entry in store.manifest["inputs"]] == list(SPLITS)
    with pytest.raises(ValueError, match=r"a\.h5 is an HDF5 file, perhaps a store already, not FASTA"):
        build_store([store.path], tmp_path / "b.h5")


def test_the_error_for_a_repeated_id_names_both_records(tmp_path: Path) -> None:
    a = write_fasta(tmp_path / "a.fasta", ("x", "MKV"), ("P1 one", "MKA\nMKA"), ("y", "MKC"))
    b = write_fasta(tmp_path / "b.fasta", ("z", "MKD"), ("P1 two", "MKE"))
    expected = r"b\.fasta: record 2 \(P1\), line 3: the id P1 already occurs in .*a\.fasta: record 2 \(P1\), line 3$"
    with pytest.raises(ValueError, match=expected):
        build_store([a, b], tmp_path / "a.h5", filters=Filters(min_length=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fasta", "b.fasta"]


def test_the_bundled_store_is_built_once(tmp_path: Path) -> None:
    built = bundled_store(tmp_path)
    before = built.path.stat().st_mtime_ns
    assert bundled_store(tmp_path).path.stat().st_mtime_ns == before
    assert min(len(built.split(split)) for split in SPLITS) > 300
    assert 3_000_000 < built.lengths[:].sum() < 4_000_000
    assert built.manifest["dropped"] == dict.fromkeys(built.manifest["dropped"], 0)


@pytest.mark.slow
@pytest.mark.system
def test_bundled_held_out_proteins_have_no_homolog_in_training(tmp_path: Path) -> None:
    """Search validation and test against train, and test against validation.

    No pair of proteins may have E < 1e-3, whatever its sequence identity.
    """
    require_program("mmseqs")
    train, validation, test = (SAMPLE_FOLDER / f"{split}.fasta.gz" for split in SPLITS)
    for *held_out, target in ((validation, test, train), (test, validation)):
        hits = tmp_path / f"in_{target.name}.m8"
        command = ["mmseqs", "easy-search", *held_out, target, hits, tmp_path / "tmp", "-s", "7.5", "-e", "1e-3"]
        subprocess.run(command, check=True, capture_output=True)
        assert hits.read_text() == ""


def mutated(sequence: str, fraction: float, seed: int) -> str:
    """Replace a fraction of the residues by random residues."""
    rng = np.random.default_rng(seed)
    letters = np.array(list(sequence))
    positions = rng.permutation(len(letters))[: round(fraction * len(letters))]
    letters[positions] = rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), len(positions))
    return "".join(letters)


@pytest.fixture
def families(tmp_path: Path, proteins: list[FastaRecord]) -> dict[str, Path]:
    """A FASTA file for each split.

    Some held-out proteins are similar to a training protein or to another held-out protein.
    """
    parents = [record.sequence for record in proteins if 150 < len(record.sequence) < 400][:20]
    apart = [record.sequence for record in proteins if 150 < len(record.sequence) < 400][20:30]
    near, near_again, far, half = (mutated(parents[i], fraction, i) for i, fraction in enumerate((0.2, 0.3, 0.9, 0.2)))
    return {
        "train": write_fasta(tmp_path / "train.fasta", *((f"t{i}", sequence) for i, sequence in enumerate(parents))),
        "validation": write_fasta(
            tmp_path / "validation.fasta",
            ("near", near),
            ("far", far),
            ("other", apart[0]),
            # similar: the alignment covers all of a training protein, but less than half of this protein
            ("longer", half + apart[1] + apart[2]),
        ),
        "test": write_fasta(
            tmp_path / "test.fasta",
            ("near_again", near_again),
            # similar to `near`, but not to a training protein
            ("cousin", mutated(near, 0.4, 9)),
            # not similar: contains half of a training protein; the alignment covers less than 80% of each protein
            ("partly", parents[5][: len(parents[5]) // 2] + apart[3][:200]),
            ("other_too", apart[4]),
        ),
    }


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("on_hit", ["move", "drop"])
def test_homologs_of_training_sequences_are_removed_from_the_held_out_splits(
    tmp_path: Path, families: dict[str, Path], on_hit: str
) -> None:
    require_program("mmseqs")
    store = build_store(families, tmp_path / "a.h5", split=Split(check="mmseqs", on_hit=on_hit))
    splits = {split: {store.id(row) for row in store.split(split)} for split in SPLITS}
    assert splits["validation"] == {"far", "other"}
    assert splits["test"] == {"partly", "other_too"} | ({"cousin"} if on_hit == "drop" else set())
    report = store.manifest["split_check"]
    assert report["searched"] == {"validation": 4, "test": 4}
    assert report["hits"] == {"validation": 2, "test": 1 if on_hit == "drop" else 2}
    assert report["rounds"] == (1 if on_hit == "drop" else 3)
    assert report["mmseqs"]
    moved = {"near", "near_again", "longer", "cousin"}
    assert splits["train"] - {f"t{i}" for i in range(20)} == (moved if on_hit == "move" else set())
    store.verify()
    described = store.manifest["splits"]
    assert sum(described[split]["sequences"] for split in SPLITS) == len(store) == (28 if on_hit == "move" else 25)


def test_the_error_for_missing_mmseqs_gives_the_install_command(
    tmp_path: Path, families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"split\.check=mmseqs needs MMseqs2.*apt-get install mmseqs2"):
        build_store(families, tmp_path / "a.h5", split=Split(check="mmseqs"))
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("filters", "split", "message"),
    [
        (Filters(), Split(0.6, 0.4), r"split\.validation_fraction=0\.6 and split\.test_fraction=0\.4 must not be neg"),
        (Filters(), Split(-0.1, 0.4), "must not be negative and must sum to less than 1"),
        (Filters(), Split(float("nan"), 0.4), "must not be negative and must sum to less than 1"),
        (Filters(), Split(check="blast"), r"split\.check=blast; choose from null, mmseqs"),
        (Filters(), Split(on_hit="keep"), r"split\.on_hit=keep; choose from move, drop"),
        (
            Filters(min_length=5, max_length=4),
            Split(),
            "filter.min_length=5 and filter.max_length=4 must satisfy 1 <= min_length <= max_length",
        ),
        (Filters(max_unknown=1.5), Split(), r"filter\.max_unknown=1\.5 must be a fraction between 0 and 1"),
        (Filters(taxa=[]), Split(), r"filter\.taxa=\[\] keeps no sequence"),
        (Filters(taxa_nodes=Path("x")), Split(), r"filter\.taxa_nodes has no effect without filter\.taxa"),
        (Filters(min_length=9), Split(), "no sequence is left of 1 records; the filters dropped 1 by min_length"),
    ],
)
def test_invalid_options_are_errors_and_leave_no_file(
    tmp_path: Path, filters: Filters, split: Split, message: str
) -> None:
    file = write_fasta(tmp_path / "a.fasta", ("a", "MKV"))
    with pytest.raises(ValueError, match=message):
        build_store([file], tmp_path / "a.h5", filters=filters, split=split)
    assert [path.name for path in tmp_path.iterdir()] == ["a.fasta"]


def test_wrong_inputs_are_errors_and_existing_files_are_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be given only once"):
        build_store(["-", "-"], tmp_path / "a.h5")
    with pytest.raises(ValueError, match="no input file given"):
        build_store([], tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"none\.fasta: no such file"):
        build_store([tmp_path / "none.fasta"], tmp_path / "a.h5")
    with pytest.raises(ValueError, match="no split 'dev'"):
        build_store({"dev": tmp_path / "none.fasta"}, tmp_path / "a.h5")
    file = write_fasta(tmp_path / "a.fasta", ("a", "MKV"))
    (tmp_path / "mine.h5").write_text("precious")
    with pytest.raises(ValueError, match=r"mine\.h5 exists already"):
        build_store([file], tmp_path / "mine.h5")
    assert (tmp_path / "mine.h5").read_text() == "precious"
    build_store([file], tmp_path / "b.h5")
    (tmp_path / "b.h5").rename(tmp_path / "c.h5")
    build_store([file], tmp_path / "b.h5")
    assert sorted(p.name for p in tmp_path.glob("b.*")) == ["b.h5", "b.h5.manifest.json", "b.h5.manifest.json.1"]


@pytest.mark.parametrize("links", [True, False])
def test_an_output_that_appears_during_the_build_is_kept(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError("no hard links")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    file = write_fasta(tmp_path / "a.fasta", ("a", "MKV"))
    for function in ("write_store", "put_in_place"):

        def interfere(original: Callable, *arguments: object) -> None:
            (tmp_path / "a.h5").write_text("precious")
            original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(build, function, functools.partial(interfere, getattr(build, function)))
            with pytest.raises(ValueError, match=r"a\.h5 exists already"):
                build_store([file], tmp_path / "a.h5")
        assert (tmp_path / "a.h5").read_text() == "precious"
        assert not (tmp_path / ".a.h5.partial").exists()
        (tmp_path / "a.h5").unlink()


def test_an_output_that_is_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.h5").symlink_to(tmp_path / "disk/big.h5")
    build_store([write_fasta(tmp_path / "a.fasta", ("a", "MKV"))], tmp_path / "link.h5")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["big.h5", "big.h5.manifest.json"]
    assert len(SequenceStore(tmp_path / "link.h5")) == 1


def test_files_left_by_a_build_killed_at_its_end_are_removed(tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "a.fasta", ("a", "MKV"))
    build_store([file], tmp_path / "a.h5")
    (tmp_path / ".a.h5.partial").mkdir()
    for name in ("lock", "tokens"):
        (tmp_path / ".a.h5.partial" / name).write_text("left")
    with pytest.raises(ValueError, match=r"a\.h5 exists already"):
        build_store([file], tmp_path / "a.h5")
    assert not (tmp_path / ".a.h5.partial").exists()


def test_a_repeated_id_in_a_pipe_is_found_without_reading_the_pipe_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(">a\nMKV\n>b\nMKA\n>a\nMKC\n",))
    writer.start()
    with pytest.raises(ValueError, match=r"pipe: record 3: the id a already occurs in .*pipe: record 1$"):
        build_store([tmp_path / "pipe"], tmp_path / "a.h5")
    writer.join()


def bundled_store_size(folder: Path) -> int:
    return len(bundled_store(folder))


def test_a_folder_that_another_process_has_just_locked_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may lock the folder and begin to write just before this process lists the folder's files."""
    folder, original = tmp_path / ".x.h5.partial", Path.iterdir
    folder.mkdir()
    locks = []

    def taken_meanwhile(path: Path) -> Iterator[Path]:
        if path == folder and not locks:
            locks.append((folder / "lock").open("w"))
            fcntl.flock(locks[0], fcntl.LOCK_EX)
            (folder / "tokens").touch()
        return original(path)

    monkeypatch.setattr(Path, "iterdir", taken_meanwhile)
    write_fasta(tmp_path / "a.fasta", ("A", "MKV"))
    with pytest.raises(build.OutputExistsError, match=r"x.h5: another process is writing it"):
        build_store([tmp_path / "a.fasta"], tmp_path / "x.h5")
    locks[0].close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_that_build_the_bundled_store_simultaneously_all_get_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert len(set(pool.map(bundled_store_size, [tmp_path] * 3))) == 1


def test_a_partial_folder_with_foreign_files_is_an_error_and_is_kept(tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "a.fasta", ("a", "MKV"))
    (tmp_path / ".a.h5.partial").mkdir()
    (tmp_path / ".a.h5.partial/mine").write_text("precious")
    with pytest.raises(ValueError, match=r"\.a\.h5\.partial exists and was not created by this program"):
        build_store([file], tmp_path / "a.h5")
    assert (tmp_path / ".a.h5.partial/mine").read_text() == "precious"
    (tmp_path / ".a.h5.partial/mine").unlink()
    build_store([file], tmp_path / "a.h5")  # an empty folder is used


def test_the_fields_of_real_headers_are_kept(tmp_path: Path) -> None:
    """Three bundled proteins get a UniRef header, a UniProt header and a bare id."""
    bodies = [record.sequence for record in itertools.islice(read_fasta(SAMPLE_FOLDER / "test.fasta.gz"), 3)]
    headers = [
        "UniRef50_UPI0012 MULTISPECIES: [FeFe] hydrogenase (GTPase) n=4 Tax=Ca. X [a=b] TaxID=N/A RepID=UPI0012",
        "sp|P31007|DLG1_DROME Disks large 1 OS=Drosophila melanogaster OX=7227 GN=dlg1 PE=1 SV=2",
        "bare",
    ]
    store = build_store([write_fasta(tmp_path / "a.fasta", *zip(headers, bodies, strict=True))], tmp_path / "a.h5")
    assert [store.header(row) for row in range(3)] == headers
    first = store.fields(0)
    assert (first.id, first.n, first.tax, first.tax_id, first.rep_id) == (
        "UniRef50_UPI0012",
        4,
        "Ca. X [a=b]",
        None,
        "UPI0012",
    )
    assert store.fields(1).tax_id == 7227
    assert store.fields(2).description == ""
    assert list(FastaFile(tmp_path / "a.fasta").blocks())
