"""Ways to run the diffusion backwards: a file for each."""
