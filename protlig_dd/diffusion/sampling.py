"""Draw new sequences by running the diffusion backwards.

A sampler is a class (samplers/): `init` gives the tokens at the highest noise level, and `step` goes from one level to
the next.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.numerics import Generators, sum_by_sequence
from protlig_dd.diffusion.samplers.base import Draws, Level, SamplerOptions
from protlig_dd.diffusion.samplers.registry import SAMPLERS
from protlig_dd.diffusion.score import Network, ScoreFn
from protlig_dd.system.device import float64_device
from protlig_dd.tokenizer import BOS, EOS


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


def check_sampler(graph: Graph, options: SamplerOptions) -> None:
    """Raise a ValueError unless this graph can be sampled so."""
    if options.predictor not in SAMPLERS:
        raise ValueError(f"no predictor {options.predictor!r}; there are {', '.join(SAMPLERS)}")
    if SAMPLERS[options.predictor].needs_masks and not graph.masks:
        others = [name for name, sampler in SAMPLERS.items() if not sampler.needs_masks]
        raise ValueError(f"predictor={options.predictor} is for the absorbing graph; use {' or '.join(others)}")
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
