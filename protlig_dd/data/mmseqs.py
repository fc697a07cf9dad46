"""Which sequences resemble others, found with MMseqs2 (Steinegger and Söding 2017)."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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
    return _run("version", options={}).strip()


def find_mmseqs(wanted: object, key: str = "mmseqs") -> bool:
    """Whether MMseqs2 is to be used: `auto` says yes where it is installed.

    Args:
        key: of the config, that says so.

    Raises:
        ValueError: wanted and not installed.
    """
    there = shutil.which("mmseqs") is not None
    if wanted is True and not there:
        raise ValueError(f"{key}=true, but no `mmseqs` is on the PATH: {INSTALL}")
    return bool(wanted) and there


class Hit(NamedTuple):
    """A query's best target."""

    identity: float
    """Of the aligned residues, 0 to 1."""
    near: bool
    """Whether this or another target is at >= IDENTITY over >= COVERAGE of either sequence."""


def best_hits(queries: Path, targets: Path, scratch: Path) -> dict[int, Hit]:
    """By query (names are integers) its best target at E <= E_VALUE, with MMseqs2's default sensitivity."""
    rows = _search(queries, targets, scratch, "query,fident,qcov,tcov", {})
    found: dict[int, Hit] = {}
    for name, identity, of_query, of_target in rows:  # a query's targets come best first
        query, share = int(name), float(identity)
        near = share >= IDENTITY and max(float(of_query), float(of_target)) >= COVERAGE
        first = found.get(query, Hit(share, near))
        found[query] = Hit(first.identity, first.near or near)
    return found


def clusters_of(sequences: Path, scratch: Path, *, identity: float, coverage: float) -> list[list[int]]:
    """Clusters of a FASTA file (names are integers) at such identity over such a share of both sequences."""
    scratch.mkdir()
    options = {"--min-seq-id": identity, "-c": coverage}
    _run("easy-cluster", sequences, scratch / "clusters", scratch / "tmp", options=options)
    found: dict[str, list[int]] = {}
    with (scratch / "clusters_cluster.tsv").open() as file:
        for line in file:
            representative, member = line.split()
            found.setdefault(representative, []).append(int(member))
    shutil.rmtree(scratch)
    return list(found.values())


def queries_with_hits(queries: Path, targets: Path, scratch: Path) -> np.ndarray:
    """Names (integers, ascending) of the queries with a target at >= IDENTITY over >= COVERAGE of either sequence.

    Args:
        queries, targets: FASTA whose names are integers.
        scratch: a folder for MMseqs2's databases, some three times as large as the FASTA files.
    """
    rows = _search(queries, targets, scratch, "query,qcov,tcov", {"--min-seq-id": IDENTITY})
    # MMseqs2 itself can ask for coverage of both, of the query or of the target, not of either
    near = {int(name) for name, of_query, of_target in rows if max(float(of_query), float(of_target)) >= COVERAGE}
    return np.array(sorted(near), dtype=np.int64)


def _search(queries: Path, targets: Path, scratch: Path, columns: str, options: dict[str, float]) -> list[list[str]]:
    """These columns of every hit at E <= E_VALUE."""
    scratch.mkdir()
    hits = scratch / "hits"
    more = {"-e": E_VALUE, "--alignment-mode": 3, "--format-output": columns}
    _run("easy-search", queries, targets, hits, scratch / "tmp", options=options | more)
    with hits.open() as file:
        rows = [line.split() for line in file]
    shutil.rmtree(scratch)
    return rows


def _run(command: str, *files: Path, options: Mapping[str, object]) -> str:
    named = [str(part) for option in options.items() for part in option]
    done = subprocess.run(["mmseqs", command, *files, *named], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise ValueError(f"mmseqs {command} failed with exit code {done.returncode}: {lines[-1]}")
    return done.stdout
