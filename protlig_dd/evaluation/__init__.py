"""What a model is measured by: held-out bounds, baselines, statistics of sequences, reports."""
