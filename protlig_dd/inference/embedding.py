"""Embeddings of proteins: the network's hidden state at each residue of a clean sequence.

This module does not use Hydra.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from protlig_dd.batch import TOKENS_PER_PACK, PackedBatch, split_lengths
from protlig_dd.data.crops import window, window_starts
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.sequences import check_list, check_whole, encode_whole
from protlig_dd.model.config import unknown_choice
from protlig_dd.model.dit import DiT
from protlig_dd.tokenizer import BOS


def resolve_layer(layer: int, n_blocks: int) -> int:
    """Return the number of a layer, counted from 0 (the embedding) to n_blocks.

    Args:
        layer: negative numbers count from the end: -1 is the last layer, -2 the layer before it.

    Raises:
        ValueError: the network does not have this layer.
    """
    check_whole(layer, "layer is a whole number")
    if not -n_blocks - 1 <= layer <= n_blocks:
        raise ValueError(f"layer={layer}: this model has layers 0 (the embedding) to {n_blocks}; -1 is the last")
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
    """Return the hidden states of each protein's residues.

    The network reads the clean sequence (no masks). A network with time conditioning receives the noise level of t_min.

    Args:
        network: the network of score_fn, in evaluation mode.
        proteins: each is `<bos> residues <eos>`.
        layer: see `DiT.hidden_states`.
        max_len: longer proteins are cut into windows of max_len residues that overlap by at least half. A residue's
            state is the mean over the windows that contain the residue.
        tokens_per_pack: maximum number of tokens per pack. A window with more tokens is a pack of its own.

    Returns: (residues_i, hidden) float32 for each protein, on the CPU.
    """
    noise, device = score_fn.noise, score_fn.device
    starts = [window_starts(len(tokens) - 2, max_len) for tokens in proteins]
    windows = [
        window(tokens, start, max_len)
        for tokens, protein_starts in zip(proteins, starts, strict=True)
        for start in protein_starts
    ]
    remaining, window_states = iter(windows), list[Tensor]()
    for lengths in split_lengths([len(tokens) - 2 for tokens in windows], tokens_per_pack):
        sequences = [torch.from_numpy(np.array(tokens)) for tokens in itertools.islice(remaining, len(lengths))]
        batch = PackedBatch.pack(sequences).to(device)
        sigma = noise(torch.full((len(sequences),), noise.t_min, device=device))[0]
        with torch.autocast(device.type, dtype=score_fn.autocast, enabled=score_fn.autocast is not None):
            network_sigma = sigma if score_fn.time_conditioning else torch.zeros_like(sigma)
            states_TH = network.hidden_states(batch, network_sigma, layer)
        window_states += batch.unpack(states_TH.float().cpu())
    remaining_states = iter(window_states)
    embedded = []
    for tokens, protein_starts in zip(proteins, starts, strict=True):
        sums = torch.zeros(len(tokens) - 2, network.embedding.embedding_dim)
        counts = torch.zeros(len(tokens) - 2, 1)
        protein_states = itertools.islice(remaining_states, len(protein_starts))
        for start, state in zip(protein_starts, protein_states, strict=True):
            residues = state[torch.from_numpy(window(tokens, start, max_len) < BOS)]
            sums[start : start + len(residues)] += residues
            counts[start : start + len(residues)] += 1
        embedded.append(sums / counts)
    return embedded


def check_long(long: str, longest: int, name: str, max_len: int) -> None:
    """Check that no protein is longer than those the model was trained on, unless proteins may be cut into windows.

    Args:
        long: what to do with longer proteins, `error` or `window`.
        longest: number of residues of the longest protein.
        name: the longest protein's name in the error message.

    Raises:
        ValueError: the longest protein is too long and `long` is `error`, or `long` has an unknown value.
    """
    if long not in (choices := ("error", "window")):
        raise ValueError(unknown_choice("long", long, choices))
    if long == "error" and longest > max_len:
        raise ValueError(
            f"{name} has {longest} residues, but this model was trained on at most {max_len} residues; "
            "long=window averages over windows of that length"
        )


def mean_embeddings(
    network: DiT, score_fn: ScoreFn, sequences: Sequence[str], *, layer: int, max_len: int, long: str
) -> Float[Tensor, "n hidden"]:
    """Return the mean hidden state of each protein, on the CPU.

    Args:
        layer: negative numbers count from the end (see `resolve_layer`).
        long: what to do with proteins of more than max_len residues, `error` or `window` (see `embed`).

    Raises:
        ValueError: `sequences` is not a list of sequences, a sequence has an illegal letter or is too long (the message
            names the sequence), or the network does not have the layer.
    """
    check_list(sequences, "embed takes a list of sequences")
    chosen = resolve_layer(layer, len(network.blocks))
    tokens = list[np.ndarray]()
    for i, sequence in enumerate(sequences):
        tokens.append(encode_whole(sequence, f"sequences[{i}]"))
        check_long(long, len(tokens[-1]) - 2, f"sequences[{i}]", max_len)
    means = [embed(network, score_fn, [protein], layer=chosen, max_len=max_len)[0].mean(0) for protein in tokens]
    return torch.stack(means)
