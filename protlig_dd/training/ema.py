"""Exponential moving average of the weights, by parameter name."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from protlig_dd.runs.checkpoint import trained_parameters

HORIZON = 0.05  # fraction of the run that the average covers with ema_decay=auto


def resolve_decay(configured: float | str, max_steps: int) -> float:
    """Return the configured decay. For `auto`, return the decay that averages over HORIZON * max_steps steps."""
    return 1 - 1 / max(1.0, HORIZON * max_steps) if configured == "auto" else float(configured)


class EMA:
    """Moving average of the trained parameters, updated after every step.

    weights <- decay * weights + (1 - decay) * parameters.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that the initial weights do not dominate the average
    of a short run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor]
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        """Start the average from the current parameters."""
        self.weights = {name: p.detach().clone() for name, p in trained_parameters(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the parameters after step `step` (counted from 1) to the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [parameters[name] for name in self.weights], 1 - decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Exchange the trained parameters for their averages inside this context, without copying them."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, parameter in trained_parameters(model).items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
