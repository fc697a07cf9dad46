"""Draw new sequences by running the diffusion backwards."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graph import Graph, categorical, clamp_negative, uniform_draws
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.tokenizer import BOS, EOS

PREDICTORS = ("analytic", "euler")


@torch.no_grad()
def sample(
    score_fn: ScoreFn,
    graph: Graph,
    noise: Noise,
    lengths: Sequence[int],
    steps: int,
    predictor: str,
    generator: torch.Generator,
    project: Callable[[Tensor], Tensor] | None = None,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
    counts: Counter[str] | None = None,
) -> list[np.ndarray]:
    """Sample one pack of sequences of the given lengths.

    Runs `steps` reverse steps from t = 1 to t_min, then a denoising step over what noise is left; the mask is never
    left over.

    Args:
        lengths: residues of each sequence.
        predictor: `analytic` (Tweedie, arXiv 2310.16834 eq. 19) or `euler`.
        project: tokens (total,) -> tokens; re-imposes fixed residues, called before every step and after the last.
        on_step: called after each network call (a progress bar's tick).
        counts: collects `draws` and `clamped` (draws with a negative probability, clamped at 0 and renormalised).

    Returns:
        One uint8 array of amino-acid ids for each sequence.

    Raises:
        ValueError: an unknown predictor, fewer than one step, or a length below 1.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"no predictor {predictor!r}; there are {', '.join(PREDICTORS)}")
    if steps < 1 or not lengths or min(lengths) < 1:
        raise ValueError(f"sampling needs at least 1 step and lengths of at least 1, got {steps} and {list(lengths)}")
    counts = Counter() if counts is None else counts
    template = [torch.tensor([BOS] + [0] * length + [EOS]) for length in lengths]
    batch = PackedBatch.pack(template).to(device)
    free_T = batch.tokens < graph.n_states
    times = torch.linspace(1, noise.t_min, steps + 1, dtype=torch.float64)
    sigma, dsigma = noise(times)
    dt = (1 - noise.t_min) / steps

    def draw(probs: Tensor) -> Tensor:
        probs, clamped = clamp_negative(probs)
        counts.update(draws=len(probs), clamped=int(clamped.sum()))
        u = uniform_draws(len(probs), generator).to(probs.device)
        return categorical(probs, u).to(device)

    xt = batch.tokens.clone()
    xt[free_T] = graph.sample_limit(int(free_T.sum()), generator, float(sigma[0])).to(device)
    for i in range(steps + 1):
        xt = project(xt) if project else xt
        sigma_n = sigma[i].float().expand(len(lengths)).to(device)
        log_score = score_fn(batch.with_tokens(xt), sigma_n)[free_T]
        current = xt[free_T]
        if i == steps:
            probs = graph.denoise_probs(log_score, current, sigma[i].float().expand(len(current)).to(device))
        elif predictor == "analytic":
            delta = (sigma[i] - sigma[i + 1]).float()
            probs = graph.analytic_probs(log_score, current, delta.expand(len(current)).to(device))
        else:
            step = (dsigma[i] * dt).float()
            probs = graph.euler_probs(log_score, current, step.expand(len(current)).to(device))
        xt = xt.masked_scatter(free_T, draw(probs))
        on_step()
    xt = project(xt) if project else xt
    return [tokens[1:-1].cpu().numpy().astype(np.uint8) for tokens in batch.unpack(xt)]
