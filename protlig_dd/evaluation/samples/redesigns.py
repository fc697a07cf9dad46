"""Score redesigned proteins: upper bounds on -log p of the free residues given the fixed residues.

The free residues are redesigned; the fixed residues are kept from the input protein. Each draw masks k of the m free
residues, with k uniform on 1..m. The sum of the cross-entropies of the masked residues is multiplied by m / k. This is
the exact-count estimator of protlig_dd.diffusion.exact_count, except that fixed residues are never masked. All designs
of one protein use the same random numbers for their masks. So designs with the same free positions get the same masks,
and their scores differ only because their residues differ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.exact_count import cross_entropies
from protlig_dd.diffusion.numerics import sum_by_sequence, uniform_draws
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.diffusion.strata import error_of_pairs, strata
from protlig_dd.inference.layouts import Design, Protein
from protlig_dd.inference.sharing import Tick, Work
from protlig_dd.system.random import keyed_generator
from protlig_dd.system.tables import csv_text
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, EOS, MASK, N_STATES, ProteinTokenizer

CPU = torch.device("cpu")
MAX_DRAWS = 1 << 20


class Redesign(NamedTuple):
    """A design, or the input protein of designs, and which of its residues are free in the designs."""

    name: str
    ids: np.ndarray
    """(length,) token ids of amino acids and context letters."""
    free: np.ndarray
    """(length,) bool: True at free positions."""
    protein: int
    """Index of the input protein. Designs with the same index use the same random numbers for their masks."""


@torch.no_grad()
def free_draws(score_fn: ScoreFn, designs: Sequence[Redesign], work: Work, *, draws: int, seed: int) -> np.ndarray:
    """Return (draws, designs) nats whose sum over draws bounds -log p of the free residues given the fixed residues.

    The random numbers for the masks of draw k depend only on the seed, `Redesign.protein` and k.
    """
    levels = strata(draws)

    def masks(design: Redesign, k: int) -> tuple[int, torch.Tensor]:
        """Return how many free residues are masked in draw number k, and a random number for each free residue.

        The free residues with the lowest random numbers are masked.
        """
        m, (low, high, _) = int(design.free.sum()), levels[k]
        generator = keyed_generator(seed, "free residues", design.protein * MAX_DRAWS + k, CPU)
        position, order = float(uniform_draws(1, generator)), uniform_draws(m, generator)
        return min(m, int((low + (high - low) * position) * m) + 1), order

    def score(keys: range, tick: Tick) -> dict[int, np.ndarray]:
        pack = [designs[i] for i in keys]
        tokens = [torch.tensor([BOS, *design.ids.tolist(), EOS]) for design in pack]
        free_T = torch.cat([torch.tensor([False, *design.free.tolist(), False]) for design in pack])
        # cross_entropies computes sigma from the masked fraction of the residues that are not context. If the network
        # was trained with context, the fixed residues are context; otherwise no residue is.
        batch = PackedBatch.pack(tokens, context=~free_T if score_fn.trained_with_context else None)
        on_device, m_n, nats_kn = batch.to(score_fn.device), sum_by_sequence(free_T, batch).clamp(min=1), []
        for k, (_, _, weight) in enumerate(levels):
            counts, orders = zip(*(masks(design, k) for design in pack), strict=True)
            u_T = torch.ones(len(free_T), dtype=torch.float64).masked_scatter(free_T, torch.cat(orders))
            count_n = torch.tensor(counts, dtype=torch.float64)
            masked_T = batch.random_subset(free_T, count_n, u_T).to(score_fn.device)
            nats_T = cross_entropies(score_fn, on_device, masked_T).cpu()
            nats_kn.append((weight * m_n / count_n * sum_by_sequence(nats_T, batch)).numpy())
            tick()
        return dict(zip(keys, np.stack(nats_kn, axis=1), strict=True))

    nats = work.share([len(design.ids) for design in designs], score, ticks=draws)
    return np.array([nats[i] for i in range(len(designs))]).T


class FreeNLL(NamedTuple):
    """Scores of a design, with standard errors over draws."""

    nll: float
    """Bound in nats per free residue."""
    nll_error: float
    score: float
    """Bound of the input minus bound of the design, in nats over all free residues. A positive value means that the
    design is more likely. NaN if there is no complete input to compare with."""
    score_error: float


def free_nll(draws_kn: np.ndarray, designs: Sequence[Redesign], inputs: Sequence[int | None]) -> list[FreeNLL]:
    """Return, for each design, its bound and its score relative to its input, with standard errors.

    Args:
        draws_kn: (draws, designs) nats from `free_draws`.
        inputs: for each design, the index of its input in `designs`; None if `designs` does not contain the input.
    """
    nats, errors = draws_kn.sum(0), errors_of(draws_kn)
    scores = []
    for i, (design, base) in enumerate(zip(designs, inputs, strict=True)):
        m = max(1, int(design.free.sum()))
        score = score_error = float("nan")
        if base is not None:
            score = float(nats[base] - nats[i])
            score_error = float(errors_of(draws_kn[:, [base]] - draws_kn[:, [i]])[0])
        scores.append(FreeNLL(float(nats[i] / m), float(errors[i] / m), score, score_error))
    return scores


def errors_of(draws_kn: np.ndarray) -> np.ndarray:
    return error_of_pairs(torch.from_numpy(np.ascontiguousarray(draws_kn))).numpy()


def mutations(ids: np.ndarray, wild_type: np.ndarray) -> str:
    """Return the mutations of a design relative to its input, such as A24P:D30N.

    Positions that have no residue in the input (`_`) are left out.
    """
    decode = ProteinTokenizer().decode
    return ":".join(
        f"{decode(wild_type[[site]])}{site + 1}{AMINO_ACIDS[ids[site]]}"
        for site in np.flatnonzero((ids != wild_type) & (wild_type != MASK) & (ids < N_STATES)).tolist()
    )


def designs_csv(rows: Sequence[tuple[Redesign, str, FreeNLL | None]]) -> str:
    """Return CSV with a row for each (design or input, its mutations, its scores). Unknown scores are empty cells."""
    table = []
    for design, changes, scores in rows:
        cells = ["" if np.isnan(value) else value for value in scores] if scores is not None else [""] * 4
        table.append([design.name, ProteinTokenizer().decode(design.ids), changes, *cells])
    return csv_text(["name", "sequence", "mutations", "nll_free", "nll_free_se", "score", "score_se"], table)


def inputs_of(records: Sequence[Protein], designs: Sequence[Design]) -> list[Redesign]:
    """Return a Redesign for each input that has an amino acid at every free position of its designs."""
    free = {design.protein: design.template == MASK for design in designs}
    return [
        Redesign(record.id, ids, free[k], k)
        for k, (record, ids) in enumerate(records)
        if (ids[free[k]] < N_STATES).all()
    ]


def best_of(designs: Sequence[Redesign], scores: Sequence[FreeNLL | None], best: int) -> list[int]:
    """Return the indices of the designs to keep: for each protein the `best` designs of lowest bound, lowest first."""
    of_protein: dict[int, list[int]] = {}
    for i, design in enumerate(designs):
        of_protein.setdefault(design.protein, []).append(i)

    def nll(i: int) -> float:
        score = scores[i]
        assert score is not None
        return score.nll

    return [i for indices in of_protein.values() for i in sorted(indices, key=nll)[:best]]


def note_of(scores: FreeNLL | None) -> str:
    """Return the part of a design's FASTA header that reports its bound."""
    return "" if scores is None else f" nll_free={scores.nll:.4f} nll_free_se={scores.nll_error:.4f}"
