import itertools
import mmap
import multiprocessing
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data.crops import crop_bounds
from protlig_dd.data.draws import VERSIONS
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.loader import PackDataset, RankPacks, check_pack_sizes, pack_loader
from protlig_dd.data.packing import clipped_tokens
from protlig_dd.data.plan_cache import plan_folder
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, EOS, ProteinTokenizer

from .conftest import make_store
from .test_plan import upgrade_numpy


def make_dataset(store: SequenceStore, *, seed: int | None = 1, max_len: int = 300, budget: int = 2000) -> PackDataset:
    return PackDataset(store, store.split("train"), max_len=max_len, tokens_per_pack=budget, seed=seed)


def test_an_epoch_has_no_sequence_twice_and_leaves_out_few_at_its_end(store: SequenceStore) -> None:
    dataset = make_dataset(store)
    for epoch in (0, 1, 5):
        packs = range(epoch * len(dataset), (epoch + 1) * len(dataset))
        rows = np.concatenate([dataset.pack_rows(pack) for pack in packs])
        assert len(np.unique(rows)) == len(rows)
        tail = np.setdiff1d(dataset.rows, rows)
        assert len(tail) == dataset.tail(epoch)
        tail_tokens = clipped_tokens(store.lengths[tail], dataset.max_len).sum()
        all_tokens = clipped_tokens(store.lengths[dataset.rows], dataset.max_len).sum()
        # the tail (what the epoch leaves out) is large here, because the budget is small: about 7 sequences per pack
        assert tail_tokens < 0.15 * all_tokens


def test_the_plan_is_a_pure_function_of_seed_and_index(store: SequenceStore) -> None:
    dataset = make_dataset(store)
    far = 7 * len(dataset) + 3
    batch = dataset[far]
    _ = dataset[0]
    assert torch.equal(dataset[far].tokens, batch.tokens)
    dataset.forget_plans()
    assert torch.equal(make_dataset(store)[far].tokens, batch.tokens)
    assert dataset[far].rows.tolist() != dataset[far - len(dataset)].rows.tolist()  # reshuffled every epoch
    assert make_dataset(store, seed=2)[far].rows.tolist() != batch.rows.tolist()


def test_sequences_are_whole_or_random_crops(store: SequenceStore) -> None:
    dataset = make_dataset(store)
    starts = set()
    for pack in range(len(dataset)):
        batch = dataset[pack]
        assert len(batch.tokens) <= 2000
        for row, tokens in zip(batch.rows.tolist(), batch.unpack(batch.tokens), strict=True):
            stored = store[row]
            if len(stored) - 2 <= 300:
                assert tokens.tolist() == stored.tolist()
                continue
            residues = tokens[(tokens != BOS) & (tokens != EOS)].numpy().astype(np.uint8).tobytes()
            assert len(residues) == 300
            start = stored.tobytes()[1:-1].find(residues)
            assert start >= 0
            assert (tokens[0] == BOS) == (start == 0)
            assert (tokens[-1] == EOS) == (start + 300 == len(stored) - 2)
            starts.add(start)
    assert len(starts) > 20


def test_proteins_of_one_length_get_new_crops_in_each_pack_and_epoch(tmp_path: Path) -> None:
    letters = np.random.default_rng(0).choice(list(AMINO_ACIDS), (14, 400))
    make_store(
        tmp_path / "long.h5",
        [FastaRecord(f"p{i}", "", "".join(sequence), "") for i, sequence in enumerate(letters)],
        train=12,
        held_out=1,
    )
    store = SequenceStore(tmp_path / "long.h5")
    starts = {}
    for seed in (1, 2):
        dataset = make_dataset(store, seed=seed, budget=302)  # one protein per pack
        packs = [dataset[pack] for pack in range(30)]
        tokens = [pack.tokens[pack.tokens < 20].numpy().astype(np.uint8).tobytes() for pack in packs]
        starts[seed] = [
            store[int(pack.rows)].tobytes()[1:-1].find(crop) for pack, crop in zip(packs, tokens, strict=True)
        ]
        assert len(set(starts[seed])) > 15  # of 101 possible starts; the packs are from 3 epochs
    assert starts[1] != starts[2]
    dataset = make_dataset(store, max_len=399, budget=401)
    # each protein has two possible crops, and both occur
    assert {int(dataset[pack].tokens[0]) == BOS for pack in range(30)} == {True, False}


def test_the_key_of_a_plan_changes_with_everything_that_the_plan_depends_on(
    store: SequenceStore, proteins: list[FastaRecord], tmp_path: Path
) -> None:
    make_store(tmp_path / "more.h5", proteins[100:], train=100, held_out=1)
    make_store(tmp_path / "other.h5", [*proteins[101:200], proteins[100], *proteins[200:]], train=100, held_out=1)
    more, other = SequenceStore(tmp_path / "more.h5"), SequenceStore(tmp_path / "other.h5")

    def key(second: SequenceStore = more, first_row: int = 0, **changes: Any) -> str:
        group = StoreGroup([store, second])
        options = {"max_len": 300, "tokens_per_pack": 2000, "seed": 1, "weights": [1.0, 1.0]} | changes
        return PackDataset(group, group.split("train")[first_row:], **options).key

    keys = [key(), key(other), key(first_row=1), key(max_len=299), key(tokens_per_pack=2001), key(seed=2)]
    keys += [key(weights=[1.0, 2.0]), key(version=1)]
    assert key() == keys[0]
    assert len(set(keys)) == 8


