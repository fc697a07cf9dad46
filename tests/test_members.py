"""Members of clusters: the file that lists them, the draw of each epoch, and runs that train on them."""

import gzip
import io
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from protlig_dd.config.train import config_in
from protlig_dd.data import fasta as fasta_module
from protlig_dd.data import members as members_module
from protlig_dd.data.draws import random_below, shuffled
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.loader import PackDataset, pack_loader
from protlig_dd.data.member_packs import MemberDataset, plan_of_draws
from protlig_dd.data.members import ClusterGroup, Members, MembersOfSplits
from protlig_dd.data.packing import clipped_tokens, make_plan
from protlig_dd.data.prepare import table as table_module
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.members import build_members
from protlig_dd.data.prepare.splits import Split
from protlig_dd.data.store import SPLITS, SequenceStore
from protlig_dd.runs.checkpoint import complete_checkpoints
from protlig_dd.runs.metrics import read_metrics

from .conftest import (
    Command,
    MadeOnce,
    Start,
    assert_one_line_error,
    make_store,
    marked,
    raises_value_error,
    require_program,
    wait_for,
)
from .test_training import TINY, assert_bit_identical, read_rows

PREPARE, TRAIN = ("-m", "protlig_dd.prepare"), ("-m", "protlig_dd.training")
TRAINED_CLUSTERS, HELD_OUT = 80, 10


class Families(NamedTuple):
    """100 clusters of real proteins with 0 to 4 members each."""

    folder: Path
    clusters: SequenceStore
    store: SequenceStore
    members: Members
    of: dict[str, list[str]]
    """{cluster id: ids of its members}."""

    @property
    def group(self) -> ClusterGroup:
        return ClusterGroup(self.clusters, self.members)


