"""Scores of variants as differences of NLL bounds, with the same noise for the wild type and the variant."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.exact_count import masked_nats
from protlig_dd.diffusion.likelihood import integrand, reconstruction
from protlig_dd.diffusion.numerics import sum_by_sequence, uniform_draws
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.variants.mutants import Variant
from protlig_dd.evaluation.variants.windows import Piece, length_change, window_tokens
from protlig_dd.inference.sharing import Tick, Work
from protlig_dd.system.random import keyed_generator
from protlig_dd.tokenizer import PAD

CPU = torch.device("cpu")
GAP = PAD  # stands for a residue that the variant lacks; no graph adds noise to <pad>


class Columns(NamedTuple):
    """Alignment of the tokens of a variant's window with the tokens of the wild type's window.

    Aligned tokens get the same noise.
    """

    aligned: Tensor
    """For each token of the wild type's window, the aligned token of the variant, or GAP if there is none."""
    inserted: Tensor
    """The variant's tokens that are not aligned with any token of the wild type."""
    order: Tensor
    """For each of the variant's tokens, its index in the concatenation of `aligned` and `inserted`."""

    def join(self, aligned: Tensor, inserted: Tensor) -> Tensor:
        """Merge values of the `aligned` tokens and values of the `inserted` tokens into the variant's order of tokens.

        The values of gaps are dropped.
        """
        return torch.cat([aligned, inserted])[self.order]


def columns_of(target: np.ndarray, piece: Piece) -> Columns:
    """Align the window of a variant with the window of the wild type.

    Without an indel, the tokens are aligned position by position. An indel replaces a block of the wild type's
    residues; all tokens outside the block are aligned. The residues of the block and the new residues are aligned one
    by one from the start of the block. If there are more of one kind than of the other, the surplus is not aligned.
    """
    aligned = torch.from_numpy(window_tokens(target, piece.start, piece.stop))
    shift = (piece.start == 0) - piece.start  # index in the window minus position in the protein
    index = torch.arange(len(aligned))
    for site, residue in piece.change.substitutions:
        aligned[site + shift] = residue
    if piece.change.indel is None:
        return Columns(aligned, torch.empty(0, dtype=torch.int64), index)
    start, stop, ids = piece.change.indel
    new, shared = torch.tensor(ids, dtype=torch.int64), min(stop - start, len(ids))
    kept, inserted = start + shift + shared, new[shared:]
    aligned[start + shift : kept], aligned[kept : stop + shift] = new[:shared], GAP
    extra = len(aligned) + torch.arange(len(inserted))
    return Columns(aligned, inserted, torch.cat([index[:kept], extra, index[stop + shift :]]))


@torch.no_grad()
def bound_differences(
    score_fn: ScoreFn, target: np.ndarray, pieces: Sequence[Piece], work: Work, *, draws: int, seed: int
) -> np.ndarray:
    """Return draws of (NLL bound of the wild type, scaled to the variant's length) - (NLL bound of the variant).

    In each draw, the wild type and all variants share the time or, with the exact-count estimator, the fraction of
    masked residues. They also share the random numbers for the noise of each aligned token. Draws 2 i and 2 i + 1 are
    antithetic: they use u and 1 - u for the time or the fraction. With the exact-count estimator, they also use u and
    1 - u for the choice of the masked residues.

    Returns:
        (draws, pieces) float64, nats.
    """
    if draws < 4 or draws % 2:
        raise ValueError(f"draws must be even and at least 4, got {draws}")
    windows = list(dict.fromkeys((piece.start, piece.stop) for piece in pieces))
    items = [Piece(-1, start, stop, Variant()) for start, stop in windows] + list(pieces)
    uniforms = antithetic_uniforms(draws, keyed_generator(seed, "variants, times", 0, CPU))
    bound_draw = exact_count_draw if score_fn.estimator == "exact_count" else integral_draw

    def score(numbers: range, tick: Tick) -> dict[int, np.ndarray]:
        columns = [columns_of(target, items[i]) for i in numbers]
        batch = PackedBatch.pack([each.join(each.aligned, each.inserted) for each in columns])
        nats = []
        for k, u in enumerate(uniforms):
            nats_T = bound_draw(score_fn, batch, columns, u, k, seed).cpu()
            nats.append(sum_by_sequence(nats_T, batch).numpy())
            tick()
        return dict(zip(numbers, np.stack(nats, axis=1), strict=True))

    lengths = [piece.stop - piece.start + length_change(piece.change) for piece in items]
    found = work.share(lengths, score, ticks=draws)
    wild = {window: found[i] for i, window in enumerate(windows)}
    nats = []
    for i, piece in enumerate(pieces):
        residues = int((target[piece.start : piece.stop] < score_fn.graph.n_states).sum())
        stretch = 1 + length_change(piece.change) / max(1, residues)
        nats.append(stretch * wild[piece.start, piece.stop] - found[len(windows) + i])
    return np.array(nats).reshape(len(pieces), draws).T


