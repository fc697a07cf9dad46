import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare

from protlig_dd.data import draws, plan_cache
from protlig_dd.data.draws import VERSIONS, random_below, random_subset, shuffled
from protlig_dd.data.packing import (
    Plan,
    clipped_tokens,
    epoch_rows,
    make_plan,
    pack_starts,
    packs_in_epoch,
    token_quotas,
    total_tokens,
)
from protlig_dd.data.plan_cache import plan_folder, remove_plans, shared_plan


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_packs_start_where_the_documented_example_says() -> None:
    assert pack_starts([np.array([5, 6, 4, 1])], 12).tolist() == [0, 2, 4]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200),
    st.integers(50, 120),
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_packs_contain_whole_sequences_within_the_budget_and_close_only_when_full(
    tokens: list[int], budget: int, sizes: list[int]
) -> None:
    cuts = [cut for cut in itertools.accumulate(itertools.islice(itertools.cycle(sizes), 200)) if cut < len(tokens)]
    starts = pack_starts(np.split(np.array(tokens), cuts), budget)  # the order may be divided into blocks of any sizes
    assert starts[0] == 0
    assert starts[-1] == len(tokens)
    packs = [tokens[a:b] for a, b in itertools.pairwise(starts.tolist())]
    assert all(pack and sum(pack) <= budget for pack in packs)
    assert all(sum(pack) + following[0] > budget for pack, following in itertools.pairwise(packs))
    # this lower bound on the number of packs makes it possible to fix the number of packs per epoch
    assert sum(tokens) // budget <= len(packs)


GROUPS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=40), min_size=1, max_size=3)


def group_rows(groups: list[list[int]]) -> tuple[list[np.ndarray], np.ndarray]:
    ends = np.cumsum([len(group) for group in groups])
    return np.split(np.arange(ends[-1], dtype=np.uint32), ends[:-1]), np.array(list(itertools.chain(*groups)))


def epochs(
    groups: list[list[int]], weights: list[float] | None, max_len: int, seed: int, count: int, version: int = 2
) -> list[np.ndarray]:
    rows, lengths = group_rows(groups)
    totals = [total_tokens(lengths, group, max_len) for group in rows]
    wanted = token_quotas(totals, weights)
    return [
        epoch_rows(rows, lengths, totals, wanted, max_len=max_len, seed=seed, epoch=epoch, version=version)
        for epoch in range(count)
    ]


@given(GROUPS, st.integers(5, 30), st.integers(0, 3))
def test_without_weights_every_epoch_has_every_row_once(groups: list[list[int]], max_len: int, seed: int) -> None:
    everything = list(range(sum(map(len, groups))))
    orders = epochs(groups, None, max_len, seed, 3)
    assert all(sorted(rows.tolist()) == everything for rows in orders)
    assert [rows.tolist() for rows in epochs(groups, None, max_len, seed, 2)] == [rows.tolist() for rows in orders[:2]]


@given(GROUPS, st.integers(5, 30), st.data())
def test_a_mixture_reads_its_longest_store_once_an_epoch_and_the_others_evenly(
    groups: list[list[int]], max_len: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.2, 3), min_size=len(groups), max_size=len(groups)))
    rows, lengths = group_rows(groups)
    totals = [total_tokens(lengths, group, max_len) for group in rows]
    wanted = token_quotas(totals, weights)
    longest = int(np.argmax([total / weight for total, weight in zip(totals, weights, strict=True)]))
    assert wanted[longest] == totals[longest]
    count = 4
    drawn = epochs(groups, weights, max_len, 7, count)
    times = Counter(np.concatenate(drawn).tolist())
    for number, group in enumerate(rows):
        row_counts = [times[row] for row in group.tolist()]
        assert max(row_counts) - min(row_counts) <= 1
        if number == longest:
            assert set(row_counts) == {count}
        # the store is read for as many tokens as its weight requests, to within one sequence
        tokens = int(np.array(row_counts) @ clipped_tokens(lengths[group], max_len))
        assert abs(tokens - count * wanted[number]) <= max_len + 1
    # every epoch fills at least the number of packs that packs_in_epoch returns
    budget = max_len + 5
    packs = packs_in_epoch(totals, wanted, budget, max_len)
    for epoch_order in drawn:
        assert len(make_plan(epoch_order, lengths, max_len=max_len, tokens_per_pack=budget).starts) - 1 >= packs


@given(st.integers(1, 30), st.integers(1, 3), st.lists(st.floats(0.2, 3), min_size=3, max_size=3))
def test_an_epoch_fills_at_least_the_announced_number_of_packs(max_len: int, most: int, weights: list[float]) -> None:
    """All sequences have the maximum length and packs are small, so an epoch with one sequence less may lose a pack."""
    groups, budget = [[max_len] * 20, [max_len] * 15, [max_len] * 25], most * (max_len + 2)
    rows, lengths = group_rows(groups)
    totals = [total_tokens(lengths, group, max_len) for group in rows]
    packs = packs_in_epoch(totals, token_quotas(totals, weights), budget, max_len)
    for order in epochs(groups, weights, max_len, 3, 6):
        assert len(make_plan(order, lengths, max_len=max_len, tokens_per_pack=budget).starts) - 1 >= packs


