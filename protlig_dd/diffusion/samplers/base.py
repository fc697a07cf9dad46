"""What samplers have in common, and the one that takes analytic steps."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.numerics import Generators, categorical, clamp_negative, pick, uniform_draws
from protlig_dd.diffusion.score import LEAST, ScoreFn, Steer


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
            start_R = torch.where(is_forbidden(start_R, self.bias), self.graph.mask, start_R)
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
            steer = partial(steered, bias=bias, temperature=self.options.temperature, top_p=self.options.top_p)
        probs, clamped = clamp_negative(self.reverse_probs(logits[moving_T], xt[moving_T], level, steer))
        if not bool(torch.isfinite(probs).all()):
            raise ValueError(
                f"the network's scores are not finite in sampling step {level.number}, at sigma = {level.now:.3g}"
            )
        self.counts.update(draws=len(probs), clamped=int(clamped.sum()))
        if not level.left and bias is not None:  # it is x0 that must not be forbidden: before, anything may stand there
            allowed = F.pad(bias > -torch.inf, (0, probs.shape[1] - bias.shape[1]))
            probs = (probs + LEAST) * allowed
        return xt.masked_scatter(moving_T, categorical(probs, self.draws(uniform_draws)[moving_R]))

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """Probabilities of the tokens that may move; not normalised."""
        now_T, left_T = (torch.full_like(logits[:, 0], sigma) for sigma in (level.now, level.left))
        return self.score_fn.reverse_probs(logits, xt, now_T, left_T, steer)


def steered(
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


def is_forbidden(tokens: Tensor, bias: Float64[Tensor, "R V"]) -> Bool[Tensor, " R"]:
    return pick((bias == -torch.inf).double(), tokens).bool()
