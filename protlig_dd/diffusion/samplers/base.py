"""What samplers have in common, and the sampler with analytic steps."""

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
from protlig_dd.diffusion.score import MIN_PROBABILITY, ScoreFn, Steer


@dataclass(frozen=True)
class SamplerOptions:
    """How sequences are sampled.

    Args:
        steps: number of reverse steps from t = 1 to t_min; a denoising step follows.
        predictor: a name in SAMPLERS.
        temperature, top_p: sharpen each position's distribution p of x0. First p is raised to the power
            1 / temperature and normalised. Then only the smallest set of amino acids whose total probability is at
            least top_p is kept. The defaults, 1 and 1, sample from the model's own distribution.
    """

    steps: int
    predictor: str = "analytic"
    temperature: float = 1.0
    top_p: float = 1.0


class Level(NamedTuple):
    """The noise levels of a reverse step."""

    number: int
    """Number of the step, from 1."""
    sigma: float
    """Total noise before the step."""
    sigma_next: float
    """Total noise after the step. It is 0 for the last step, the denoising step, which leaves no residue masked."""
    euler_step: float
    """Length of an Euler step: the step in t times the derivative d sigma / d t."""


class Draws:
    """Random numbers for the residues of a pack. If there are several generators, each sequence uses its own."""

    def __init__(self, lengths: Sequence[int], generator: Generators, device: torch.device) -> None:
        self.lengths, self.generator, self.device = lengths, generator, device

    def __call__(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Call draw(length, generator) for each sequence, and return the concatenated results (R,), one per residue.

        With a single generator, `draw` is called once, with the total number of residues.
        """
        if isinstance(self.generator, torch.Generator):
            return draw(sum(self.lengths), self.generator).to(self.device)
        pairs = zip(self.lengths, self.generator, strict=True)
        return torch.cat([draw(length, generator) for length, generator in pairs]).to(self.device)


class Analytic:
    """The sampler with Tweedie's steps (arXiv 2310.16834, eq. 19).

    If the parametrisation is `x0`, the step is computed from the posterior of x0. The result is the same distribution
    as in eq. 19, but the formula has no exponentials that grow with the noise.

    Sampling starts from the distribution at t = 1 that the bound on the NLL assumes (see likelihood.py).
    `score_fn.estimator` names the estimator of that bound. For `exact_count`, all residues are masked at the start. For
    `integral`, the residues at the start are drawn from the prior.

    Args:
        batch: sequences `<bos> residues <eos>` of the lengths to sample. Each residue is a placeholder: its token may
            be any amino acid, because the sampler uses it only to find where the residues are.
        bias: (R, V), added to the log-probability of each of the V amino acids at each of the R residues. -inf forbids
            an amino acid.
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
        """Return the residues (R,) at the highest noise level, total noise `sigma`."""
        if self.score_fn.estimator == "exact_count":
            return torch.full((sum(self.draws.lengths),), self.graph.mask, device=self.draws.device)
        start_R = self.draws(lambda n, generator: self.graph.sample_limit(n, generator, sigma))
        # Mask forbidden amino acids now. If the graph has a mask, steps change only masked residues. A forbidden amino
        # acid would therefore stay until the denoising step, which would replace it by a random allowed amino acid,
        # whatever the network returns.
        if self.bias is not None and self.graph.masks:
            start_R = torch.where(is_forbidden(start_R, self.bias), self.graph.mask, start_R)
        return start_R

    def step(
        self, xt: Int64[Tensor, " total"], logits: Float64[Tensor, "total V"], level: Level
    ) -> Int64[Tensor, " total"]:
        """Draw the tokens (total,) at noise `level.sigma_next`, given the tokens xt at noise `level.sigma`.

        Raises:
            ValueError: the network's scores are not finite.
        """
        # moving_R: False where the caller put a context letter (XBZJUO) into xt, which the step must not change
        moving_R = xt[self.free_T] < self.graph.n_reverse_states
        moving_T = self.free_T.masked_scatter(self.free_T, moving_R)
        bias = None if self.bias is None else self.bias[moving_R]
        steer = None
        if bias is not None or self.options.temperature != 1 or self.options.top_p != 1:
            steer = partial(apply_steering, bias=bias, temperature=self.options.temperature, top_p=self.options.top_p)
        probs, clamped = clamp_negative(self.reverse_probs(logits[moving_T], xt[moving_T], level, steer))
        if not bool(torch.isfinite(probs).all()):
            raise ValueError(
                f"the network's scores are not finite in sampling step {level.number}, at sigma = {level.sigma:.3g}"
            )
        self.counts.update(draws=len(probs), clamped=int(clamped.sum()))
        # x_t may contain forbidden amino acids, but the final x0 must not
        if not level.sigma_next and bias is not None:
            allowed = F.pad(bias > -torch.inf, (0, probs.shape[1] - bias.shape[1]))
            probs = (probs + MIN_PROBABILITY) * allowed
        return xt.masked_scatter(moving_T, categorical(probs, self.draws(uniform_draws)[moving_R]))

    def reverse_probs(
        self, logits: Float64[Tensor, "T V"], xt: Int64[Tensor, " T"], level: Level, steer: Steer | None
    ) -> Float64[Tensor, "T S"]:
        """Return the unnormalised probabilities (T, S) of the next state of each of the T tokens that may change."""
        sigma_T, next_T = (torch.full_like(logits[:, 0], sigma) for sigma in (level.sigma, level.sigma_next))
        return self.score_fn.reverse_probs(logits, xt, sigma_T, next_T, steer)


def apply_steering(
    log_q: Float64[Tensor, "T V"], *, bias: Float64[Tensor, "T V"] | None, temperature: float, top_p: float
) -> Float64[Tensor, "T V"]:
    """Multiply q, the distribution of x0 at each residue, by exp(bias), sharpen q, and return log q.

    See `SamplerOptions` for temperature and top_p. Each residue is steered on its own. Sampling with a bias aims at a
    distribution of whole sequences, proportional to p(x0) exp(sum of the biases of x0). It reaches this distribution
    exactly only if residues are independent (see docs/diffusion.md, Steering).
    """
    if bias is not None:
        log_q = log_q + bias
    log_q = ((log_q - log_q.amax(-1, keepdim=True)) / temperature).log_softmax(-1)
    if top_p < 1:
        ranked, order = log_q.exp().sort(dim=-1, descending=True)
        excluded = ranked.cumsum(-1) - ranked >= top_p
        log_q = log_q.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
    return log_q


def is_forbidden(tokens: Tensor, bias: Float64[Tensor, "R V"]) -> Bool[Tensor, " R"]:
    """Return (R,) bool: whether the bias of a residue forbids the residue's token. A mask is never forbidden."""
    return pick((bias == -torch.inf).double(), tokens).bool()
