"""Sample new sequences by running the diffusion backwards.

A sampler is a class (see samplers/): `init` returns the residues at the highest noise level, and `step` changes the
tokens from one noise level to the next lower level.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
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
    """Sample one pack of sequences of the given lengths. Everything except the network is computed in float64.

    Args:
        lengths: number of residues of each sequence.
        generator: one generator for all sequences, or one per sequence, so that a sequence's draws do not depend on its
            pack.
        project: function that sets fixed residues (or context letters) back to their values. It maps the tokens
            (total,) of the pack to new tokens. Each sequence has <bos> and <eos> around it, so residue 0 of the first
            sequence is token 1. The function is called before the first step and after every step. Fixing residues in
            this way is exact for the absorbing graph and an approximation for the other graphs (docs/diffusion.md).
            With the absorbing graph and `project`, the network receives for each sequence the sigma that matches the
            masked fraction of the sequence's residues: 1 - e^-sigma is this fraction. If the network was trained with
            context, only the free residues count in the fraction.
        log_bias: nats added to the log-probability of each of the V amino acids. The shape is (V,), to add the same
            values at all residues, or (sum of lengths, V), with a row for each residue but none for <bos> and <eos>.
            The model is steered towards the distribution proportional to p(x0) exp(sum of log_bias over the residues
            of x0). The steering is exact if positions are independent. -inf forbids an amino acid.
        on_step: called after each step, for a progress bar.
        counts: counter to which the function adds. `draws` counts drawn tokens. `clamped` counts draws with a negative
            probability, which is set to 0 before renormalisation. `evaluated` counts, over all steps, the sequences
            that the network evaluates. `skipped` counts the sequences that a network without time conditioning
            need not evaluate, because they have not changed since the step before.

    Returns:
        One uint8 array of amino-acid ids for each sequence.

    Raises:
        ValueError: a predictor that is unknown or not supported by the graph, fewer than one step, a length below 1, a
            temperature or top_p out of range, a log_bias that has a wrong shape or forbids all amino acids of a
            residue, or a network output that is not finite.
    """
    steps = ReverseSteps(score_fn, lengths, options, generator, project, log_bias=log_bias, counts=counts)
    for _ in steps:
        on_step()
    return steps.residues()


class Step(NamedTuple):
    """A reverse step of a pack."""

    level: Level
    before: Int64[Tensor, " total"]
    """The tokens before the step."""
    after: Int64[Tensor, " total"]
    logits: Float64[Tensor, "total V"]
    """The network's output at `before`."""


class ReverseSteps:
    """An iterator over the reverse steps of one pack. See `sample`, which runs it, for the arguments and errors.

    Between two steps, the caller may replace the pack's tokens with `continue_from`.
    """

    @torch.no_grad()
    def __init__(
        self,
        score_fn: ScoreFn,
        lengths: Sequence[int],
        options: SamplerOptions,
        generator: Generators,
        project: Callable[[Tensor], Tensor] | None = None,
        *,
        log_bias: Float[Tensor, "*residues V"] | None = None,
        counts: Counter[str] | None = None,
    ) -> None:
        graph, noise = score_fn.graph, score_fn.noise
        check_sampler(graph, options)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"sampling needs lengths of at least 1, got {list(lengths)}")
        counts = Counter() if counts is None else counts
        self.score_fn, self.options, self.project = score_fn, options, project
        self.device, self.device64 = score_fn.device, float64_device(score_fn.device)
        batch = PackedBatch.pack([torch.tensor([BOS] + [0] * length + [EOS]) for length in lengths]).to(self.device64)
        bias_RV = None
        if log_bias is not None:
            bias_RV = _expand_bias(log_bias.to(self.device64, torch.float64), sum(lengths), graph.n_states)
        draws = Draws(lengths, generator, self.device64)
        self.sampler = SAMPLERS[options.predictor](score_fn, batch, draws, bias_RV, options, counts)
        sigma, self.dsigma = noise(torch.linspace(1, noise.t_min, options.steps + 1, dtype=torch.float64))
        self.levels = [*sigma.tolist(), 0.0]
        self.logits_of = CachedLogits(score_fn.logits, counts, time_free=not score_fn.time_conditioning)
        self.done = 0
        """Number of steps that have run."""
        self.matches_masks = project is not None and graph.masks
        """Whether the network receives the sigma that matches the masked fraction, instead of the schedule's sigma."""
        xt = batch.tokens.masked_scatter(self.sampler.free_T, self.sampler.init(self.levels[0]))
        self.batch = batch.with_tokens(xt if project is None else project(xt))
        self.counted_T = self.batch.tokens == graph.mask if score_fn.trained_with_context and graph.masks else None
        """(total,) bool: which tokens are the residues whose masked fraction sets sigma. None: all residues.

        For a network trained with context, these are the residues that were masked at the start or by `continue_from`.
        """

    def __len__(self) -> int:
        return len(self.levels) - 1

    def __iter__(self) -> "ReverseSteps":
        return self

    @torch.no_grad()
    def __next__(self) -> Step:
        if self.done == len(self):
            raise StopIteration
        i, noise, options = self.done, self.score_fn.noise, self.options
        sigma_now, sigma_next = self.levels[i : i + 2]
        sigma_n = torch.full((len(self.batch.lengths),), sigma_now, dtype=torch.float64, device=self.device64)
        if self.matches_masks:
            bounds = self.levels[-2], self.levels[0]
            sigma_n = sigma_of_masks(self.batch, self.score_fn.graph, *bounds, counted_T=self.counted_T)
        logits_TV = self.logits_of(self.batch.to(self.device), sigma_n.to(self.device, torch.float32))
        logits_TV = logits_TV.to(self.device64, torch.float64)
        level = Level(i + 1, sigma_now, sigma_next, float(self.dsigma[i]) * (1 - noise.t_min) / options.steps)
        before = self.batch.tokens
        xt = self.sampler.step(before, logits_TV, level)
        self.batch = self.batch.with_tokens(xt if self.project is None else self.project(xt))
        self.done += 1
        return Step(level, before, self.batch.tokens, logits_TV)

    def continue_from(self, tokens: Int64[Tensor, " total"]) -> None:
        """Replace the pack's tokens, from which the next step starts. `project` is applied to the new tokens.

        With the absorbing graph, all later steps give the network the sigma that matches each sequence's masked
        fraction (see `sigma_of_masks`), because this fraction no longer follows the schedule.

        Args:
            tokens: (total,), with <bos> and <eos>.
        """
        self.batch = self.batch.with_tokens(tokens if self.project is None else self.project(tokens))
        self.matches_masks = self.score_fn.graph.masks
        if self.counted_T is not None:
            self.counted_T = self.counted_T | (self.batch.tokens == self.score_fn.graph.mask)

    def residues(self) -> list[np.ndarray]:
        """Return the current residues of each sequence as uint8 token ids (length_i,). Residues may still be masked."""
        return [tokens[1:-1].cpu().numpy().astype(np.uint8) for tokens in self.batch.unpack(self.batch.tokens)]


