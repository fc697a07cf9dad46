"""Assign sequences to the train, validation and test splits."""

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
    """Options of the splits.

    If the inputs do not name the split of each file, the split of a sequence is determined by the two fractions and a
    seeded hash of the sequence's id.
    """

    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    check: str | None = None
    """`mmseqs` searches the training sequences for homologs of the held-out sequences; None does not search."""
    on_hit: str = "move"
    """What to do with a held-out sequence that has a training homolog: `move` it to training or `drop` it."""


def hashed_splits(id_hashes: np.ndarray, split: Split) -> np.ndarray:
    """Return the split of each id, (n,) uint8 index into SPLITS.

    The split depends only on the id and the fractions, so a sequence keeps its split when data are added.
    """
    test_end, validation_end = (
        np.uint64(min(int(fraction * 2**64), 2**64 - 1))
        for fraction in (split.test_fraction, split.test_fraction + split.validation_fraction)
    )
    codes = np.full(len(id_hashes), TRAIN, np.uint8)
    codes[id_hashes < validation_end] = VALIDATION
    codes[id_hashes < test_end] = TEST
    return codes


def empty_training_split(output: Path, file: FastaFile | None, counts: Mapping[str, Any]) -> ValueError:
    by_filter = ", ".join(f"{count:,} by {name}" for name, count in counts["dropped"].items() if count) or "none"
    dropped = f"of all {counts['records']:,} records, the filters dropped {by_filter}"
    if file is None:
        reason = f"split.validation_fraction and split.test_fraction hold out every sequence; lower them ({dropped})"
    else:
        reason = f"no record of {file.name}, which has {file.records:,}, passed the filters ({dropped})"
    return ValueError(f"{output}: the train split is empty: {reason}")


def search_held_out(spool: Spool, keep: np.ndarray, splits: np.ndarray, on_hit: str) -> dict[str, Any]:
    """Move held-out sequences with a training homolog to training, or drop them. Changes `keep` and `splits` in place.

    A moved sequence may itself have held-out homologs. So each further search compares the remaining held-out sequences
    with the sequences that were just moved, until a search finds nothing.

    Returns:
        The search's options and counts, for the manifest.
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
    query_file, target_file = spool.folder / "queries.fasta", spool.folder / "targets.fasta"
    while True:
        held_out = keep & (splits != TRAIN)
        if not held_out.any() or not targets.any():
            break
        write_fasta(query_file, spool, held_out)
        write_fasta(target_file, spool, targets)
        hits = queries_with_hits(query_file, target_file, spool.folder / "mmseqs")
        report["rounds"] += 1
        for name in names:
            report["hits"][name] += int((splits[hits] == SPLITS.index(name)).sum())
        targets = np.zeros_like(keep)
        if on_hit == "drop":
            keep[hits] = False
        else:
            splits[hits] = TRAIN
            targets[hits] = True
    for file in (query_file, target_file):
        file.unlink(missing_ok=True)
    return report
