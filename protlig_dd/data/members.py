"""The members of clusters, from which training draws (see member_packs.py).

The representatives of the clusters are in one store, and the members in another. A file of members, which `prepare`
writes (see prepare/members.py), lists the members of each cluster. Layout of its format version 1, for n clusters and m
members. Every dataset is contiguous, so that it can be memory-mapped.

    offsets     (n + 1,) int64   the members of cluster i are rows[offsets[i]:offsets[i + 1]]
    rows        (m,) uint32      row numbers in the store of members, ascending within a cluster
    manifest    (k,) uint8       JSON text of k bytes: the table and the counts
    attributes  members_version, fingerprint; `clusters` and `members`, the fingerprints of the two stores; `store`, the
                path of the store of members, relative to this file's folder. Each dataset has an attribute `xxh3`, the
                128-bit XXH3 of its bytes
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from protlig_dd.data.case import Context
from protlig_dd.data.datasets import check_datasets, map_extent, read_extents
from protlig_dd.data.draws import random_below
from protlig_dd.data.lengths import Lengths
from protlig_dd.data.packing import clipped_tokens
from protlig_dd.data.store import NOT_A_STORE, SPLITS, SequenceStore, StoreGroup

FORMAT_VERSION = 1
COLUMNS = {"offsets": np.int64, "rows": np.uint32, "manifest": np.uint8}
CLUSTERS_AT_ONCE = 1 << 20  # changing this changes the draws of all runs
HOW_TO_WRITE = (
    "write one with `python -m protlig_dd.prepare members.clusters=... members.store=... members.table=... output=...`"
)


class Members:
    """The members of each cluster. Only the path is pickled; each process maps the file itself.

    Raises:
        ValueError: the file is missing, is not a file of members, is incomplete, or has another format version. The
            message names the file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            problem = "a folder, not a file" if self.path.is_dir() else f"no such file of members; {HOW_TO_WRITE}"
            raise ValueError(f"{self.path}: {problem}")
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                self._read_layout(file)
        except NOT_A_STORE as error:
            raise ValueError(f"{self.path}: not a file of members ({error}); {HOW_TO_WRITE}") from error

    def _read_layout(self, file: h5py.File) -> None:
        attrs = dict(file.attrs)
        if (version := attrs.get("members_version")) != FORMAT_VERSION:
            if version is None:
                raise ValueError(f"{self.path}: not a file of members; {HOW_TO_WRITE}")
            raise ValueError(
                f"{self.path} has format {version} of files of members; this version of protlig_dd reads only format "
                f"{FORMAT_VERSION}"
            )
        names = ("fingerprint", "clusters", "members", "store")
        self.fingerprint, self.clusters_fingerprint, self.store_fingerprint, store = (
            attrs[name].decode() for name in names
        )
        self.store_path = self.path.parent / store
        self._extents, self.checksums = read_extents(file, self.path, COLUMNS)
        self.manifest: dict[str, Any] = json.loads(file["manifest"][:].tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        """Return the number of clusters."""
        return self._extents["offsets"].size - 1

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n + 1,) int64, memory-mapped."""
        return map_extent(self.path, self._extents["offsets"])

    @cached_property
    def rows(self) -> np.ndarray:
        """(m,) row numbers in the store of members, grouped by cluster, memory-mapped."""
        return map_extent(self.path, self._extents["rows"])

    @cached_property
    def store(self) -> SequenceStore:
        """The store of members.

        Raises:
            ValueError: the store is not where it was when the file of members was written, or has other contents.
        """
        if not self.store_path.is_file():
            raise ValueError(
                f"{self.path} needs its store of members, {self.store_path}, which does not exist; move the two files "
                f"together, or {HOW_TO_WRITE}"
            )
        store = SequenceStore(self.store_path)
        if store.fingerprint != self.store_fingerprint:
            raise ValueError(
                f"{self.path} was written for other contents of {store.path}: fingerprint {self.store_fingerprint}, "
                f"now {store.fingerprint}; {HOW_TO_WRITE}"
            )
        return store

    def verify(self) -> None:
        """Read every dataset and compare it with its checksum.

        Raises:
            ValueError: a dataset does not match its checksum, or the checksums do not match the fingerprint.
        """
        check_datasets(self.path, self._extents, self.checksums)
        if fingerprint_of(self.checksums, self.clusters_fingerprint, self.store_fingerprint) != self.fingerprint:
            raise ValueError(f"{self.path}: the fingerprint does not match the checksums")

    def sizes(self, clusters: np.ndarray) -> np.ndarray:
        """Return the number of members of each of these clusters, (n,) int64."""
        starts, ends = self.offsets[clusters], self.offsets[clusters.astype(np.int64) + 1]
        if len(starts) and (starts.min() < 0 or (ends < starts).any() or ends.max() > len(self.rows)):
            raise self._damaged()
        return ends - starts

    def of(self, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of all members of some clusters, cluster by cluster, and each cluster's number of members."""
        starts, sizes = self.offsets[clusters], self.sizes(clusters)
        before = np.cumsum(sizes) - sizes
        return self._rows(np.repeat(starts - before, sizes) + np.arange(sizes.sum())), sizes

    def draw(self, clusters: np.ndarray, key: list[int], version: int) -> np.ndarray:
        """Draw a member of each of these clusters. Return (n,) row numbers in `ClusterGroup.joint`.

        Args:
            key: key of the random numbers (see draws.py).
            version: version of the method of random choices (see draws.py).
        """
        drawn = np.empty(len(clusters), np.uint32 if len(self) + len(self.store) < 2**32 else np.int64)
        for number, first in enumerate(range(0, len(clusters), CLUSTERS_AT_ONCE)):
            block = clusters[first : first + CLUSTERS_AT_ONCE]
            starts, sizes = self.offsets[block], self.sizes(block)
            chosen = starts + random_below(np.maximum(sizes, 1), [*key, number], version)
            filled = sizes > 0
            part = drawn[first : first + len(block)]
            part[:] = block
            part[filled] = len(self) + self._rows(chosen[filled])
        return drawn

    def expected_tokens(self, clusters: np.ndarray, lengths: np.ndarray | Lengths, max_len: int) -> int:
        """Return the sum, over these clusters, of the mean number of tokens of the cluster's members, rounded down.

        A cluster without members counts the tokens of its representative.

        Args:
            lengths: number of residues of every representative.
            max_len: longer sequences are cropped to this many residues.
        """
        total = 0
        for first in range(0, len(clusters), CLUSTERS_AT_ONCE):
            block = clusters[first : first + CLUSTERS_AT_ONCE]
            rows, sizes = self.of(block)
            ends = np.append(0, np.cumsum(clipped_tokens(self.store.lengths[rows], max_len)))
            bounds = np.append(0, np.cumsum(sizes))
            sums, filled = np.diff(ends[bounds]), sizes > 0
            total += int((sums[filled] // sizes[filled]).sum())
            total += int(clipped_tokens(lengths[block[~filled]], max_len).sum())
        return total

    def _rows(self, indices: np.ndarray) -> np.ndarray:
        """Return these values of `rows` as int64, after checking that they are rows of the store."""
        rows = self.rows[indices].astype(np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.store):
            raise self._damaged()
        return rows

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} is damaged; check it with `python -m protlig_dd.prepare inspect={self.path}`")


class ClusterGroup(StoreGroup):
    """A store of clusters, in whose place training reads random members of the training clusters.

    As a StoreGroup, it contains the representatives only: they are evaluated, and statistics describe them.

    Raises:
        ValueError: the file of members was written for another store of clusters, or an error of StoreGroup.
    """

    def __init__(self, clusters: SequenceStore, members: Members, context: Context = "none") -> None:
        super().__init__([clusters], context)
        if members.clusters_fingerprint != clusters.fingerprint:
            raise ValueError(
                f"data.members={members.path} was written for another store of clusters (fingerprint "
                f"{members.clusters_fingerprint}) than data.path={clusters.path} ({clusters.fingerprint}); "
                f"{HOW_TO_WRITE}"
            )
        if len(members) != len(clusters):
            raise ValueError(f"{members.path}: {len(members)} clusters, but {clusters.path} has {len(clusters)}")
        self.members = members
        self.joint = StoreGroup([clusters, members.store], context)
        """The clusters' representatives and then the members, with joint row numbers."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stores[0], self.members, self.context)


class MembersOfSplits(SequenceStore):
    """The store of members, in which each member has the split of its cluster. Rows without a cluster have no split.

    `token_counts` has the counts of the store's own splits.
    """

    def __init__(self, group: ClusterGroup) -> None:
        super().__init__(group.members.store.path)
        self.group = group

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.group,)

    @cached_property
    def _splits(self) -> np.ndarray:
        splits = np.full(len(self), len(SPLITS), np.uint8)
        for code, name in enumerate(SPLITS):
            for block in self.group.stores[0].split_blocks(name):
                splits[self.group.members.of(block)[0]] = code
        return splits


def is_members_file(path: str) -> bool:
    """Whether this is a file of members of any format version."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return "members_version" in file.attrs
    except OSError:
        return False


def fingerprint_of(checksums: dict[str, str], clusters: str, members: str) -> str:
    """Return a hash that identifies the contents of a file of members, without its manifest."""
    parts = [f"offsets={checksums['offsets']}", f"rows={checksums['rows']}", clusters, members]
    return xxhash.xxh3_128_hexdigest(" ".join(parts).encode())
