"""Compute the embeddings of a FASTA file on all ranks and write them as HDF5 or NPZ."""

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
MAX_ID_BYTES = 1 << 30


def ids_column(ids: list[str], output: Path) -> np.ndarray:
    """Return the ids as an array for the output file.

    HDF5 stores each id at its own length. NPZ stores every id at the length of the longest id.

    Raises:
        ValueError: the ids would take more than MAX_ID_BYTES in an NPZ file.
    """
    if output.suffix == ".h5":
        return np.array(ids, dtype=object)
    longest = max(ids, key=len)
    if (size := 4 * len(longest) * len(ids)) > MAX_ID_BYTES:
        raise ValueError(
            f"output={output}: NPZ stores every id at the length of the longest one, {len(longest):,} letters "
            f"({longest[:20]}...), {size / 1e9:.1f} GB in total; write HDF5 instead, such as output=x.h5"
        )
    return np.array(ids)


def read_proteins(path: str) -> tuple[list[str], list[np.ndarray]]:
    """Return the ids and tokens (`<bos> residues <eos>`) of a FASTA file's records.

    Raises:
        ValueError: the file is malformed. The message names the record and line.
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
    """Yield blocks of float32 rows, the embeddings of the proteins in their order.

    The ranks share the work: each rank computes one pack at a time. The rows are then gathered, so every rank yields
    the rows of all proteins.
    """
    processes = trained.processes
    residues = [
        len(window_starts(len(tokens) - 2, trained.max_len)) * min(len(tokens) - 2, trained.max_len)
        for tokens in proteins
    ]
    bounds = np.append(0, np.cumsum([len(pack) for pack in split_lengths(residues, tokens_per_pack)])).tolist()
    n_packs = len(bounds) - 1
    with ProgressBar("embedding", n_packs, shown=processes.first) as bar:
        for first in range(0, n_packs, processes.world_size):
            rows: list[np.ndarray] = []
            if (pack := first + processes.rank) < n_packs:
                states = embed(
                    trained.network,
                    trained.score_fn,
                    proteins[bounds[pack] : bounds[pack + 1]],
                    layer=layer,
                    max_len=trained.max_len,
                    tokens_per_pack=tokens_per_pack,
                )
                rows = [pool(state, pooling).numpy() for state in states]
            for rank_rows in gather_objects(rows):
                yield from rank_rows
            bar.advance(min(processes.world_size, n_packs - first))


def pool(states: Tensor, pooling: str) -> Tensor:
    """Return a protein's rows of the output: the mean (1, hidden) of its states, or all states (residues, hidden)."""
    return states.mean(0, keepdim=True) if pooling == "mean" else states


def fill(target: Any, blocks: Iterator[np.ndarray]) -> None:
    """Write blocks of rows to `target`, one after another."""
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
    with path.open("wb") as file:  # given a path that does not end in .npz, savez would add .npz
        np.savez(file, embeddings=embeddings, **columns, **notes)  # type: ignore[arg-type]
