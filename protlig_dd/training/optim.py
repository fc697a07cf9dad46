"""The optimizers and the learning-rate schedules."""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # kellerjordan.github.io/posts/muon: steepest at zero, ends within 0.7 .. 1.2
NEWTON_SCHULZ_STEPS = 5
ADAMW_RMS = 0.2  # of AdamW's usual update, which Muon's is scaled to (arXiv 2502.16982, section 2.2)


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    momentum: float = 0.95,
    precision: str = "fp32",
) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon for the matrices of the blocks with AdamW for the rest.

    Weight decay acts on matrices only, not on norms, biases or the embedding. The step reads `optimizer.found_inf`:
    where that device flag is 1, it changes no weight. The trainer uses this to freeze the weights at the first
    non-finite loss without waiting for the device.

    Args:
        momentum: Muon's.
        precision: bf16 | fp32, in which Muon orthogonalises.

    Raises:
        ValueError: a name that is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optim.name={name}; there are {', '.join(OPTIMIZERS)}")
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not parameter_name.startswith("embedding.")
        in_block = parameter_name.startswith("blocks.") and ".adaln." not in parameter_name
        (hidden if matrix and in_block and name == "muon" else decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "adamw":
        return adamw
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(hidden, adamw, lr=lr, weight_decay=weight_decay, momentum=momentum, dtype=dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is orthogonalised before it is added (kellerjordan.github.io/posts/muon, arXiv 2502.16982).

    The update is torch.optim.Muon's with adjust_lr_fn="match_rms_adamw", but that matrices of one shape are taken
    together, that those stacked in a fused qkv are orthogonalised one by one, and that it can be frozen.

    Args:
        hidden: matrices; one of (3 h, h) is three of (h, h).
        adamw: for the other parameters; its groups are this optimizer's too.
        dtype: of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        hidden: Sequence[nn.Parameter],
        adamw: torch.optim.AdamW,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__([{"params": list(hidden)}], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.adamw, self.dtype = adamw, dtype
        self.param_groups += adamw.param_groups
        adamw.state = self.state  # one table, by parameter

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients of all parameters; none where `found_inf` is 1."""
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
        updates = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov's
        pieces = [piece for pair in zip(weights, updates, strict=True) for piece in self.matrices(*pair)]
        for shape, same in groupby(sorted(pieces, key=lambda pair: pair[0].shape), key=lambda pair: pair[0].shape):
            old, new = zip(*same, strict=True)
            update = orthogonal(torch.stack(new), self.dtype) * (ADAMW_RMS * math.sqrt(max(shape)))
            if group["weight_decay"]:
                update += group["weight_decay"] * torch.stack(old)
            if frozen is not None:
                update = torch.where(frozen > 0, 0.0, update)
            torch._foreach_add_(list(old), list(update.unbind()), alpha=-group["lr"])

    @staticmethod
    def matrices(weight: Tensor, update: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A weight and its update, cut into the square matrices that a fused qkv stacks."""
        stacked = 3 if weight.shape[0] == 3 * weight.shape[1] else 1
        return list(zip(weight.chunk(stacked), update.chunk(stacked), strict=True))


def orthogonal(matrices: Float[Tensor, "n rows columns"], dtype: torch.dtype) -> Float[Tensor, "n rows columns"]:
    """U V^T of each matrix U S V^T, nearly: singular values end between 0.7 and 1.2. Float32, computed in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()


def warmup_of(wanted: int, max_steps: int) -> int:
    """Steps of the warm-up: those that are wanted, or a tenth of a run that would be over by then."""
    return wanted if wanted < max_steps else max_steps // 10


def learning_rate(
    step: int,
    *,
    schedule: str,
    lr: float,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
    decay_share: float,
) -> float:
    """Linear warm-up over `warmup_steps`, then down to lr * min_lr_ratio at `max_steps`.

    Args:
        step: counted from 0; the first step of a warm-up already learns.
        schedule: `cosine` from the warm-up's end on; `wsd` (warm-up, stable, decay; arXiv 2404.06395) stays at lr until
            the last decay_share of max_steps, and falls linearly.

    Raises:
        ValueError: a schedule that is not in SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={schedule}; there are {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    start = warmup_steps if schedule == "cosine" else max(warmup_steps, round(max_steps * (1 - decay_share)))
    progress = min(1.0, max(0, step - start) / max(1, max_steps - start))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * left)
