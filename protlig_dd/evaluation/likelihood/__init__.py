"""Bounds on the likelihood of held-out proteins."""
