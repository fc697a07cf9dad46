"""Errors that end a run early. Their messages name the step, the rank or pack, and the sequences."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence, Set
from typing import Any

from protlig_dd.data.loader import PackDataset
from protlig_dd.system.distributed import gather_objects, host_name, lost_ranks_named
from protlig_dd.training.trainer import Trainer

SIGNAL_DELAY = 2.0  # seconds that a rank waits for a signal that another host may have received already


class NonFiniteLossError(ValueError):
    """The loss or the gradient of a step is not finite. This step and all later steps did not change the weights."""


class LossSpikeError(ValueError):
    """The loss of a step is far above its running mean. This step and all later steps did not change the weights."""


class LoaderDiedError(ValueError):
    """A process that loads packs died, for example because it was killed for lack of memory."""


def describe_stopped_hosts(reason: str, received: Set[str]) -> str:
    """Return a text that names the hosts on which a rank received the signal to stop.

    The text is "" if every host has such a rank, or if no host has one. A signal reaches the hosts of a job at
    slightly different times, so a rank that has not received it yet waits up to SIGNAL_DELAY seconds for it.

    Args:
        reason: name of the signal.
        received: names of the signals that this rank has received; the signal's handler adds to it during the wait.
    """
    deadline = time.monotonic() + SIGNAL_DELAY
    while reason not in received and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks = gather_objects((host_name(), reason in received))
    hosts, stopped = {host for host, _ in ranks}, {host for host, signalled in ranks if signalled}
    if not stopped or stopped == hosts:
        return ""
    return (  # scripts/slurm and scripts/pbs search stopped.json for "only .* was told"
        f"; only {', '.join(sorted(stopped))} was told to stop: torchrun was stopped there, or lost contact; torchrun "
        "on the other hosts may wait five minutes before it ends"
    )


@contextlib.contextmanager
def explain_lost_processes(trainer: Trainer) -> Iterator[None]:
    """Replace torch's error about a lost loader process or a lost rank by an error with a message of one line.

    Raises:
        LoaderDiedError: a loader process died. The message names the step, this rank and the sequences in its packs.
        RankLostError: another rank is gone or does not answer. The message names the step and this rank.
        RuntimeError: any other RuntimeError is raised unchanged.
    """
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
                f"{where}: a loader process died, perhaps killed for lack of memory ({' '.join(str(error).split())}); "
                f"the step needs sequences {ids}"
            ) from error
        with lost_ranks_named(where):
            raise


def ids_of_packs(dataset: PackDataset, packs: Sequence[int]) -> list[str]:
    return [dataset.group.id(row) for pack in packs for row in dataset.pack_rows(pack)]


def raise_bad_step(trainer: Trainer, pending: list[dict[str, Any]]) -> None:
    """Raise an error if there is a bad step among the steps since metrics were last written.

    A step is bad if its loss or gradient is not finite, or if its loss exceeds trainer.loss_spike times the running
    mean of the loss. The error is about the first bad step.

    Args:
        pending: the records of these steps.

    Raises:
        NonFiniteLossError, LossSpikeError: there is a bad step.
    """
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
        after = f"sequences {', '.join(ids)}; the weights are those from before this step"
        limit = trainer.config.trainer.loss_spike
        if bad or limit is None or not math.isfinite(float(record["grad_norm"])):
            raise NonFiniteLossError(f"non-finite {'loss' if bad else 'gradient'} {where}; {after}")
        raise LossSpikeError(
            f"loss {sum(losses):.4g} {where} is more than trainer.loss_spike={limit} times the running "
            f"mean {float(trainer.usual_loss):.4g}; {after}"
        )
