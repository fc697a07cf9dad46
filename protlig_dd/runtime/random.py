"""Random streams keyed by (seed, purpose, index): the same on every rank, in every order, after any restart."""

import hashlib

import torch

from protlig_dd.diffusion.numerics import float64_device


def random_key(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed; different arguments give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, index: int, device: torch.device) -> torch.Generator:
    """A generator for one purpose and index. It lives on the CPU for MPS, which has no float64 to draw in."""
    return torch.Generator(float64_device(device)).manual_seed(random_key(seed, purpose, index))
