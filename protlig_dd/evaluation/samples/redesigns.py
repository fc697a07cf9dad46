"""How likely designs are where they were designed: bounds on -log p of the free residues given the fixed ones.

Of m free residues k are masked, k uniform on 1..m, and m / k times their cross-entropies is averaged: the exact count
of protlig_dd.diffusion.likelihood with the fixed residues always shown. The designs of one protein have the same masks,
so that what differs between them is the residues.
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
MOST_DRAWS = 1 << 20


class Redesign(NamedTuple):
    """Residues of a protein of which some were free."""

    name: str
    ids: np.ndarray
    """(length,) amino acids and context letters."""
    free: np.ndarray
    """(length,) bool: an amino acid that was free."""
    protein: int
    """The number of the protein that it is a design of; those of one number have the same masks."""


@torch.no_grad()
def free_draws(score_fn: ScoreFn, designs: Sequence[Redesign], work: Work, *, draws: int, seed: int) -> np.ndarray:
    """(draws, designs) nats whose sum over draws bounds -log p of each design's free residues given the fixed ones.

    Draw k masks by (seed, "free residues", protein, k) alone.
    """
    levels = strata(draws)

    def masks(design: Redesign, k: int) -> tuple[int, torch.Tensor]:
        """How many free residues are masked, and the order in which they would be."""
        m, (low, high, _) = int(design.free.sum()), levels[k]
        generator = keyed_generator(seed, "free residues", design.protein * MOST_DRAWS + k, CPU)
        place, order = float(uniform_draws(1, generator)), uniform_draws(m, generator)
        return min(m, int((low + (high - low) * place) * m) + 1), order

    def score(keys: range, tick: Tick) -> dict[int, np.ndarray]:
        some = [designs[i] for i in keys]
        batch = PackedBatch.pack([torch.tensor([BOS, *one.ids.tolist(), EOS]) for one in some])
        free_T = torch.cat([torch.tensor([False, *one.free.tolist(), False]) for one in some])
        there, m_n, found = batch.to(score_fn.device), sum_by_sequence(free_T, batch).clamp(min=1), []
        for k, (_, _, weight) in enumerate(levels):
            counts, orders = zip(*(masks(one, k) for one in some), strict=True)
            u_T = torch.ones(len(free_T), dtype=torch.float64).masked_scatter(free_T, torch.cat(orders))
            count_n = torch.tensor(counts, dtype=torch.float64)
            masked_T = batch.random_subset(free_T, count_n, u_T).to(score_fn.device)
            nats_T = cross_entropies(score_fn, there, masked_T).cpu()
            found.append((weight * m_n / count_n * sum_by_sequence(nats_T, batch)).numpy())
            tick()
        return dict(zip(keys, np.stack(found, axis=1), strict=True))

    found = work.share([len(one.ids) for one in designs], score, ticks=draws)
    return np.array([found[i] for i in range(len(designs))]).T


class FreeNLL(NamedTuple):
    """Of a design, with standard errors over draws."""

    nll: float
    """Nats per free residue."""
    nll_error: float
    score: float
    """How many nats likelier the free residues are than the input's own; NaN where the input does not say all."""
    score_error: float


def free_nll(draws_kn: np.ndarray, designs: Sequence[Redesign], inputs: Sequence[int | None]) -> list[FreeNLL]:
    """Sums over draws, by free residue, and beside the input's own, which has the same masks.

    Args:
        inputs: for each design, which of `designs` is its input, if any.
    """
    nats, errors = draws_kn.sum(0), errors_of(draws_kn)
    found = []
    for i, (design, base) in enumerate(zip(designs, inputs, strict=True)):
        m = max(1, int(design.free.sum()))
        score = score_error = float("nan")
        if base is not None:
            score = float(nats[base] - nats[i])
            score_error = float(errors_of(draws_kn[:, [base]] - draws_kn[:, [i]])[0])
        found.append(FreeNLL(float(nats[i] / m), float(errors[i] / m), score, score_error))
    return found


def errors_of(draws_kn: np.ndarray) -> np.ndarray:
    return error_of_pairs(torch.from_numpy(np.ascontiguousarray(draws_kn))).numpy()


def mutations(ids: np.ndarray, wild_type: np.ndarray) -> str:
    """`A24P:D30N`: where a design has another amino acid than its input; what the input does not say is left out."""
    decode = ProteinTokenizer().decode
    return ":".join(
        f"{decode(wild_type[[site]])}{site + 1}{AMINO_ACIDS[ids[site]]}"
        for site in np.flatnonzero((ids != wild_type) & (wild_type != MASK) & (ids < N_STATES)).tolist()
    )


def designs_csv(rows: Sequence[tuple[Redesign, str, FreeNLL | None]]) -> str:
    """A row for each design or input, with its mutations: what one orders from. Empty cells are not known."""
    table = []
    for design, changed, found in rows:
        figures = ["" if np.isnan(value) else value for value in found] if found is not None else [""] * 4
        table.append([design.name, ProteinTokenizer().decode(design.ids), changed, *figures])
    return csv_text(["name", "sequence", "mutations", "nll_free", "nll_free_se", "score", "score_se"], table)


def inputs_of(records: Sequence[Protein], designs: Sequence[Design]) -> list[Redesign]:
    """The inputs that have a residue at every position that their designs have free, as rows of their own."""
    free = {design.protein: design.template == MASK for design in designs}
    return [
        Redesign(record.id, ids, free[k], k)
        for k, (record, ids) in enumerate(records)
        if (ids[free[k]] < N_STATES).all()
    ]


def best_of(designs: Sequence[Redesign], found: Sequence[FreeNLL | None], best: int) -> list[int]:
    """The numbers of the best designs of each protein, the best first."""
    of_protein: dict[int, list[int]] = {}
    for i, design in enumerate(designs):
        of_protein.setdefault(design.protein, []).append(i)

    def nll(i: int) -> float:
        one = found[i]
        assert one is not None
        return one.nll

    return [i for numbers in of_protein.values() for i in sorted(numbers, key=nll)[:best]]


def note_of(found: FreeNLL | None) -> str:
    """What the header of a design says of it."""
    return "" if found is None else f" nll_free={found.nll:.4f} nll_free_se={found.nll_error:.4f}"
