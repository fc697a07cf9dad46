"""Measure how fast `prepare` turns FASTA into a store. Called by data.py."""

import gzip
import itertools
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from protlig_dd.data.fasta import read_fasta
from protlig_dd.system.files import sha256
from protlig_dd.system.terminal import ProgressBar
from protlig_dd.system.workers import count_workers
from scripts.benchmarks.measure import measured
from scripts.benchmarks.tables import table


def make_fasta(proteins: Path, path: Path, size: int) -> None:
    """Write the proteins repeatedly, until the FASTA file `path` has at least `size` bytes.

    Every repeat permutes the ids and rotates the sequences.
    """
    records = list(read_fasta(proteins))
    rng = np.random.default_rng(0)
    with path.open("w") as file, ProgressBar("writing FASTA", size >> 20) as bar:
        for rotation in itertools.count():
            if (written := file.tell()) >= size:
                return
            bar.advance((written >> 20) - bar.done)
            for record, other in zip(records, rng.permutation(len(records)).tolist(), strict=True):
                shift = rotation % len(record.sequence)
                sequence = record.sequence[shift:] + record.sequence[:shift]
                file.write(f">{records[other].id}_{rotation}\n")
                file.writelines(f"{sequence[i : i + 60]}\n" for i in range(0, len(sequence), 60))


PREPARE = """
from scripts.benchmarks.build import timed_build
timed_build({input!r}, {output!r}, {workers})
"""


def prepare(folder: Path, fasta: Path, repeats: int) -> Path:
    """Time `prepare` on the plain and on the gzipped FASTA file, with workers=1 and workers=auto, alternately.

    Return the path of the store.
    """
    zipped = fasta.with_suffix(".fasta.gz")
    if not zipped.exists():
        with fasta.open("rb") as source, gzip.open(zipped, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target, 1 << 24)
    size, auto = fasta.stat().st_size, count_workers("auto")
    numbers = {"1": 1, f"auto, {auto}": auto}
    found: dict[tuple[Path, str], list[dict[str, Any]]] = {(file, n): [] for file in (fasta, zipped) for n in numbers}
    store = folder / "store.h5"
    with ProgressBar("prepare", len(found) * repeats) as bar:
        for _ in range(repeats):
            for (file, name), runs in found.items():
                for old in folder.glob("store.h5*"):
                    old.unlink()
                before = hashing_rate(fasta)
                code = PREPARE.format(input=str(file), output=str(store), workers=numbers[name])
                runs.append(measured(code, folder))
                runs[-1]["hashing"] = (before + hashing_rate(fasta)) / 2
                bar.advance()
    rows = []
    for (file, name), runs in found.items():
        limit = 500e6 + 40 * runs[0]["sequences"]
        peak = max(run["peak"] for run in runs)
        rows.append(
            [
                "plain" if file == fasta else "gzipped",
                name,
                f"{file.stat().st_size / 1e6:,.0f}",
                f"{runs[0]['sequences']:,}",
                spread([size / run["cpu"] / 1e6 for run in runs]),
                spread([run["hashing"] / 1e6 for run in runs]),
                f"{statistics.median(size / run['wall'] for run in runs) / 1e6:.0f}",
                spread([alone["wall"] / run["wall"] for alone, run in zip(found[file, "1"], runs, strict=True)], 2),
                f"{peak / 1e6:.0f}",
                f"{limit / 1e6:.0f}",
            ]
        )
    print(
        f"\nPrepare of {size / 1e6:,.0f} MB of FASTA, median (and range) of {repeats} runs. It includes SHA-256 of the "
        "input, which is also timed alone before and after each run, as a measure of the machine's speed. The times of "
        "one run with `workers=1` and one run with `workers=auto` give a speed-up, and the column has the median of "
        "these, not the quotient of two rows\n"
    )
    table(
        [
            "input",
            "workers",
            "MB read",
            "sequences",
            "MB of FASTA per CPU second",
            "SHA-256 alone, MB per CPU second",
            "MB per second",
            "speed-up",
            "peak MB",
            "500 MB + 40 bytes per sequence",
        ],
        rows,
    )
    print(
        "\nWhere the time goes, median seconds of a run. Workers share only the parsing and the counting of letters\n"
    )
    names = (
        "start of Python and libraries",
        "reading and parsing",
        "duplicates, splits, fsync",
        "counting and writing",
    )
    table(
        ["input", "workers", *names, "all"], [parts(file == fasta, name, runs) for (file, name), runs in found.items()]
    )
    return store


def parts(plain: bool, workers: str, runs: list[dict[str, Any]]) -> list[str]:
    """Return a row of the table of seconds."""
    reading, others, writing, wall = (
        statistics.median(run[key] for run in runs) for key in ("reading", "others", "writing", "wall")
    )
    seconds = (wall - reading - others - writing, reading, others, writing, wall)
    return ["plain" if plain else "gzipped", workers, *(f"{value:.2f}" for value in seconds)]


def hashing_rate(file: Path) -> float:
    """Return how many bytes SHA-256 hashes per CPU second."""
    began = time.process_time()
    sha256(file)
    return file.stat().st_size / (time.process_time() - began)


def spread(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
