"""Find similar sequences with MMseqs2 (Steinegger and Söding 2017)."""

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
    """Return the version of the installed MMseqs2.

    Raises:
        ValueError: MMseqs2 is not installed. The message says how to install it.
    """
    if shutil.which("mmseqs") is None:
        raise ValueError(f"split.check=mmseqs needs MMseqs2, and no `mmseqs` is on the PATH: {INSTALL}")
    return _run("version", options={}).strip()


def find_mmseqs(wanted: object, key: str = "mmseqs") -> bool:
    """Whether to use MMseqs2.

    Args:
        wanted: True, False, or `auto`, which uses MMseqs2 if it is installed.
        key: name of the config key that sets `wanted`.

    Raises:
        ValueError: `wanted` is True and MMseqs2 is not installed.
    """
    installed = shutil.which("mmseqs") is not None
    if wanted is True and not installed:
        raise ValueError(f"{key}=true, but no `mmseqs` is on the PATH: {INSTALL}")
    return bool(wanted) and installed


class Hit(NamedTuple):
    """The identity of a query with its best target, and whether the query has a near target."""

    identity: float
    """Fraction of aligned residues that are identical in the query and its best target (MMseqs2's first), 0 to 1."""
    near: bool
    """Whether any target is aligned with identity >= IDENTITY over >= COVERAGE of the query or of the target."""


def best_hits(queries: Path, targets: Path, scratch: Path) -> dict[int, Hit]:
    """Return {query id: Hit} of the queries that have a target with E <= E_VALUE.

    The search has MMseqs2's default sensitivity.

    Args:
        queries, targets: FASTA files whose ids are integers.
        scratch: a new folder for MMseqs2's databases. The folder is created, and removed at the end.
    """
    rows = _search(queries, targets, scratch, "query,fident,qcov,tcov", {})
    found: dict[int, Hit] = {}
    for name, fraction, query_coverage, target_coverage in rows:  # sorted: the best target of a query comes first
        query, identity = int(name), float(fraction)
        near = identity >= IDENTITY and max(float(query_coverage), float(target_coverage)) >= COVERAGE
        first = found.get(query, Hit(identity, near))
        found[query] = Hit(first.identity, first.near or near)
    return found


def clusters_of(sequences: Path, scratch: Path, *, identity: float, coverage: float) -> list[list[int]]:
    """Cluster a FASTA file whose ids are integers, and return the ids of each cluster's members.

    Args:
        scratch: a new folder for MMseqs2's files. The folder is created, and removed at the end.
        identity: minimum identity, 0 to 1.
        coverage: minimum aligned fraction of each of the two sequences, 0 to 1.
    """
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
    """Return the ids of the queries that are similar to a target, ascending.

    A query is similar to a target if their alignment has E <= E_VALUE and identity >= IDENTITY, and covers >= COVERAGE
    of the query or of the target.

    Args:
        queries, targets: FASTA files whose ids are integers.
        scratch: a new folder for MMseqs2's databases (about three times the FASTA files' size). The folder is created,
            and removed at the end.
    """
    rows = _search(queries, targets, scratch, "query,qcov,tcov", {"--min-seq-id": IDENTITY})
    # MMseqs2 can filter by the coverage of the query, of the target or of both, but not by the larger coverage
    similar = {
        int(name)
        for name, query_coverage, target_coverage in rows
        if max(float(query_coverage), float(target_coverage)) >= COVERAGE
    }
    return np.array(sorted(similar), dtype=np.int64)


def _search(queries: Path, targets: Path, scratch: Path, columns: str, options: dict[str, float]) -> list[list[str]]:
    """Search the targets for the queries, and return these columns of every hit with E <= E_VALUE."""
    scratch.mkdir()
    hits = scratch / "hits"
    fixed_options = {"-e": E_VALUE, "--alignment-mode": 3, "--format-output": columns}
    _run("easy-search", queries, targets, hits, scratch / "tmp", options=options | fixed_options)
    with hits.open() as file:
        rows = [line.split() for line in file]
    shutil.rmtree(scratch)
    return rows


def _run(command: str, *files: Path, options: Mapping[str, object]) -> str:
    arguments = [str(part) for option in options.items() for part in option]
    done = subprocess.run(["mmseqs", command, *files, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        raise ValueError(f"mmseqs {command} failed with exit code {done.returncode}: {lines[-1]}")
    return done.stdout
