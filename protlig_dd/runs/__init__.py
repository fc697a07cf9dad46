"""The contents of a run folder: checkpoints and metrics."""
