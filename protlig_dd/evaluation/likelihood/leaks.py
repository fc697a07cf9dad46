"""Whether proteins that a model is judged by have trained it: exact copies, and near ones by MMseqs2."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.data.mmseqs import COVERAGE, IDENTITY, find_mmseqs, queries_with_hits
from protlig_dd.data.store import SPLITS, SequenceStore, StoreGroup
from protlig_dd.evaluation.inputs import numbered_fasta
from protlig_dd.evaluation.likelihood.trained_on import Source
from protlig_dd.tokenizer import N_STATES

WINDOW = 8  # tokens from the middle of a protein, one 64-bit number, that rows are compared by first
ROWS_AT_ONCE = 1 << 18
MOST_RESIDUES = 20_000_000  # of training proteins that near=auto searches: some minutes of two cores
FEWEST = 2  # proteins that an error can be told of
NEAR = f"at >= {IDENTITY:.0%} identity over >= {COVERAGE:.0%} of either"


@dataclass(frozen=True)
class Leaks:
    """Of n proteins, those that trained a model."""

    sources: Sequence[Source]
    copies: list[np.ndarray]
    """For each source whose stores were found, (n,) bool: an exact copy of one of its training proteins."""
    near: np.ndarray | None
    """(n,) bool: no copy, but near one of a source's training proteins; None where that was not looked for."""
    why: str
    """Why not."""

    @property
    def searched(self) -> list[Source]:
        return [source for source in self.sources if source.stores is not None]

    @property
    def copied(self) -> np.ndarray:
        """(n,) bool, of any source; of no source that was found, (0,)."""
        return np.any(self.copies, axis=0) if self.copies else np.zeros(0, bool)

    @property
    def leaked(self) -> np.ndarray:
        """(n,) bool, copies and near ones; (0,) as above."""
        return self.copied if self.near is None else self.copied | self.near

    def lines(self, proteins: str = "proteins") -> list[str]:
        """What the user is told of these proteins."""
        told, clean = [], []
        for source, found in zip(self.searched, self.copies, strict=True):
            name = named(source)
            if found.any():
                told.append(
                    f"warning: {found.sum():,} of {len(found):,} {proteins} are exact copies of proteins that "
                    f"trained {name}"
                )
            else:
                clean.append(name)
        if clean:
            told.append(
                f"none of {len(self.copied):,} {proteins} is an exact copy of one that trained {' or '.join(clean)}"
            )
        told += [
            f"copies of what trained {source.model} were not looked for among the {proteins}: {source.why}"
            for source in self.sources
            if source.stores is None
        ]
        if self.near is not None:
            more = "more " if self.copied.any() else ""
            sign = "warning: " if self.near.any() else ""
            told.append(f"{sign}{self.near.sum():,} {more}of {len(self.near):,} are near a training protein ({NEAR})")
        elif self.copies and self.why:
            told.append(f"near ones were not looked for: {self.why}")
        return told

    def report(self) -> dict[str, Any]:
        """The same for JSON; None for what was not looked for."""
        return {
            "copies": int(self.copied.sum()) if self.copies else None,
            "near": None if self.near is None else int(self.near.sum()),
            "searched": [
                {"model": source.model, "store": source.stores.name, "copies": int(found.sum())}
                for source, found in zip(self.searched, self.copies, strict=True)
                if source.stores is not None
            ],
            "not_searched": [f"{one.model}: {one.why}" for one in self.sources if one.stores is None],
        }

    def cells(self, n: int) -> list[str]:
        """For each of the n proteins `copy`, `near` or `no`; empty where nothing could be searched."""
        if not self.copies:
            return [""] * n
        return [
            "copy" if copy else "near" if leak else "no" for copy, leak in zip(self.copied, self.leaked, strict=True)
        ]


def named(source: Source) -> str:
    return source.model if source.stores is None else f"{source.model} ({source.stores.name})"


