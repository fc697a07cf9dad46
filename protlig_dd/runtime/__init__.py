"""What every verb shares: configuration, environment, checkpoints, processes and metrics."""
