"""Read the proteins of the benchmarks, and print Markdown tables."""

import subprocess
import sys
from pathlib import Path

from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.data.store import SequenceStore, StoreGroup


def table(columns: list[str], rows: list[list[str]]) -> None:
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |", flush=True)


def open_store(fasta: Path | None, folder: Path) -> StoreGroup:
    """Return the store of `fasta`, or the store of the bundled proteins if `fasta` is None.

    If the store of `fasta` is not in `folder` yet, it is built there.
    """
    if fasta is None:
        return StoreGroup([SequenceStore(bundled_store().path)])
    store = folder / f"{fasta.name.split('.')[0]}.h5"
    if not store.exists():
        command = [sys.executable, "-m", "protlig_dd.prepare", f"input={fasta}", f"output={store}"]
        subprocess.run(command, check=True)
    return StoreGroup([SequenceStore(store)])
