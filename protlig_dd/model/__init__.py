"""The diffusion transformer: maps packs of tokens to logits, and knows nothing of diffusion."""
