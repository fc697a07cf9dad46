"""Evaluation of models: bounds on held-out proteins, baselines, sample statistics and reports."""
