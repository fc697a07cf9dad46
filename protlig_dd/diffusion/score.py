"""From a network's logits to log-scores: the one place where precision and parametrisation meet."""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graph import Absorbing, Graph

PARAMETRISATIONS = ("log_score", "x0")

ScoreFn = Callable[[PackedBatch, Tensor], Tensor]
"""(batch at x_t, sigma (n,) float32) -> log_score (total, 20) float32, 0 at x_t."""


def make_score_fn(
    model: Callable[[PackedBatch, Tensor], Tensor],
    graph: Graph,
    parametrisation: str,
    *,
    time_conditioning: bool = True,
    autocast: torch.dtype | None = None,
) -> ScoreFn:
    """Wrap a network (batch, sigma) -> logits as a score function.

    Args:
        parametrisation: `log_score`, SEDD's; or `x0`: the network's softmax q is the distribution of x0 at a token
            given all the others, and the graph turns it into scores exactly, s_y = (q P)_y / (q P)_x.
        time_conditioning: False shows the network sigma = 0 always; valid where the posterior of x0 does not depend
            on the time (absorbing with x0).
        autocast: dtype the network computes in; None for that of its weights. Its logits leave as float32, and
            everything after them is float32: sums of exponentials in bf16 are off by 0.2%.

    Raises:
        ValueError: a parametrisation that the graph does not have.
    """
    check_parametrisation(graph, parametrisation, time_conditioning)

    def score_fn(batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float32[Tensor, "total 20"]:
        shown = sigma if time_conditioning else torch.zeros_like(sigma)
        with torch.autocast(sigma.device.type, dtype=autocast, enabled=autocast is not None):
            logits = model(batch, shown)
        sigma_T = sigma.index_select(0, batch.segment_ids)
        if parametrisation == "x0":
            return graph.log_score_from_x0(logits.float(), batch.tokens, sigma_T)
        return graph.log_score(logits.float(), batch.tokens, sigma_T)

    return score_fn


def is_time_free(graph: Graph, parametrisation: str) -> bool:
    """Whether the best network is the same at every noise level: what is not masked is then clean."""
    return isinstance(graph, Absorbing) and parametrisation == "x0"


def check_parametrisation(graph: Graph, parametrisation: str, time_conditioning: bool) -> None:
    """Raise unless this graph can be used with this parametrisation."""
    if parametrisation not in PARAMETRISATIONS:
        raise ValueError(f"no parametrisation {parametrisation!r}; there are {', '.join(PARAMETRISATIONS)}")
    if not time_conditioning and not is_time_free(graph, parametrisation):
        raise ValueError("time_conditioning=false is valid only with graph=absorbing and parametrisation=x0")
