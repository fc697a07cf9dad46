"""Load a trained model and use it: sampling, infilling, embeddings and export."""
