"""Build a store from FASTA."""
