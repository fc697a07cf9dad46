"""Draw new sequences by running the diffusion backwards."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.registry import Graph
from protlig_dd.diffusion.likelihood import pick_estimator
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.numerics import Generators, categorical, clamp_negative, pick, sum_by_sequence, uniform_draws
from protlig_dd.diffusion.score import LEAST, Network, ScoreFn
from protlig_dd.system.device import float64_device
from protlig_dd.tokenizer import BOS, EOS

PREDICTORS = ("analytic", "euler", "ancestral")


@torch.no_grad()
def sample(
    score_fn: ScoreFn,
    noise: Noise,
    lengths: Sequence[int],
    steps: int,
    predictor: str,
    generator: Generators,
    project: Callable[[Tensor], Tensor] | None = None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    log_bias: Float[Tensor, "*residues V"] | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
    counts: Counter[str] | None = None,
) -> list[np.ndarray]:
    """Sample one pack of sequences of the given lengths.

    Runs `steps` reverse steps from t = 1 to t_min, then a denoising step over what noise is left; the mask is never
    left over. Begins with all residues masked where the exact count is the model's bound (and for `ancestral`),
    elsewhere with a draw of the prior at t = 1. All but the network is computed in float64.

    Args:
        lengths: residues of each sequence.
        predictor: `analytic` (Tweedie, arXiv 2310.16834 eq. 19; for x0 the exact posterior, which is the same without
            its growing terms), `euler`, or `ancestral` (absorbing graph only): the number of masked residues follows
            the noise exactly, L (1 - e^-sigma) to the nearest, instead of on average; scores are normalised.
        generator: one for each sequence, so that what a sequence draws does not depend on its pack; or a single one.
        project: tokens (total,) -> tokens, with <bos> and <eos> around each sequence: residue 0 of the first is token
            1. Re-imposes fixed residues (or context letters), called before every step and after the last. Exact for
            the absorbing graph, an approximation for the others (docs/diffusion.md). With the absorbing graph the
            network is then shown the noise level at which as many of a sequence's residues are masked as are.
        log_bias: (V,) or (sum of lengths, V) nats for each amino acid, V of them, at every residue (<bos> and <eos>
            not among them): the model is steered towards p(x0) exp(sum of log_bias over x0), exactly where positions
            are independent. -inf forbids.
        temperature, top_p: sharpen each position's distribution of x0 (steered, if it is): p^(1 / temperature), then
            the smallest set of amino acids that holds top_p of it. 1 and 1, the default, sample the model itself.
        device: where the network is.
        on_step: called after each step (a progress bar's tick).
        counts: collects `draws` and `clamped` (draws with a negative probability, clamped at 0 and renormalised), and
            `evaluated` and `skipped` sequences: a network that does not look at sigma is not asked again about those
            of which no residue has changed.

    Returns:
        One uint8 array of amino-acid ids for each sequence.

    Raises:
        ValueError: an unknown predictor or one that the graph does not have, fewer than one step, a length below 1, a
            temperature or top_p out of range, a bias of another shape or one that leaves no amino acid, a network
            whose output is not finite.
    """
    graph = score_fn.graph
    check_sampler(graph, predictor, temperature, top_p)
    if steps < 1 or not lengths or min(lengths) < 1:
        raise ValueError(f"sampling needs at least 1 step and lengths of at least 1, got {steps} and {list(lengths)}")
    counts = Counter() if counts is None else counts
    counted = project is not None and isinstance(graph, Absorbing)
    project = project or (lambda tokens: tokens)
    device = torch.device(device)
    home = float64_device(device)
    batch = PackedBatch.pack([torch.tensor([BOS] + [0] * length + [EOS]) for length in lengths]).to(home)
    free_T = batch.tokens < graph.n_states
    bias_RV = None if log_bias is None else _read_bias(log_bias.to(home, torch.float64), sum(lengths), graph.n_states)
    sigma, dsigma = noise(torch.linspace(1, noise.t_min, steps + 1, dtype=torch.float64))
    levels = [*sigma.tolist(), 0.0]
    logits_of = _Remembered(score_fn.logits, counts, time_free=not score_fn.time_conditioning)

    def per_residue(draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """(R,) draws, each sequence's from its own generator."""
        if isinstance(generator, torch.Generator):
            return draw(sum(lengths), generator).to(home)
        return torch.cat([draw(length, one) for length, one in zip(lengths, generator, strict=True)]).to(home)

    # the bound of a network that does not look at the noise is that of a decoder which begins with nothing but masks
    exact = pick_estimator(graph, score_fn.parametrisation, score_fn.time_conditioning) == "exact_count"
    if exact or predictor == "ancestral":
        start_R = torch.full((sum(lengths),), graph.n_states, device=home)
    else:
        start_R = per_residue(lambda n, one: graph.sample_limit(n, one, levels[0]))
    if bias_RV is not None and isinstance(graph, Absorbing):  # a forbidden residue that survived the noise would stay
        start_R = torch.where(_is_forbidden(start_R, bias_RV), graph.n_states, start_R)
    xt = project(batch.tokens.masked_scatter(free_T, start_R))
    masked_n = sum_by_sequence(xt == graph.n_states, batch)
    for i, (now, left) in enumerate(pairwise(levels)):
        last = left == 0
        moving_R = xt[free_T] < graph.n_reverse_states  # all but context letters that `project` put there
        moving_T = free_T.masked_scatter(free_T, moving_R)
        current = xt[moving_T]
        bias = None if bias_RV is None else bias_RV[moving_R]
        shown_n = torch.full((len(lengths),), now, dtype=torch.float64, device=home)
        if counted:  # what is fixed is never masked: the network saw such sequences in training at another noise level
            residues_n = sum_by_sequence(xt <= graph.n_states, batch).clamp(min=1)
            shares_n = sum_by_sequence(xt == graph.n_states, batch) / residues_n
            shown_n = (-torch.log1p(-shares_n)).clamp(levels[-2], levels[0])
        shown = shown_n.to(device, torch.float32)
        logits = logits_of(batch.with_tokens(xt).to(device), shown).to(home, torch.float64)[moving_T]
        level = torch.full_like(logits[:, 0], now)
        steer = None
        if bias is not None or temperature != 1 or top_p != 1:
            steer = partial(_steer, bias=bias, temperature=temperature, top_p=top_p)
        if predictor == "euler" and not last:
            step = torch.full_like(level, float(dsigma[i]) * (1 - noise.t_min) / steps)
            probs = graph.euler_probs(score_fn.log_score(logits, current, level, steer), current, step)
        else:
            rest = torch.full_like(level, 0.0 if predictor == "ancestral" else left)
            probs = score_fn.reverse_probs(logits, current, level, rest, steer)
        probs, clamped = clamp_negative(probs)
        if not bool(torch.isfinite(probs).all()):
            raise ValueError(f"the network's scores are not finite in sampling step {i + 1}, at sigma = {now:.3g}")
        counts.update(draws=len(probs), clamped=int(clamped.sum()))
        if last and bias is not None:  # before, a residue may be anything: it is x0 that must not be forbidden
            allowed = F.pad(bias > -torch.inf, (0, probs.shape[1] - bias.shape[1]))
            probs = (probs + LEAST) * allowed
        drawn = xt.masked_scatter(moving_T, categorical(probs, per_residue(uniform_draws)[moving_R]))
        if predictor == "ancestral":
            wanted_n = (masked_n * -math.expm1(-left)).round()
            now_n = sum_by_sequence(xt == graph.n_states, batch)
            u_T = torch.zeros_like(free_T, dtype=torch.float64).masked_scatter(free_T, per_residue(uniform_draws))
            drawn = torch.where(batch.random_subset(xt == graph.n_states, now_n - wanted_n, u_T), drawn, xt)
        xt = project(drawn)
        on_step()
    return [tokens[1:-1].cpu().numpy().astype(np.uint8) for tokens in batch.unpack(xt)]


def check_sampler(graph: Graph, predictor: str, temperature: float = 1.0, top_p: float = 1.0) -> None:
    """Raise unless this graph can be sampled so."""
    if predictor not in PREDICTORS:
        raise ValueError(f"no predictor {predictor!r}; there are {', '.join(PREDICTORS)}")
    if predictor == "ancestral" and not isinstance(graph, Absorbing):
        raise ValueError("predictor=ancestral is for the absorbing graph; use analytic or euler")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


class _Remembered:
    """A network's logits; one that does not look at sigma is shown only the sequences which have changed."""

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
