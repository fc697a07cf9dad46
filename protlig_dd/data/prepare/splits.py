"""Which sequences are put aside for validation and testing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.data.fasta import FastaFile
from protlig_dd.data.mmseqs import COVERAGE, E_VALUE, IDENTITY, queries_with_hits
from protlig_dd.data.prepare.spool import Spool, write_fasta
from protlig_dd.data.store import SPLITS

TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True)
class Split:
    """How sequences are put aside. The shares are those of a keyed hash of the id."""

    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    check: str | None = None
    """`mmseqs` searches what was put aside against the training sequences."""
    on_hit: str = "move"
    """A held-out sequence with a homolog in training is moved there, or dropped: move | drop."""


def hashed_splits(id_hashes: np.ndarray, split: Split) -> np.ndarray:
    """(n,) uint8 split of each id: depends on nothing but the id and the fractions, so it stays when data grows."""
    test_end, validation_end = (
        np.uint64(min(int(share * 2**64), 2**64 - 1))
        for share in (split.test_fraction, split.test_fraction + split.validation_fraction)
    )
    codes = np.full(len(id_hashes), TRAIN, np.uint8)
    codes[id_hashes < validation_end] = VALIDATION
    codes[id_hashes < test_end] = TEST
    return codes


def nothing_to_train_on(output: Path, file: FastaFile | None, counts: Mapping[str, Any]) -> ValueError:
    failed = ", ".join(f"{count:,} by {name}" for name, count in counts["dropped"].items() if count) or "none"
    dropped = f"dropped of all {counts['records']:,} records: {failed}"
    if file is None:
        why = f"the ids of all sequences are in the shares that are put aside, which are too large ({dropped})"
    else:
        why = f"none of the {file.records:,} records of {file.name} is left ({dropped})"
    return ValueError(f"{output}: the train split is empty: {why}")


def search_held_out(spool: Spool, keep: np.ndarray, splits: np.ndarray, on_hit: str) -> dict[str, Any]:
    """Move to training, or drop, the held-out sequences with a homolog there; changes `keep` and `splits`.

    What is moved becomes a training sequence that others may resemble, so the rest is searched in it, until nothing
    hits.
    """
    names = SPLITS[1:]
    report: dict[str, Any] = {
        "identity": IDENTITY,
        "coverage": COVERAGE,
        "e_value": E_VALUE,
        "on_hit": on_hit,
        "rounds": 0,
    }
    report |= {"searched": {name: int((keep & (splits == SPLITS.index(name))).sum()) for name in names}}
    report["hits"] = dict.fromkeys(names, 0)
    targets = keep & (splits == TRAIN)
    queries, against = spool.folder / "queries.fasta", spool.folder / "targets.fasta"
    while True:
        held_out = keep & (splits != TRAIN)
        if not held_out.any() or not targets.any():
            break
        write_fasta(queries, spool, held_out)
        write_fasta(against, spool, targets)
        hits = queries_with_hits(queries, against, spool.folder / "mmseqs")
        report["rounds"] += 1
        for name in names:
            report["hits"][name] += int((splits[hits] == SPLITS.index(name)).sum())
        targets = np.zeros_like(keep)
        if on_hit == "drop":
            keep[hits] = False
        else:
            splits[hits] = TRAIN
            targets[hits] = True
    for file in (queries, against):
        file.unlink(missing_ok=True)
    return report