def members_of(proteins: list[FastaRecord]) -> dict[str, list[FastaRecord]]:
    """Return the members of each cluster. Every fourth protein is a representative.

    The next 0 to 3 proteins are members of its cluster. In a third of the clusters, so is its sequence, rotated by one.
    """
    found = {}
    for i in range(0, len(proteins), 4):
        representative, cluster = proteins[i], proteins[i + 1 : i + 1 + i // 4 % 4]
        if i % 3 == 0:
            sequence = representative.sequence[1:] + representative.sequence[:1]
            cluster = [*cluster, FastaRecord(f"{representative.id}_rotated", "member", sequence)]
        found[representative.id] = cluster
    return found


def fill_families(folder: Path, proteins: list[FastaRecord]) -> None:
    make_store(folder / "clusters.h5", proteins[::4], train=TRAINED_CLUSTERS, held_out=HELD_OUT)
    families = members_of(proteins)
    fasta = [f">{r.id} {r.description}\n{r.sequence}\n" for cluster in families.values() for r in cluster]
    (folder / "members.fasta").write_text("".join(fasta[i] for i in shuffled(np.arange(len(fasta)), [0])))
    build_store([folder / "members.fasta"], folder / "members.h5", split=Split(0.3, 0.3))
    lines = [f"{cluster}\t{member.id}\n" for cluster, found in families.items() for member in found]
    with gzip.open(folder / "table.tsv.gz", "wt") as file:
        file.writelines(lines[i] for i in shuffled(np.arange(len(lines)), [1]))
    stores = (SequenceStore(folder / name) for name in ("clusters.h5", "members.h5"))
    build_members(*stores, str(folder / "table.tsv.gz"), str(folder / "families.members.h5"))


@pytest.fixture(scope="session")
def families(proteins: list[FastaRecord], made_once: MadeOnce) -> Families:
    folder = made_once("families", lambda folder: fill_families(folder, proteins))
    stores = (SequenceStore(folder / name) for name in ("clusters.h5", "members.h5"))
    of = {cluster: [member.id for member in found] for cluster, found in members_of(proteins).items()}
    return Families(folder, *stores, Members(folder / "families.members.h5"), of)


@pytest.fixture
def own_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the plans in the test's own folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def make_dataset(families: Families, *, max_len: int = 300, budget: int = 2000, seed: int = 1, **more: Any) -> Any:
    group = families.group
    return MemberDataset(
        group, group.split("train"), max_len=max_len, tokens_per_pack=budget, seed=seed, **more
    )  # fmt: skip


def candidates(families: Families, cluster: int) -> list[str]:
    """Return the ids that may be drawn for a cluster."""
    id_ = families.clusters.id(cluster)
    return families.of[id_] or [id_]


# the file of members


def test_the_file_lists_exactly_the_members_of_each_cluster(families: Families) -> None:
    for row in range(len(families.clusters)):
        rows, sizes = families.members.of(np.array([row]))
        assert sorted(map(families.store.id, rows)) == sorted(families.of[families.clusters.id(row)])
        assert rows.tolist() == sorted(rows.tolist())
        assert sizes.tolist() == [len(rows)]
    sizes = [len(found) for found in families.of.values()]
    manifest = families.members.manifest
    assert min(sizes) == 0
    assert max(sizes) == 4
    assert manifest["members_per_cluster"] == {"mean": np.mean(sizes), "median": np.median(sizes), "max": 4}
    assert manifest["clusters_without_members"] == sizes.count(0)
    assert manifest["members"] == manifest["lines"] == sum(sizes)
    families.members.verify()
    assert pickle.loads(pickle.dumps(families.group)).members.rows.tolist() == families.members.rows.tolist()


LINES = st.lists(st.tuples(st.integers(-2, 99), st.integers(-2, 150)), min_size=1, max_size=60)


@given(LINES, st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]), st.booleans(), st.integers(1, 200))
def test_any_table_is_joined_as_line_by_line(
    families: Families,
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[int, int]],
    end: str,
    zipped: bool,
    block: int,
) -> None:
    """A negative number stands for an id that the store does not have."""
    clusters, store, folder = families.clusters, families.store, tmp_path_factory.mktemp("table")

    def id_in(of: SequenceStore, row: int) -> str:
        return of.id(row) if row >= 0 else f"unknown{row}"

    expected: dict[int, int] = {}
    conflict = None
    for number, (cluster, member) in enumerate(lines):
        if min(cluster, member) >= 0 and expected.setdefault(member, cluster) != cluster:
            conflict = conflict or number
    text = end.join(f"{id_in(clusters, cluster)}\t{id_in(store, member)}" for cluster, member in lines).encode()
    (folder / "table").write_bytes(gzip.compress(text) if zipped else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module, "BLOCK_BYTES", block)
        patch.setattr(fasta_module, "PIECE_BYTES", block)
        patch.setattr(fasta_module, "BLOCK_BYTES", block)
        if conflict is not None or not expected:
            message = "a member may be in one cluster only" if expected else "none of its .* names a cluster and"
            with pytest.raises(ValueError, match=message):
                build_members(clusters, store, str(folder / "table"), str(folder / "a.h5"))
            assert not (folder / "a.h5").exists()
            return
        found = build_members(clusters, store, str(folder / "table"), str(folder / "a.h5"))
    assert {int(m): c for c in range(100) for m in found.of(np.array([c]))[0]} == expected
    matched = sum(min(pair) >= 0 for pair in lines)
    assert found.manifest["lines"] == len(lines)
    assert found.manifest["duplicate_lines"] == matched - len(expected)
    for i, name in enumerate(("clusters", "members")):
        missing = [f"unknown{pair[i]}" for pair in lines if pair[i] < 0]
        assert found.manifest["unknown"][name] == {"lines": len(missing), "first": next(iter(missing), None)}


