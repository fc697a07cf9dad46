import dataclasses
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from protlig_dd.batch import PackedBatch, StaticShape

from .conftest import raises_value_error, random_batch

lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def test_a_batch_has_the_fields_of_the_documented_example() -> None:
    batch = random_batch([5, 6, 4, 1])
    assert batch.cu_seqlens.tolist() == [0, 5, 11, 15, 16]
    assert batch.segment_ids.tolist() == [0] * 5 + [1] * 6 + [2] * 4 + [3]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0]
    assert batch.lengths == (5, 6, 4, 1)
    assert batch.max_seqlen == 6


@given(lengths_strategy)
def test_unpack_undoes_pack(lengths: list[int]) -> None:
    batch = random_batch(lengths)
    parts = batch.unpack(batch.tokens)
    assert [len(part) for part in parts] == lengths
    again = PackedBatch.pack(parts)
    for field in dataclasses.fields(PackedBatch):
        mine, theirs = getattr(batch, field.name), getattr(again, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_store_rows_of_a_pack_stay_on_the_cpu_and_are_minus_one_by_default() -> None:
    batch = PackedBatch.pack([torch.tensor([1, 2])], rows=[7]).to("meta")
    assert batch.tokens.device.type == "meta"
    assert batch.rows.tolist() == [7]
    assert random_batch([2, 3]).rows.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(32, 32, 512, dtype=torch.int64)}, r"\(total,\), got shape \(32, 32, 512\)"),
        ({"tokens": torch.zeros(5, dtype=torch.int32)}, "torch.int64, got torch.int32"),
        ({"tokens": torch.zeros(6, dtype=torch.int64)}, "sum to 5 but tokens has 6"),
        ({"lengths": (2, 4)}, "sum to 6 but tokens has 5"),
        ({"lengths": (0, 5)}, "at least one token"),
        ({"max_seqlen": 2}, "max_seqlen is 2 but the longest sequence has 3"),
        ({"cu_seqlens": torch.tensor([2, 5], dtype=torch.int32)}, r"cu_seqlens must be \(3,\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "torch.int32, got .* torch.int64"),
        ({"positions": torch.zeros(5, dtype=torch.int64, device="meta")}, "positions is on meta but tokens is on cpu"),
    ],
)
def test_a_pack_with_inconsistent_fields_is_an_error(changes: dict[str, Any], message: str) -> None:
    with raises_value_error(message):
        dataclasses.replace(random_batch([2, 3]), **changes)


@given(lengths_strategy, st.integers(0, 999))
def test_a_random_subset_has_the_requested_number_of_candidates(lengths: list[int], seed: int) -> None:
    batch, generator = random_batch(lengths), torch.Generator().manual_seed(seed)
    candidates = torch.rand(sum(lengths), generator=generator) < 0.6
    available = torch.tensor([int(part.sum()) for part in batch.unpack(candidates)])
    counts = (torch.rand(len(lengths), generator=generator) * (available + 1)).long()
    chosen = batch.random_subset(candidates, counts, torch.rand(sum(lengths), generator=generator).double())
    assert not (chosen & ~candidates).any()
    assert [int(part.sum()) for part in batch.unpack(chosen)] == counts.tolist()


def test_every_subset_is_equally_likely() -> None:
    batch = random_batch([5] * 6000)
    candidates = torch.tensor([True, True, False, True, True] * 6000)
    u = torch.rand(30_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = batch.random_subset(candidates, torch.full((6000,), 2), u).view(6000, 5)
    seen = torch.bincount((chosen * 2 ** torch.arange(5)).sum(1))
    pairs = [2**a + 2**b for a, b in itertools.combinations([0, 1, 3, 4], 2)]
    assert int(seen[pairs].sum()) == 6000
    assert chisquare(seen[pairs].numpy()).pvalue > 1e-3


def test_pack_and_unpack_reject_wrong_shapes_and_counts() -> None:
    with raises_value_error(r"sequence 1 of a pack must be 1-D, got shape \(2, 3\)"):
        PackedBatch.pack([torch.zeros(3), torch.zeros(2, 3)])
    with raises_value_error("at least one sequence"):
        PackedBatch.pack([])
    with raises_value_error("1 rows for 2 sequences"):
        PackedBatch.pack([torch.zeros(3), torch.zeros(3)], rows=[1])
    with raises_value_error(r"5 tokens .* got 4"):
        random_batch([2, 3]).unpack(torch.zeros(4))


def test_a_pack_is_pickled_as_one_byte_per_token_and_lengths() -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.255"):
        pickle.dumps(PackedBatch.pack([torch.tensor([-1, 3])]))
    batch = PackedBatch.pack([torch.tensor([27, 3, 4, 28]), torch.tensor([19, 28])], [7, 2**40])
    pickled = pickle.dumps(batch)
    assert len(pickled) < 1000
    other = pickle.loads(pickled)
    for name, value in vars(batch).items():
        assert (
            torch.equal(getattr(other, name), value)
            if isinstance(value, torch.Tensor)
            else (getattr(other, name) == value)
        )


@given(lengths_strategy, st.integers(0, 70), st.integers(0, 6))
def test_a_padded_pack_is_the_pack_followed_by_padding(lengths: list[int], more: int, spare: int) -> None:
    batch = random_batch(lengths)
    total, n, longest = sum(lengths), len(lengths), max(lengths)
    tails = -(-more // longest)
    shape = StaticShape(total + more, n + tails + spare, longest)
    padded = batch.padded_to(shape)
    assert len(padded.tokens) == shape.tokens
    assert len(padded.lengths) == len(padded.cu_seqlens) - 1 == shape.sequences
    assert padded.cu_seqlens.tolist() == [0, *np.cumsum(padded.lengths)]
    for mine, theirs in zip(batch.unpack(batch.tokens), padded.unpack(padded.tokens), strict=False):
        assert torch.equal(mine, theirs)
    plain = PackedBatch.pack([torch.full((length,), 29) for length in padded.lengths if length])
    assert torch.equal(padded.segment_ids, plain.segment_ids)
    assert torch.equal(padded.positions, plain.positions)
    assert (padded.tokens[total:] == 29).all()
    assert max(padded.lengths) == longest
    for smaller in (shape._replace(tokens=total - 1), shape._replace(sequences=n + tails - 1)):
        assert not batch.fits(smaller)
        with raises_value_error("does not fit into"):
            batch.padded_to(smaller)
