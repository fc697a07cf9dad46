import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data.loader import PackDataset, RankPacks, check_pack_sizes, clipped_tokens, pack_loader, pack_starts
from protlig_dd.data.store import SequenceStore
from protlig_dd.tokenizer import BOS, EOS


def make_dataset(store: SequenceStore, *, seed: int | None = 1, max_len: int = 300, budget: int = 2000) -> PackDataset:
    return PackDataset(store, store.split("train"), max_len=max_len, tokens_per_pack=budget, seed=seed)


def test_the_example_of_the_docs() -> None:
    assert pack_starts(np.array([5, 6, 4, 1]), 12).tolist() == [0, 2, 4]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 120))
def test_packs_hold_whole_sequences_within_the_budget_and_close_only_when_full(tokens: list[int], budget: int) -> None:
    starts = pack_starts(np.array(tokens), budget)
    assert starts[0] == 0
    assert starts[-1] == len(tokens)
    packs = [tokens[a:b] for a, b in itertools.pairwise(starts.tolist())]
    assert all(pack and sum(pack) <= budget for pack in packs)
    assert all(sum(pack) + following[0] > budget for pack, following in itertools.pairwise(packs))
    # what makes a fixed number of packs per epoch possible
    assert sum(tokens) // budget <= len(packs)


def test_an_epoch_has_no_sequence_twice_and_misses_only_its_tail(store: SequenceStore) -> None:
    dataset = make_dataset(store)
    for epoch in (0, 1, 5):
        packs = range(epoch * len(dataset), (epoch + 1) * len(dataset))
        rows = np.concatenate([dataset.pack_rows(pack) for pack in packs])
        assert len(np.unique(rows)) == len(rows)
        tail = np.setdiff1d(dataset.rows, rows)
        tail_tokens = clipped_tokens(store.lengths[tail], dataset.max_len).sum()
        all_tokens = clipped_tokens(store.lengths[dataset.rows], dataset.max_len).sum()
        assert tail_tokens < 0.15 * all_tokens  # the budget here is small: 7 sequences a pack


def test_the_plan_is_a_pure_function_of_seed_and_index(store: SequenceStore) -> None:
    dataset = make_dataset(store)
    far = 7 * len(dataset) + 3
    batch = dataset[far]
    _ = dataset[0]
    assert torch.equal(dataset[far].tokens, batch.tokens)
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
            starts.add(start)
    assert len(starts) > 20


def test_evaluation_sees_every_sequence_once_in_order(store: SequenceStore) -> None:
    dataset = make_dataset(store, seed=None)
    batches = [dataset[pack] for pack in range(len(dataset))]
    assert np.concatenate([batch.rows.numpy() for batch in batches]).tolist() == dataset.rows.tolist()
    long = next(row for row in dataset.rows if store.lengths[row] > 300)
    batch = next(batch for batch in batches if long in batch.rows)
    tokens = batch.unpack(batch.tokens)[batch.rows.tolist().index(long)]
    assert tokens.tolist() == store[long][:301].tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ranks_and_workers_read_the_plan_in_order(store: SequenceStore, workers: int) -> None:
    dataset = make_dataset(store)
    expected = [dataset[pack].rows.tolist() for pack in range(3 * 4, 5 * 4)]  # steps 3 and 4 of 4 packs
    by_rank = []
    for rank in range(2):
        packs = RankPacks(3, 5, packs_per_step=4, rank=rank, world_size=2)
        assert len(packs) == 4
        by_rank.append([batch.rows.tolist() for batch in pack_loader(dataset, packs, workers, pin_memory=False)])
    assert [rows for pair in zip(*by_rank, strict=True) for rows in pair] == expected


def test_sizes_that_cannot_work_are_refused(store: SequenceStore) -> None:
    with pytest.raises(ValueError, match=r"tokens_per_pack=512 cannot hold .*max_len=512 residues .*514 tokens"):
        check_pack_sizes(512, 512)
    with pytest.raises(ValueError, match=r"max_len is 0"):
        check_pack_sizes(0, 512)
    with pytest.raises(ValueError, match=r"\d+ tokens, less than one pack of data.tokens_per_pack=90000000"):
        make_dataset(store, budget=90_000_000)