def find_leaks(sequences: Sequence[np.ndarray], sources: Sequence[Source], near: object) -> Leaks:
    """Compare tokenised proteins with the training splits of the sources.

    Args:
        near: `auto`, True or False: whether to search with MMseqs2; auto does where it is installed and there are at
            most MOST_RESIDUES training residues. None does not either, and says nothing of it.

    Raises:
        ValueError: near is none of these, or wanted and MMseqs2 not installed.
    """
    installed = near is not None and find_mmseqs(near, "near")
    stores = [source.stores for source in sources if source.stores is not None]
    found = [copies(sequences, one) for one in stores]
    residues = sum(training_residues(one) for one in stores)
    if near is None:
        return Leaks(sources, found, None, "")
    if not installed:
        why = "near=false" if near is False else "MMseqs2 is not installed"
    elif near == "auto" and residues > MOST_RESIDUES:
        why = f"{residues:,} training residues would take long, and near=true does it all the same"
    else:
        why = ""
    if why or not stores:
        return Leaks(sources, found, None, why)
    left = np.flatnonzero(~np.any(found, axis=0))
    hits = np.zeros(len(sequences), bool)
    if len(left):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            queries = numbered_fasta(folder / "queries", (sequences[i][1:-1] for i in left.tolist()))
            targets = numbered_fasta(folder / "targets", (tokens[1:-1] for one in stores for tokens in trained_by(one)))
            hits[left[queries_with_hits(queries, targets, folder / "mmseqs")]] = True
    return Leaks(sources, found, hits, "")


def copies(sequences: Sequence[np.ndarray], stores: StoreGroup) -> np.ndarray:
    """(n,) bool: which of the proteins, `<bos> residues <eos>`, are in the training split of the stores.

    A row is read as a whole only where its length and its middle are those of one of them, so that 60 M rows take
    one pass over the offsets and a look at each row of such a length.
    """
    places: dict[bytes, list[int]] = {}
    for i, tokens in enumerate(sequences):
        places.setdefault(tokens.astype(np.uint8).tobytes(), []).append(i)
    lengths = np.array(sorted({len(one) for one in places}))
    whole = [np.frombuffer(one, np.uint8) for one in places if len(one) >= WINDOW]
    middles = np.array([one[start : start + WINDOW] for one in whole for start in [middle(len(one))]], np.uint8)
    keys = middles.reshape(-1, WINDOW).view(np.uint64).ravel()
    found = np.zeros(len(sequences), bool)
    for store in stores.stores:
        for row in candidates(store, lengths, keys):
            found[places.get(store[row].tobytes(), [])] = True
    return found


def candidates(store: SequenceStore, lengths: np.ndarray, keys: np.ndarray) -> Iterator[int]:
    """Rows of the training split with one of these numbers of tokens and, unless shorter than it, middles."""
    for block in store.split_blocks("train"):
        for first in range(0, len(block), ROWS_AT_ONCE):
            rows = block[first : first + ROWS_AT_ONCE]
            begins = store.offsets[rows]
            sizes = store.offsets[rows + 1] - begins
            wanted = np.isin(sizes, lengths)
            long = wanted & (sizes >= WINDOW)
            if long.any():
                windows = np.lib.stride_tricks.sliding_window_view(store.tokens, WINDOW)
                own = windows[begins[long] + middle(sizes[long])].view(np.uint64).ravel()
                wanted[long] = np.isin(own, keys)
            yield from rows[wanted].tolist()


def middle(tokens: Any) -> Any:
    """Where the WINDOW in the middle of so many tokens begins."""
    return (tokens - WINDOW) // 2


def trained_by(stores: StoreGroup) -> Iterator[np.ndarray]:
    """The tokens of every training protein."""
    for store in stores.stores:
        for rows in store.split_blocks("train"):
            yield from (store[row] for row in rows)


def training_residues(stores: StoreGroup) -> int:
    return int(stores.token_counts[SPLITS.index("train")][:N_STATES].sum())


def may_repeat(stores: StoreGroup) -> bool:
    """Whether a protein may be there twice: in several stores, or in one that `prepare` was told to keep copies in."""
    filters = stores.stores[0].manifest.get("options", {}).get("filters", {})
    return len(stores.stores) > 1 or bool(filters.get("duplicates", True))
