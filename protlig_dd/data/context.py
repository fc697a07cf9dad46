"""Find which residues of a sequence are context, that is, given to the network. Their case marks them (see case.py)."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from protlig_dd.data.case import context_tokens, nothing_to_design
from protlig_dd.data.store import StoreGroup


def context_of(group: StoreGroup, row: SupportsIndex) -> np.ndarray | None:
    """Return which tokens of a row (`<bos> residues <eos>`) are context, (residues + 2,) bool.

    If no token is context, the result is None or an array in which every value is False.
    """
    if group.context == "none":
        return None
    store, store_row = group.find(row)
    residues = int(store.offsets[store_row + 1] - store.offsets[store_row]) - 2
    return context_tokens(store.lower_case(store_row), residues, group.context)


def joined_context(
    contexts: Sequence[np.ndarray | None], first: Sequence[int], lengths: Sequence[int]
) -> Bool[Tensor, " total"] | None:
    """Return which tokens of n crops are context, concatenated as in a pack; None if all `contexts` are None.

    Args:
        contexts: for each sequence before cropping, which tokens are context; None means no token.
        first: index of the first token of each crop.
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
    """Raise ValueError if all amino acids of a record are context. The message names the first such record."""
    if group.context == "none":
        return
    for store in group.stores:
        found = store.manifest["case"]["only_context"][group.context]
        if count := found["sequences"]:
            others = f" (as in {count - 1:,} other records)" if count > 1 else ""
            raise ValueError(nothing_to_design(f"{store.path}: record {found['first'][0]}", group.context, others))


def designed_counts(group: StoreGroup) -> np.ndarray:
    """Return (3, 30) int64: how often each token id occurs outside the context in each split.

    If upper-case letters are the context, `<bos>` and `<eos>` are not counted.
    """
    if group.context == "none":
        return group.token_counts
    lower = np.sum([store.case_counts for store in group.stores], axis=0)
    return group.token_counts - lower if group.context == "lower" else lower
