"""Conversion of a network's logits to log-scores and reverse steps, for each parametrisation."""

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
MIN_PROBABILITY = 1e-30  # lower limit of probabilities, so that their logarithms are finite

Network = Callable[[PackedBatch, Tensor], Tensor]
"""(batch with tokens x_t, sigma (n,) float32) -> logits (total, 20)."""

Steer = Callable[[Tensor], Tensor]
"""log q (T, V) -> a changed log q. q is the distribution of x0 at each position, given x_t at all other positions.

The result need not be normalised: each token's row may have any constant added.
"""


@dataclass(frozen=True)
class ScoreFn:
    """A network as a score function, together with its forward process.

    Args:
        model: (batch, sigma) -> logits.
        graph, noise: the forward process.
        parametrisation: `log_score`: the logits are log-scores up to known terms, which the graph adds, as in SEDD.
            `x0`: q, the softmax of the logits, is the distribution of x0 at each position, given the tokens of x_t at
            all other positions. The graph converts q to scores exactly: s_y = (q P)_y / (q P)_x with x = x_t.
        time_conditioning: if False, the network always receives sigma = 0. This is valid only if the posterior of x0
            does not depend on time (the absorbing graph with parametrisation x0).
        autocast: dtype in which the network computes; None for the dtype of its weights. The logits are converted to
            float32, and all later computations are at least as precise, because sums of exponentials in bf16 have
            errors of 0.2%.
        trained_with_context: whether training gave some residues to the network as context, which is never masked
            (`PackedBatch.context`). If so, the masked fraction from which sigma is computed does not count context
            residues (see `sigma_of_masks`).

    Raises:
        ValueError: an unknown parametrisation, or time_conditioning=False where it is not valid.
    """

    model: Network
    graph: Graph
    noise: Noise
    parametrisation: str
    time_conditioning: bool = True
    autocast: torch.dtype | None = None
    trained_with_context: bool = False

    def __post_init__(self) -> None:
        check_parametrisation(self.graph, self.parametrisation, self.time_conditioning)

    @property
    def estimator(self) -> str:
        """The estimator of the bound on the NLL (see likelihood.py).

        For models with the absorbing graph, x0 and no time conditioning it is `exact_count`, because the exact-count
        bound then holds for the model itself. For all other models it is `integral`.
        """
        exact = self.graph.time_free_with(self.parametrisation) and not self.time_conditioning
        return "exact_count" if exact else "integral"

    @property
    def device(self) -> torch.device:
        """The network's device, or the CPU if the network has no parameters."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def __call__(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float32[Tensor, "total V"]:
        """Return the log-scores (total, V) of a batch at noise levels sigma (n,), one per sequence."""
        sigma_T = sigma.index_select(0, batch.segment_ids)
        return self.log_score(self.logits(batch, sigma), batch.tokens, sigma_T)

    def logits(self, batch: PackedBatch, sigma: Float32[Tensor, " n"]) -> Float32[Tensor, "total V"]:
        """Return the network's logits as float32. Without time conditioning the network always receives sigma = 0."""
        network_sigma = sigma if self.time_conditioning else torch.zeros_like(sigma)
        with torch.autocast(sigma.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(batch, network_sigma).float()

    def x0_log_probs(self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma) -> Float[Tensor, "T V"]:
        """Return log q. q is the distribution of x0 at each position, given the tokens of x_t at all other positions.

        With the parametrisation x0 or the absorbing graph, q is the softmax of the logits. With log_score and a graph
        without a mask, q is the distribution that the log-scores imply (`Graph.x0_probs`). The absorbing graph has no
        loss at unmasked positions, so training does not fit q there.
        """
        if self.parametrisation == "x0" or self.graph.masks:
            return logits.log_softmax(-1)
        log_score = self.graph.log_score(logits, xt, sigma)
        return self.graph.x0_probs(log_score, xt, sigma).clamp(min=MIN_PROBABILITY).log()

    def log_score(
        self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, steer: Steer | None = None
    ) -> Float[Tensor, "T V"]:
        """Convert logits to log-scores, in the precision of the logits. `steer` changes the distribution q of x0.

        With the parametrisation x0, q is the softmax of the logits. With the parametrisation log_score, q is the
        distribution that the network's log-scores imply. Computing this q undoes all the noise, which amplifies errors.
        For log_score with `steer`, the result is therefore not the log-scores of the steered q, but the network's
        log-scores plus a difference: the log-scores of q after steering minus the log-scores of q before steering. A
        small change of q then causes only a small change of the scores.
        """
        if self.parametrisation == "x0":
            log_q = logits if steer is None else steer(logits.log_softmax(-1))
            return self.graph.log_score_from_x0(log_q, xt, sigma)
        log_score = self.graph.log_score(logits, xt, sigma)
        if steer is None:
            return log_score
        log_q = self.graph.x0_probs(log_score, xt, sigma).clamp(min=MIN_PROBABILITY).log()
        before, after = (self.graph.log_score_from_x0(q, xt, sigma) for q in (log_q, steer(log_q)))
        return log_score + (after - before)

    def reverse_probs(
        self, logits: Float[Tensor, "T V"], xt: Tokens, sigma: Sigma, sigma_next: Sigma, steer: Steer | None = None
    ) -> Float64[Tensor, "T S"]:
        """Return the probabilities (T, S) of each token's state after a step from total noise `sigma` to `sigma_next`.

        With the parametrisation x0 the step is the exact posterior, otherwise Tweedie's analytic step. With
        sigma_next = 0 no token stays masked. Rows are unnormalised. Entries can be negative if the network's scores are
        not those of any distribution.
        """
        if self.parametrisation == "x0":
            log_q = logits if steer is None else steer(logits.log_softmax(-1))
            return self.graph.posterior_probs(log_q, xt, sigma, sigma_next)
        log_score = self.log_score(logits, xt, sigma, steer)
        if not sigma_next.any():
            return self.graph.denoise_probs(log_score, xt, sigma)
        return self.graph.analytic_probs(log_score, xt, sigma - sigma_next)


def check_parametrisation(graph: Graph, parametrisation: str, time_conditioning: bool) -> None:
    """Raise a ValueError if the parametrisation is unknown, or if `time_conditioning` is False where it must be True.

    Only the absorbing graph with the parametrisation x0 is valid without time conditioning.
    """
    if parametrisation not in PARAMETRISATIONS:
        raise ValueError(f"unknown parametrisation {parametrisation!r}; choose from {', '.join(PARAMETRISATIONS)}")
    if not time_conditioning and not graph.time_free_with(parametrisation):
        raise ValueError(
            "time_conditioning=false is valid only with graph=absorbing and parametrisation=x0; "
            "otherwise set time_conditioning=true"
        )
