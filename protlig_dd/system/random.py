"""Random streams keyed by (seed, purpose, index).

A stream is the same on every rank and after every restart. It does not depend on the use of other streams.
"""

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
    """Return a generator for one purpose and index. For MPS, the generator is on the CPU, as MPS has no float64."""
    return torch.Generator(float64_device(device)).manual_seed(random_key(seed, purpose, index))


def protein_keys(sequences: Iterable[np.ndarray]) -> UInt64[np.ndarray, " n"]:
    """Return a number for each protein (token sequence). The number keys the random draws of this protein.

    It depends on the protein's tokens and on how many equal sequences precede the protein.
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
    """Return a position on [0, 1) for each Monte-Carlo draw of each protein.

    A likelihood bound takes each of its draws from one stratum (part) of the noise levels. The position is where in
    the stratum the draw lies: 0 is the start of the stratum, 1 is its end.

    In each draw, the positions of the n proteins are distributed evenly: each of n equal parts of [0, 1) contains the
    position of one protein. The positions depend on the set of proteins, but not on the order or the packing of the
    proteins.

    Args:
        keys: the `protein_keys` of the n proteins.
    """
    n, generator = len(keys), keyed_generator(seed, "places", 0, torch.device("cpu"))
    rank = torch.from_numpy(np.argsort(np.argsort(keys, kind="stable")))
    parts = torch.stack([torch.randperm(n, generator=generator) for _ in range(draws)])
    return ((parts + torch.rand(draws, n, generator=generator, dtype=torch.float64)) / n)[:, rank]