def test_a_member_in_two_clusters_is_an_error_that_names_the_line(families: Families, tmp_path: Path) -> None:
    clusters, store = families.clusters, families.store
    lines = [f"{clusters.id(i)}\t{store.id(i)}" for i in range(20)]
    other = f"{clusters.id(30)}\t{store.id(7)}"
    message = rf"{re.escape(store.id(7))} is in the cluster {re.escape(clusters.id(30))}, but also in "
    message += rf"{re.escape(clusters.id(7))}; a member may be in one cluster only"
    for block in (1, 1 << 20):  # in blocks of a line, and in one block
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table_module, "BLOCK_BYTES", block)
            (tmp_path / "table").write_text("\n".join([*lines, "", other]))
            with pytest.raises(ValueError, match=rf"line 22: the member {message}"):
                build_members(clusters, store, str(tmp_path / "table"), str(tmp_path / "a.h5"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a b\n", r"line 1: expected `cluster id <TAB> member id`, got 'a b'"),
        (b"a\tb\n\nc\td\te\n", r"line 3: expected .*, got 'c\\td\\te'"),
        (b"a\tb\nc\t\n", r"line 2: expected .*, got 'c\\t'"),
        (b"a\nb\tc\td\n", r"line 1: expected .*, got 'a'"),
        (b"\t\na\tb\n", r"line 1: expected .*, got '\\t'"),
        (b"", r"table: the table is empty"),
        (b"\n\n", r"table: the table is empty"),
        (gzip.compress(b"a\tb\n" * 99, mtime=0)[:-9], r"truncated or damaged gzip after line \d+"),
        (
            b"a\tb\n",
            r"none of its 1 lines .* clusters such as a, but .*clusters.h5 has ids such as .*; members such as b",
        ),
    ],
)
def test_a_wrong_table_is_an_error_that_names_the_line(
    families: Families, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "table").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_members(families.clusters, families.store, str(tmp_path / "table"), str(tmp_path / "a.h5"))
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_prepare_writes_and_inspects_a_file_of_members(
    families: Families, run_python: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (families.folder / "table.tsv.gz").read_bytes()
    (tmp_path / "table").write_bytes(table)
    stores = [f"members.clusters={families.clusters.path}", f"members.store={families.store.path}"]
    done = run_python(*PREPARE, *stores, "members.table=table", "output=d/new.members.h5")
    assert done.returncode == 0, done.stderr
    assert "d/new.members.h5: 100 clusters with" in done.stdout
    assert "clusters have no member: training reads their representatives" in done.stdout
    made = Members(tmp_path / "d/new.members.h5")
    assert made.fingerprint == families.members.fingerprint  # the path of the store of members is not part of it
    assert made.store.path.resolve() == families.store.path.resolve()
    shown = run_python(*PREPARE, "inspect=d/new.members.h5")
    assert shown.returncode == 0, shown.stderr
    assert made.fingerprint in shown.stdout
    assert "new.members.h5: all checksums match" in shown.stdout
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(table)))
    piped = build_members(families.clusters, families.store, "-", str(tmp_path / "piped.members.h5"))
    assert piped.fingerprint == made.fingerprint
    assert piped.manifest["table"] == made.manifest["table"] | {"name": "stdin"}


@pytest.mark.slow
def test_a_table_of_mmseqs_is_read(families: Families, tmp_path: Path) -> None:
    """MMseqs2 prints only the accession of an id such as sp|P00533|EGFR_HUMAN."""
    require_program("mmseqs")
    fasta = families.folder / "members.fasta"
    subprocess.run(
        [
            "mmseqs",
            "easy-linclust",
            fasta,
            tmp_path / "c",
            tmp_path / "scratch",
            "--min-seq-id",
            "0.5",
            "--threads",
            "1",
        ],
        check=True,
        capture_output=True,
    )
    clusters = build_store([tmp_path / "c_rep_seq.fasta"], tmp_path / "clusters.h5")
    made = build_members(clusters, families.store, str(tmp_path / "c_cluster.tsv"), str(tmp_path / "a.h5"))
    assert made.manifest["members"] == len(families.store)
    assert made.manifest["clusters_without_members"] == 0
    assert made.manifest["unknown"]["clusters"]["lines"] == 0
    line = (tmp_path / "c_cluster.tsv").read_text().split()
    assert families.store.id(0).split("|")[1] in line
    assert families.store.id(0) not in line


@pytest.mark.parametrize("name", ["offsets", "rows"])
def test_a_damaged_file_is_detected(families: Families, tmp_path: Path, name: str) -> None:
    path = tmp_path / "damaged.members.h5"
    content = bytearray((families.folder / "families.members.h5").read_bytes())
    offset = families.members._extents[name][0]
    content[offset + 42] ^= 0x40  # offsets[5] or rows[10]
    path.write_bytes(content)
    shutil.copy(families.store.path, tmp_path)
    damaged = Members(path)
    with pytest.raises(ValueError, match=rf"damaged.members.h5: {name} is damaged: checksum"):
        damaged.verify()
    group = ClusterGroup(families.clusters, damaged)
    with pytest.raises(ValueError, match=r"damaged.members.h5 is damaged; check it with .* inspect="):
        MemberDataset(group, group.split("train"), max_len=300, tokens_per_pack=2000, seed=1)


def test_other_stores_than_those_of_the_file_are_errors(
    families: Families, store: SequenceStore, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"another store of clusters .* than data.path=.*small.h5"):
        ClusterGroup(store, families.members)
    moved = tmp_path / "moved.members.h5"
    shutil.copy(families.members.path, moved)
    with pytest.raises(ValueError, match=r"needs its store of members, .*members.h5, which does not exist"):
        ClusterGroup(families.clusters, Members(moved))
    shutil.copy(store.path, tmp_path / "members.h5")
    with pytest.raises(ValueError, match=r"was written for other contents of .*members.h5: fingerprint"):
        ClusterGroup(families.clusters, Members(moved))
    with pytest.raises(ValueError, match=r"small.h5: not a file of members; write one with"):
        Members(store.path)
    with pytest.raises(ValueError, match=r"families.members.h5: a file of members \(data.members\), not a store"):
        SequenceStore(families.members.path)


