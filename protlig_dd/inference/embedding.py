"""Embeddings of proteins: what the network makes of each residue of a clean sequence; knows nothing of Hydra."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protlig_dd.batch import PackedBatch, split_lengths
from protlig_dd.data.crops import window, window_starts
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.dit import DiT
from protlig_dd.tokenizer import BOS

TOKENS_PER_PACK = 16_384  # as in configs/embed.yaml


def resolve_layer(layer: int, n_blocks: int) -> int:
    """A layer counted from 0, the embedding, to n_blocks; -1 is the last, -2 the one before.

    Raises:
        ValueError: a layer that the network does not have.
    """
    if not -n_blocks - 1 <= layer <= n_blocks:
        raise ValueError(f"layer={layer}: this model has 0 (the embedding) to {n_blocks}, or -1 for the last")
    return layer if layer >= 0 else n_blocks + 1 + layer


@torch.no_grad()
def embed(
    network: DiT,
    score_fn: ScoreFn,
    proteins: Sequence[np.ndarray],
    *,
    layer: int,
    max_len: int,
    tokens_per_pack: int = TOKENS_PER_PACK,
) -> list[Tensor]:
    """Hidden states of the residues of proteins.

    The network sees the clean sequence (no masks), and where it is conditioned on time the least noise it knows, t_min.

    Args:
        network: that of score_fn, evaluating.
        proteins: `<bos> residues <eos>` each.
        layer: see `DiT.hidden_states`.
        max_len: a longer protein is taken in windows of so many residues, which overlap by half; a residue's state is
            the mean over the windows that it is in.
        tokens_per_pack: how much is computed at once, a window at least.

    Returns: (residues_i, hidden) float32 of each protein, on the CPU.
    """
    noise, device = score_fn.noise, score_fn.device
    starts = [window_starts(len(tokens) - 2, max_len) for tokens in proteins]
    cut = [window(tokens, start, max_len) for tokens, own in zip(proteins, starts, strict=True) for start in own]
    left, found = iter(cut), list[Tensor]()
    for lengths in split_lengths([len(tokens) - 2 for tokens in cut], tokens_per_pack):
        some = [torch.from_numpy(np.array(tokens)) for tokens in itertools.islice(left, len(lengths))]
        batch = PackedBatch.pack(some).to(device)
        sigma = noise(torch.full((len(some),), noise.t_min, device=device))[0]
        with torch.autocast(device.type, dtype=score_fn.autocast, enabled=score_fn.autocast is not None):
            seen = sigma if score_fn.time_conditioning else torch.zeros_like(sigma)
            states_TH = network.hidden_states(batch, seen, layer)
        found += batch.unpack(states_TH.float().cpu())
    states = iter(found)
    embedded = []
    for tokens, own in zip(proteins, starts, strict=True):
        sums = torch.zeros(len(tokens) - 2, network.embedding.embedding_dim)
        counts = torch.zeros(len(tokens) - 2, 1)
        for start, state in zip(own, itertools.islice(states, len(own)), strict=True):
            residues = state[torch.from_numpy(window(tokens, start, max_len) < BOS)]
            sums[start : start + len(residues)] += residues
            counts[start : start + len(residues)] += 1
        embedded.append(sums / counts)
    return embedded
