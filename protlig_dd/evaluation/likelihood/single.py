"""Score single proteins. The figures of a protein depend on no other protein, on no packing and on no rank.

`protlig_dd.score` and the methods `nll` and `pseudo_nll` of `protlig_dd.hub.ProteinDiffusion` call these functions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.data.case import targets_of
from protlig_dd.diffusion.likelihood import BoundsPerResidue, nll_bound, protein_draws
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.likelihood.scoring import Given
from protlig_dd.inference.profiles import masked_log_probs, site_packs
from protlig_dd.inference.sequences import check_list, check_seed, check_trained_length, check_whole, encode_whole
from protlig_dd.inference.sharing import QUIET, Tick, Work
from protlig_dd.system.random import protein_keys, stratified_positions
from protlig_dd.tokenizer import CONTEXT_LETTERS, N_STATES


def protein_bounds(
    score_fn: ScoreFn, proteins: Sequence[Given], work: Work = QUIET, *, draws: int, seed: int
) -> BoundsPerResidue:
    """Bound the NLL of each protein.

    The bound of a protein has the same draws as that of `protlig_dd.evaluate` for a file with only this protein. So it
    depends only on the model, the protein, `draws` and `seed`. The draws of a protein are evaluated together, in packs
    of at most work.tokens_per_pack tokens. The ranks share the proteins, and every rank returns all bounds.

    Args:
        proteins: each has at least one amino acid that is not context (`check_scored`).
    """
    positions = stratified_positions(np.zeros(1, np.uint64), draws, seed)  # one protein has the same for every key

    def score(i: int, tick: Tick) -> dict[int, tuple[float, float, int]]:
        tokens, is_context = proteins[i]
        context = None if is_context is None else torch.from_numpy(is_context)
        batch = PackedBatch.pack([torch.from_numpy(tokens.astype(np.int64))], context=context).to(score_fn.device)
        keyed_draws = protein_draws(protein_keys([tokens]), positions, seed)
        bound = nll_bound(score_fn, batch, generator=keyed_draws, draws=draws, tokens_at_once=work.tokens_per_pack)
        residues = int(bound.residues)
        tick()
        return {i: (float(bound.nats) / residues, float(bound.standard_error) / residues, residues)}

    found = work.share_packs(range(len(proteins)), score)
    bounds, errors, residues = zip(*(found[i] for i in range(len(proteins))), strict=True)
    return BoundsPerResidue(
        torch.tensor(bounds, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64), torch.tensor(residues)
    )


def pseudo_nlls(score_fn: ScoreFn, proteins: Sequence[np.ndarray], work: Work = QUIET) -> Float64[Tensor, " n"]:
    """Return minus the pseudo-log-likelihood of each protein, in nats per residue, on the CPU.

    This is the mean over residues of -log p(residue | all other residues): each residue is masked alone (Salazar et al.
    2020, arXiv 1910.14659). It has no random draws, and it is not a likelihood. The ranks share the packs, and every
    rank returns all figures.

    Args:
        score_fn: its graph is the absorbing graph.
        proteins: tokens `<bos> residues <eos>` of each protein, or a crop, with at least one amino acid.
    """
    packs = [
        (i, sites) for i, tokens in enumerate(proteins) for sites in site_packs(score_fn, tokens, work.tokens_per_pack)
    ]

    def score(pack: tuple[int, np.ndarray], tick: Tick) -> dict[tuple[int, int], float]:
        i, sites = pack
        log_RV = masked_log_probs(score_fn, proteins[i], sites)
        letters = torch.from_numpy(proteins[i][sites].astype(np.int64))
        tick()
        return {(i, int(sites[0])): -float(log_RV.gather(1, letters[:, None]).sum())}

    found = work.share_packs(packs, score)
    totals = torch.zeros(len(proteins), dtype=torch.float64)
    for i, sites in packs:
        totals[i] += found[i, int(sites[0])]
    return totals / torch.tensor([int((tokens < N_STATES).sum()) for tokens in proteins])


def check_scored(protein: Given, name: str) -> None:
    """Raise a ValueError if the protein has no amino acid to score."""
    if not (targets_of(protein.tokens, protein.is_context) < N_STATES).any():
        letters = ", ".join(CONTEXT_LETTERS)
        raise ValueError(f"{name} has no residue to score: all its letters are among {letters}")


def read_whole(sequences: Sequence[str], method: str, max_len: int) -> list[Given]:
    """Return proteins without context from a list of strings.

    Raises:
        ValueError: `sequences` is not a list of sequences; a sequence has an illegal letter, no amino acid or more than
            max_len residues. The message names the sequence.
    """
    check_list(sequences, f"{method} takes a list of sequences")
    proteins = []
    for i, sequence in enumerate(sequences):
        protein = Given(encode_whole(sequence, f"sequences[{i}]"), None)
        check_trained_length(len(protein.tokens) - 2, f"sequences[{i}]", max_len)
        check_scored(protein, f"sequences[{i}]")
        proteins.append(protein)
    return proteins


def check_draws(draws: int, seed: int) -> None:
    """Raise a ValueError unless `draws` is a whole number of at least 1 and `seed` is a whole number."""
    check_whole(draws, "draws is a whole number")
    check_seed(seed)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
