"""Embed proteins: write a trained model's hidden states, one vector per protein or one per residue.

python -m protlig_dd.embed from=runs/demo input=proteins.fasta output=embeddings.h5
python -m protlig_dd.embed from=runs/demo input=proteins.fasta output=residues.npz pooling=per_residue layer=1
torchrun --nproc-per-node=8 -m protlig_dd.embed from=runs/demo input=proteins.fasta.gz output=embeddings.h5 long=window
"""

import numpy as np
from omegaconf import DictConfig

from protlig_dd import __version__
from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import EmbedConfig
from protlig_dd.inference.embedding import check_long, resolve_layer
from protlig_dd.inference.embedding_file import (
    SUFFIXES,
    embedded_blocks,
    ids_column,
    read_proteins,
    write_hdf5,
    write_npz,
)
from protlig_dd.inference.model import load_trained
from protlig_dd.system.files import check_free, creating
from protlig_dd.system.terminal import announce


def embed_proteins(cfg: DictConfig) -> None:
    """Load a model's averaged weights, embed the proteins of a FASTA file, and write HDF5 or NPZ."""
    config = read_config(cfg, EmbedConfig)
    output = check_free(config.output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output={output}: the name must end in {' or '.join(SUFFIXES)}")
    ids, proteins = read_proteins(config.input)
    lengths = np.array([len(tokens) - 2 for tokens in proteins])
    trained = load_trained(config.from_, device=config.device, precision=config.precision)
    layer = resolve_layer(config.layer, len(trained.network.blocks))
    longest = int(lengths.argmax())
    check_long(config.long, int(lengths[longest]), f"{config.input}: {ids[longest]}", trained.max_len)
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
        with creating(output) as file:
            write(file, shape, blocks, columns, notes)
    else:
        for _ in blocks:  # iterating computes this rank's packs; rank 0 writes the results
            pass
    announce(f"{output}: {len(ids)} proteins, {config.pooling}, {shape[0]} x {shape[1]} float32", trained.processes)


def main() -> None:
    """The command line."""
    run_verb(embed_proteins, "embed", EmbedConfig)


if __name__ == "__main__":
    main()
