"""Discrete diffusion: noise, graphs, scores, the loss, the likelihood bound and the samplers."""
