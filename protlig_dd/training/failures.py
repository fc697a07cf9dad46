"""What ends a run early, named by step, rank and sequences."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from protlig_dd.data.loader import PackDataset
from protlig_dd.system.distributed import gather_objects, host_name, losses_named
from protlig_dd.training.trainer import Trainer


class NonFiniteLossError(ValueError):
    """The loss or the gradient stopped being a number; the weights were frozen before that step."""


class LossSpikeError(ValueError):
    """The loss rose far above its running mean; the weights were frozen before that step."""


class LoaderDiedError(ValueError):
    """A process that loads packs is gone: killed for memory, say."""


def hosts_stopped(told: bool) -> str:
    """Which hosts were told to stop, where others were not."""
    ranks = gather_objects((host_name(), told))
    every, some = {host for host, _ in ranks}, {host for host, told in ranks if told}
    if not some or some == every:
        return ""
    told_ones = ", ".join(sorted(some))
    return (
        f"; only {told_ones} was told: torchrun there was stopped, or lost the other hosts, whose own may wait five "
        "minutes for it"
    )


@contextlib.contextmanager
def named_losses(trainer: Trainer) -> Iterator[None]:
    """Turn what torch says of a lost loader process or rank into one line that names step, rank and sequences."""
    try:
        yield
    except RuntimeError as error:
        step = trainer.current_step
        where = f"step {step + 1}, rank {trainer.processes.rank}"
        if "DataLoader worker" in str(error) and "Original Traceback" not in str(error):
            first = step * trainer.packs_per_step
            mine = range(trainer.processes.rank, trainer.packs_per_step, trainer.processes.world_size)
            ids = ", ".join(ids_of_packs(trainer.dataset, [first + pack for pack in mine]))
            raise LoaderDiedError(
                f"{where}: a loader process is gone, killed for memory perhaps ({' '.join(str(error).split())}); "
                f"wanted were sequences {ids}"
            ) from error
        with losses_named(where):
            raise


def ids_of_packs(dataset: PackDataset, packs: Sequence[int]) -> list[str]:
    return [dataset.group.id(row) for pack in packs for row in dataset.pack_rows(pack)]


def raise_frozen(trainer: Trainer, pending: list[dict[str, Any]]) -> None:
    """Raise for the first step since the last flush whose update was left out, as its loss or gradients were not finite
    or its loss had jumped."""
    for record in pending:
        if not record["bad"].item():
            continue
        losses = record["pack_loss"].tolist()
        bad = [pack for pack, loss in enumerate(losses) if not math.isfinite(loss)]
        first = (record["step"] - 1) * trainer.packs_per_step
        ids = ids_of_packs(trainer.dataset, [first + pack for pack in bad or range(trainer.packs_per_step)])
        where = (
            f"in step {record['step']}, pack {', '.join(str(p) for p in bad) or 'unknown'} of {trainer.packs_per_step}"
        )
        after = f"sequences {', '.join(ids)}; the weights are those before that step"
        limit = trainer.config.trainer.loss_spike
        if bad or limit is None or not math.isfinite(float(record["grad_norm"])):
            raise NonFiniteLossError(f"non-finite {'loss' if bad else 'gradient'} {where}; {after}")
        raise LossSpikeError(
            f"loss {sum(losses):.4g} {where} is more than trainer.loss_spike={limit} times the usual "
            f"{float(trainer.usual_loss):.4g}; {after}"
        )
