"""FASTA -> HDF5 store -> packs of sequences (sequences longer than data.max_len are cropped)."""
