"""The context of the rows of stores: residues that are given, marked by their case (see case.py)."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from protlig_dd.data.case import context_tokens, nothing_to_design
from protlig_dd.data.store import StoreGroup


def context_of(group: StoreGroup, row: SupportsIndex) -> np.ndarray | None:
    """Return which tokens of a row, `<bos> residues <eos>`, are context, (tokens,) bool; None if none is."""
    if group.context == "none":
        return None
    store, store_row = group.find(row)
    residues = int(store.offsets[store_row + 1] - store.offsets[store_row]) - 2
    return context_tokens(store.lower_case(store_row), residues, group.context)


def joined_context(
    contexts: Sequence[np.ndarray | None], first: Sequence[int], lengths: Sequence[int]
) -> Bool[Tensor, " total"] | None:
    """Return the context of crops of n sequences, joined as in a pack; None if no crop has any.

    Args:
        contexts: which tokens of each whole sequence are context; None: none.
        first: the first token of each crop.
        lengths: number of tokens of each crop.
    """
    if all(is_context is None for is_context in contexts):
        return None
    parts = [
        np.zeros(length, bool) if is_context is None else is_context[start : start + length]
        for is_context, start, length in zip(contexts, first, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def check_designed(group: StoreGroup) -> None:
    """Raise ValueError if the context leaves nothing to design in a record of a store; the message names the record."""
    if group.context == "none":
        return
    for store in group.stores:
        found = store.manifest["case"]["only_context"][group.context]
        if count := found["sequences"]:
            others = f", and so are those of {count - 1:,} other records" if count > 1 else ""
            raise ValueError(nothing_to_design(f"{store.path}: record {found['first'][0]}", group.context, others))


def designed_counts(group: StoreGroup) -> np.ndarray:
    """Return (3, 30) int64: how often each token id occurs outside the context in each split."""
    if group.context == "none":
        return group.token_counts
    lower = np.sum([store.case_counts for store in group.stores], axis=0)
    return group.token_counts - lower if group.context == "lower" else lower