# the draw


def draws(families: Families, times: int) -> tuple[Any, np.ndarray, list[list[int]]]:
    """Return the dataset, its draws of the first epochs (times, n), and the rows that may be drawn for each cluster."""
    dataset = make_dataset(families)
    row_of = {dataset.group.id(row): row for row in range(len(dataset.group))}
    rows = [[row_of[id_] for id_ in candidates(families, cluster)] for cluster in dataset.rows.tolist()]
    return dataset, np.array([dataset.draw(dataset.rows, epoch) for epoch in range(times)]), rows


def test_a_draw_is_uniform_over_the_members(families: Families) -> None:
    dataset, drawn, rows = draws(families, 3000)
    assert drawn[0].tolist() == dataset.draw(dataset.rows, 0).tolist()
    for column, members in zip(drawn.T, rows, strict=True):
        counts = Counter(column.tolist())
        assert sorted(counts) == sorted(members)
        if len(counts) > 1:
            assert chisquare(list(counts.values())).pvalue > 1e-4
    # two clusters with two members each, and two successive epochs, are independent
    two = [i for i, members in enumerate(rows) if len(members) == 2][:2]
    first, second = (drawn[:, i] == rows[i][0] for i in two)
    for a, b in ((first, second), (first[:-1], first[1:])):
        assert chisquare(np.bincount(2 * a + b, minlength=4)).pvalue > 1e-4
    assert (make_dataset(families, seed=2).draw(dataset.rows, 0) != drawn[0]).any()
    assert (dataset.draw(dataset.rows, 0, 1) != drawn[0]).any()


def test_the_draws_never_change(families: Families) -> None:
    """If a draw changed, resumed runs would read other members than before."""
    members = [families.members.draw(np.arange(100), [1, 6, epoch, 0], 2) for epoch in (0, 7)]
    chosen = [
        random_below(np.maximum(np.diff(families.members.offsets), 1), [1, 6, epoch, 0, 0], 2) for epoch in (0, 7)
    ]
    for found, numbers in zip(members, chosen, strict=True):
        for row, number, (first, end) in zip(found, numbers, pairwise(families.members.offsets), strict=True):
            assert first == end or row == 100 + families.members.rows[first + number]
    dataset = make_dataset(families)
    assert [dataset.draw(dataset.rows, epoch)[:12].tolist() for epoch in (0, 7)] == [
        [206, 142, 104, 199, 4, 189, 267, 244, 8, 247, 188, 105],
        [206, 142, 109, 258, 4, 189, 236, 244, 8, 247, 148, 105],
    ]


def test_blocks_of_clusters_are_drawn_with_different_random_numbers(
    families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members_module, "CLUSTERS_AT_ONCE", 7)
    _, drawn, rows = draws(families, 300)
    assert [set(column.tolist()) for column in drawn.T] == [set(members) for members in rows]
    choices = [np.searchsorted(sorted(members), column) for members, column in zip(rows, drawn.T, strict=True)]
    pairs = [(i, i + 7) for i in range(len(rows) - 7) if len(rows[i]) == len(rows[i + 7]) > 1]
    assert pairs
    assert all((choices[i] != choices[j]).any() for i, j in pairs)


# the packs of an epoch


def expected_tokens(families: Families, max_len: int) -> int:
    lengths = {
        store.id(row): int(store.lengths[row]) for store in families.group.joint.stores for row in range(len(store))
    }
    total = 0
    for cluster in families.clusters.split("train").tolist():
        tokens = [int(clipped_tokens(np.array(lengths[id_]), max_len)) for id_ in candidates(families, cluster)]
        total += sum(tokens) // len(tokens)
    return total


