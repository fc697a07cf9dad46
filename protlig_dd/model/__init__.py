"""The diffusion transformer and its rotary and attention kernels."""
