"""Exponential moving average of the weights, by parameter name."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HORIZON = 0.05  # of `ema_decay=auto`: the steps that the average reaches back, as a share of the run


def decay_of(wanted: float | str, max_steps: int) -> float:
    """The decay that is wanted; `auto` is one whose average reaches back over HORIZON of a run of max_steps."""
    return 1 - 1 / max(1.0, HORIZON * max_steps) if wanted == "auto" else float(wanted)


class EMA:
    """weights <- decay * weights + (1 - decay) * parameters, after every step.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that a short run is not an average of its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the parameters after step `step` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [parameters[name] for name in self.weights], 1 - decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """The model computes with the averaged weights inside; no copies are made."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.data, self.weights[name] = self.weights[name], parameter.data
