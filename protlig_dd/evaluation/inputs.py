"""Proteins to be measured, from a store or FASTA, and the tables that come of it."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from protlig_dd.data.draws import some_of
from protlig_dd.data.encode import is_nucleotide, nucleotide_warning
from protlig_dd.data.fasta import read_fasta
from protlig_dd.data.store import HDF5_MAGIC, SequenceStore
from protlig_dd.system.distributed import processes_from_environment
from protlig_dd.system.files import writing
from protlig_dd.system.terminal import announce
from protlig_dd.tokenizer import ProteinTokenizer


def read_sequences(
    path: Path, split: str, most: int | None, seed: int
) -> tuple[SequenceStore | None, list[str], list[np.ndarray]]:
    """Ids and tokens of a store's split, or of a FASTA file; at most so many, drawn by the seed.

    Raises:
        ValueError: no such file or split, illegal letters, an empty split; named.
    """
    if is_store(path):
        store = SequenceStore(path)
        rows = thinned(store.split(split), most, seed)
        ids, sequences = [store.id(row) for row in rows], [store[row] for row in rows]
    else:
        store, encode = None, ProteinTokenizer().encode
        records = list(read_fasta(path))
        records = [records[i] for i in thinned(np.arange(len(records)), most, seed)]
        ids = [record.id for record in records]
        sequences = [encode(record.sequence.upper(), record.name) for record in records]
        if found := sum(is_nucleotide(tokens[1:-1].astype(np.uint8).tobytes()) for tokens in sequences):
            announce(nucleotide_warning(found, len(records), str(path)), processes_from_environment())
    if not sequences:
        raise ValueError(f"{path}: the split {split} is empty")
    return store, ids, sequences


def is_store(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(HDF5_MAGIC)) == HDF5_MAGIC


def thinned(rows: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    return rows if most is None else some_of(rows, most, seed)


def numbered_fasta(path: Path, sequences: Iterable[np.ndarray]) -> Path:
    """Write residues, without <bos> and <eos>, as FASTA with numbers as names; returns `path`."""
    decode = ProteinTokenizer().decode
    with writing(path), path.open("w") as file:
        file.writelines(f">{i}\n{decode(one)}\n" for i, one in enumerate(sequences))
    return path
