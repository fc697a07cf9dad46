"""How fit a model thinks the variants of a protein are: log-likelihood to the wild type, nats, higher is fitter.

A protein longer than the model was trained on is seen through windows of that length around what a variant changes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from protlig_dd.batch import PackedBatch, split_lengths
from protlig_dd.diffusion.graph import Absorbing, Graph
from protlig_dd.diffusion.likelihood import integrand, masked_nats, masked_sigma, pick_estimator, reconstruction
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.numerics import sum_by_sequence, uniform_draws
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.assays import Assay, Variant
from protlig_dd.runtime.distributed import Processes, gather_objects
from protlig_dd.runtime.embedding import window
from protlig_dd.runtime.generate import ALONE
from protlig_dd.runtime.metrics import ProgressBar
from protlig_dd.runtime.random import keyed_generator
from protlig_dd.tokenizer import BOS, EOS, PAD

ASKED_FOR = "as asked for"  # why a strategy was chosen
GAP = PAD  # where the wild type has a residue that the variant lacks; no graph noises it
UNMASKED = ("wildtype_marginals", "ratio")  # strategies that see nothing but the wild type
ONE_BY_ONE = (*UNMASKED, "site_marginals")  # and that look at each site by itself
CPU = torch.device("cpu")

T = TypeVar("T")


class Piece(NamedTuple):
    """What a variant changes within one window of the wild type, residues start..stop (from 0, stop not included)."""

    variant: int
    start: int
    stop: int
    change: Variant


@dataclass(frozen=True)
class Scores:
    nats: np.ndarray
    """(variants,) float64."""
    standard_error: np.ndarray | None
    """(variants,) of the bound's draws."""


def strategies_of(graph: Graph) -> tuple[str, ...]:
    """The strategies that a graph has; the first is the one for substitutions."""
    if isinstance(graph, Absorbing):
        return ("masked_marginals", "site_marginals", "wildtype_marginals", "bound")
    return ("ratio", "bound")


def choose_strategies(wanted: str, graph: Graph, assay: Assay) -> tuple[list[str], str]:
    """The strategy of each variant, and why: `auto` is each one's own, insertions and deletions by bound.

    Raises:
        ValueError: one that this graph does not have, or that has no place for insertions and deletions; says which do.
    """
    able, first = strategies_of(graph), assay.first_indel
    if wanted not in ("auto", *able):
        raise ValueError(f"strategy={wanted}: a model with this graph ({graph_name(graph)}) can do {', '.join(able)}")
    if wanted == "auto":
        why = f"the graph is {graph_name(graph)}" if first is None else "there are insertions or deletions"
        return [able[0] if one.indel is None else "bound" for one in assay.variants], why
    if first is not None and wanted != "bound":
        indel = assay.variants[first].indel
        assert indel is not None
        raise ValueError(
            f"{assay.where[first]}: {len(indel.ids)} residues stand in the place of {indel.stop - indel.start}, "
            f"but strategy={wanted} needs equal lengths; use auto, or bound"
        )
    return [wanted] * len(assay.variants), ASKED_FOR


def graph_name(graph: Graph) -> str:
    return type(graph).__name__.removesuffix("Graph").lower()


