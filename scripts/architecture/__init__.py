"""Measurements of the kinds of networks in docs/architecture.md."""