@pytest.mark.parametrize("max_len", [60, 300, 5000])
def test_every_epoch_reads_each_training_cluster_once(families: Families, own_plans: None, max_len: int) -> None:
    dataset = make_dataset(families, max_len=max_len, budget=max_len + 1200)
    representatives = PackDataset(
        families.clusters, dataset.rows, max_len=max_len, tokens_per_pack=max_len + 1200, seed=1
    )
    assert dataset.packs_per_epoch == expected_tokens(families, max_len) // (max_len + 1200)
    assert dataset.mean_tokens == expected_tokens(families, max_len) / TRAINED_CLUSTERS
    cluster_of = {id_: row for row in range(100) for id_ in candidates(families, row)}
    orders = []
    for epoch in range(4):
        rows, starts = dataset.plan(epoch)
        assert len(starts) > dataset.packs_per_epoch
        orders.append([cluster_of[dataset.group.id(row)] for row in rows])
        if len(rows) == TRAINED_CLUSTERS:  # else a second draw was needed
            assert orders[-1] == representatives.plan(epoch).rows.tolist()
        assert sorted(orders[-1][:TRAINED_CLUSTERS]) == dataset.rows.tolist()  # no held-out cluster
        for pack in range(epoch * len(dataset), (epoch + 1) * len(dataset)):
            batch = dataset[pack]
            assert len(batch.tokens) <= max_len + 1200
            for row, tokens in zip(batch.rows.tolist(), batch.unpack(batch.tokens), strict=True):
                store, store_row = dataset.group.find(row)
                assert tokens.numpy().astype(np.uint8).tobytes() in store[store_row].tobytes()
    assert orders[0] != orders[1]
    dataset.forget_plans()
    representatives.forget_plans()


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=6, max_size=6), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(32, 60),
)
def test_an_epoch_is_filled_by_further_draws(draws: list[list[int]], packs: int, budget: int) -> None:
    """Each draw has six sequences. Their rows are numbered over all draws."""
    lengths = np.array(draws).reshape(-1)
    rows = [np.arange(6 * i, 6 * i + 6) for i in range(len(draws))]
    for used in range(1, len(draws) + 1):
        starts = make_plan(np.concatenate(rows[:used]), lengths, max_len=30, tokens_per_pack=budget).starts
        if len(starts) > packs:
            break
    else:
        with raises_value_error("fewer than"):
            plan_of_draws(rows, lengths, packs, max_len=30, tokens_per_pack=budget)
        return
    plan = plan_of_draws(rows, lengths, packs, max_len=30, tokens_per_pack=budget)
    if used > 1:
        starts = starts[: packs + 1]
    assert plan.starts.tolist() == starts.tolist()
    assert plan.rows.tolist() == list(range(starts[-1]))


