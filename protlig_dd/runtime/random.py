"""Random streams keyed by (seed, purpose, index): the same on every rank, in every order, after any restart."""

import hashlib

import torch


def random_key(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed; different arguments give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, index: int, device: torch.device) -> torch.Generator:
    """A generator for one purpose and index. It lives on the CPU for MPS, which has no float64 to draw in."""
    where = "cpu" if device.type == "mps" else device
    return torch.Generator(where).manual_seed(random_key(seed, purpose, index))
