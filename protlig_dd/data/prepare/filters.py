"""Filters that drop sequences from a store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protlig_dd.data.encode import EncodedBlock
from protlig_dd.data.fasta import FastaBlock, parse_header
from protlig_dd.tokenizer import BOS, MASK

# names of the filters in the manifest, in the order in which they are applied; duplicates are found at the end
FILTERS = ("min_length", "max_length", "max_unknown", "fragments", "taxa", "duplicates")


@dataclass(frozen=True)
class Filters:
    """Options of the filters. A dropped sequence is counted once, under the first filter that it fails."""

    min_length: int = 1
    max_length: int | None = None
    max_unknown: float = 1.0
    """Largest allowed fraction of residues outside the 20 amino acids (letters X, B, Z, J, U and O)."""
    fragments: bool = True
    """False drops sequences whose header contains `(Fragment`."""
    taxa: Sequence[int] | None = None
    """TaxIDs to keep; with taxa_nodes, all taxa below them are kept too. None keeps all sequences."""
    taxa_nodes: Path | None = None
    """The file nodes.dmp of the NCBI taxonomy."""
    duplicates: bool = False
    """True keeps sequences that are equal to an earlier sequence."""


def taxa_below(taxa: Sequence[int], nodes: Path | None) -> np.ndarray:
    """Return the TaxIDs `taxa` and, if nodes.dmp of the NCBI taxonomy is given, all TaxIDs below them, ascending.

    Raises:
        ValueError: `nodes` does not exist or is not a nodes.dmp, or a TaxID is not in `nodes`.
    """
    if nodes is None:
        return np.unique(np.array(taxa, dtype=np.int64))
    if not nodes.is_file():
        raise ValueError(f"{nodes}: no such file (nodes.dmp is in NCBI's taxdump.tar.gz)")
    try:
        pairs = np.loadtxt(nodes, dtype=np.int64, delimiter="|", usecols=(0, 1), comments=None, ndmin=2)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{nodes}: not a nodes.dmp of the NCBI taxonomy: {error}") from error
    parent = np.full(int(pairs.max()) + 1, -1, dtype=np.int64)
    parent[pairs[:, 0]] = pairs[:, 1]
    for taxon in taxa:
        if not 0 < taxon < len(parent) or parent[taxon] < 0:
            raise ValueError(f"{nodes}: no TaxID {taxon}")
    wanted = np.zeros(len(parent), dtype=bool)
    wanted[list(taxa)] = True
    while True:  # each pass adds one level of the tree
        grown = wanted | (wanted[parent] & (parent >= 0))
        if (grown == wanted).all():
            return np.flatnonzero(wanted)
        wanted = grown


def failures(
    block: FastaBlock, encoded: EncodedBlock, filters: Filters, taxa: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield, for each active filter, the name of the filter and which records fail it, (n,) bool."""
    residues = encoded.lengths - 2
    if filters.min_length > 1:
        yield "min_length", residues < filters.min_length
    if filters.max_length is not None:
        yield "max_length", residues > filters.max_length
    if filters.max_unknown < 1:
        starts = np.cumsum(encoded.lengths) - encoded.lengths
        unknown = (encoded.tokens > MASK) & (encoded.tokens < BOS)
        yield "max_unknown", np.add.reduceat(unknown, starts, dtype=np.int64) / residues > filters.max_unknown
    if not filters.fragments:
        yield "fragments", np.array([b"(Fragment" in header for header in block.headers])
    if taxa is not None:
        tax_ids = [parse_header(header.decode()).tax_id for header in block.headers]
        yield "taxa", ~np.isin([-1 if tax_id is None else tax_id for tax_id in tax_ids], taxa)
