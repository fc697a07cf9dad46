"""Random streams keyed by (seed, purpose, index): the same on every rank, in every order, after any restart."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
import xxhash
from jaxtyping import Float64, UInt64

from protlig_dd.system.device import float64_device


def random_key(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed; different arguments give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, index: int, device: torch.device) -> torch.Generator:
    """A generator for one purpose and index. It lives on the CPU for MPS, which has no float64 to draw in."""
    return torch.Generator(float64_device(device)).manual_seed(random_key(seed, purpose, index))


def protein_keys(sequences: Iterable[np.ndarray]) -> UInt64[np.ndarray, " n"]:
    """A number for each sequence of tokens, which follows from them and, of equal ones, from how many came before."""
    seen: Counter[bytes] = Counter()
    keys = []
    for one in sequences:
        digest = xxhash.xxh3_128_digest(one.astype(np.uint8).tobytes())
        keys.append(xxhash.xxh3_64_intdigest(digest, seed=seen[digest]))
        seen[digest] += 1
    return np.array(keys, np.uint64)


def places_of_set(keys: UInt64[np.ndarray, " n"], draws: int, seed: int) -> Float64[torch.Tensor, "draws n"]:
    """Where in its stratum each draw of each protein lies, stratified over the whole set: each draw has one place in
    each of n equal parts of [0, 1). They follow from the set, whatever order and packs its proteins come in.
    """
    n, generator = len(keys), keyed_generator(seed, "places", 0, torch.device("cpu"))
    rank = torch.from_numpy(np.argsort(np.argsort(keys, kind="stable")))
    parts = torch.stack([torch.randperm(n, generator=generator) for _ in range(draws)])
    return ((parts + torch.rand(draws, n, generator=generator, dtype=torch.float64)) / n)[:, rank]
