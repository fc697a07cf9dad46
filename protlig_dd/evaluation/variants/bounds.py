"""Variants scored by the difference of their bounds to the wild type's, with the same noise for both."""

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
from protlig_dd.evaluation.variants.windows import Piece, longer, windowed
from protlig_dd.inference.sharing import Tick, Work
from protlig_dd.system.random import keyed_generator
from protlig_dd.tokenizer import PAD

CPU = torch.device("cpu")
GAP = PAD  # where the wild type has a residue that the variant lacks; no graph noises it


class Columns(NamedTuple):
    """A variant's window laid over the wild type's, so that both can be noised alike."""

    aligned: Tensor
    """(tokens of the wild type's window,): the variant's token there; GAP where it has none."""
    inserted: Tensor
    """What has no place there."""
    order: Tensor
    """The places, in `aligned` then `inserted`, of the variant's tokens."""

    def join(self, aligned: Tensor, inserted: Tensor) -> Tensor:
        return torch.cat([aligned, inserted])[self.order]


def columns_of(target: np.ndarray, piece: Piece) -> Columns:
    """Substitutions stay in their places; a block keeps as many places as both have, from its start on."""
    aligned = torch.from_numpy(windowed(target, piece.start, piece.stop))
    shift = (piece.start == 0) - piece.start  # from a residue's place in the protein to its place here
    place = torch.arange(len(aligned))
    for site, residue in piece.change.substitutions:
        aligned[site + shift] = residue
    if piece.change.indel is None:
        return Columns(aligned, torch.empty(0, dtype=torch.int64), place)
    start, stop, ids = piece.change.indel
    new, shared = torch.tensor(ids, dtype=torch.int64), min(stop - start, len(ids))
    kept, inserted = start + shift + shared, new[shared:]
    aligned[start + shift : kept], aligned[kept : stop + shift] = new[:shared], GAP
    extra = len(aligned) + torch.arange(len(inserted))
    return Columns(aligned, inserted, torch.cat([place[:kept], extra, place[stop + shift :]]))


@torch.no_grad()
def bound_differences(
    score_fn: ScoreFn, target: np.ndarray, pieces: Sequence[Piece], work: Work, *, draws: int, seed: int
) -> np.ndarray:
    """(draws, pieces) float64: the wild type's draws of the NLL bound, drawn out to the variant's length, less the
    variant's.

    Draw k has the same time (or share of masked residues) everywhere and the same noise at each residue of a window,
    for the wild type as for all variants. Draws 2 i and 2 i + 1 are mirrored, u and 1 - u: their times, and for the
    exact count which residues are masked as well.
    """
    if draws < 4 or draws % 2:
        raise ValueError(f"draws must be an even number of at least 4, got {draws}")
    windows = list(dict.fromkeys((piece.start, piece.stop) for piece in pieces))
    items = [Piece(-1, start, stop, Variant()) for start, stop in windows] + list(pieces)
    places = mirrored_places(draws, keyed_generator(seed, "variants, times", 0, CPU))
    one_draw = exact_count_draw if score_fn.estimator == "exact_count" else integral_draw

    def score(numbers: range, tick: Tick) -> dict[int, np.ndarray]:
        columns = [columns_of(target, items[i]) for i in numbers]
        batch = PackedBatch.pack([one.join(one.aligned, one.inserted) for one in columns])
        nats = []
        for k, place in enumerate(places):
            nats_T = one_draw(score_fn, batch, columns, place, k, seed).cpu()
            nats.append(sum_by_sequence(nats_T, batch).numpy())
            tick()
        return dict(zip(numbers, np.stack(nats, axis=1), strict=True))

    lengths = [piece.stop - piece.start + longer(piece.change) for piece in items]
    found = work.share(lengths, score, ticks=draws)
    wild = {window: found[i] for i, window in enumerate(windows)}
    nats = []
    for i, piece in enumerate(pieces):
        residues = int((target[piece.start : piece.stop] < score_fn.graph.n_states).sum())
        stretch = 1 + longer(piece.change) / max(1, residues)
        nats.append(stretch * wild[piece.start, piece.stop] - found[len(windows) + i])
    return np.array(nats).reshape(len(pieces), draws).T


def mirrored_places(draws: int, generator: torch.Generator) -> list[float]:
    """Draws on [0, 1], one in each of as many strata; of each two neighbours one is the other's mirror image."""
    lower = (torch.arange(draws // 2) + uniform_draws(draws // 2, generator)) / draws
    return torch.stack([lower, 1 - lower], dim=1).flatten().tolist()


def column_streams(seed: int, draw: int) -> tuple[torch.Generator, torch.Generator]:
    """For the wild type's columns and for what is inserted; on the CPU, whatever computes."""
    return keyed_generator(seed, "variants, columns", draw, CPU), keyed_generator(seed, "variants, inserted", draw, CPU)


def exact_count_draw(
    score_fn: ScoreFn, batch: PackedBatch, columns: Sequence[Columns], place: float, k: int, seed: int
) -> Tensor:
    """(total,) nats: draw k, with the count at this place in 1..L, for sequences laid over the wild type's."""
    graph, device = score_fn.graph, score_fn.device
    drawn = []
    for one in columns:
        aligned, inserted = column_streams(seed, k // 2)
        drawn.append(one.join(uniform_draws(len(one.aligned), aligned), uniform_draws(len(one.inserted), inserted)))
    u_T = torch.cat(drawn)
    residue_T = batch.tokens < graph.n_states
    length_n = sum_by_sequence(residue_T, batch)
    count_n = torch.minimum((place * length_n).floor() + 1, length_n)
    masked_T = batch.random_subset(residue_T, count_n, 1 - u_T if k % 2 else u_T)
    return masked_nats(score_fn, batch.to(device), masked_T.to(device))


def integral_draw(
    score_fn: ScoreFn, batch: PackedBatch, columns: Sequence[Columns], place: float, k: int, seed: int
) -> Tensor:
    """(total,) nats: draw k of the integral at this place in its times, with the reconstruction and prior terms."""
    graph, noise, device, n = score_fn.graph, score_fn.noise, score_fn.device, len(columns)
    streams = [column_streams(seed, k) for _ in columns]

    def noised(sigma: Tensor) -> Tensor:
        """x_t after this much noise."""
        parts = []
        for one, (aligned, inserted) in zip(columns, streams, strict=True):
            xt = graph.sample_transition(one.aligned, sigma.expand(len(one.aligned)), aligned)
            more = graph.sample_transition(one.inserted, sigma.expand(len(one.inserted)), inserted)
            parts.append(one.join(xt, more))
        return torch.cat(parts).to(device)

    t = torch.tensor(noise.t_min + (1 - noise.t_min) * place).clamp(max=1)
    (now, lowest, highest), _ = noise(torch.stack([t, torch.tensor(noise.t_min), torch.tensor(1.0)]))
    there = batch.to(device)
    nats = integrand(score_fn, there, t.expand(n).to(device), noised(now))
    nats = nats + reconstruction(score_fn, there, lowest.expand(n).to(device), noised(lowest))
    return nats.cpu() + graph.prior_kl(batch.tokens, highest.expand(len(batch.tokens)))
