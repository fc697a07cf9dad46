"""Embed proteins: a trained model's hidden states, averaged over each protein or for each residue.

python -m protlig_dd.embed from=runs/demo input=proteins.fasta output=embeddings.h5
python -m protlig_dd.embed from=runs/demo input=proteins.fasta output=residues.npz pooling=per_residue layer=1
torchrun --nproc-per-node=8 -m protlig_dd.embed from=runs/demo input=proteins.fasta.gz output=embeddings.h5 long=window
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from protlig_dd import __version__
from protlig_dd.batch import split_lengths
from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import check_least, read_config
from protlig_dd.config.verbs import EmbedConfig
from protlig_dd.data.crops import window_starts
from protlig_dd.data.encode import encode_block, nucleotide_warning
from protlig_dd.data.fasta import FastaFile
from protlig_dd.inference.embedding import POOLINGS, embed, resolve_layer
from protlig_dd.inference.model import TrainedModel, load_trained
from protlig_dd.system.distributed import gather_objects, processes_from_environment
from protlig_dd.system.files import check_free, replacing
from protlig_dd.system.terminal import ProgressBar, announce

SUFFIXES = (".h5", ".npz")
LONG = ("error", "window")
MOST_ID_BYTES = 1 << 30


def embed_proteins(cfg: DictConfig) -> None:
    """Load a run's newest checkpoint (averaged weights), embed a FASTA file, and write HDF5 or NPZ."""
    config = read_config(cfg, EmbedConfig)
    output = check_free(config.output)
    for key, value, choices in (
        ("pooling", config.pooling, POOLINGS),
        ("long", config.long, LONG),
        ("output's suffix", output.suffix, SUFFIXES),
    ):
        if value not in choices:
            raise ValueError(f"{key}={value}: there are {', '.join(choices)}")
    check_least([("tokens_per_pack", config.tokens_per_pack, 1)])
    ids, proteins = read_proteins(config.input)
    lengths = np.array([len(tokens) - 2 for tokens in proteins])
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    layer = resolve_layer(config.layer, len(trained.network.blocks))
    if config.long == "error" and lengths.max() > trained.max_len:
        first = int((lengths > trained.max_len).argmax())
        raise ValueError(
            f"{config.input}: {ids[first]} has {lengths[first]} residues, and this model was trained on at most "
            f"{trained.max_len}; long=window averages over windows of that length"
        )
    blocks = embedded_blocks(trained, proteins, layer, config.pooling, config.tokens_per_pack)
    offsets = np.append(0, lengths.cumsum())
    columns = {"ids": ids_column(ids, output), "lengths": lengths}
    columns |= {"offsets": offsets} if config.pooling == "per_residue" else {}
    notes = {
        "run": trained.run,
        "step": trained.step,
        "checkpoint": str(trained.saved.path),
        "layer": layer,
        "pooling": config.pooling,
        "protlig_dd": __version__,
    }
    shape = (len(ids) if config.pooling == "mean" else int(offsets[-1]), trained.network.embedding.embedding_dim)
    if trained.processes.first:
        write = write_hdf5 if output.suffix == ".h5" else write_npz
        with replacing(output) as file:
            write(file, shape, blocks, columns, notes)
    else:
        for _ in blocks:  # this rank computes its packs, and rank 0 writes
            pass
    announce(f"{output}: {len(ids)} proteins, {config.pooling}, {shape[0]} x {shape[1]} float32", trained.processes)


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


def main() -> None:
    """The command line."""
    run_verb(embed_proteins, "embed", EmbedConfig)


if __name__ == "__main__":
    main()
