"""Log-probabilities of the 20 amino acids at each position of a protein. Does not use Hydra.

The columns are the amino acids in the order ACDEFGHIKLMNPQRSTVWY. Context letters, such as X, are not amino acids:
their rows are -inf.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.exact_count import scheduled_sigma
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.inspect import pack_of, sigma_of
from protlig_dd.inference.sequences import check_trained_length, encode_whole


@torch.no_grad()
def log_probs(
    score_fn: ScoreFn, sequence: str, *, t: float | None = None, max_len: int
) -> Float32[Tensor, "residues 20"]:
    """Return log q of each residue from one evaluation of the network, on the CPU; see `ScoreFn.x0_log_probs` for q.

    Args:
        sequence: letters in either case; `_` is a masked residue (only for graphs with a mask).
        t: as in `protlig_dd.inference.inspect.attention`.
        max_len: largest number of residues that the model was trained on.

    Raises:
        ValueError: an illegal letter, or `_` if the graph has no mask; a sequence longer than max_len; t out of range.
    """
    batch = pack_of(score_fn, sequence, "sequence", max_len)
    sigma, batch = sigma_of(score_fn, batch, t).to(score_fn.device), batch.to(score_fn.device)
    sigma_T = sigma.index_select(0, batch.segment_ids)
    log_TV = score_fn.x0_log_probs(score_fn.logits(batch, sigma), batch.tokens, sigma_T).float().cpu()
    known_T = (batch.tokens <= score_fn.graph.mask).cpu()
    return torch.where(known_T[:, None], log_TV, -torch.inf)[1:-1]


def profile(score_fn: ScoreFn, sequence: str, *, max_len: int, tokens_per_pack: int) -> Float64[Tensor, "residues 20"]:
    """Return the log-probabilities at each residue if this residue alone is masked, on the CPU.

    Args:
        sequence: letters in either case.
        max_len: largest number of residues that the model was trained on.

    Raises:
        ValueError: a graph without a mask, an illegal letter, or a sequence longer than max_len.
    """
    check_masks(score_fn, "pssm")
    tokens = encode_whole(sequence, "sequence")
    check_trained_length(len(tokens) - 2, "sequence", max_len)
    table = torch.full((len(tokens), score_fn.graph.n_states), -torch.inf, dtype=torch.float64)
    for sites in site_packs(score_fn, tokens, tokens_per_pack):
        table[sites] = masked_log_probs(score_fn, tokens, sites)
    return table[1:-1]


def check_masks(score_fn: ScoreFn, name: str) -> None:
    """Raise a ValueError if the graph has no mask.

    Args:
        name: what needs the mask: a method, or a key with its value.
    """
    if not score_fn.graph.masks:
        raise ValueError(
            f"{name} masks one residue at a time, which needs the absorbing graph; this model has graph="
            f"{score_fn.graph.name}"
        )


def site_packs(score_fn: ScoreFn, tokens: np.ndarray, tokens_per_pack: int) -> Iterator[np.ndarray]:
    """Yield the indices of the protein's amino acids in `tokens`, in parts for `masked_log_probs`.

    The copies of the protein that a part needs have at most tokens_per_pack tokens, unless one copy has more.
    """
    sites = np.flatnonzero(tokens < score_fn.graph.n_states)
    size = max(1, tokens_per_pack // len(tokens))
    for start in range(0, len(sites), size):
        yield sites[start : start + size]


@torch.no_grad()
def masked_log_probs(score_fn: ScoreFn, tokens: np.ndarray, sites: np.ndarray) -> Float64[Tensor, "sites 20"]:
    """Return the log-probabilities at each site if this site alone is masked, on the CPU.

    The network evaluates one copy of the protein for each site, all in one pack. If it has time conditioning, it
    receives the sigma that matches one masked residue, within the limits of the noise schedule.

    Args:
        tokens: `<bos> residues <eos>`, or a crop.
        sites: indices of amino acids in `tokens`.
    """
    graph, device = score_fn.graph, score_fn.device
    copies = PackedBatch.pack([torch.from_numpy(tokens.astype(np.int64))]).repeated(len(sites))
    masked = torch.arange(len(sites)) * len(tokens) + torch.from_numpy(sites)
    copies = copies.with_tokens(copies.tokens.index_fill(0, masked, graph.mask)).to(device)
    fraction = torch.full((len(sites),), 1 / (tokens < graph.n_states).sum(), dtype=torch.float64)
    logits_TV = score_fn.logits(copies, scheduled_sigma(score_fn.noise, fraction).to(device))
    return logits_TV[masked.to(device)].cpu().double().log_softmax(-1)
