"""Write a file of members (see data/members.py) from two stores and a table of cluster ids and member ids.

Ids are matched by their 64-bit hashes. A line whose id is not in a store matches a wrong row with probability
(rows of the store) / 2^64: with 4e8 such lines and 1.9e8 rows, 0.004 wrong lines are expected. If two ids of a store
have the same hash, one of the two is never matched.

Memory: 20 bytes per member and 12 bytes per cluster while the hashes of the members' ids are sorted, then 24 bytes per
member and 8 bytes per cluster while the members are sorted by cluster, and 0.5 GB for blocks of ids and lines. For 70
million clusters and 190 million members this is 5.6 GB.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from protlig_dd.data.datasets import write_datasets, write_manifest
from protlig_dd.data.encode import hash_ids
from protlig_dd.data.members import COLUMNS, FORMAT_VERSION, Members, fingerprint_of
from protlig_dd.data.prepare.output import output_errors
from protlig_dd.data.prepare.read import NoProgress, Progress
from protlig_dd.data.prepare.table import Table
from protlig_dd.data.store import SequenceStore
from protlig_dd.system.files import check_free, creating, sync_folder

IDS_AT_ONCE = 1 << 20


class Ids(NamedTuple):
    """The ids of a store's rows, as hashes in ascending order."""

    hashes: np.ndarray
    """(n,) uint64."""
    rows: np.ndarray
    """(n,) the row of each hash."""

    def find(self, ids: list[bytes]) -> np.ndarray:
        """Return the row of each id, (n,) int64; -1 if no row has this id."""
        wanted = hash_ids(without_database(ids))
        order = np.argsort(wanted)  # a search for ascending values takes less time
        ordered = wanted[order]
        places = np.searchsorted(self.hashes, ordered).clip(max=len(self.hashes) - 1)
        found = np.empty(len(ids), np.int64)
        found[order] = np.where(self.hashes[places] == ordered, self.rows[places].astype(np.int64), -1)
        return found


def ids_of(store: SequenceStore, on_bytes: Callable[[int], None]) -> Ids:
    """Hash the ids of all rows of a store. `on_bytes` is called with the number of bytes of each block of headers."""
    hashes = np.empty(len(store), np.uint64)
    for first in range(0, len(store), IDS_AT_ONCE):
        text, bounds = store.headers(first, min(first + IDS_AT_ONCE, len(store)))
        text = text.replace(b"\t", b" ")  # an id ends before the first space or tab
        ids = [text[start:end].partition(b" ")[0] for start, end in itertools.pairwise(bounds)]
        hashes[first : first + len(ids)] = hash_ids(without_database(ids))
        on_bytes(len(text))
    order = np.argsort(hashes)
    rows = order.astype(np.uint32)
    del order
    return Ids(hashes[rows], rows)


def without_database(ids: list[bytes]) -> list[bytes]:
    """Return the ids, with only the accession of ids such as `sp|P00533|EGFR_HUMAN`, as in the tables of MMseqs2."""
    return [id_.split(b"|")[1] if id_[:3] in (b"sp|", b"tr|") and id_.count(b"|") == 2 else id_ for id_ in ids]


def build_members(
    clusters: SequenceStore,
    store: SequenceStore,
    table: str,
    output: str,
    progress: Callable[[str, int | None], Progress] = NoProgress,
) -> Members:
    """Write a new file of members. The file appears under its name only when it is complete and synced.

    Args:
        clusters: one row per cluster, the representative.
        store: the members.
        table: path of a table of cluster ids and member ids (see Table).
        progress: called with a description and a total (None if unknown); returns a progress bar.

    Raises:
        ValueError: the table cannot be read, no line matches both stores, a member is in two clusters, the two stores
            have the same contents or too many sequences, or the output exists or cannot be written.
    """
    path = check_free(output)
    if clusters.fingerprint == store.fingerprint:
        raise ValueError(f"members.clusters={clusters.path} and members.store={store.path} have the same contents")
    for key, of, most in (("clusters", clusters, 2**31 - 1), ("store", store, 2**32 - 1)):
        if len(of) > most:
            raise ValueError(f"members.{key}={of.path} has {len(of):,} sequences; at most {most:,} are supported")
    lines = Table(table)
    with progress("hashing the ids", None) as bar:
        cluster_ids, member_ids = ids_of(clusters, bar.advance), ids_of(store, bar.advance)
    size = lines.path.stat().st_size if lines.path is not None and lines.path.is_file() else None
    with progress("reading the table", size) as bar:
        lines.on_bytes = bar.advance
        cluster_of, counts = join(lines, clusters, store, cluster_ids, member_ids)
    del cluster_ids, member_ids
    members, sizes = by_cluster(cluster_of, len(clusters))
    del cluster_of
    offsets = np.append(0, np.cumsum(sizes))
    counts["duplicate_lines"] = counts.pop("matched_lines") - len(members)
    counts |= {
        "clusters": len(sizes),
        "clusters_without_members": int((sizes == 0).sum()),
        "members": len(members),
        "members_per_cluster": {
            "mean": round(float(sizes.mean()), 2),
            "median": float(np.median(sizes)),
            "max": int(sizes.max()),
        },
    }
    manifest = {
        "table": lines.described(),
        "clusters_store": clusters.path.name,
        "members_store": store.path.name,
        **counts,
    }
    with output_errors(path), creating(path) as temporary:
        relative = os.path.relpath(store.path.absolute(), path.absolute().parent)
        identity = {"clusters": clusters.fingerprint, "members": store.fingerprint, "store": relative}
        write_members(temporary, offsets, members, manifest, identity)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
    sync_folder(path.parent)
    return Members(path)


