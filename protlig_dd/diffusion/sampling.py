"""Draw new sequences by running the diffusion backwards."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graph import (
    Absorbing,
    Graph,
    categorical,
    clamp_negative,
    log_expm1,
    one_hot,
    pick,
    to_float64,
    uniform_draws,
)
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.tokenizer import BOS, EOS

LEAST = 1e-30  # of a probability whose logarithm is taken
PREDICTORS = ("analytic", "euler", "ancestral")

Generators = torch.Generator | Sequence[torch.Generator]


@torch.no_grad()
def sample(
    score_fn: ScoreFn,
    graph: Graph,
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
    time_free: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
    counts: Counter[str] | None = None,
) -> list[np.ndarray]:
    """Sample one pack of sequences of the given lengths.

    Runs `steps` reverse steps from t = 1 to t_min, then a denoising step over what noise is left; the mask is never
    left over.

    Args:
        lengths: residues of each sequence.
        predictor: `analytic` (Tweedie, arXiv 2310.16834 eq. 19), `euler`, or `ancestral` (absorbing graph only): the
            number of masked residues follows the noise exactly, L (1 - e^-sigma) to the nearest, instead of on average.
        generator: one for each sequence, so that what a sequence draws does not depend on its pack; or a single one.
        project: tokens (total,) -> tokens; re-imposes fixed residues, called before every step and after the last.
            Exact for the absorbing graph, an approximation for the others (docs/diffusion.md).
        log_bias: (V,) or (sum of lengths, V) nats for each amino acid, V of them, at every position: the model is
            steered towards p(x0) exp(sum of log_bias over x0), exactly where positions are independent. -inf forbids.
        temperature, top_p: sharpen each position's distribution of x0 (steered, if it is): p^(1 / temperature), then
            the smallest set of amino acids that holds top_p of it. 1 and 1, the default, sample the model itself.
        time_free: the score function's network does not look at sigma (`is_time_free`), so sequences that no residue
            of has changed skip it.
        on_step: called after each step (a progress bar's tick).
        counts: collects `draws` and `clamped` (draws with a negative probability, clamped at 0 and renormalised), and
            `evaluated` and `skipped` sequences.

    Returns:
        One uint8 array of amino-acid ids for each sequence.

    Raises:
        ValueError: an unknown predictor or one that the graph does not have, fewer than one step, a length below 1, a
            temperature or top_p out of range, a bias of another shape or one that leaves no amino acid.
    """
    check_sampler(graph, predictor, temperature, top_p)
    if steps < 1 or not lengths or min(lengths) < 1:
        raise ValueError(f"sampling needs at least 1 step and lengths of at least 1, got {steps} and {list(lengths)}")
    counts = Counter() if counts is None else counts
    project = project or (lambda tokens: tokens)
    batch = PackedBatch.pack([torch.tensor([BOS] + [0] * length + [EOS]) for length in lengths]).to(device)
    free_T = batch.tokens < graph.n_states
    bias = None if log_bias is None else _read_bias(log_bias.to(device), sum(lengths), graph.n_states)
    sigma, dsigma = noise(torch.linspace(1, noise.t_min, steps + 1, dtype=torch.float64))
    score = _Cached(score_fn, graph.n_states, counts) if time_free else score_fn

    def draw(probs_TS: Float64[Tensor, "T S"]) -> Int64[Tensor, " T"]:
        return categorical(probs_TS, _per_sequence(uniform_draws, lengths, generator).to(probs_TS.device)).to(device)

    def each(value: Float64[Tensor, ""], like: Tensor) -> Float[Tensor, " T"]:
        return value.float().expand(len(like)).to(device)

    if predictor == "ancestral":
        start = torch.full((sum(lengths),), graph.n_states)
    else:
        start = _per_sequence(lambda n, g: graph.sample_limit(n, g, float(sigma[0])), lengths, generator)
    xt = batch.tokens.masked_scatter(free_T, start.to(device))
    if bias is not None and isinstance(graph, Absorbing):  # a forbidden residue that has survived the noise would stay
        xt = xt.masked_scatter(free_T, torch.where(_is_forbidden(xt[free_T], bias), graph.mask, xt[free_T]))
    xt = project(xt)
    masked_n = _count(xt == graph.n_states, batch)
    for i in range(steps + 1):
        current, last = xt[free_T], i == steps
        log_score = score(batch.with_tokens(xt), each(sigma[i], masked_n))[free_T]
        if bias is not None or temperature != 1 or top_p != 1:
            log_score = _steer(log_score, current, each(sigma[i], current), graph, bias, temperature, top_p)
        if last or predictor == "ancestral":
            probs = graph.denoise_probs(log_score, current, each(sigma[i], current))
        elif predictor == "analytic":
            probs = graph.analytic_probs(log_score, current, each(sigma[i] - sigma[i + 1], current))
        else:
            probs = graph.euler_probs(log_score, current, each(dsigma[i] * (1 - noise.t_min) / steps, current))
        probs, clamped = clamp_negative(probs)
        counts.update(draws=len(probs), clamped=int(clamped.sum()))
        if last and bias is not None:  # before, a residue may be anything: it is x0 that must not be forbidden
            probs = _forbid(probs, current, bias)
        drawn = xt.masked_scatter(free_T, draw(probs))
        if predictor == "ancestral":
            left_n = torch.zeros_like(masked_n) if last else (masked_n * -torch.expm1(-sigma[i + 1])).round().long()
            now_n = _count(xt == graph.n_states, batch)
            u = torch.zeros(len(xt), dtype=torch.float64)
            u[free_T.cpu()] = _per_sequence(uniform_draws, lengths, generator).cpu()
            drawn = torch.where(batch.random_subset(xt == graph.n_states, now_n - left_n, u), drawn, xt)
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
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


class _Cached:
    """A time-free score function that shows its network only the sequences which have changed.

    At a mask, log_score + log(e^sigma - 1) is the network's log-softmax, whatever sigma is.
    """

    def __init__(self, score_fn: ScoreFn, mask: int, counts: Counter[str]) -> None:
        self.score_fn, self.mask, self.counts = score_fn, mask, counts
        self.tokens: Tensor | None = None
        self.log_p_TV = torch.empty(0)

    def __call__(self, batch: PackedBatch, sigma: Float[Tensor, " n"]) -> Float[Tensor, "total V"]:
        scale_T1 = log_expm1(sigma).index_select(0, batch.segment_ids)[:, None]
        if self.tokens is None:
            self.log_p_TV = self.score_fn(batch, sigma) + scale_T1
            self.counts.update(evaluated=len(batch.lengths), skipped=0)
        else:
            changed_n = _count(batch.tokens != self.tokens, batch) > 0
            changed_T = changed_n[batch.segment_ids]
            some = [
                tokens
                for tokens, changed in zip(batch.unpack(batch.tokens), changed_n.tolist(), strict=True)
                if changed
            ]
            if some:
                self.log_p_TV[changed_T] = self.score_fn(PackedBatch.pack(some), sigma[changed_n]) + scale_T1[changed_T]
            self.counts.update(evaluated=len(some), skipped=len(batch.lengths) - len(some))
        self.tokens = batch.tokens
        return torch.where((batch.tokens == self.mask)[:, None], self.log_p_TV - scale_T1, 0.0)


def _per_sequence(
    draw: Callable[[int, torch.Generator], Tensor], lengths: Sequence[int], generator: Generators
) -> Tensor:
    """Draws for the residues of all sequences, each sequence's from its own generator."""
    if isinstance(generator, torch.Generator):
        return draw(sum(lengths), generator)
    return torch.cat([draw(length, one) for length, one in zip(lengths, generator, strict=True)])


def _count(where_T: Bool[Tensor, " total"], batch: PackedBatch) -> Int64[Tensor, " n"]:
    """How many tokens of each sequence are marked."""
    zeros = torch.zeros(len(batch.lengths), dtype=torch.int64, device=where_T.device)
    return zeros.index_add_(0, batch.segment_ids, where_T.long())


def _read_bias(log_bias: Float[Tensor, "..."], residues: int, n_states: int) -> Float64[Tensor, "R V"]:
    """The bias of every residue, checked."""
    if log_bias.shape not in ((n_states,), (residues, n_states)):
        raise ValueError(
            f"log_bias must have shape ({n_states},) or ({residues}, {n_states}), got {tuple(log_bias.shape)}"
        )
    bias = to_float64(log_bias).expand(residues, n_states)
    if bool((torch.isnan(bias) | (bias == float("inf"))).any()):
        raise ValueError("log_bias must be finite or -inf")
    barred = (bias == -float("inf")).all(-1)
    if bool(barred.any()):
        raise ValueError(f"log_bias forbids every amino acid at residue {int(barred.nonzero()[0])} of the pack")
    return bias


def _steer(
    log_score_RV: Float[Tensor, "R V"],
    current: Int64[Tensor, " R"],
    sigma_R: Float[Tensor, " R"],
    graph: Graph,
    bias_RV: Float64[Tensor, "R V"] | None,
    temperature: float,
    top_p: float,
) -> Float[Tensor, "R V"]:
    """Scores of the model times exp(bias), sharpened: exact where positions are independent given the rest.

    All three belong to x0. The scores imply a distribution of x0; it is changed, and turned into scores again.
    """
    log_q_RV = graph.x0_probs(log_score_RV, current, sigma_R).clamp(min=LEAST).log()
    if bias_RV is not None:
        log_q_RV = log_q_RV + bias_RV.to(log_q_RV.device)
    log_q_RV = (log_q_RV / temperature).log_softmax(-1)
    if top_p < 1:
        ranked_RV, order_RV = log_q_RV.exp().sort(dim=-1, descending=True)
        beyond_RV = ranked_RV.cumsum(-1) - ranked_RV >= top_p
        log_q_RV = log_q_RV.masked_fill(beyond_RV.scatter(-1, order_RV, beyond_RV), -torch.inf)
    return graph.log_score_from_x0(log_q_RV.to(current.device), current, sigma_R.double())


def _is_forbidden(current: Int64[Tensor, " R"], bias_RV: Float64[Tensor, "R V"]) -> Bool[Tensor, " R"]:
    return pick((bias_RV == -float("inf")).double(), current).bool()


def _forbid(
    probs_RS: Float64[Tensor, "R S"], current: Int64[Tensor, " R"], bias_RV: Float64[Tensor, "R V"]
) -> Float64[Tensor, "R S"]:
    """No probability on what is forbidden; a row that had no other (a residue that `project` put there) stays."""
    allowed_RS = F.pad(bias_RV > -float("inf"), (0, probs_RS.shape[1] - bias_RV.shape[1]), value=True)
    left_RS = probs_RS * allowed_RS
    return torch.where(left_RS.sum(-1, keepdim=True) > 0, left_RS, one_hot(current, probs_RS.shape[1]))
