"""Read the proteins to evaluate from a store or FASTA file, and write FASTA files for other programs."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protlig_dd.data.case import lower_case_of
from protlig_dd.data.draws import random_subset
from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.data.fasta import read_fasta
from protlig_dd.data.rows import SplitRows
from protlig_dd.data.store import HDF5_MAGIC, SequenceStore, StoreGroup
from protlig_dd.system.distributed import processes_from_environment
from protlig_dd.system.files import writing
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import ProteinTokenizer


class Proteins(NamedTuple):
    """Proteins that were read from a store or a FASTA file."""

    store: SequenceStore | None
    """None for FASTA."""
    ids: list[str]
    sequences: list[np.ndarray]
    """The tokens `<bos> residues <eos>` of each protein."""
    lower_case: list[np.ndarray | None]
    """For each protein, (residues,) bool: True for lower-case letters. None if the protein has no lower-case letter, or
    if the store does not keep the case of letters."""
    has_case: bool
    """For FASTA: whether any record of the file has both upper-case and lower-case letters, even if that record is not
    among the selected ones. For a store: whether it keeps the case of its records."""


def read_sequences(
    path: Path, split: str, most: int | None, seed: int
) -> tuple[SequenceStore | None, list[str], list[np.ndarray]]:
    """Read proteins as `read_proteins` does. Return the store (None for FASTA), and each protein's id and tokens."""
    return read_proteins(path, split, most, seed)[:3]


def read_proteins(path: Path, split: str, most: int | None, seed: int) -> Proteins:
    """Read proteins from one split of a store, or from a FASTA file.

    Args:
        most: maximum number of proteins; a larger set is subsampled at random with `seed`. None: all.

    Raises:
        ValueError: the file or split does not exist, a letter is illegal, or the split is empty.
    """
    if is_store(path):
        store = SequenceStore(path)
        rows = subsample(SplitRows(StoreGroup([store]), split), most, seed)
        ids, sequences = [store.id(row) for row in rows], [store[row] for row in rows]
        lower_case, has_case = [store.lower_case(row) for row in rows], store.has_case
    else:
        store, encode = None, ProteinTokenizer().encode
        records = list(read_fasta(path))
        cases = (lower_case_of(record.sequence) for record in records)
        has_case = any(lower is not None and not lower.all() for lower in cases)
        records = [records[i] for i in subsample(np.arange(len(records)), most, seed)]
        ids = [record.id for record in records]
        sequences = [encode(record.sequence.upper(), record.name) for record in records]
        lower_case = [lower_case_of(record.sequence) for record in records]
        if found := sum(is_nucleotide(tokens[1:-1].astype(np.uint8).tobytes()) for tokens in sequences):
            announce(nucleotide_warning(found, len(records), str(path)), processes_from_environment())
    if not sequences:
        raise ValueError(f"{path}: the split {split} is empty")
    return Proteins(store, ids, sequences, lower_case, has_case)


def is_store(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(HDF5_MAGIC)) == HDF5_MAGIC


def subsample(rows: np.ndarray | SplitRows, most: int | None, seed: int) -> np.ndarray:
    """Return at most `most` of the ascending `rows`, chosen at random with `seed`; all rows if `most` is None."""
    return np.asarray(rows) if most is None else random_subset(rows, most, seed)


def numbered_fasta(path: Path, sequences: Iterable[np.ndarray]) -> Path:
    """Write a FASTA file of sequences named 0, 1, ... and return its path.

    Args:
        sequences: token ids of each sequence, without <bos> and <eos>.
    """
    decode = ProteinTokenizer().decode
    with writing(path), path.open("w") as file:
        file.writelines(f">{i}\n{decode(sequence)}\n" for i, sequence in enumerate(sequences))
    return path
