"""From FASTA to a store."""