def antithetic_uniforms(draws: int, generator: torch.Generator) -> list[float]:
    """Return stratified uniform draws on [0, 1], one per stratum, as pairs u, 1 - u."""
    lower = (torch.arange(draws // 2) + uniform_draws(draws // 2, generator)) / draws
    return torch.stack([lower, 1 - lower], dim=1).flatten().tolist()


def column_streams(seed: int, draw: int) -> tuple[torch.Generator, torch.Generator]:
    """Return a generator for the aligned tokens, and a generator for the inserted tokens.

    The generators are on the CPU, so that all devices get the same draws.
    """
    return keyed_generator(seed, "variants, columns", draw, CPU), keyed_generator(seed, "variants, inserted", draw, CPU)


def exact_count_draw(
    score_fn: ScoreFn, batch: PackedBatch, columns: Sequence[Columns], u: float, k: int, seed: int
) -> Tensor:
    """Return draw k of the exact-count bound: nats of each token of the pack, (total,).

    The draw masks floor(u L) + 1 of the L residues of each sequence.
    """
    graph, device = score_fn.graph, score_fn.device
    drawn = []
    for each in columns:
        aligned, inserted = column_streams(seed, k // 2)
        drawn.append(each.join(uniform_draws(len(each.aligned), aligned), uniform_draws(len(each.inserted), inserted)))
    u_T = torch.cat(drawn)
    residue_T = batch.tokens < graph.n_states
    length_n = sum_by_sequence(residue_T, batch)
    count_n = torch.minimum((u * length_n).floor() + 1, length_n)
    masked_T = batch.random_subset(residue_T, count_n, 1 - u_T if k % 2 else u_T)
    return masked_nats(score_fn, batch.to(device), masked_T.to(device))


def integral_draw(
    score_fn: ScoreFn, batch: PackedBatch, columns: Sequence[Columns], u: float, k: int, seed: int
) -> Tensor:
    """Return draw k of the integral bound, at time t_min + (1 - t_min) u: nats of each token of the pack, (total,).

    The draw includes the reconstruction term and the prior term of the bound.
    """
    graph, noise, device, n = score_fn.graph, score_fn.noise, score_fn.device, len(columns)
    streams = [column_streams(seed, k) for _ in columns]

    def noised(sigma: Tensor) -> Tensor:
        """Return x_t of the pack at total noise sigma."""
        parts = []
        for each, (aligned, inserted) in zip(columns, streams, strict=True):
            xt = graph.sample_transition(each.aligned, sigma.expand(len(each.aligned)), aligned)
            xt_inserted = graph.sample_transition(each.inserted, sigma.expand(len(each.inserted)), inserted)
            parts.append(each.join(xt, xt_inserted))
        return torch.cat(parts).to(device)

    t = torch.tensor(noise.t_min + (1 - noise.t_min) * u).clamp(max=1)
    (now, lowest, highest), _ = noise(torch.stack([t, torch.tensor(noise.t_min), torch.tensor(1.0)]))
    on_device = batch.to(device)
    nats = integrand(score_fn, on_device, t.expand(n).to(device), noised(now))
    nats = nats + reconstruction(score_fn, on_device, lowest.expand(n).to(device), noised(lowest))
    return nats.cpu() + graph.prior_kl(batch.tokens, highest.expand(len(batch.tokens)))
