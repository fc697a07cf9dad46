"""Random streams keyed by (seed, purpose, index): the same on every rank, in any order and after any restart."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float64, UInt64

from protlig_dd.system.device import float64_device


def random_key(seed: int, purpose: str, index: int) -> int:
    """Return a 63-bit seed; different arguments give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, index: int, device: torch.device) -> torch.Generator:
    """Return a generator for one purpose and index. For MPS it is on the CPU, as MPS has no float64."""
    return torch.Generator(float64_device(device)).manual_seed(random_key(seed, purpose, index))


def protein_keys(sequences: Iterable[np.ndarray]) -> UInt64[np.ndarray, " n"]:
    """Return a number for each token sequence.

    It depends on the tokens and, for equal sequences, on how many of them came before.
    """
    import xxhash  # imported here because loading a model in Python must not need it

    seen: Counter[bytes] = Counter()
    keys = []
    for sequence in sequences:
        digest = xxhash.xxh3_128_digest(sequence.astype(np.uint8).tobytes())
        keys.append(xxhash.xxh3_64_intdigest(digest, seed=seen[digest]))
        seen[digest] += 1
    return np.array(keys, np.uint64)


def stratified_positions(keys: UInt64[np.ndarray, " n"], draws: int, seed: int) -> Float64[torch.Tensor, "draws n"]:
    """Return the position of each draw of each protein within the draw's stratum, on [0, 1).

    The positions are themselves stratified over the n proteins: in each draw, each of n equal parts of [0, 1) contains
    the position of one protein. The positions depend on the set of proteins, not on their order or packs.

    Args:
        keys: `protein_keys` of the set.
    """
    n, generator = len(keys), keyed_generator(seed, "places", 0, torch.device("cpu"))
    rank = torch.from_numpy(np.argsort(np.argsort(keys, kind="stable")))
    parts = torch.stack([torch.randperm(n, generator=generator) for _ in range(draws)])
    return ((parts + torch.rand(draws, n, generator=generator, dtype=torch.float64)) / n)[:, rank]