def test_clusters_of_very_different_members_fill_every_epoch(tmp_path: Path, own_plans: None) -> None:
    """Three clusters, each with a member of 4 and one of 200 residues: most draws are far from the mean."""
    letters = np.random.default_rng(0).choice(list("ACDEFGHIKLMNPQRSTVWY"), (9, 200))
    sequences = ["".join(sequence) for sequence in letters]
    records = {"c": sequences[:3], "s": [sequence[:4] for sequence in sequences[3:6]], "l": sequences[6:]}
    for file, names in (("clusters", "c"), ("members", "sl")):
        text = "".join(f">{name}{i}\n{sequence}\n" for name in names for i, sequence in enumerate(records[name]))
        (tmp_path / f"{file}.fasta").write_text(text)
        build_store({"train": tmp_path / f"{file}.fasta"}, tmp_path / f"{file}.h5")
    (tmp_path / "table").write_text("".join(f"c{i}\t{name}{i}\n" for name in "sl" for i in range(3)))
    stores = (SequenceStore(tmp_path / f"{name}.h5") for name in ("clusters", "members"))
    made = build_members(*stores, str(tmp_path / "table"), str(tmp_path / "a.members.h5"))
    group = ClusterGroup(SequenceStore(tmp_path / "clusters.h5"), made)
    dataset = MemberDataset(group, group.split("train"), max_len=200, tokens_per_pack=202, seed=3)
    assert dataset.packs_per_epoch == 3 * ((6 + 202) // 2) // 202 == 1
    dataset = MemberDataset(group, group.split("train"), max_len=200, tokens_per_pack=202, seed=3)
    dataset.packs_per_epoch, dataset.plan_ahead = 3, False
    used = set()
    for epoch in range(40):
        rows, starts = dataset.plan(epoch)
        assert len(starts) > 3
        used.add(len(rows))
        ids = [dataset.group.id(row) for row in rows]
        assert sorted(id_[1] for id_ in ids[:3]) == ["0", "1", "2"]
        assert [id_[1] for id_ in ids] == [ids[i % 3][1] for i in range(len(ids))]  # the same order in all draws
    assert len(used) > 3
    dataset.forget_plans()


def test_packs_depend_only_on_the_seed_and_their_number(families: Families, own_plans: None) -> None:
    dataset = make_dataset(families)
    packs = [3, len(dataset) + 2, 5 * len(dataset) + 1]
    expected = [(dataset[pack].rows.tolist(), dataset[pack].tokens.tolist()) for pack in packs]
    dataset.forget_plans()
    again = pickle.loads(pickle.dumps(make_dataset(families)))
    assert [(again[pack].rows.tolist(), again[pack].tokens.tolist()) for pack in reversed(packs)] == expected[::-1]
    for workers in (0, 2):
        loaded = pack_loader(make_dataset(families), range(3, 4), workers, pin_memory=False)
        assert [batch.rows.tolist() for batch in loaded] == [expected[0][0]]
    again.forget_plans()


def test_the_key_of_the_plans_changes_with_the_members(families: Families, tmp_path: Path) -> None:
    """In the other file, two training clusters have exchanged their members."""
    table, (first, second) = (
        gzip.decompress((families.folder / "table.tsv.gz").read_bytes()).decode(),
        [id_ for id_ in list(families.of)[:TRAINED_CLUSTERS] if families.of[id_]][:2],
    )
    exchanged = {first: second, second: first}
    pairs = [line.split("\t") for line in table.splitlines()]
    lines = (f"{exchanged.get(cluster, cluster)}\t{member}\n" for cluster, member in pairs)
    (tmp_path / "table").write_text("".join(lines))
    made = build_members(families.clusters, families.store, str(tmp_path / "table"), str(tmp_path / "a.members.h5"))
    group = ClusterGroup(families.clusters, made)
    other = MemberDataset(group, group.split("train"), max_len=300, tokens_per_pack=2000, seed=1)
    plain = PackDataset(families.clusters, group.split("train"), max_len=300, tokens_per_pack=2000, seed=1)
    assert other.mean_tokens == make_dataset(families).mean_tokens
    assert len({dataset.key for dataset in (other, plain, make_dataset(families), make_dataset(families, seed=2))}) == 4
    assert make_dataset(families).key == make_dataset(families).key


def test_members_have_the_split_of_their_cluster(families: Families) -> None:
    split_of = {families.clusters.id(row): split for split in SPLITS for row in families.clusters.split(split)}
    store = MembersOfSplits(families.group)
    for split in SPLITS:
        found = [store.id(row) for row in store.split(split)]
        expected = {id_ for cluster, ids in families.of.items() if split_of[cluster] == split for id_ in ids}
        assert set(found) == expected
        assert len(found) == len(expected)
        assert pickle.loads(pickle.dumps(store)).split(split).tolist() == store.split(split).tolist()
        assert found != [families.store.id(row) for row in families.store.split(split)]  # not the store's own split


# runs


def command(families: Families, name: str, *more: str) -> list[str]:
    data = [f"data.path={families.clusters.path}", f"data.members={families.members.path}"]
    return [*TRAIN, *TINY, *data, f"run.name={name}", *more]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically_with_other_workers(
    families: Families, run_python: Command, tmp_path: Path, start: Start
) -> None:
    steps = ("trainer.max_steps=30", "trainer.checkpoint_every=3", "trainer.eval_every=15")
    whole = run_python(*command(families, "whole", *steps))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    members = sum(len(found) for found in list(families.of.values())[:TRAINED_CLUSTERS])
    assert f"random member of each of 80 training clusters, which have {members} members in" in whole.stdout
    assert re.search(r"none of 10 validation proteins is an exact copy .* this run \(.*members.h5\)", whole.stdout)
    victim = start(*command(families, "killed", *steps, "data.workers=0"), new=True)
    wait_for(lambda: complete_checkpoints(tmp_path / "runs/killed"))
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    again = run_python(*command(families, "killed", *steps, "data.workers=2"))
    assert again.returncode == 0, again.stderr
    assert "resuming from runs/killed/checkpoints/step_" in again.stdout
    assert_bit_identical(tmp_path / "runs/whole", tmp_path / "runs/killed")
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / f"runs/{n}/metrics.jsonl").values()]
        for n in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    read = {row for rows in read_rows(tmp_path / "runs/whole").values() for row in rows}
    assert max(read) >= 100  # members, not only representatives

    environment = json.loads((tmp_path / "runs/whole/environment.json").read_text())
    assert environment["members_fingerprint"] == families.members.fingerprint
    assert config_in(tmp_path / "runs/whole").data.members == str(families.members.path)
    done = run_python("-m", "protlig_dd.export", "from=runs/whole", "to=exported")
    assert done.returncode == 0, done.stderr
    assert f"members {families.members.fingerprint} |" in (tmp_path / "exported/README.md").read_text()
    tested = run_python(
        "-m",
        "protlig_dd.evaluate",
        "from=runs/whole",
        f"input={families.clusters.path}",
        "output=e",
        "near=false",
        "draws=1",
    )
    assert tested.returncode == 0, tested.stderr
    assert re.search(r"none of 10 proteins is an exact copy .* this model \(.*members.h5\)", tested.stdout)
    alone = run_python(
        "-m",
        "protlig_dd.evaluate",
        "from=exported",
        f"input={families.clusters.path}",
        "output=f",
        "near=false",
        "draws=1",
    )
    assert "not compared with the training proteins of this model (members of clusters, data.members)" in alone.stdout


