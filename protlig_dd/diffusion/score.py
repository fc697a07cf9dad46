"""From a network's logits to log-scores and reverse steps: where precision and parametrisation meet."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from protlig_dd.batch import PackedBatch
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.noise import Noise
from protlig_dd.diffusion.numerics import Sigma, Tokens

PARAMETRISATIONS = ("log_score", "x0")
LEAST = 1e-30  # of a probability whose logarithm is taken

Network = Callable[[PackedBatch, Tensor], Tensor]
"""(batch at x_t, sigma (n,) float32) -> logits (total, 20)."""

Steer = Callable[[Tensor], Tensor]
"""log q (T, V) of x0 at each token given the others -> the same, changed (up to a constant for each token)."""


@dataclass(frozen=True)
class ScoreFn:
    """A network as a score function, with the process that it is the score of.

    Args:
        model: (batch, sigma) -> logits.
        graph, noise: the forward process.
        parametrisation: `log_score`, SEDD's; or `x0`: the network's softmax q is the distribution of x0 at a token
            given all the others, and the graph turns it into scores exactly, s_y = (q P)_y / (q P)_x.
        time_conditioning: False shows the network sigma = 0 always; valid where the posterior of x0 does not depend
            on the time (absorbing with x0).
        autocast: dtype the network computes in; None for that of its weights. Its logits leave as float32, and
            nothing after them is of lower precision: sums of exponentials in bf16 are off by 0.2%.

    Raises:
        ValueError: a parametrisation that the graph does not have.
    """

    model: Network
    graph: Graph
    noise: Noise
    parametrisation: str
    time_conditioning: bool = True
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_parametrisation(self.graph, self.parametrisation, self.time_conditioning)

    @property
    def estimator(self) -> str:
        """Of its bound (likelihood.py): exact_count where that is the bound of the model, which is absorbing, x0 and
        time-free; the integral elsewhere.
        """
        exact = self.graph.time_free_with(self.parametrisation) and not self.time_conditioning
        return "exact_count" if exact else "integral"

    @property
    def device(self) -> torch.device:
        """Where the network is; the CPU for one without parameters."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def __call__(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float32[Tensor, "total V"]:
        sigma_T = sigma.index_select(0, batch.segment_ids)
        return self.log_score(self.logits(batch, sigma), batch.tokens, sigma_T)

    def logits(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float32[Tensor, "total V"]:
        """What the network says; without time conditioning it is the same for every sigma."""
        shown = sigma if self.time_conditioning else torch.zeros_like(sigma)
        with torch.autocast(sigma.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(batch, shown).float()

    def log_score(
        self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, steer: Steer | None = None
    ) -> Float[Tensor, "T V"]:
        """Log-scores in the precision of the logits; steered towards another distribution of x0.

        With x0 the network's own q is steered. Log-scores imply a q too, by undoing all the noise, which amplifies
        their errors; they are changed by what steering changes in the scores of that q, so that a small change of q is
        a small change of the scores.
        """
        if self.parametrisation == "x0":
            log_q = logits if steer is None else steer(logits.log_softmax(-1))
            return self.graph.log_score_from_x0(log_q, xt, sigma)
        log_score = self.graph.log_score(logits, xt, sigma)
        if steer is None:
            return log_score
        log_q = self.graph.x0_probs(log_score, xt, sigma).clamp(min=LEAST).log()
        before, after = (self.graph.log_score_from_x0(q, xt, sigma) for q in (log_q, steer(log_q)))
        return log_score + (after - before)

    def reverse_probs(
        self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, left: Sigma, steer: Steer | None = None
    ) -> Float64[Tensor, "T S"]:
        """Probabilities of each token's state when `left` is left of sigma: for x0 exact, else Tweedie's analytic step.

        With nothing left no token stays masked. Unnormalised; inconsistent scores can give negative entries.
        """
        if self.parametrisation == "x0":
            log_q = logits if steer is None else steer(logits.log_softmax(-1))
            return self.graph.posterior_probs(log_q, xt, sigma, left)
        log_score = self.log_score(logits, xt, sigma, steer)
        if not left.any():
            return self.graph.denoise_probs(log_score, xt, sigma)
        return self.graph.analytic_probs(log_score, xt, sigma - left)


def check_parametrisation(graph: Graph, parametrisation: str, time_conditioning: bool) -> None:
    """Raise unless this graph can be used with this parametrisation."""
    if parametrisation not in PARAMETRISATIONS:
        raise ValueError(f"no parametrisation {parametrisation!r}; there are {', '.join(PARAMETRISATIONS)}")
    if not time_conditioning and not graph.time_free_with(parametrisation):
        raise ValueError(
            "time_conditioning=false is valid only with graph=absorbing and parametrisation=x0; "
            "with others, add time_conditioning=true"
        )
