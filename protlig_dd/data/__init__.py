"""FASTA -> HDF5 store -> packs of whole sequences."""
