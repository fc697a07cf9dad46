"""Evaluate a model on held-out proteins: bounds on their likelihood, baselines and leaks from training."""
