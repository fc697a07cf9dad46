"""The order data.order=blocks, and the memory that the processes of a run need for a store of many sequences."""

import multiprocessing
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from protlig_dd.config.read import as_dict
from protlig_dd.config.train import changed_keys, check_train_config
from protlig_dd.data import blocks, draws, packing, rows
from protlig_dd.data import lengths as lengths_module
from protlig_dd.data import store as store_module
from protlig_dd.data.blocks import BlockDataset, blocks_of_windows, count_windows, packs_in_windows
from protlig_dd.data.draws import VERSIONS, random_subset
from protlig_dd.data.loader import PackDataset, RankPacks, pack_loader
from protlig_dd.data.packing import clipped_tokens
from protlig_dd.data.plan_cache import plan_folder
from protlig_dd.data.rows import SplitRows, index_blocks
from protlig_dd.data.store import SPLITS, SequenceStore, StoreGroup
from protlig_dd.evaluation.likelihood.held_out import length_counts
from protlig_dd.training.packs import subset, training_packs
from scripts.benchmarks.synthetic import write_store_of_lengths

from .conftest import Command, assert_one_line_error, train_config
from .test_training import TINY, assert_bit_identical, read_rows

GOLDEN_STORE = Path(__file__).parent / "golden/files/store.h5"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows and windows of 3 blocks, so that a small store has many windows."""
    monkeypatch.setattr(rows, "BLOCK_ROWS", 8)
    monkeypatch.setattr(blocks, "WINDOW_BLOCKS", 3)


def make_dataset(
    stores: SequenceStore | StoreGroup, *, seed: int = 1, max_len: int = 300, budget: int = 2000
) -> BlockDataset:
    group = stores if isinstance(stores, StoreGroup) else StoreGroup([stores])
    dataset = BlockDataset(group, SplitRows(group, "train"), max_len=max_len, tokens_per_pack=budget, seed=seed)
    dataset.plan_ahead = False  # a thread could still be planning when a test restores the sizes of blocks
    return dataset


@given(st.integers(1, 400), st.integers(0, 3), st.integers(0, 3))
def test_every_window_has_blocks_of_all_parts_of_the_store(n: int, seed: int, epoch: int) -> None:
    windows = blocks_of_windows(n, seed, epoch, 2)
    assert len(windows) == count_windows(n)
    assert sorted(np.concatenate(windows).tolist()) == list(range(n))
    parts = [set(part.tolist()) for part in np.array_split(np.arange(n), blocks.WINDOW_BLOCKS)]
    if n >= blocks.WINDOW_BLOCKS:
        assert all(part & set(window.tolist()) for part in parts for window in windows)
        assert max(map(len, windows)) < 2 * blocks.WINDOW_BLOCKS
    if n > 30:
        for other in (blocks_of_windows(n, seed, epoch + 1, 2), blocks_of_windows(n, seed + 1, epoch, 2)):
            assert [window.tolist() for window in other] != [window.tolist() for window in windows]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 60))
def test_the_windows_fill_at_least_the_announced_number_of_packs(totals: list[int], budget: int) -> None:
    announced = packs_in_windows(sum(totals), len(totals), budget)
    assert sum(total // budget for total in totals) >= announced
    worst = [total // budget * budget + budget - 1 for total in totals]  # every window just misses another pack
    assert sum(total // budget for total in worst) == packs_in_windows(sum(worst), len(worst), budget)


@given(st.lists(st.integers(1, 40), min_size=30, max_size=300), st.integers(2, 9), st.integers(2, 5), st.integers(0, 9))
def test_an_epoch_reads_each_sequence_at_most_once_and_leaves_out_only_tails(
    lengths: list[int], block_rows: int, window_blocks: int, epoch: int
) -> None:
    max_len, budget = 30, 50
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(rows, "BLOCK_ROWS", block_rows)
        patch.setattr(blocks, "WINDOW_BLOCKS", window_blocks)
        store = write_store_of_lengths(Path(folder) / "lengths.h5", np.array(lengths), len(lengths))
        tokens = clipped_tokens(store.lengths[:], max_len)
        windows = count_windows(-(-len(lengths) // block_rows))
        assume(packs_in_windows(int(tokens.sum()), windows, budget) > 0)
        dataset = make_dataset(store, max_len=max_len, budget=budget)
        first = epoch * len(dataset)
        packs = [dataset.pack_rows(pack) for pack in range(first, first + len(dataset))]
        read = np.concatenate(packs)
        assert len(np.unique(read)) == len(read) == len(lengths) - dataset.tail(epoch)
        assert all(0 < tokens[pack].sum() <= budget for pack in packs)
        epoch_windows = dataset.windows(epoch)
        window_of_block = {int(block): i for i, window in enumerate(epoch_windows.blocks) for block in window}
        window_of_pack = [{window_of_block[row // block_rows] for row in pack.tolist()} for pack in packs]
        assert all(len(window) == 1 for window in window_of_pack)  # no pack spans two windows
        numbers = [next(iter(window)) for window in window_of_pack]
        assert numbers == sorted(numbers)
        starts = np.append(0, epoch_windows.ends)
        for i in set(numbers) - {numbers[-1]}:  # each window but the last has all packs that it is guaranteed to fill
            of_window = np.isin(np.arange(len(lengths)) // block_rows, epoch_windows.blocks[i])
            assert numbers.count(i) == starts[i + 1] - starts[i] == tokens[of_window].sum() // budget
        dataset.forget_plans()


def test_a_run_that_starts_at_any_pack_reads_what_a_continuing_run_reads(
    store: SequenceStore, small_blocks: None
) -> None:
    dataset = make_dataset(store)
    assert dataset.n_windows > 10
    in_order = [dataset.pack_rows(pack).tolist() for pack in range(2 * len(dataset) + 5)]
    dataset.forget_plans()
    assert not list(plan_folder().glob("*-*"))
    for pack in (0, 7, len(dataset) - 1, len(dataset), 2 * len(dataset) + 4):
        fresh = make_dataset(store)
        assert fresh.pack_rows(pack).tolist() == in_order[pack]
        plans = [path for path in plan_folder().iterdir() if path.is_dir()]
        assert len(plans) == 1  # the start has planned one window, not an epoch
        fresh.forget_plans()


def test_other_seeds_epochs_and_block_sizes_have_other_packs(
    store: SequenceStore, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, other = make_dataset(store), make_dataset(store, seed=2)
    first = [dataset.pack_rows(pack).tolist() for pack in range(len(dataset))]
    second = [dataset.pack_rows(pack).tolist() for pack in range(len(dataset), 2 * len(dataset))]
    assert not {tuple(sorted(pack)) for pack in first} & {tuple(sorted(pack)) for pack in second}
    assert first != [other.pack_rows(pack).tolist() for pack in range(len(dataset))]
    full = PackDataset(store, store.split("train"), max_len=300, tokens_per_pack=2000, seed=1)
    keys = {dataset.key, other.key, full.key}
    for module, name, size in ((rows, "BLOCK_ROWS", 16), (blocks, "WINDOW_BLOCKS", 4)):
        monkeypatch.setattr(module, name, size)
        keys.add(make_dataset(store).key)
    assert len(keys) == 5


def test_the_packs_of_the_order_blocks_never_change(small_blocks: None) -> None:
    """If the packs changed, resumed runs would read their data in another order than before."""
    found = blocks_of_windows(10, 7, 1, 2)
    assert [window.tolist() for window in found] == [[3, 4, 8, 1], [5, 7, 0], [6, 9, 2]]
    dataset = make_dataset(SequenceStore(GOLDEN_STORE), seed=0, max_len=150, budget=900)
    packs = [dataset.pack_rows(pack).tolist() for pack in (0, len(dataset) + 1)]
    assert packs == [[46, 44, 14, 76, 13, 8, 12, 79, 74], [54, 25, 8, 52, 64, 50, 24]]


def test_the_packs_of_the_full_order_are_those_of_earlier_versions() -> None:
    group = StoreGroup([SequenceStore(GOLDEN_STORE)])
    for selected in (SplitRows(group, "train"), group.split("train")):
        dataset = PackDataset(group, selected, max_len=150, tokens_per_pack=900, seed=0)
        assert dataset.key == "a60470f4739fae371d77e3b6cbf71909"
        packs = [dataset.pack_rows(pack).tolist() for pack in (0, len(dataset) + 1)]
        assert packs == [[10, 14, 54, 61, 26, 6, 57, 15, 23], [79, 35, 6, 19, 70, 55, 56]]
        dataset.forget_plans()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_packs_do_not_depend_on_the_numbers_of_ranks_and_workers(
    store: SequenceStore, small_blocks: None, workers: int
) -> None:
    dataset = make_dataset(store)
    across = len(dataset) // 4 - 1  # these steps cross the end of an epoch
    expected = [dataset[pack].rows.tolist() for pack in range(across * 4, (across + 3) * 4)]
    for ranks in (1, 2, 4):
        read: dict[int, list[int]] = {}
        for rank in range(ranks):
            packs = RankPacks(across, across + 3, packs_per_step=4, rank=rank, world_size=ranks)
            batches = pack_loader(dataset, packs, workers, pin_memory=False)
            read |= {pack: batch.rows.tolist() for pack, batch in zip(packs, batches, strict=True)}
        assert [read[pack] for pack in sorted(read)] == expected


def test_packs_contain_the_tokens_of_their_rows(store: SequenceStore, small_blocks: None) -> None:
    dataset = make_dataset(store)
    for pack in (0, 5, len(dataset)):
        batch = dataset[pack]
        for row, tokens in zip(batch.rows.tolist(), batch.unpack(batch.tokens), strict=True):
            if len(store[row]) <= 302:
                assert tokens.tolist() == store[row].tolist()
    assert dataset.tokens[0] is store.tokens  # mapped with the system's read-ahead


def test_no_block_has_rows_of_two_stores(tmp_path: Path, small_blocks: None) -> None:
    sizes = {"a": 61, "b": 30}
    stores = [
        write_store_of_lengths(tmp_path / f"{name}.h5", np.arange(5, 40) + i, n)
        for i, (name, n) in enumerate(sizes.items())
    ]
    group = StoreGroup(stores)
    dataset = make_dataset(group, max_len=40, budget=100)
    index = dataset.blocks
    assert index.rows.tolist() == [8] * 7 + [5] + [8] * 3 + [6]
    assert index.store.tolist() == [0] * 8 + [1] * 4
    assert index.first[8] == index.end[7] == 61
    lengths = group.lengths[group.split("train")]
    assert index.of_stores(index.tokens, 2) == [int((part + 2).sum()) for part in (lengths[:61], lengths[61:])]
    read = np.concatenate([dataset.pack_rows(pack) for pack in range(len(dataset))])
    assert len(np.unique(read)) == len(read) == 91 - dataset.tail(0)
    assert (read >= 61).any()


def test_the_windows_of_a_store_sorted_by_length_have_similar_lengths(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK_ROWS", 20)
        lengths = np.sort(np.random.default_rng(0).gamma(2, 150, 10_000).astype(np.int64) + 20)
        dataset = make_dataset(write_store_of_lengths(tmp_path / "sorted.h5", lengths, len(lengths)), max_len=1000)
        windows = dataset.windows(0).blocks
        means = [dataset.blocks.tokens[window].sum() / dataset.blocks.rows[window].sum() for window in windows]
        assert len(windows) == 31
        assert np.std(means) < 0.05 * np.mean(means)  # 0.2 if the blocks of a window were chosen from the whole store
        assert dataset.mean_tokens == pytest.approx(min(means))


def test_blocks_without_rows_of_the_split_are_left_out(tmp_path: Path, small_blocks: None) -> None:
    """With own splits, prepare writes the training sequences first, and then the others."""
    store = write_store_of_lengths(tmp_path / "all.h5", np.arange(10, 50), 200)
    group, selected = StoreGroup([store]), np.arange(16, 90, dtype=np.uint32)
    index = index_blocks(group, selected, 100)
    assert (int(index.first[0]), int(index.end[-1]), index.rows.tolist()) == (16, 96, [8] * 9 + [2])
    dataset = BlockDataset(group, selected, max_len=100, tokens_per_pack=120, seed=0)
    dataset.plan_ahead = False
    read = np.concatenate([dataset.pack_rows(pack) for pack in range(len(dataset))])
    assert (read.min() >= 16, read.max() < 90) == (True, True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_rows_of_a_split_are_the_same_when_they_are_read_in_blocks(
    store: SequenceStore, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    group = StoreGroup([store])
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr(store_module, "ROWS_AT_ONCE", size)
        monkeypatch.setattr(draws, "ROWS_AT_ONCE", size)
        for split in SPLITS:
            lazy, array = SplitRows(group, split), store.split(split)
            assert len(lazy) == len(array)
            assert np.asarray(lazy).dtype == np.uint32
            assert np.asarray(lazy).tolist() == array.tolist()
            for positions in (np.arange(len(array)), np.arange(0, len(array), 3), np.array([len(array) - 1])):
                assert lazy[positions].tolist() == array[positions].tolist()
            for limit in (1, 5, len(array) - 1, len(array), len(array) + 1):
                expected = array if limit >= len(array) else np.sort(draws.shuffled(array, [3, limit], version)[:limit])
                assert random_subset(lazy, limit, 3, version).tolist() == expected.tolist()
                assert random_subset(array, limit, 3, version).tolist() == expected.tolist()


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak memory that Python and numpy allocate during the call. Mapped files do not count."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def large_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SequenceStore]:
    """Stores of 100,000 and 500,000 sequences. All sizes of buffers are small in comparison."""
    monkeypatch.setattr(store_module, "ROWS_AT_ONCE", 1 << 12)
    monkeypatch.setattr(draws, "ROWS_AT_ONCE", 1 << 12)
    monkeypatch.setattr(draws, "ROWS_PER_SORT", 1 << 12)
    monkeypatch.setattr(packing, "ROWS_AT_ONCE", 1 << 12)
    monkeypatch.setattr(lengths_module, "ROWS_AT_ONCE", 1 << 12)
    monkeypatch.setattr(rows, "BLOCK_ROWS", 1 << 10)
    lengths = np.random.default_rng(0).integers(20, 600, 4096)
    return [write_store_of_lengths(tmp_path / f"{n}.h5", lengths, n) for n in (100_000, 500_000)]


def start_of_rank(store: SequenceStore, order: str) -> PackDataset:
    """Do what a rank of a run does before its first step: plan or map the plan, count lengths, choose proteins."""
    group = StoreGroup([SequenceStore(store.path)])
    config = train_config(f"data.order={order}", "data.max_len=400", "data.tokens_per_pack=20000")
    dataset = training_packs(config, group)
    dataset.plan_ahead = False
    dataset.pack_rows(len(dataset) // 2)
    length_counts(group, 400)
    subset(group, "train", 100, 0, 2)
    pickle.dumps(dataset)
    return dataset


@pytest.mark.parametrize("order", ["full", "blocks"])
def test_a_rank_that_makes_no_plan_needs_no_memory_for_the_sequences_of_the_store(
    order: str, large_stores: list[SequenceStore]
) -> None:
    few, many = large_stores
    start_of_rank(few, order).forget_plans()  # what Python imports and caches is not measured
    planning = [peak_bytes(lambda store=store: start_of_rank(store, order)) for store in large_stores]
    mapping = [peak_bytes(lambda store=store: start_of_rank(store, order)) for store in large_stores]
    more = len(many) - len(few)
    assert (
        mapping[1] - mapping[0] < 0.4 * more
    )  # the sums over blocks, which are small here, take 0.04 bytes a sequence
    # the rows, their order, and an eighth of the words to sort, twice; with blocks, one window at a time
    most = 12 if order == "full" else 0.4
    assert planning[1] - planning[0] < most * more
    dataset = start_of_rank(few, order)
    assert len(pickle.dumps(dataset)) < 20_000


def rows_of_pack(dataset: PackDataset) -> list[int]:
    return dataset.pack_rows(3).tolist()


@pytest.mark.parametrize("order", [PackDataset, BlockDataset])
def test_a_spawned_process_reads_the_same_packs(
    order: type[PackDataset], store: SequenceStore, spawned_in_forks: None
) -> None:
    group = StoreGroup([store])
    dataset = order(group, SplitRows(group, "train"), max_len=300, tokens_per_pack=2000, seed=1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(rows_of_pack, [dataset]) == rows_of_pack(dataset)


def test_lengths_of_several_stores_are_those_of_their_sequences(store: SequenceStore, tmp_path: Path) -> None:
    second = write_store_of_lengths(tmp_path / "b.h5", np.array([3, 9, 27]), 7)
    group = StoreGroup([store, second])
    expected = [*(len(store[row]) - 2 for row in range(len(store))), 3, 9, 27, 3, 9, 27, 3]
    assert len(group.lengths) == 407
    assert group.lengths[:].tolist() == expected
    chosen = np.array([406, 3, 400, 399], np.uint32)
    assert group.lengths[chosen].tolist() == [expected[row] for row in chosen.tolist()]
    assert group.lengths[chosen].dtype == np.int32
    assert (int(group.lengths[402]), int(group.lengths[2])) == (27, expected[2])
    assert group.lengths[399:402].tolist() == expected[399:402]


def test_a_config_without_the_order_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    full, by_blocks = train_config(), train_config("data.order=blocks")
    assert "order" not in as_dict(full)["data"]  # earlier versions can read the file
    assert as_dict(by_blocks)["data"]["order"] == "blocks"
    assert changed_keys(as_dict(full), as_dict(by_blocks)) == ["data.order: full -> blocks"]
    assert changed_keys(as_dict(full), as_dict(train_config("data.order=full"))) == []
    mixture = train_config("data.order=blocks", "data.path=[a.h5,b.h5]", "data.weights=[1,2]")
    with pytest.raises(ValueError, match=r"data.order=blocks reads each store once.* data.weights=\[1.0, 2.0\]"):
        check_train_config(mixture)


PROGRAM = """
import runpy, sys
from protlig_dd.data import blocks, rows
rows.BLOCK_ROWS, blocks.WINDOW_BLOCKS = 8, 3
sys.argv = ["protlig_dd.training", {arguments}]
runpy.run_module("protlig_dd.training", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_run_is_resumed_with_other_workers_bit_for_bit(
    store: SequenceStore, run_python: Command, tmp_path: Path, small_blocks: None
) -> None:
    """The order of the run has windows that are smaller than an epoch, and the run is stopped within a window."""

    def train(name: str, *more: str) -> str:
        options = ["data.order=blocks", "trainer.max_steps=30", f"data.path={store.path}", f"run.name={name}", *more]
        arguments = ", ".join(map(repr, [*TINY, *options]))
        done = run_python("-c", PROGRAM.format(arguments=arguments))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = train("whole", "data.workers=1")
    assert "360 sequences in 15 windows of at most 24 (data.order=blocks)" in out
    train("parts", "data.workers=2", "trainer.stop_at_step=17")
    assert "resuming from" in train("parts", "data.workers=0")
    assert_bit_identical(tmp_path / "runs/whole", tmp_path / "runs/parts")
    dataset = make_dataset(store, seed=0, max_len=200, budget=800)
    assert dataset.n_windows == 15
    for step, read in read_rows(tmp_path / "runs/whole").items():
        packs = [dataset.pack_rows(2 * (step - 1) + i) for i in (0, 1)]
        assert read == sorted(np.concatenate(packs).tolist())


@pytest.mark.slow
def test_a_run_keeps_its_order_and_rejects_other_values(
    store: SequenceStore, trained_run: Path, run_python: Command, tmp_path: Path
) -> None:
    arguments = [*TINY, f"data.path={store.path}", "run.name=small", "trainer.max_steps=3"]
    assert run_python("-m", "protlig_dd.training", *arguments).returncode == 0
    changed = run_python("-m", "protlig_dd.training", *arguments, "data.order=blocks")
    assert_one_line_error(changed, "data.order: full -> blocks", "run.fresh=true")
    typing = run_python("-m", "protlig_dd.training", *arguments, "data.order=block", "run.name=new")
    assert_one_line_error(typing, "data.order=block", "full, blocks")
    weighted = run_python(
        "-m", "protlig_dd.training", *arguments, "data.order=blocks", "data.weights=[1]", "run.name=new"
    )
    assert_one_line_error(weighted, "data.order=blocks", "data.weights")
    large = ["data.order=blocks", "data.tokens_per_pack=1000000", "run.name=new"]
    few = run_python("-m", "protlig_dd.training", *arguments, *large)
    assert_one_line_error(few, "too few for one pack of data.tokens_per_pack=1000000")
    assert not (tmp_path / "runs/new/checkpoints").exists()
