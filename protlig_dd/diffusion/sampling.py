"""Draw new sequences by running the diffusion backwards.

A sampler is a class: `init` gives the tokens at the highest noise level and `step` goes from one level to the next. A
new one is a subclass with a name in SAMPLERS.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.numerics import Generators, categorical, clamp_negative, pick, sum_by_sequence, uniform_draws
from protlig_dd.diffusion.score import LEAST, Network, ScoreFn, Steer
from protlig_dd.system.device import float64_device
from protlig_dd.tokenizer import BOS, EOS


@dataclass(frozen=True)
class SamplerOptions:
    """How sequences are sampled.

    Args:
        steps: reverse steps from t = 1 to t_min; a denoising step follows.
        predictor: one of SAMPLERS.
        temperature, top_p: sharpen each position's distribution of x0 (steered, if it is): p^(1 / temperature), then
            the smallest set of amino acids that holds top_p of it. 1 and 1, the default, sample the model itself.
    """

    steps: int
    predictor: str = "analytic"
    temperature: float = 1.0
    top_p: float = 1.0


class Level(NamedTuple):
    """The noise before and after a reverse step."""

    number: int
    """Of the step, from 1."""
    now: float
    left: float
    """0 for the last step, which leaves no mask."""
    euler: float
    """dt * dsigma, the length of an Euler step."""


@torch.no_grad()
def sample(
    score_fn: ScoreFn,
    lengths: Sequence[int],
    options: SamplerOptions,
    generator: Generators,
    project: Callable[[Tensor], Tensor] | None = None,
    *,
    log_bias: Float[Tensor, "*residues V"] | None = None,
    on_step: Callable[[], None] = lambda: None,
    counts: Counter[str] | None = None,
) -> list[np.ndarray]:
    """Sample one pack of sequences of the given lengths. All but the network is computed in float64.

    Args:
        lengths: residues of each sequence.
        generator: one for each sequence, so that what a sequence draws does not depend on its pack; or a single one.
        project: tokens (total,) -> tokens, with <bos> and <eos> around each sequence: residue 0 of the first is token
            1. Re-imposes fixed residues (or context letters), called before every step and after the last. Exact for
            the absorbing graph, an approximation for the others (docs/diffusion.md). With the absorbing graph the
            network is then shown the noise level at which as many of a sequence's residues are masked as are.
        log_bias: (V,) or (sum of lengths, V) nats for each amino acid, V of them, at every residue (<bos> and <eos>
            not among them): the model is steered towards p(x0) exp(sum of log_bias over x0), exactly where positions
            are independent. -inf forbids.
        on_step: called after each step (a progress bar's tick).
        counts: collects `draws` and `clamped` (draws with a negative probability, clamped at 0 and renormalised), and
            `evaluated` and `skipped` sequences: a network that does not look at sigma is not evaluated again on those
            of which no residue has changed.

    Returns:
        One uint8 array of amino-acid ids for each sequence.

    Raises:
        ValueError: an unknown predictor or one that the graph does not have, fewer than one step, a length below 1, a
            temperature or top_p out of range, a bias of another shape or one that leaves no amino acid, a network
            whose output is not finite.
    """
    graph, noise, device = score_fn.graph, score_fn.noise, score_fn.device
    check_sampler(graph, options)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"sampling needs lengths of at least 1, got {list(lengths)}")
    counts = Counter() if counts is None else counts
    home = float64_device(device)
    batch = PackedBatch.pack([torch.tensor([BOS] + [0] * length + [EOS]) for length in lengths]).to(home)
    bias_RV = None if log_bias is None else _read_bias(log_bias.to(home, torch.float64), sum(lengths), graph.n_states)
    sampler = SAMPLERS[options.predictor](score_fn, batch, Draws(lengths, generator, home), bias_RV, options, counts)
    sigma, dsigma = noise(torch.linspace(1, noise.t_min, options.steps + 1, dtype=torch.float64))
    levels = [*sigma.tolist(), 0.0]
    logits_of = UnchangedLogits(score_fn.logits, counts, time_free=not score_fn.time_conditioning)
    xt = batch.tokens.masked_scatter(sampler.free_T, sampler.init(levels[0]))
    xt = xt if project is None else project(xt)
    for i, (now, left) in enumerate(pairwise(levels)):
        shown_n = torch.full((len(lengths),), now, dtype=torch.float64, device=home)
        if project is not None and graph.masks:
            # fixed residues are never masked, so show the sigma that matches the masked fraction
            residues_n = sum_by_sequence(xt <= graph.n_states, batch).clamp(min=1)
            shares_n = sum_by_sequence(xt == graph.mask, batch) / residues_n
            shown_n = (-torch.log1p(-shares_n)).clamp(levels[-2], levels[0])
        logits_TV = logits_of(batch.with_tokens(xt).to(device), shown_n.to(device, torch.float32))
        level = Level(i + 1, now, left, float(dsigma[i]) * (1 - noise.t_min) / options.steps)
        xt = sampler.step(xt, logits_TV.to(home, torch.float64), level)
        xt = xt if project is None else project(xt)
        on_step()
    return [tokens[1:-1].cpu().numpy().astype(np.uint8) for tokens in batch.unpack(xt)]


class Draws:
    """Random numbers for each residue of a pack, each sequence's from its own generator where there are several."""

    def __init__(self, lengths: Sequence[int], generator: Generators, device: torch.device) -> None:
        self.lengths, self.generator, self.device = lengths, generator, device

    def __call__(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """(R,) what `draw` gives for each length and generator, end to end."""
        if isinstance(self.generator, torch.Generator):
            return draw(sum(self.lengths), self.generator).to(self.device)
        pairs = zip(self.lengths, self.generator, strict=True)
        return torch.cat([draw(length, one) for length, one in pairs]).to(self.device)


class Analytic:
    """Tweedie's step (arXiv 2310.16834, eq. 19); for x0 the exact posterior, the same without its growing terms.

    Starts with all residues masked where the exact count is the model's bound (which is that of a decoder that starts
    so), elsewhere with a draw of the prior at t = 1.
    """

    needs_masks = False

    def __init__(
        self,
        score_fn: ScoreFn,
        batch: PackedBatch,
        draws: Draws,
        bias: Float64[Tensor, "R V"] | None,
        options: SamplerOptions,
        counts: Counter[str],
    ) -> None:
        self.score_fn, self.graph, self.batch, self.draws = score_fn, score_fn.graph, batch, draws
        self.bias, self.options, self.counts = bias, options, counts
        self.free_T = batch.tokens < self.graph.n_states

    def init(self, sigma: float) -> Int64[Tensor, " R"]:
        """Residues at the highest noise level."""
        if self.score_fn.estimator == "exact_count":
            return torch.full((sum(self.draws.lengths),), self.graph.mask, device=self.draws.device)
        start_R = self.draws(lambda n, one: self.graph.sample_limit(n, one, sigma))
        if self.bias is not None and self.graph.masks:  # a forbidden residue that no step changes would stay
            start_R = torch.where(_is_forbidden(start_R, self.bias), self.graph.mask, start_R)
        return start_R

    def step(
        self, xt: Int64[Tensor, " total"], logits: Float64[Tensor, "total V"], level: Level
    ) -> Int64[Tensor, " total"]:
        """Tokens at `level.left`, drawn given those at `level.now`.

        Raises:
            ValueError: scores that are not finite.
        """
        moving_R = xt[self.free_T] < self.graph.n_reverse_states  # all but context letters that `project` put there
        moving_T = self.free_T.masked_scatter(self.free_T, moving_R)
        bias = None if self.bias is None else self.bias[moving_R]
        steer = None
        if bias is not None or self.options.temperature != 1 or self.options.top_p != 1:
            steer = partial(_steer, bias=bias, temperature=self.options.temperature, top_p=self.options.top_p)
        probs, clamped = clamp_negative(self.reverse_probs(logits[moving_T], xt[moving_T], level, steer))
        if not bool(torch.isfinite(probs).all()):
            raise ValueError(
                f"the network's scores are not finite in sampling step {level.number}, at sigma = {level.now:.3g}"
            )
        self.counts.update(draws=len(probs), clamped=int(clamped.sum()))
        if (
            not level.left and bias is not None
        ):  # before, a residue may be anything: it is x0 that must not be forbidden
            allowed = F.pad(bias > -torch.inf, (0, probs.shape[1] - bias.shape[1]))
            probs = (probs + LEAST) * allowed
        return xt.masked_scatter(moving_T, categorical(probs, self.draws(uniform_draws)[moving_R]))

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """Probabilities of the tokens that may move; not normalised."""
        now_T, left_T = (torch.full_like(logits[:, 0], sigma) for sigma in (level.now, level.left))
        return self.score_fn.reverse_probs(logits, xt, now_T, left_T, steer)


class Euler(Analytic):
    """Steps of first order in dt; the last one is analytic."""

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """As of `Analytic`."""
        if not level.left:
            return super().reverse_probs(logits, xt, level, steer)
        now_T, step_T = (torch.full_like(logits[:, 0], value) for value in (level.now, level.euler))
        return self.graph.euler_probs(self.score_fn.log_score(logits, xt, now_T, steer), xt, step_T)


class Ancestral(Analytic):
    """The number of masked residues follows the noise exactly, L (1 - e^-sigma) to the nearest, instead of on average;
    scores are normalised. For graphs that mask.
    """

    needs_masks = True
    masked_n: Float64[Tensor, " n"] | None = None
    """How many residues of each sequence are masked at the start, after `project`."""

    def init(self, sigma: float) -> Int64[Tensor, " R"]:
        """As of `Analytic`, but always all masked."""
        return torch.full((sum(self.draws.lengths),), self.graph.mask, device=self.draws.device)

    def step(
        self, xt: Int64[Tensor, " total"], logits: Float64[Tensor, "total V"], level: Level
    ) -> Int64[Tensor, " total"]:
        """As of `Analytic`: every masked residue is drawn, and as many are masked again as the noise wants."""
        if self.masked_n is None:
            self.masked_n = sum_by_sequence(xt == self.graph.mask, self.batch)
        drawn = super().step(xt, logits, level)
        wanted_n = (self.masked_n * -math.expm1(-level.left)).round()
        now_n = sum_by_sequence(xt == self.graph.mask, self.batch)
        u_T = torch.zeros_like(self.free_T, dtype=torch.float64)
        u_T = u_T.masked_scatter(self.free_T, self.draws(uniform_draws))
        revealed_T = self.batch.random_subset(xt == self.graph.mask, now_n - wanted_n, u_T)
        return torch.where(revealed_T, drawn, xt)

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """As of `Analytic`, with no noise left."""
        return super().reverse_probs(logits, xt, level._replace(left=0.0), steer)


SAMPLERS: dict[str, type[Analytic]] = {"analytic": Analytic, "euler": Euler, "ancestral": Ancestral}


def check_sampler(graph: Graph, options: SamplerOptions) -> None:
    """Raise a ValueError unless this graph can be sampled so."""
    if options.predictor not in SAMPLERS:
        raise ValueError(f"no predictor {options.predictor!r}; there are {', '.join(SAMPLERS)}")
    if SAMPLERS[options.predictor].needs_masks and not graph.masks:
        raise ValueError(f"predictor={options.predictor} is for the absorbing graph; use analytic or euler")
    if options.steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {options.steps}")
    if not 0 < options.temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {options.top_p}")


class UnchangedLogits:
    """A network's logits; one that does not look at sigma is evaluated only on the sequences that have changed."""

    def __init__(self, logits: Network, counts: Counter[str], *, time_free: bool) -> None:
        self.logits, self.counts, self.time_free = logits, counts, time_free
        self.batch: PackedBatch | None = None
        self.logits_TV = torch.empty(0)

    def __call__(self, batch: PackedBatch, sigma: Float[Tensor, " n"]) -> Float[Tensor, "total V"]:
        if self.batch is None or not self.time_free:
            self.logits_TV = self.logits(batch, sigma)
            self.counts.update(evaluated=len(batch.lengths), skipped=0)
        else:
            changed = (sum_by_sequence(batch.tokens != self.batch.tokens, batch) > 0).tolist()
            some = [tokens for tokens, new in zip(batch.unpack(batch.tokens), changed, strict=True) if new]
            if some:
                changed_n = torch.tensor(changed, device=sigma.device)
                self.logits_TV[changed_n[batch.segment_ids]] = self.logits(PackedBatch.pack(some), sigma[changed_n])
            self.counts.update(evaluated=len(some), skipped=len(changed) - len(some))
        self.batch = batch
        return self.logits_TV


def _read_bias(log_bias: Float64[Tensor, "..."], residues: int, n_states: int) -> Float64[Tensor, "R V"]:
    """The bias of every residue, checked."""
    if log_bias.shape not in ((n_states,), (residues, n_states)):
        raise ValueError(
            f"log_bias must have shape ({n_states},) or ({residues}, {n_states}), got {tuple(log_bias.shape)}"
        )
    bias = log_bias.expand(residues, n_states)
    if bool((torch.isnan(bias) | (bias == float("inf"))).any()):
        raise ValueError("log_bias must be finite or -inf")
    barred = (bias == -float("inf")).all(-1)
    if bool(barred.any()):
        raise ValueError(f"log_bias forbids every amino acid at residue {int(barred.nonzero()[0])} of the pack")
    return bias


def _steer(
    log_q: Float64[Tensor, "T V"], *, bias: Float64[Tensor, "T V"] | None, temperature: float, top_p: float
) -> Float64[Tensor, "T V"]:
    """The distribution of x0 times exp(bias), sharpened: exact where positions are independent given the rest."""
    if bias is not None:
        log_q = log_q + bias
    log_q = ((log_q - log_q.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    if top_p < 1:
        ranked, order = log_q.exp().sort(dim=-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p
        log_q = log_q.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return log_q


def _is_forbidden(tokens: Tensor, bias: Float64[Tensor, "R V"]) -> Bool[Tensor, " R"]:
    return pick((bias == -torch.inf).double(), tokens).bool()
