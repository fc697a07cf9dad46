"""Training: `python -m protlig_dd.training`."""
