"""One process for each device of this machine: started, started again when one is lost, and who failed first."""

import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import torch

from protlig_dd.system.distributed import OtherRankError
from protlig_dd.system.signals import STOPPED, Stopped, handled_signals


def count_devices(wanted: Any, device: str) -> int:
    """Processes to start on this machine: a number, or `auto`, which is one for each GPU (without any: 1).

    Raises:
        ValueError: no such number, or more than there are GPUs.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if wanted == "auto":
        return max(1, gpus)
    if not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"trainer.devices={wanted}: give a number from 1 on, or auto")
    if gpus and wanted > gpus:
        raise ValueError(f"trainer.devices={wanted}, but there are {gpus} GPUs")
    return wanted


class RanksFailedError(Exception):
    """A process that was started from here failed.

    Args:
        rank: the first one that did.
        message: its error, as `ErrorType: text`.
        trace: its traceback; empty where it was killed.
    """

    def __init__(self, rank: int, message: str, trace: str) -> None:
        kind, _, text = message.partition(": ")
        kind = kind.rpartition(".")[2]
        # what is wrong with the user's input, or ends runs, is a ValueError; full and read-only disks are OSErrors
        self.foreseen = kind in names_of(ValueError) | names_of(OSError)
        self.trace = trace
        told = text if self.foreseen else message
        super().__init__(told if f"rank {rank}" in told else f"rank {rank}: {told}")


def names_of(kind: type[Exception]) -> set[str]:
    """An exception's name and those of its descendants."""
    return {kind.__name__}.union(*map(names_of, kind.__subclasses__()))


def launch_ranks(
    entry: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    processes: int,
    max_restarts: int,
    stop_within: int,
    timeout: int,
    run_folder: Path,
) -> None:
    """Run `entry(*arguments)` in several processes on this machine, through torch's elastic launcher.

    Args:
        max_restarts: times that all of them are started again when one fails or is killed.
        stop_within: seconds between a signal that is passed on to them and SIGKILL.
        timeout: seconds that the launcher waits for an answer of its own store.
        run_folder: where rank 0 leaves environment.json once it is open, and STOPPED when it was asked to stop.

    Raises:
        RanksFailedError: one of them failed.
        ValueError: they were asked to stop, and had to be killed.
        Stopped: they were asked to stop, and did.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # A store that outlives a restart would hand the new processes the addresses of the dead ones.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # they share the cores
        variables["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"read_timeout": max(60, timeout)},  # torchrun's own is 60
        local_addr="localhost",  # processes of one machine need no name of it, which may not resolve
        max_restarts=max_restarts,
        start_method="spawn",
        shutdown_timeout=stop_within,
        signals_to_handle=",".join(number.name for number in handled_signals()),
        logs_specs=DefaultLogsSpecs(),
    )
    environment, log = run_folder / "environment.json", run_folder / "logs" / "rank_0.log"
    handlers = {number: signal.getsignal(number) for number in handled_signals()}  # the launcher leaves its own
    start_resource_tracker()
    earlier = os.environ.copy()
    os.environ.update(variables)
    try:
        elastic_launch(config, entry)(*arguments)
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        if recorded_environment(run_folder).get("launch") != config.run_id:
            raise Stopped(name) from error
        if not (run_folder / STOPPED).is_file():
            if log.is_file() and log.stat().st_mtime >= environment.stat().st_mtime:  # not of an earlier start
                text = log.read_text()  # rank 0 writes there what ended it
                raise RanksFailedError(0, text.strip().splitlines()[-1], text) from error
            raise ValueError(
                f"{run_folder}: the step was not finished within trainer.stop_within={stop_within} s of {name}; "
                "its processes were killed, and the run goes on from its last checkpoint"
            ) from error
    except ChildFailedError as error:
        (run_folder / STOPPED).unlink(missing_ok=True)  # of ranks that were ended for another's sake
        raise first_failure(error.failures) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in variables:
            os.environ.pop(name)
        os.environ.update(earlier)
    if recorded_environment(run_folder).get("launch") == config.run_id and (run_folder / STOPPED).is_file():
        raise Stopped(**json.loads((run_folder / STOPPED).read_text()))


def start_resource_tracker() -> None:
    """multiprocessing's own process, which a terminal's SIGHUP would end as any other's: now, with that ignored."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, earlier)


def recorded_environment(run_folder: Path) -> dict[str, Any]:
    """environment.json of the start that opened the folder last; {} where there was none, or it cannot be read."""
    try:
        return dict(json.loads((run_folder / "environment.json").read_text()))
    except (OSError, ValueError):  # who goes on with the run says so
        return {}


def first_failure(failures: dict[int, Any]) -> RanksFailedError:
    """What to report of several: who was killed, as the others fail for lack of it; else who failed first, of those
    that met something themselves.
    """

    def blame(item: tuple[int, Any]) -> tuple[bool, bool, int]:
        failure = item[1]
        told = failure.message["message"] if isinstance(failure.message, dict) else ""
        return failure.exitcode != -signal.SIGKILL, OtherRankError.__name__ in told, failure.timestamp

    rank, failure = min(failures.items(), key=blame)
    if isinstance(failure.message, dict):  # it wrote its exception down
        return RanksFailedError(rank, failure.message["message"], failure.message["extraInfo"]["py_callstack"])
    killed = f"ended by {failure.signal_name()}, for memory perhaps; the same command goes on from the last checkpoint"
    return RanksFailedError(rank, killed if failure.exitcode < 0 else failure.message, "")


def leave_without_closing(code: int) -> NoReturn:
    """End this process. A thread of the process group may still be letting go of its last tensor, and one that meets a
    closing interpreter aborts the process; so the interpreter is not closed. Everything is written by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