def pieces_of(assay: Assay, length: int, longest: int, strategy: str) -> list[Piece]:
    """The windows through which a model that sees `longest` residues sees the variants of a protein of this length.

    A window lies around the middle of the changes, as far inside the protein as it can. Substitutions that no window
    holds together are scored in several (`groups_of`), each with the wild type's residues at the other windows' sites,
    and summed.
    Where nothing is masked, each site has a window by itself; these begin at multiples of a quarter of their length,
    so that all sites share a few.

    Raises:
        ValueError: an insertion or deletion that no window holds; names the row and the lengths.
    """
    pieces, unmasked = [], strategy in UNMASKED
    grid = max(1, longest // 4) if unmasked else 1
    for number, (variant, where) in enumerate(zip(assay.variants, assay.where, strict=True)):
        if variant.indel is not None:
            start, stop, ids = variant.indel
            if max(length, length + longer(variant)) > longest and max(stop - start, len(ids)) >= longest:
                raise ValueError(
                    f"{where}: {stop - start} residues become {len(ids)}, too many for a window of the {longest} "
                    "that this model was trained on"
                )
            size = longest - max(0, longer(variant))  # of the wild type's window; the variant's is no longer either
            pieces.append(Piece(number, *around(start, stop, length, size), variant))
        alone, sites = strategy in ONE_BY_ONE, [site for site, _ in variant.substitutions]
        for first, last in [(i, i + 1) for i in range(len(sites))] if alone else groups_of(sites, length, longest):
            start, stop = around(sites[first], sites[last - 1] + 1, length, longest, grid)
            pieces.append(Piece(number, start, stop, Variant(variant.substitutions[first:last])))
    return pieces


def groups_of(sites: Sequence[int], length: int, longest: int) -> list[tuple[int, int]]:
    """Which sites share a window: first, last (not among them) of each group of neighbours.

    As few windows as hold all the sites; of such partitions the one whose site nearest to its window's edge lies
    furthest inside, then the next nearest window's, and so on. So the part of a best partition that ends at a site is
    itself best, and a table over the sites finds it.

    Args:
        sites: in ascending order, without repeats; none has no groups.
    """
    if not sites or sites[-1] - sites[0] < longest:
        return [(0, len(sites))] if sites else []
    # of the sites before each: how many windows, their margins in ascending order, and where the last group begins
    best: list[tuple[int, list[int], int]] = [(0, [], 0)]
    for last in range(1, len(sites) + 1):
        lowest = bisect_right(sites, sites[last - 1] - longest)  # the first site that a window with the last can hold
        windows, margins, begin = best[lowest][0] + 1, list[int](), lowest
        for first in range(lowest, last):
            if best[first][0] + 1 > windows:  # more sites never need fewer
                break
            others = best[first][1]
            if margins and others and others[0] < margins[0]:
                continue  # whatever the last group's
            mine = margin(sites[first], sites[last - 1], length, longest)
            if margins and mine < margins[0]:
                continue  # not worth sorting
            if (candidate := sorted([*others, mine])) > margins:
                margins, begin = candidate, first
        best.append((windows, margins, begin))
    groups, last = [], len(sites)
    while last:
        groups.append((best[last][2], last))
        last = best[last][2]
    return groups[::-1]


def margin(first: int, last: int, length: int, longest: int) -> int:
    """Residues between the sites first..last and the nearer edge of their window; the protein's ends are no edges."""
    start, stop = around(first, last + 1, length, longest)
    return min(first - start if start else length, stop - 1 - last if stop < length else length)


def longer(change: Variant) -> int:
    """By how many residues a variant is longer than the wild type."""
    return len(change.indel.ids) - (change.indel.stop - change.indel.start) if change.indel else 0


def around(first: int, last: int, length: int, size: int, grid: int = 1) -> tuple[int, int]:
    """start, stop of `size` residues (all, of a shorter protein) around first..last; from the nearest multiple of
    `grid`, unless the protein ends before.
    """
    size = min(size, length)
    nearest = ((first + last - size) // 2 + grid // 2) // grid * grid
    start = min(max(0, nearest), length - size)
    return start, start + size


def windowed(target: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Ids of a window; <bos> and <eos> stand at the protein's own ends alone, as in the crops of training."""
    return window(np.concatenate([[BOS], target, [EOS]]), start, stop - start).astype(np.int64)


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


@dataclass(frozen=True)
class Work:
    """How sequences are put before the network."""

    device: torch.device
    tokens_per_pack: int
    description: str = "variants"
    processes: Processes = ALONE

    def share(
        self,
        keys: Sequence[T],
        lengths: Sequence[int],
        score: Callable[[Sequence[T], Callable[[], None]], dict[Any, Any]],
        ticks: int = 1,
    ) -> dict[Any, Any]:
        """What `score` finds for these keys, a pack at a time and each rank its own; all of it on each rank.

        Args:
            lengths: residues of each key's sequence.
            score: (keys of a pack, the progress bar's tick) -> {anything: what was found}.
            ticks: how often `score` ticks.
        """
        packs = split_lengths(lengths, self.tokens_per_pack)
        firsts = np.cumsum([0, *map(len, packs)]).tolist()
        mine = range(self.processes.rank, len(packs), self.processes.world_size)
        found: dict[Any, Any] = {}
        with ProgressBar(self.description, len(mine) * ticks, shown=self.processes.first) as bar:
            for number in mine:
                found |= score(keys[firsts[number] : firsts[number + 1]], bar.advance)
        return {key: value for part in gather_objects(found) for key, value in part.items()}


def score_variants(
    score_fn: ScoreFn,
    noise: Noise,
    target: np.ndarray,
    assay: Assay,
    work: Work,
    *,
    strategy: str,
    longest: int,
    draws: int,
    seed: int,
) -> Scores:
    """Score the variants of one protein, on all ranks; the same on each. What equals the wild type has 0.

    Args:
        target: (length,) ids of the wild type.
        strategy: one of `strategies_of` the graph:

            - masked_marginals: sum over the changed sites of log p(variant) - log p(wild type), all of them masked at
              once (Meier et al. 2021, "Language models enable zero-shot prediction of the effects of mutations on
              protein function", doi 10.1101/2021.07.09.450648);
            - site_marginals: the same, each site masked by itself beside the wild type's residues at the others;
            - wildtype_marginals: the same from one look at the wild type, nothing masked (the same paper);
            - ratio: sum over the changed sites of the log-scores of the wild type at the schedule's smallest noise,
              log p(y) / p(x) itself for a single substitution (arXiv 2310.16834, sec. 3.1);
            - bound: the bound on -log p of the wild type less that of the variant, with the same noise for both.
              Where the variant is by d residues longer (or shorter, d < 0), plus d times the wild type's bound per
              residue: the bound is of log p given the length, and without that term each residue more would cost some
              3 nats, whatever it is. The score is then the variant's length times the difference in nats per residue.
        longest: residues that the model can see.
        draws, seed: of the bound; an even number, at least 4.

    Raises:
        ValueError: an indel that no window holds, a number of draws that does not do, scores that are not finite.
    """
    pieces = pieces_of(assay, len(target), longest, strategy)
    owner, n = np.array([piece.variant for piece in pieces], dtype=np.int64), len(assay.variants)
    if strategy == "bound":
        found_kp = bound_differences(score_fn, noise, target, pieces, work, draws=draws, seed=seed)
        scores = over_draws(np.stack([np.bincount(owner, row, n) for row in found_kp]))
    else:
        scores = Scores(np.bincount(owner, marginals(score_fn, noise, target, pieces, work, strategy), n), None)
    wrong = np.flatnonzero(~np.isfinite(scores.nats))
    if len(wrong):
        raise ValueError(f"{assay.where[wrong[0]]}: the score is not finite")
    return scores


def score_each(
    score_fn: ScoreFn,
    noise: Noise,
    target: np.ndarray,
    assay: Assay,
    work: Work,
    *,
    strategies: Sequence[str],
    **settings: int,
) -> Scores:
    """Score each variant by its own strategy; the standard error of those that have none is NaN, None if no one has.

    All estimate log p(variant) - log p(wild type) in nats, so that they may stand in one column.

    Args:
        strategies: of each variant.
        settings: longest, draws and seed of `score_variants`, which has the other arguments and errors too.
    """
    n = len(assay.variants)
    nats, errors = np.zeros(n), np.full(n, np.nan)
    for strategy, rows in rows_by_strategy(strategies).items():
        some = assay.only(rows)
        scores = score_variants(score_fn, noise, target, some, work, strategy=strategy, **settings)
        nats[rows] = scores.nats
        if scores.standard_error is not None:
            errors[rows] = scores.standard_error
    return Scores(nats, None if np.isnan(errors).all() else errors)


def rows_by_strategy(strategies: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each strategy the rows that have it, (rows,); the one of the first row first."""
    return {name: np.flatnonzero(np.array(strategies) == name) for name in dict.fromkeys(strategies)}


def over_draws(nats_kn: np.ndarray) -> Scores:
    """Means over draws (draws, variants), with standard errors from the pairs of mirrored draws, 2 i and 2 i + 1.

    Pairs lie in different strata, which the error does not credit: it errs on the large side.
    """
    pair_kn = (nats_kn[0::2] + nats_kn[1::2]) / 2
    return Scores(pair_kn.mean(0), pair_kn.std(0, ddof=1) / np.sqrt(len(pair_kn)))


Context = tuple[int, int, tuple[int, ...]]
"""A window of the wild type, and the sites that are masked in it."""


@torch.no_grad()
def marginals(
    score_fn: ScoreFn, noise: Noise, target: np.ndarray, pieces: Sequence[Piece], work: Work, strategy: str
) -> np.ndarray:
    """(pieces,) float64; the network is asked once for each context that they have."""
    contexts: dict[Context, list[int]] = {}
    for i, piece in enumerate(pieces):
        masked = () if strategy in UNMASKED else tuple(site for site, _ in piece.change.substitutions)
        contexts.setdefault((piece.start, piece.stop, masked), []).append(i)
    n_states = score_fn.graph.n_states
    least = float(noise(torch.tensor(noise.t_min, dtype=torch.float64))[0])

    def score(keys: Sequence[Context], tick: Callable[[], None]) -> dict[int, float]:
        tokens, shares, found = [], [], {}
        for start, stop, masked in keys:
            ids = torch.from_numpy(windowed(target, start, stop))
            ids[torch.tensor(masked, dtype=torch.int64) + (start == 0) - start] = n_states
            tokens.append(ids)
            shares.append(len(masked) / max(1, int((target[start:stop] < n_states).sum())))
        batch = PackedBatch.pack(tokens).to(work.device)
        sigma = masked_sigma(noise, torch.tensor(shares, dtype=torch.float64)).clamp(min=least).to(work.device)
        values = score_fn.logits(batch, sigma) if strategy == "wildtype_marginals" else score_fn(batch, sigma)
        for key, values_TV in zip(keys, batch.unpack(values.cpu().double()), strict=True):
            table = values_TV[1 if key[0] == 0 else 0 :].numpy()  # without <bos>
            for i in contexts[key]:
                sites, residues = np.array(pieces[i].change.substitutions).T
                rows = sites - key[0]
                found[i] = float((table[rows, residues] - table[rows, target[sites]]).sum())
        tick()
        return found

    keys = list(contexts)
    found = work.share(keys, [stop - start for start, stop, _ in keys], score)
    return np.array([found[i] for i in range(len(pieces))])


@torch.no_grad()
def bound_differences(
    score_fn: ScoreFn, noise: Noise, target: np.ndarray, pieces: Sequence[Piece], work: Work, *, draws: int, seed: int
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
    estimator = pick_estimator(score_fn.graph, score_fn.parametrisation, score_fn.time_conditioning)
    one_draw = exact_count_draw if estimator == "exact_count" else integral_draw

    def score(numbers: Sequence[int], tick: Callable[[], None]) -> dict[int, np.ndarray]:
        columns = [columns_of(target, items[i]) for i in numbers]
        batch = PackedBatch.pack([one.join(one.aligned, one.inserted) for one in columns])
        nats = []
        for k, place in enumerate(places):
            nats_T = one_draw(score_fn, noise, batch, columns, place, k, seed, work.device).cpu()
            nats.append(sum_by_sequence(nats_T, batch).numpy())
            tick()
        return dict(zip(numbers, np.stack(nats, axis=1), strict=True))

    lengths = [piece.stop - piece.start + longer(piece.change) for piece in items]
    found = work.share(range(len(items)), lengths, score, ticks=draws)
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
    score_fn: ScoreFn,
    noise: Noise,
    batch: PackedBatch,
    columns: Sequence[Columns],
    place: float,
    k: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    """(total,) nats: draw k, with the count at this place in 1..L, for sequences laid over the wild type's."""
    graph = score_fn.graph
    assert isinstance(graph, Absorbing)
    drawn = []
    for one in columns:
        aligned, inserted = column_streams(seed, k // 2)
        drawn.append(one.join(uniform_draws(len(one.aligned), aligned), uniform_draws(len(one.inserted), inserted)))
    u_T = torch.cat(drawn)
    residue_T = batch.tokens < graph.n_states
    length_n = sum_by_sequence(residue_T, batch)
    count_n = torch.minimum((place * length_n).floor() + 1, length_n)
    masked_T = batch.random_subset(residue_T, count_n, 1 - u_T if k % 2 else u_T)
    return masked_nats(score_fn, batch.to(device), graph, noise, masked_T.to(device))


def integral_draw(
    score_fn: ScoreFn,
    noise: Noise,
    batch: PackedBatch,
    columns: Sequence[Columns],
    place: float,
    k: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    """(total,) nats: draw k of the integral at this place in its times, with the reconstruction and prior terms."""
    graph, n = score_fn.graph, len(columns)
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
    nats = integrand(score_fn, there, graph, noise, t.expand(n).to(device), noised(now))
    nats = nats + reconstruction(score_fn, there, graph, lowest.expand(n).to(device), noised(lowest))
    return nats.cpu() + graph.prior_kl(batch.tokens, highest.expand(len(batch.tokens)))
