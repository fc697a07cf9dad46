"""Which held-out sequences resemble training sequences, found with MMseqs2 (Steinegger and Söding 2017)."""

import shutil
import subprocess
from pathlib import Path

import numpy as np

IDENTITY, COVERAGE, E_VALUE = 0.5, 0.8, 1e-3
INSTALL = (
    "install it with `conda install -c conda-forge -c bioconda mmseqs2`, `apt-get install mmseqs2` or "
    "`brew install mmseqs2`, or from https://mmseqs.com"
)


def mmseqs_version() -> str:
    """Version of the installed MMseqs2.

    Raises:
        ValueError: it is not installed; says how to install it.
    """
    if shutil.which("mmseqs") is None:
        raise ValueError(f"split.check=mmseqs needs MMseqs2, and no `mmseqs` is on the PATH: {INSTALL}")
    return _run("version").strip()


def queries_with_hits(queries: Path, targets: Path, scratch: Path) -> np.ndarray:
    """Names (integers, ascending) of the queries with a target at >= IDENTITY over >= COVERAGE of either sequence.

    Args:
        queries, targets: FASTA whose names are integers.
        scratch: a folder for MMseqs2's databases, some three times as large as the FASTA files.
    """
    scratch.mkdir()
    hits = scratch / "hits"
    _run(
        "easy-search", str(queries), str(targets), str(hits), str(scratch / "tmp"),
        "--min-seq-id", str(IDENTITY), "-e", str(E_VALUE), "--alignment-mode", "3",
        "--format-output", "query,qcov,tcov",
    )  # fmt: skip
    with hits.open() as file:
        rows = (line.split() for line in file)
        # MMseqs2 itself can ask for coverage of both, of the query or of the target, not of either
        near = {int(name) for name, of_query, of_target in rows if max(float(of_query), float(of_target)) >= COVERAGE}
    shutil.rmtree(scratch)
    return np.array(sorted(near), dtype=np.int64)


def _run(*arguments: str) -> str:
    done = subprocess.run(["mmseqs", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise ValueError(f"mmseqs {arguments[0]} failed with exit code {done.returncode}: {lines[-1]}")
    return done.stdout
