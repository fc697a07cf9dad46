"""The diffusion transformer: maps packed tokens to logits. It does not depend on the diffusion code."""
