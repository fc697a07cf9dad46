"""The Muon optimizer for the matrices of the blocks."""

import math
from collections.abc import Mapping
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Coefficients a, b, c of the polynomial a x + b x^3 + c x^5 that is applied repeatedly to each singular value x. They
# have the steepest slope at zero for which the results end between 0.7 and 1.2 (kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAMW_RMS = 0.2  # usual RMS of AdamW updates; Muon's updates are scaled to it (arXiv 2502.16982, section 2.2)


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalised update matrices (kellerjordan.github.io/posts/muon, arXiv 2502.16982).

    The update is that of torch.optim.Muon with adjust_lr_fn="match_rms_adamw", with three differences: matrices of the
    same shape are processed together, matrices that are stacked in one parameter (such as a fused qkv) are
    orthogonalised separately, and a step changes no weight if the flag `found_inf` is 1.

    Args:
        hidden: maps each parameter that Muon updates to the number of matrices stacked along its rows.
        adamw: optimizer of the other parameters. Its parameter groups become groups of this optimizer too.
        dtype: precision of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        hidden: Mapping[nn.Parameter, int],
        adamw: torch.optim.AdamW,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__([{"params": list(hidden)}], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.adamw, self.dtype, self.stacked = adamw, dtype, dict(hidden)
        self.param_groups += adamw.param_groups
        adamw.state = self.state  # the two optimizers share one dictionary of states, keyed by parameter

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients. If `found_inf` is 1, change no parameter."""
        frozen = getattr(self, "found_inf", None)
        self.adamw.found_inf = frozen  # type: ignore[attr-defined]
        self.adamw.step()
        group = self.param_groups[0]
        weights = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in weights]
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov momentum
        pairs = [pair for stack in zip(weights, updates, strict=True) for pair in self.unstack(*stack)]
        for shape, alike in groupby(sorted(pairs, key=lambda pair: pair[0].shape), key=lambda pair: pair[0].shape):
            old, new = zip(*alike, strict=True)
            update = orthogonalise(torch.stack(new), self.dtype) * (ADAMW_RMS * math.sqrt(max(shape)))
            if group["weight_decay"]:
                update += group["weight_decay"] * torch.stack(old)
            if frozen is not None:
                update = torch.where(frozen > 0, 0.0, update)
            torch._foreach_add_(list(old), list(update.unbind()), alpha=-group["lr"])

    def unstack(self, weight: nn.Parameter, update: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return a pair (weight, update) for each matrix that is stacked in this weight."""
        stacked = self.stacked[weight]
        return list(zip(weight.chunk(stacked), update.chunk(stacked), strict=True))


def orthogonalise(matrices: Float[Tensor, "n rows columns"], dtype: torch.dtype) -> Float[Tensor, "n rows columns"]:
    """Return approximately U V^T for each matrix with the singular value decomposition U S V^T, as float32.

    The singular values of the result are between 0.7 and 1.2.

    Args:
        dtype: precision of the computation.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()