def test_every_epoch_and_every_pass_over_a_store_has_another_order() -> None:
    groups = [[9] * 50, [9] * 50]
    first, second = epochs(groups, None, 30, 1, 2)
    assert first.tolist() != second.tolist()
    assert first.tolist() != epochs(groups, None, 30, 2, 1)[0].tolist()
    # the second store is read one and a half times per epoch, so half of its rows are read twice
    twice = [
        {row for row, n in Counter(rows.tolist()).items() if n == 2} for rows in epochs(groups, [2.0, 3.0], 30, 1, 4)
    ]
    assert [len(rows) for rows in twice] == [25] * 4
    assert twice[0] | twice[1] == set(range(50, 100))  # epoch 1 reads the other half twice
    assert twice[0] not in (twice[2], twice[3])  # epochs 2 and 3 divide the rows in another way


KEYS = st.lists(st.integers(0, 2**40), min_size=1, max_size=3)


def test_the_orders_of_plan_version_2_never_change() -> None:
    """If an order changed, resumed runs would read their data in another order than before."""
    assert shuffled(np.arange(10, dtype=np.uint32), [7, 1, 0], 2).tolist() == [1, 3, 2, 7, 8, 4, 5, 9, 0, 6]
    assert shuffled(np.arange(10), [7, 1, 1], 2).tolist() == [9, 8, 2, 6, 7, 4, 1, 5, 0, 3]
    assert random_below(np.array([1, 2, 10, 1000, 10**6]), [7, 2, 0], 2).tolist() == [0, 1, 0, 570, 439288]
    assert random_subset(np.arange(100, 200), 5, 3, 2).tolist() == [121, 182, 187, 193, 196]


@given(st.integers(0, 200), st.sampled_from([1, 2, 16, 1 << 25]), KEYS)
def test_an_order_has_every_row_once_for_blocks_of_any_size(n: int, part: int, key: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "ROWS_PER_SORT", part)
        patch.setattr(draws, "ROWS_AT_ONCE", 7)
        order = shuffled(np.arange(n, dtype=np.uint32) * 3, key, 2)
    assert sorted(order.tolist()) == list(range(0, 3 * n, 3))
    assert order.dtype == np.uint32
    assert order.tolist() == shuffled(np.arange(n, dtype=np.uint32) * 3, key, 2).tolist()
    if n > 30:
        assert order.tolist() != shuffled(np.arange(n, dtype=np.uint32) * 3, [*key[:-1], key[-1] + 1], 2).tolist()


