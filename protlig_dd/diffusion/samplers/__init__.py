"""Samplers, which run the diffusion backwards: one file per kind."""