def test_packs_of_version_2_do_not_depend_on_the_numpy_version(
    store: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packs(version: int) -> list[list[int]]:
        dataset = PackDataset(store, store.split("train"), max_len=100, tokens_per_pack=2000, seed=1, version=version)
        dataset.forget_plans()
        found = first_tokens(dataset)
        dataset.forget_plans()
        return found

    before = {version: packs(version) for version in VERSIONS}
    upgrade_numpy(monkeypatch)
    assert packs(1) != before[1]
    assert packs(2) == before[2]
    of_rows = PackDataset(store, store.split("train"), max_len=100, tokens_per_pack=2000, seed=1, version=1)
    of_rows.plan = PackDataset(store, store.split("train"), max_len=100, tokens_per_pack=2000, seed=1).plan
    assert first_tokens(of_rows) != before[2]  # version 1 crops differently, even with the plan of version 2


def test_crop_start_always_takes_the_first_residues(store: SequenceStore) -> None:
    dataset = PackDataset(store, store.split("train"), max_len=300, tokens_per_pack=2000, seed=1, crop="start")
    for pack in range(len(dataset)):
        batch = dataset[pack]
        for row, tokens in zip(batch.rows.tolist(), batch.unpack(batch.tokens), strict=True):
            assert tokens.tolist() == (store[row][:301] if store.lengths[row] > 300 else store[row]).tolist()


def test_a_crop_has_bos_or_eos_only_if_it_reaches_that_end() -> None:
    tokens = ProteinTokenizer().encode("ACDEF")
    first, last = crop_bounds(np.full(3, 5), np.arange(3), 3)
    crops = [tokens[a:b].tolist() for a, b in zip(first, last, strict=True)]
    assert crops == [[BOS, 0, 1, 2], [1, 2, 3], [2, 3, 4, EOS]]


@given(st.integers(1, 40), st.integers(0, 40))
def test_the_clipped_number_of_tokens_is_that_of_the_largest_crop(max_len: int, more: int) -> None:
    residues = max_len + 1 + more
    starts = np.arange(residues - max_len + 1)
    first, last = crop_bounds(np.full(len(starts), residues), starts, max_len)
    assert (last - first).max() == clipped_tokens(np.array(residues), max_len)
    assert first.min() >= 0
    assert last.max() == residues + 2


def test_evaluation_reads_every_sequence_once_in_order(store: SequenceStore) -> None:
    dataset = make_dataset(store, seed=None)
    batches = [dataset[pack] for pack in range(len(dataset))]
    assert np.concatenate([batch.rows.numpy() for batch in batches]).tolist() == dataset.rows.tolist()
    long = next(row for row in dataset.rows.tolist() if store.lengths[row] > 300)
    batch = next(batch for batch in batches if long in batch.rows)
    tokens = batch.unpack(batch.tokens)[batch.rows.tolist().index(long)]
    assert tokens.tolist() == store[long][:301].tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_and_workers_read_the_plan_in_order(store: SequenceStore, workers: int) -> None:
    dataset = make_dataset(store)
    across = len(dataset) - 2  # these steps cross the end of an epoch
    first, last = across // 4, across // 4 + 2
    expected = [dataset[pack].rows.tolist() for pack in range(first * 4, last * 4)]
    by_rank = []
    for rank in range(2):
        packs = RankPacks(first, last, packs_per_step=4, rank=rank, world_size=2)
        assert len(packs) == 4
        by_rank.append([batch.rows.tolist() for batch in pack_loader(dataset, packs, workers, pin_memory=False)])
    assert [rows for pair in zip(*by_rank, strict=True) for rows in pair] == expected


def first_tokens(dataset: PackDataset) -> list[list[int]]:
    return [dataset[pack].tokens.tolist() for pack in (0, len(dataset) + 1)]


def is_marked_random(array: np.ndarray) -> bool | None:
    """Whether this memory-mapped array is marked for random reads (MADV_RANDOM); None if the system cannot show it."""
    address, inside = array.__array_interface__["data"][0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "rr" in line.split()
    return None


def reads_at_random(dataset: PackDataset) -> list[bool]:
    _ = dataset[0]
    return [is_marked_random(dataset.tokens[0]), is_marked_random(dataset.group.stores[0].tokens)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_only_training_reads_at_random(store: SequenceStore, method: str, spawned_in_forks: None) -> None:
    """Sequential readers keep the system's read-ahead, even if the same process also trains on the same store."""
    training = make_dataset(store)
    shown = is_marked_random(store.tokens) is not None
    assert reads_at_random(training) == ([True, False] if shown else [None, None])
    assert not any(reads_at_random(make_dataset(store, seed=None)))
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(reads_at_random, [training]) == reads_at_random(training)
    assert len(pickle.dumps(training)) < 4 * len(training.rows) + 4000


@pytest.mark.parametrize("missing", ["constant", "call"])
def test_a_system_without_madvise_reads_the_same_packs(
    store: SequenceStore, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    expected = first_tokens(make_dataset(store))
    if missing == "constant":
        monkeypatch.delattr(mmap, "MADV_RANDOM")
    else:
        monkeypatch.setattr(mmap, "MADV_RANDOM", -1)  # the kernel rejects this value
    assert first_tokens(make_dataset(store)) == expected


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_and_spawn_workers_read_the_same_bytes(store: SequenceStore, method: str, spawned_in_forks: None) -> None:
    dataset = make_dataset(store)
    expected = first_tokens(dataset)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(first_tokens, [dataset] * 2) == [expected, expected]


def test_a_pickled_dataset_does_not_contain_its_plan(store: SequenceStore) -> None:
    dataset = make_dataset(store)
    _ = dataset[0]
    small = len(pickle.dumps(dataset))
    assert small < 4 * len(dataset.rows) + 4000
    assert pickle.loads(pickle.dumps(dataset))[5].tokens.tolist() == dataset[5].tokens.tolist()


def test_the_next_epoch_is_planned_ahead(store: SequenceStore) -> None:
    dataset = make_dataset(store, seed=12345)
    _ = dataset[0]
    dataset.planner.join(timeout=60)
    assert len(list(plan_folder().glob(f"{dataset.key}-1"))) == 1
    dataset.forget_plans()
    assert not list(plan_folder().glob(f"{dataset.key}-*"))


@pytest.fixture
def two_stores(store: SequenceStore, tmp_path: Path) -> StoreGroup:
    (tmp_path / "b.fasta").write_text("".join(f">b{i}\nMKV{'ACDEFGHIKL'[i % 10] * (i % 37 + 1)}\n" for i in range(200)))
    return StoreGroup([store, build_store([tmp_path / "b.fasta"], tmp_path / "b.h5")])


def test_a_mixture_has_the_fractions_of_its_weights(two_stores: StoreGroup) -> None:
    rows = two_stores.split("train")
    dataset = PackDataset(two_stores, rows, max_len=300, tokens_per_pack=2000, seed=3, weights=[1.0, 1.0])
    drawn = [dataset[pack] for pack in range(2 * len(dataset))]
    from_second = sum(int((batch.rows >= 400)[batch.segment_ids].sum()) for batch in drawn)
    assert abs(from_second / sum(len(batch.tokens) for batch in drawn) - 0.5) < 0.02
    for batch in itertools.islice(drawn, 0, None, 40):
        for row, tokens in zip(batch.rows.tolist(), batch.unpack(batch.tokens), strict=True):
            stored = two_stores.stores[0][row] if row < 400 else two_stores.stores[1][row - 400]
            assert len(stored) > 302 or tokens.tolist() == stored.tolist()
    natural = PackDataset(two_stores, rows, max_len=300, tokens_per_pack=2000, seed=3)
    seen = np.concatenate([natural.pack_rows(pack) for pack in range(len(natural))])
    assert len(np.unique(seen)) == len(seen) == len(rows) - natural.tail(0)


def test_invalid_sizes_weights_and_crops_are_errors(store: SequenceStore, two_stores: StoreGroup) -> None:
    with pytest.raises(ValueError, match=r"tokens_per_pack=512 cannot hold .*max_len=512 residues .*514 tokens"):
        check_pack_sizes(512, 512)
    with pytest.raises(ValueError, match=r"data\.max_len must be at least 1 residue, got 0"):
        check_pack_sizes(0, 512)
    with pytest.raises(
        ValueError, match=r"\d+ tokens per epoch, too few for one pack of data.tokens_per_pack=90000000"
    ):
        make_dataset(store, budget=90_000_000)
    rows, sizes = two_stores.split("train"), {"max_len": 300, "tokens_per_pack": 2000}
    with pytest.raises(ValueError, match=r"data\.weights has 1 weights for 2 stores"):
        PackDataset(two_stores, rows, seed=1, weights=[1.0], **sizes)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"data\.weights: {weight} is not a positive finite number"):
            PackDataset(two_stores, rows, seed=1, weights=[1.0, weight], **sizes)
    with pytest.raises(ValueError, match=r"b\.h5 has no training sequences"):
        PackDataset(two_stores, store.split("train"), seed=1, **sizes)
    with pytest.raises(ValueError, match=r"data\.crop=end; choose from random, start"):
        PackDataset(store, rows[:360], seed=1, crop="end", **sizes)
