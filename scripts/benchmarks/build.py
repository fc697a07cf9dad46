"""Build a store in a process of its own, and time the parts of the work.

This module imports only what `prepare` needs, because the time and the memory of the process are measured.
"""

import json
import time
from pathlib import Path

from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.read import NoProgress
from protlig_dd.data.prepare.splits import Split


def timed_build(fasta: str, output: str, workers: int) -> None:
    """Build a store, and print as JSON its size and the seconds of each part of the work."""
    began, seconds = time.perf_counter(), {"reading": 0.0, "writing": 0.0}

    class Timer(NoProgress):
        def __init__(self, description: str, total: int | None) -> None:
            self.description, self.began = description, time.perf_counter()

        def __exit__(self, *exception: object) -> None:
            seconds[self.description] += time.perf_counter() - self.began

    store = build_store([fasta], Path(output), split=Split(0.01, 0.01), workers=workers, progress=Timer)
    others = time.perf_counter() - began - sum(seconds.values())
    size = {"sequences": len(store), "residues": int(store.lengths[:].sum())}
    print(json.dumps({**size, **seconds, "others": others}))
