"""Embeddings of a FASTA file, computed by all ranks and written as HDF5 or NPZ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from protlig_dd.batch import split_lengths
from protlig_dd.data.crops import window_starts
from protlig_dd.data.encode import encode_block, nucleotide_warning
from protlig_dd.data.fasta import FastaFile
from protlig_dd.inference.embedding import embed
from protlig_dd.inference.model import TrainedModel
from protlig_dd.system.distributed import gather_objects, processes_from_environment
from protlig_dd.system.terminal import ProgressBar, announce

SUFFIXES = (".h5", ".npz")
MOST_ID_BYTES = 1 << 30


def ids_column(ids: list[str], output: Path) -> np.ndarray:
    """The ids as the file keeps them: HDF5 each at its length, NPZ all at that of the longest.

    Raises:
        ValueError: ids that would take more than MOST_ID_BYTES so.
    """
    if output.suffix == ".h5":
        return np.array(ids, dtype=object)
    longest = max(ids, key=len)
    if (size := 4 * len(longest) * len(ids)) > MOST_ID_BYTES:
        raise ValueError(
            f"output={output}: NPZ keeps all ids at the length of the longest, {len(longest):,} letters "
            f"({longest[:20]}...), {size / 1e9:.1f} GB in all; HDF5 does not (output=x.h5)"
        )
    return np.array(ids)


def read_proteins(path: str) -> tuple[list[str], list[np.ndarray]]:
    """Ids and `<bos> residues <eos>` of a FASTA file's records.

    Raises:
        ValueError: what is wrong with the file, naming record and line.
    """
    ids: list[str] = []
    proteins: list[np.ndarray] = []
    nucleotides = 0
    for block in FastaFile(path).blocks():
        encoded = encode_block(block)
        nucleotides += encoded.nucleotides
        ids += [id_.decode() for id_ in block.ids]
        proteins += np.split(encoded.tokens, encoded.lengths.cumsum()[:-1])
    if nucleotides:
        announce(nucleotide_warning(nucleotides, len(ids), path), processes_from_environment())
    return ids, proteins


def embedded_blocks(
    trained: TrainedModel, proteins: list[np.ndarray], layer: int, pooling: str, tokens_per_pack: int
) -> Iterator[np.ndarray]:
    """Float32 rows in the order of the proteins, a pack of each rank at a time; the same on every rank."""
    processes = trained.processes
    computed = [
        len(window_starts(len(tokens) - 2, trained.max_len)) * min(len(tokens) - 2, trained.max_len)
        for tokens in proteins
    ]
    firsts = np.append(0, np.cumsum([len(pack) for pack in split_lengths(computed, tokens_per_pack)])).tolist()
    n_packs = len(firsts) - 1
    with ProgressBar("embedding", n_packs, shown=processes.first) as bar:
        for first in range(0, n_packs, processes.world_size):
            rows: list[np.ndarray] = []
            if (mine := first + processes.rank) < n_packs:
                states = embed(
                    trained.network,
                    trained.score_fn,
                    proteins[firsts[mine] : firsts[mine + 1]],
                    layer=layer,
                    max_len=trained.max_len,
                    tokens_per_pack=tokens_per_pack,
                )
                rows = [pooled(state, pooling).numpy() for state in states]
            for part in gather_objects(rows):
                yield from part
            bar.advance(min(processes.world_size, n_packs - first))


def pooled(states: Tensor, pooling: str) -> Tensor:
    """(residues, hidden) -> the rows to write, (1, hidden) for the mean."""
    return states.mean(0, keepdim=True) if pooling == "mean" else states


def fill(target: Any, blocks: Iterator[np.ndarray]) -> None:
    """Write blocks of rows one below the other."""
    start = 0
    for block in blocks:
        target[start : start + len(block)] = block
        start += len(block)


def write_hdf5(
    path: Path,
    shape: tuple[int, int],
    blocks: Iterator[np.ndarray],
    columns: dict[str, np.ndarray],
    notes: dict[str, Any],
) -> None:
    with h5py.File(path, "w") as file:
        fill(file.create_dataset("embeddings", shape, np.float32), blocks)
        for name, column in columns.items():
            file.create_dataset(name, data=column, dtype=h5py.string_dtype() if name == "ids" else column.dtype)
        file.attrs.update(notes)


def write_npz(
    path: Path,
    shape: tuple[int, int],
    blocks: Iterator[np.ndarray],
    columns: dict[str, np.ndarray],
    notes: dict[str, Any],
) -> None:
    embeddings = np.empty(shape, np.float32)
    fill(embeddings, blocks)
    with path.open("wb") as file:  # given a name, savez would add a suffix
        np.savez(file, embeddings=embeddings, **columns, **notes)  # type: ignore[arg-type]