@pytest.mark.slow
def test_a_run_is_resumed_only_with_the_same_members(families: Families, run_python: Command, tmp_path: Path) -> None:
    steps = ("trainer.max_steps=8", "trainer.stop_at_step=4")
    first = run_python(*command(families, "a", *steps))
    assert first.returncode == 0, first.stderr
    lines = gzip.decompress((families.folder / "table.tsv.gz").read_bytes()).splitlines()
    (tmp_path / "table").write_bytes(b"\n".join(lines[1:]))
    shutil.copy(families.store.path, tmp_path / "members.h5")
    stores = [f"members.clusters={families.clusters.path}", "members.store=members.h5"]
    made = run_python(*PREPARE, *stores, "members.table=table", "output=other.members.h5")
    assert made.returncode == 0, made.stderr
    changed = run_python(*command(families, "a", *steps), "data.members=other.members.h5")
    fingerprint = Members(tmp_path / "other.members.h5").fingerprint
    message = f"was started with members_fingerprint {families.members.fingerprint}, now {fingerprint}"
    assert_one_line_error(changed, message, "run.fresh=true")
    without = run_python(*command(families, "a", *steps), "data.members=null")
    assert_one_line_error(without, f"members_fingerprint {families.members.fingerprint}, now None")
    elsewhere = run_python(*command(families, "b", *steps), "run.resume=runs/a", "data.members=other.members.h5")
    assert_one_line_error(elsewhere, "was written with other data: members_fingerprint was")
    shutil.copy(families.members.path, tmp_path / "moved.members.h5")
    moved = run_python(*command(families, "a", "trainer.max_steps=8"), "data.members=moved.members.h5")
    assert moved.returncode == 0, moved.stderr
    assert f"members_path was {families.members.path}, now moved.members.h5" in moved.stdout
    plain = [*TRAIN, *TINY, f"data.path={families.clusters.path}", "run.name=c", *steps]
    assert run_python(*plain).returncode == 0
    assert "members" not in (tmp_path / "runs/c/environment.json").read_text()
    assert "members" not in (tmp_path / "runs/c/config.yaml").read_text()
    assert_one_line_error(run_python(*command(families, "c", *steps)), "members_fingerprint None, now")
    tuned = run_python(*plain, "run.name=d", "from=runs/a")
    assert tuned.returncode == 0, tuned.stderr
    assert "members" not in (tmp_path / "runs/d/config.yaml").read_text()  # a fine-tune reads its own data


@pytest.mark.slow
def test_copies_of_held_out_proteins_among_the_members_are_found(
    families: Families, run_python: Command, tmp_path: Path
) -> None:
    """A member of a training cluster has the sequence of a test representative."""
    clusters, copied = families.clusters, families.clusters.split("test")[0]
    row = int(clusters.split("train")[0])
    fasta = (families.folder / "test.fasta").read_text().split(">")[1]
    (tmp_path / "m.fasta").write_text(f">copy {fasta.partition(chr(10))[0]}\n{fasta.partition(chr(10))[2]}")
    store = build_store({"train": tmp_path / "m.fasta"}, tmp_path / "m.h5")
    assert store[0].tolist() == clusters[copied].tolist()
    (tmp_path / "table").write_text(f"{clusters.id(row)}\tcopy\n")
    build_members(clusters, store, str(tmp_path / "table"), str(tmp_path / "m.members.h5"))
    done = run_python(
        *command(families, "a", "trainer.max_steps=2"), "data.members=m.members.h5", "report.max_sequences=10"
    )
    assert done.returncode == 0, done.stderr
    assert "warning: 1 of 10 test proteins are exact copies of training proteins of this run" in done.stdout
    assert json.loads((tmp_path / "runs/a/report.json").read_text())["in_training"]["copies"] == 1


