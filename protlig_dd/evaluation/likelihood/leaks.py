"""Find evaluated proteins that are also training proteins: exact copies, and similar proteins (MMseqs2)."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.data.mmseqs import COVERAGE, IDENTITY, find_mmseqs, queries_with_hits
from protlig_dd.data.store import SPLITS, SequenceStore, StoreGroup
from protlig_dd.evaluation.inputs import numbered_fasta
from protlig_dd.evaluation.likelihood.trained_on import TrainingData
from protlig_dd.tokenizer import N_STATES

# a training row is read in full only if its middle WINDOW tokens, as one 64-bit number, match an evaluated protein
WINDOW = 8
ROWS_AT_ONCE = 1 << 18
MAX_RESIDUES = 20_000_000  # near=auto searches at most this many training residues: a few minutes on two cores
MIN_PROTEINS = 2  # smallest number of proteins for which a standard error exists
SIMILARITY = f">= {IDENTITY:.0%} identity over >= {COVERAGE:.0%} of at least one of the two sequences"


@dataclass(frozen=True)
class Leaks:
    """Which of n evaluated proteins are exact copies of training proteins, or similar to a training protein.

    `sources` is the training data that the proteins were compared with.
    """

    sources: Sequence[TrainingData]
    copies: list[np.ndarray]
    """For each source whose stores were found, (n,) bool: exact copies of its training proteins."""
    near: np.ndarray | None
    """(n,) bool: similar to a training protein, but not a copy; None if similar proteins were not searched for."""
    reason: str
    """Why similar proteins were not searched for."""

    @property
    def searched(self) -> list[TrainingData]:
        return [source for source in self.sources if source.stores is not None]

    @property
    def copied(self) -> np.ndarray:
        """(n,) bool: copies of training proteins of any source; (0,) if no stores were found."""
        return np.any(self.copies, axis=0) if self.copies else np.zeros(0, bool)

    @property
    def leaked(self) -> np.ndarray:
        """(n,) bool: copies and similar proteins; (0,) if no stores were found."""
        return self.copied if self.near is None else self.copied | self.near

    def lines(self, proteins: str = "proteins") -> list[str]:
        """Return the messages for the user; `proteins` is the noun for the n proteins in the messages."""
        messages, clean = [], []
        for source, copied in zip(self.searched, self.copies, strict=True):
            name = source_name(source)
            if copied.any():
                messages.append(
                    f"warning: {copied.sum():,} of {len(copied):,} {proteins} are exact copies of training proteins of "
                    f"{name}"
                )
            else:
                clean.append(name)
        if clean:
            messages.append(
                f"none of {len(self.copied):,} {proteins} is an exact copy of a training protein of "
                f"{' or '.join(clean)}"
            )
        messages += [
            f"{proteins} were not compared with the training proteins of {source.model}: {source.reason}"
            for source in self.sources
            if source.stores is None
        ]
        if self.near is not None:
            more = "more " if self.copied.any() else ""
            label = "warning: " if self.near.any() else ""
            messages.append(
                f"{label}{self.near.sum():,} {more}of {len(self.near):,} {proteins} are similar to a training protein "
                f"({SIMILARITY})"
            )
        elif self.copies and self.reason:
            messages.append(f"similar proteins were not searched for: {self.reason}")
        return messages

    def report(self) -> dict[str, Any]:
        """Return the counts for JSON. A count is None if such proteins were not searched for."""
        return {
            "copies": int(self.copied.sum()) if self.copies else None,
            "near": None if self.near is None else int(self.near.sum()),
            "searched": [
                {"model": source.model, "store": source.stores.name, "copies": int(copied.sum())}
                for source, copied in zip(self.searched, self.copies, strict=True)
                if source.stores is not None
            ],
            "not_searched": [f"{source.model}: {source.reason}" for source in self.sources if source.stores is None],
        }

    def cells(self, n: int) -> list[str]:
        """Return `copy`, `near` or `no` for each of the n proteins; empty texts if no training stores were found."""
        if not self.copies:
            return [""] * n
        return [
            "copy" if copy else "near" if leak else "no" for copy, leak in zip(self.copied, self.leaked, strict=True)
        ]


def source_name(source: TrainingData) -> str:
    return source.model if source.stores is None else f"{source.model} ({source.stores.name})"


def find_leaks(sequences: Sequence[np.ndarray], sources: Sequence[TrainingData], near: object) -> Leaks:
    """Compare tokenised proteins with the training splits of the sources.

    Args:
        near: whether to search for similar proteins with MMseqs2: True, False, or `auto`, which searches if MMseqs2 is
            installed and there are at most MAX_RESIDUES training residues. None: no search, and no message that says
            so.

    Raises:
        ValueError: near is True and MMseqs2 is not installed.
    """
    installed = near is not None and find_mmseqs(near, "near")
    stores = [source.stores for source in sources if source.stores is not None]
    copies = [find_copies(sequences, group) for group in stores]
    residues = sum(training_residues(group) for group in stores)
    if near is None:
        return Leaks(sources, copies, None, "")
    if not installed:
        reason = "near=false" if near is False else "MMseqs2 is not installed"
    elif near == "auto" and residues > MAX_RESIDUES:
        reason = f"a search of {residues:,} training residues would take long; set near=true to search anyway"
    else:
        reason = ""
    if reason or not stores:
        return Leaks(sources, copies, None, reason)
    not_copied = np.flatnonzero(~np.any(copies, axis=0))
    hits = np.zeros(len(sequences), bool)
    if len(not_copied):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            queries = numbered_fasta(folder / "queries", (sequences[i][1:-1] for i in not_copied.tolist()))
            targets = numbered_fasta(
                folder / "targets", (tokens[1:-1] for group in stores for tokens in training_proteins(group))
            )
            hits[not_copied[queries_with_hits(queries, targets, folder / "mmseqs")]] = True
    return Leaks(sources, copies, hits, "")


def find_copies(sequences: Sequence[np.ndarray], stores: StoreGroup) -> np.ndarray:
    """Return (n,) bool: which of the proteins, `<bos> residues <eos>`, are in the training split of the stores.

    A row of a store is read in full only if its length and its middle WINDOW tokens both occur among the proteins. A
    search of 60 M rows therefore reads all offsets once, and WINDOW tokens of each row that is as long as one of
    the proteins.
    """
    indices: dict[bytes, list[int]] = {}
    for i, tokens in enumerate(sequences):
        indices.setdefault(tokens.astype(np.uint8).tobytes(), []).append(i)
    lengths = np.array(sorted({len(content) for content in indices}))
    long = [np.frombuffer(content, np.uint8) for content in indices if len(content) >= WINDOW]
    starts = [middle_start(len(tokens)) for tokens in long]
    middles = np.array([tokens[start : start + WINDOW] for tokens, start in zip(long, starts, strict=True)], np.uint8)
    keys = middles.reshape(-1, WINDOW).view(np.uint64).ravel()
    found = np.zeros(len(sequences), bool)
    for store in stores.stores:
        for row in candidate_rows(store, lengths, keys):
            found[indices.get(store[row].tobytes(), [])] = True
    return found


def candidate_rows(store: SequenceStore, lengths: np.ndarray, keys: np.ndarray) -> Iterator[int]:
    """Yield training rows whose number of tokens is in `lengths` and whose middle WINDOW tokens are in `keys`.

    Rows with fewer than WINDOW tokens have no such middle. They are yielded if their length is in `lengths`.
    """
    for block in store.split_blocks("train"):
        for first in range(0, len(block), ROWS_AT_ONCE):
            rows = block[first : first + ROWS_AT_ONCE]
            begins = store.offsets[rows]
            sizes = store.offsets[rows + 1] - begins
            selected = np.isin(sizes, lengths)
            long = selected & (sizes >= WINDOW)
            if long.any():
                windows = np.lib.stride_tricks.sliding_window_view(store.tokens, WINDOW)
                middles = windows[begins[long] + middle_start(sizes[long])].view(np.uint64).ravel()
                selected[long] = np.isin(middles, keys)
            yield from rows[selected].tolist()


def middle_start(tokens: Any) -> Any:
    """Return the index of the first of the WINDOW middle tokens in a sequence of this many tokens."""
    return (tokens - WINDOW) // 2


def training_proteins(stores: StoreGroup) -> Iterator[np.ndarray]:
    """Yield the tokens of every training protein."""
    for store in stores.stores:
        for rows in store.split_blocks("train"):
            yield from (store[row] for row in rows)


def training_residues(stores: StoreGroup) -> int:
    return int(stores.token_counts[SPLITS.index("train")][:N_STATES].sum())


def may_have_duplicates(stores: StoreGroup) -> bool:
    """Whether a protein may occur twice: in several stores, or in a store whose duplicates `prepare` did not remove."""
    filters = stores.stores[0].manifest.get("options", {}).get("filters", {})
    return len(stores.stores) > 1 or bool(filters.get("duplicates", True))