def test_every_row_is_equally_likely_at_every_position() -> None:
    n, times = 16, 4800
    orders = np.array([shuffled(np.arange(n), [0, epoch], 2) for epoch in range(times)])
    rows = np.arange(n)
    counts = np.array([(orders == row).sum(0) for row in rows])  # (row, position)
    # the row and column sums of the n^2 counts are fixed, so (n - 1)^2 degrees of freedom remain
    assert chi2.sf(((counts - times / n) ** 2 / (times / n)).sum(), (n - 1) ** 2) > 0.001
    after = np.zeros((n, n))
    np.add.at(after, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    # each order has n - 1 pairs of neighbours, and there are n (n - 1) possible pairs
    after, expected = after[~np.eye(n, dtype=bool)], times / n
    assert chi2.sf(((after - expected) ** 2 / expected).sum(), n * (n - 1) - 1) > 0.001
    numbers = random_below(np.full(6000, 6), [5, 1], 2)
    assert chisquare(np.bincount(numbers, minlength=6)).pvalue > 0.001
    assert set(random_below(np.full(200, 3), [5, 2], 2).tolist()) == {0, 1, 2}


class OtherGenerator(np.random.Generator):
    """A stand-in for numpy's generator after an upgrade of numpy that changes the random streams."""

    def shuffle(self, x: Any, axis: int = 0) -> None:  # `permutation` calls this method too
        super().shuffle(x, axis)
        x[:] = x[::-1].copy()

    def integers(self, *arguments: Any, **options: Any) -> Any:
        return super().integers(*arguments, **options)[::-1]


def upgrade_numpy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(np.random, "default_rng", lambda seed: OtherGenerator(np.random.PCG64(seed)))


@pytest.mark.parametrize("weights", [None, [2.0, 3.0]])
def test_plans_of_version_2_do_not_depend_on_the_numpy_version(
    weights: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [[9] * 50, [9] * 50]
    before = {version: epochs(groups, weights, 30, 1, 3, version) for version in VERSIONS}
    upgrade_numpy(monkeypatch)
    for version, changes in ((1, True), (2, False)):
        after = epochs(groups, weights, 30, 1, 3, version)
        assert ([rows.tolist() for rows in after] != [rows.tolist() for rows in before[version]]) == changes


def test_plan_version_1_uses_numpys_shuffle() -> None:
    rows = np.arange(1000, dtype=np.uint32)
    in_place = rows.copy()
    np.random.default_rng([3, 1, 2]).shuffle(in_place)
    assert shuffled(rows, [3, 1, 2], 1).tolist() == in_place.tolist()
    drawn = np.random.default_rng([3, 2, 5]).integers(np.array([5, 1000]))
    assert random_below(np.array([5, 1000]), [3, 2, 5], 1).tolist() == drawn.tolist()


def small_plan() -> Plan:
    return Plan(np.arange(5, dtype=np.uint32), np.array([0, 2, 5]))


def test_a_plan_is_made_once_and_memory_mapped(tmp_path: Path) -> None:
    made: list[int] = []

    def counted() -> Plan:
        made.append(1)
        return small_plan()

    for _ in range(3):
        shared = shared_plan("key", 4, counted)
        assert shared is not None
        assert isinstance(shared.rows.base, np.memmap)
        assert not shared.rows.flags.writeable
        assert (shared.rows.tolist(), shared.starts.tolist()) == ([0, 1, 2, 3, 4], [0, 2, 5])
    assert len(made) == 1
    assert plan_folder().parent == tmp_path
    assert plan_folder().stat().st_mode & 0o777 == 0o700


def process_that_makes_the_plan(seconds: float) -> int:
    def slow() -> Plan:
        time.sleep(seconds)
        return Plan(np.array([os.getpid()]), np.array([0, 1]))

    shared = shared_plan("race", 0, slow)
    assert shared is not None
    return int(shared.rows[0])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_only_one_of_many_processes_makes_the_plan(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(6) as pool:
        assert len(set(pool.map(process_that_makes_the_plan, [0.2] * 12))) == 1


def test_a_plan_is_made_by_another_process_if_the_first_died(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=process_that_makes_the_plan, args=(60,))
    process.start()
    while not list(plan_folder().glob("race-0.*")):
        time.sleep(0.01)
    assert shared_plan("race", 0, small_plan, wait=False) is None  # the first process is still making the plan
    process.kill()
    process.join()
    shared = shared_plan("race", 0, small_plan)
    assert shared is not None
    assert shared.rows.tolist() == [0, 1, 2, 3, 4]


def slow_plan() -> Plan:
    time.sleep(0.5)
    return small_plan()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_forked_while_a_plan_is_made_does_not_keep_the_lock() -> None:
    thread = threading.Thread(target=shared_plan, args=("fork", 1, slow_plan))
    thread.start()
    while not list(plan_folder().glob("fork-1.*")):
        time.sleep(0.01)
    worker = multiprocessing.get_context("fork").Process(target=shared_plan, args=("fork", 2, small_plan))
    worker.start()  # the worker inherits the file descriptor of the lock and requests the lock itself
    worker.join(timeout=30)
    thread.join(timeout=30)
    assert worker.exitcode == 0
    assert {path.name for path in plan_folder().iterdir() if path.is_dir()} == {"fork-1", "fork-2"}


@pytest.mark.parametrize("left", [{}, {"rows.npy": b""}, {"rows.npy": b"", "starts.npy": b"\x93NUMPY"}])
def test_an_incomplete_plan_is_made_again(left: dict[str, bytes]) -> None:
    path = plan_folder() / "torn-0"
    path.mkdir()
    for name, content in left.items():
        (path / name).write_bytes(content)
    shared = shared_plan("torn", 0, small_plan)
    assert shared is not None
    assert shared.rows.tolist() == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in plan_folder().iterdir()) == ["torn-0", "torn.lock"]


def test_old_plans_are_removed_but_mapped_ones_stay_readable() -> None:
    first = shared_plan("key", 0, small_plan)
    assert first is not None
    for epoch in (1, 2):
        shared_plan("key", epoch, small_plan)
    shared_plan("other", 0, small_plan)
    names = sorted(path.name for path in plan_folder().iterdir() if path.is_dir())
    assert names == ["key-1", "key-2", "other-0"]
    assert first.rows.tolist() == [0, 1, 2, 3, 4]
    remove_plans("key")
    assert sorted(path.name for path in plan_folder().iterdir() if path.is_dir()) == ["other-0"]


def test_a_plan_folder_of_another_user_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    plan_folder()
    (tmp_path / f"protlig_dd-{uid}").rename(tmp_path / f"protlig_dd-{uid + 1}")
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(ValueError, match=rf"belongs to user {uid}, not to {uid + 1}; set TMPDIR"):
        plan_folder()


def test_the_error_for_an_unwritable_temporary_folder_names_tmpdir(tmp_path: Path) -> None:
    def full() -> Plan:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"cannot store the plan of an epoch .*No space left.*; set TMPDIR"):
        shared_plan("key", 0, full)
    assert [path.name for path in plan_folder().iterdir()] == ["key.lock"]
    (tmp_path / f"protlig_dd-{os.getuid()}" / "key.lock").unlink()
    plan_folder().rmdir()
    (tmp_path / f"protlig_dd-{os.getuid()}").write_text("a file")
    with pytest.raises(ValueError, match="cannot store the plan of an epoch"):
        plan_cache.plan_folder()