def sigma_of_masks(
    batch: PackedBatch, graph: Graph, lowest: float, highest: float, *, counted_T: Bool[Tensor, " total"] | None = None
) -> Float64[Tensor, " n"]:
    """Return for each sequence the sigma at which 1 - e^-sigma is the sequence's fraction of masked residues.

    Each sigma is clamped to [lowest, highest].

    Fixed residues are never masked, so the schedule's sigma would be too high for sequences that have fixed residues.

    Args:
        counted_T: which residues count in the fraction. None: all residues, including fixed residues.
    """
    counted_T = batch.tokens <= graph.n_states if counted_T is None else counted_T
    residues_n = sum_by_sequence(counted_T, batch).clamp(min=1)
    masked_fraction_n = sum_by_sequence(batch.tokens == graph.mask, batch) / residues_n
    return (-torch.log1p(-masked_fraction_n)).clamp(lowest, highest)


def check_sampler(graph: Graph, options: SamplerOptions) -> None:
    """Raise a ValueError unless the options are valid and the graph supports the predictor."""
    if not isinstance(options, SamplerOptions):
        raise ValueError(f"the options of a sampler are SamplerOptions(steps, ...), got {options!r:.40}")
    for name in ("steps", "temperature", "top_p"):
        kind, expected = (Integral, "whole number") if name == "steps" else (Real, "number")
        if not isinstance(value := getattr(options, name), kind) or isinstance(value, bool):
            raise ValueError(f"{name} is a {expected}, got {value!r:.40}")
    if options.predictor not in SAMPLERS:
        raise ValueError(f"unknown predictor {options.predictor!r}; choose from {', '.join(SAMPLERS)}")
    if SAMPLERS[options.predictor].needs_masks and not graph.masks:
        others = [name for name, sampler in SAMPLERS.items() if not sampler.needs_masks]
        raise ValueError(f"predictor={options.predictor} is for the absorbing graph; use {' or '.join(others)}")
    if options.steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {options.steps}")
    if not 0 < options.temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {options.top_p}")


class CachedLogits:
    """Logits of a network, kept for reuse.

    If `time_free`, the logits do not depend on sigma. The network is then evaluated only on sequences that have changed
    since the last call.
    """

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
            sequences = [tokens for tokens, new in zip(batch.unpack(batch.tokens), changed, strict=True) if new]
            if sequences:
                changed_n = torch.tensor(changed, device=sigma.device)
                self.logits_TV[changed_n[batch.segment_ids]] = self.logits(
                    PackedBatch.pack(sequences), sigma[changed_n]
                )
            self.counts.update(evaluated=len(sequences), skipped=len(changed) - len(sequences))
        self.batch = batch
        return self.logits_TV


def _expand_bias(log_bias: Float64[Tensor, "..."], residues: int, n_states: int) -> Float64[Tensor, "R V"]:
    """Check log_bias, and return it with one row for each residue."""
    if log_bias.shape not in ((n_states,), (residues, n_states)):
        raise ValueError(
            f"log_bias must have shape ({n_states},) or ({residues}, {n_states}), got {tuple(log_bias.shape)}"
        )
    bias = log_bias.expand(residues, n_states)
    if bool((torch.isnan(bias) | (bias == float("inf"))).any()):
        raise ValueError("log_bias must be finite or -inf")
    forbidden = (bias == -float("inf")).all(-1)
    if bool(forbidden.any()):
        raise ValueError(
            f"log_bias forbids every amino acid at residue {int(forbidden.nonzero()[0])} of the pack (counted from 0, "
            "over all its sequences)"
        )
    return bias