def by_cluster(cluster_of: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that have a cluster, by cluster and ascending, (m,) uint32, and the sizes of the clusters.

    Args:
        cluster_of: (n,) the cluster of each row; -1 for none.
    """
    rows = np.flatnonzero(cluster_of >= 0)
    keys = cluster_of[rows].astype(np.uint64)  # sorted in place: the cluster is in the high half, the row in the low
    sizes = np.bincount(keys.view(np.int64), minlength=clusters)
    keys <<= np.uint64(32)
    keys |= rows.view(np.uint64)
    del rows
    keys.sort()
    return keys.astype(np.uint32), sizes


def join(
    lines: Table, clusters: SequenceStore, store: SequenceStore, cluster_ids: Ids, member_ids: Ids
) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the table. Return the cluster of each row of the store of members, (n,) with -1 for none, and the counts.

    Raises:
        ValueError: the table has no line, no line matches both stores, or a member is in two clusters.
    """
    cluster_of = np.full(len(store), -1, np.int32)
    counts: dict[str, Any] = {"lines": 0, "matched_lines": 0}
    unknown: dict[str, dict[str, Any]] = {name: {"lines": 0, "first": None} for name in ("clusters", "members")}
    for block in lines:
        found = {"clusters": cluster_ids.find(block.clusters), "members": member_ids.find(block.members)}
        matched = (found["clusters"] >= 0) & (found["members"] >= 0)
        for (name, rows), ids in zip(found.items(), (block.clusters, block.members), strict=True):
            missing = np.flatnonzero(rows < 0)
            unknown[name]["lines"] += len(missing)
            if len(missing) and unknown[name]["first"] is None:
                unknown[name]["first"] = ids[missing[0]].decode("utf-8", "replace")
        counts["lines"] += len(matched)
        counts["matched_lines"] += int(matched.sum())
        cluster, member = (found[name][matched] for name in found)
        before = cluster_of[member].astype(np.int64)
        cluster_of[member] = cluster
        after = cluster_of[member]  # differs from `cluster` if a later line of the block has the same member
        other = np.where(after == cluster, before, after)
        if ((other >= 0) & (other != cluster)).any():
            i = int(np.argmax((other >= 0) & (other != cluster)))
            first, second, line = other[i], cluster[i], i
            if after[i] != cluster[i]:  # both lines are in this block: report the second one
                first, second, line = cluster[i], other[i], int(np.flatnonzero(member == member[i])[-1])
            raise ValueError(
                f"{lines.name}, line {block.numbers[matched][line]}: the member {store.id(member[i])} is in the "
                f"cluster {clusters.id(second)}, but also in {clusters.id(first)}; a member may be in one cluster only"
            )
    if not counts["matched_lines"]:
        raise ValueError(no_match(lines, clusters, store, counts["lines"], unknown))
    return cluster_of, counts | {"unknown": unknown}


def no_match(
    lines: Table, clusters: SequenceStore, store: SequenceStore, count: int, unknown: dict[str, dict[str, Any]]
) -> str:
    """Return the error message for a table that has no line whose two ids are both in the stores."""
    if not count:
        return f"{lines.name}: the table is empty; expected lines `cluster id <TAB> member id`"
    shown = [
        f"{name} such as {found['first']}, but {of.path} has ids such as {of.id(0)}"
        for (name, found), of in zip(unknown.items(), (clusters, store), strict=True)
        if found["first"] is not None
    ]
    return (
        f"{lines.name}: none of its {count:,} lines names a cluster and a member of the stores: it has "
        f"{'; '.join(shown)}. The first column must have the ids of members.clusters, and the second those of "
        "members.store"
    )


def write_members(
    path: Path, offsets: np.ndarray, rows: np.ndarray, manifest: dict[str, Any], identity: dict[str, str]
) -> None:
    """Write the datasets and attributes of a file of members (see data/members.py).

    Args:
        identity: the attributes `clusters`, `members` and `store`.
    """

    def finish(file: h5py.File, checksums: dict[str, str]) -> None:
        checksums = {**checksums, "manifest": write_manifest(file, manifest)}
        fingerprint = fingerprint_of(checksums, identity["clusters"], identity["members"])
        for name, value in {**identity, "fingerprint": fingerprint}.items():
            file.attrs[name] = np.bytes_(value.encode())
        file.attrs["members_version"] = FORMAT_VERSION

    columns = {"offsets": offsets, "rows": rows}
    write_datasets(path, {name: (COLUMNS[name], len(values), [values]) for name, values in columns.items()}, finish)