@pytest.mark.slow
def test_members_keep_their_context(proteins: list[FastaRecord], run_python: Command, tmp_path: Path) -> None:
    few = proteins[:120]
    for name, records in (
        ("clusters", few[::4]),
        ("members", [r for found in members_of(few).values() for r in found]),
    ):
        (tmp_path / f"{name}.fasta").write_text("".join(marked(record) for record in records))
        options = ("split.validation_fraction=0.2", "split.test_fraction=0.2")
        done = run_python(*PREPARE, f"input={name}.fasta", f"output={name}.h5", *options)
        assert done.returncode == 0, done.stderr
    lines = [f"{cluster}\t{member.id}\n" for cluster, found in members_of(few).items() for member in found]
    (tmp_path / "table").write_text("".join(lines))
    tables = ("members.clusters=clusters.h5", "members.store=members.h5", "members.table=table")
    assert run_python(*PREPARE, *tables, "output=a.members.h5").returncode == 0
    stores = [SequenceStore(tmp_path / f"{name}.h5") for name in ("clusters", "members")]
    group = ClusterGroup(stores[0], Members(tmp_path / "a.members.h5"), "lower")
    dataset = MemberDataset(group, group.split("train"), max_len=200, tokens_per_pack=800, seed=1)
    batch = dataset[0]
    for row, context in zip(batch.rows.tolist(), batch.unpack(batch.context), strict=True):
        lower = dataset.group.stores[int(row >= len(stores[0]))].lower_case(
            row - len(stores[0]) * (row >= len(stores[0]))
        )
        assert lower is not None
        assert context.any()
        assert 1 <= len(context) - int(context.sum()) <= 14
    data = ["data.path=clusters.h5", "data.members=a.members.h5", "data.context=lower", "run.name=a"]
    done = run_python(*TRAIN, *TINY, *data, "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.members=none.h5"], ["none.h5: no such file of members", "protlig_dd.prepare members.clusters="]),
        (["data.members={members}", "data.path=[{clusters},{store}]"], ["2 stores in data.path: give the one store"]),
        (["data.members={members}", "data.path={clusters}", "data.weights=[1.0]"], ["data.weights=[1.0]: set data.w"]),
        (["data.members={store}", "data.path={clusters}"], ["members.h5: not a file of members"]),
        (["data.members={members}", "data.path={store}"], ["another store of clusters", "than data.path="]),
        (
            ["data.members={members}", "data.path={clusters}", "data.context=lower"],
            ["data.context=lower needs the case"],
        ),
        (["data.path={members}"], ["a file of members (data.members), not a store"]),
    ],
)
def test_wrong_settings_of_a_run_are_one_line_errors(
    families: Families, run_python: Command, tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    paths = {"members": families.members.path, "clusters": families.clusters.path, "store": families.store.path}
    done = run_python(*TRAIN, *TINY, *(override.format(**paths) for override in overrides))
    assert_one_line_error(done, *parts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["members.table=t"],
            ["members.clusters=null: give members.clusters, members.store, members.table and output"],
        ),
        (["members.clusters={clusters}", "members.store={store}", "members.table={table}"], ["output=null: give"]),
        (
            ["members.clusters={clusters}", "members.store={store}", "members.table=no", "output=a"],
            ["=no: no such file"],
        ),
        (
            ["members.clusters={clusters}", "members.store={store}", "members.table=/", "output=a"],
            ["a folder, not a t"],
        ),
        (
            ["members.clusters={clusters}", "members.store={clusters}", "members.table={table}", "output=a"],
            ["same cont"],
        ),
        (
            ["members.clusters={clusters}", "members.store={store}", "members.table={table}", "output={table}"],
            ["table.tsv.gz exists already"],
        ),
        (
            ["members.clusters={clusters}", "members.store={store}", "members.table={table}", "output=a", "input=b"],
            ["input=b and members.table=", "give only one of them"],
        ),
    ],
)
def test_wrong_settings_of_prepare_are_one_line_errors(
    families: Families, run_python: Command, tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    paths = {
        "clusters": families.clusters.path,
        "store": families.store.path,
        "table": families.folder / "table.tsv.gz",
    }
    assert_one_line_error(run_python(*PREPARE, *(override.format(**paths) for override in overrides)), *parts)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".a", "a"))]


def test_plan_prints_the_members(families: Families, run_python: Command, tmp_path: Path) -> None:
    done = run_python(*command(families, "a", "plan=true"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\nmembers +each epoch reads a random member of each of 80 training clusters", done.stdout)
    missing = run_python(*command(families, "a", "plan=true"), "data.members=none.members.h5")
    assert missing.returncode == 0, missing.stderr
    assert "none.members.h5 does not exist: protein lengths and epochs are estimated from other data" in missing.stdout
    assert not (tmp_path / "runs").exists()
