"""Start one process for each device of this machine.

All processes are restarted when a process is lost. If the run fails, the first failure is reported.
"""

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


def count_devices(requested: Any, device: str) -> int:
    """Return the number of processes to start on this machine.

    Args:
        requested: a number, or `auto` for one process per GPU (one process if there is no GPU).

    Raises:
        ValueError: `requested` is neither `auto` nor a number of at least 1, or it exceeds the number of GPUs.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if requested == "auto":
        return max(1, gpus)
    if not isinstance(requested, int) or isinstance(requested, bool) or requested < 1:
        raise ValueError(f"trainer.devices={requested}: must be auto or a number of at least 1")
    if gpus and requested > gpus:
        raise ValueError(f"trainer.devices={requested}, but there are {gpus} GPUs")
    return requested


class RanksFailedError(Exception):
    """A process that `launch_ranks` started has failed.

    Args:
        rank: the rank whose failure is reported.
        message: the rank's error as `ErrorType: text`, or how the process ended if it recorded no error.
        trace: the traceback of that error; empty if the process recorded none, for example because it was killed.
    """

    def __init__(self, rank: int, message: str, trace: str) -> None:
        kind, _, text = message.partition(": ")
        kind = kind.rpartition(".")[2]
        # The project raises ValueError for wrong input and for failures that it detects, such as a non-finite loss or a
        # lost rank. A full or read-only disk raises OSError. Any other error is a bug.
        self.foreseen = kind in class_names(ValueError) | class_names(OSError)
        self.trace = trace
        shown = text if self.foreseen else message
        super().__init__(shown if f"rank {rank}" in shown else f"rank {rank}: {shown}")


def class_names(kind: type[Exception]) -> set[str]:
    """Return the names of an exception class and of all its subclasses."""
    return {kind.__name__}.union(*map(class_names, kind.__subclasses__()))


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
    """Start processes on this machine with torch's elastic launcher, and run `entry(*arguments)` in each of them.

    Args:
        max_restarts: maximum number of times that all processes are restarted after a process has failed or was killed.
        stop_within: seconds that the processes have to exit after the launcher has forwarded a signal to them. After
            this time, the launcher kills the remaining processes with SIGKILL.
        timeout: seconds that the launcher waits for an answer from torch's rendezvous store. If it is below 60, the
            launcher waits 60 seconds.
        run_folder: the run's folder. When rank 0 opens the run, it writes environment.json there. If the run is stopped
            on request, rank 0 writes stopped.json (the constant STOPPED) there.

    Raises:
        RanksFailedError: a process failed.
        ValueError: a signal requested a stop, but the processes did not stop in time and were killed.
        Stopped: a signal or the time limit stopped the run.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):  # each logger has its own level
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # A store that outlives a restart would give the new processes the addresses of the dead ones.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # the processes share the cores
        variables["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"read_timeout": max(60, timeout)},  # torchrun's default is 60
        local_addr="localhost",  # the host name may not resolve, and processes on one machine do not need it
        max_restarts=max_restarts,
        start_method="spawn",
        shutdown_timeout=stop_within,
        signals_to_handle=",".join(number.name for number in handled_signals()),
        logs_specs=DefaultLogsSpecs(),
    )
    environment, log = run_folder / "environment.json", run_folder / "logs" / "rank_0.log"
    # The launcher replaces these handlers and does not restore them.
    handlers = {number: signal.getsignal(number) for number in handled_signals()}
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
            if log.is_file() and log.stat().st_mtime >= environment.stat().st_mtime:  # written by this attempt
                text = log.read_text()  # rank 0 logs the error that ended it
                raise RanksFailedError(0, text.strip().splitlines()[-1], text) from error
            raise ValueError(
                f"{run_folder}: the step was not finished within trainer.stop_within={stop_within} s of {name}, "
                "so the processes were killed; the same command resumes from the last checkpoint"
            ) from error
    except ChildFailedError as error:
        # if one rank fails, the launcher stops the other ranks, and rank 0 may then have written stopped.json
        (run_folder / STOPPED).unlink(missing_ok=True)
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
    """Start multiprocessing's resource tracker with SIGHUP ignored, so that it survives when the terminal is closed."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, earlier)


def recorded_environment(run_folder: Path) -> dict[str, Any]:
    """Return the environment.json of the last attempt that opened the folder; {} if it is missing or unreadable."""
    try:
        return dict(json.loads((run_folder / "environment.json").read_text()))
    except (OSError, ValueError):  # the error is reported when the run is resumed
        return {}


def first_failure(failures: dict[int, Any]) -> RanksFailedError:
    """Return the failure to report: that of a killed rank if there is one, else the earliest failure.

    If a rank is killed, the other ranks fail as a consequence. An error that only repeats another rank's error is
    reported only if there is no other error.
    """

    def priority(item: tuple[int, Any]) -> tuple[bool, bool, int]:
        failure = item[1]
        message = failure.message["message"] if isinstance(failure.message, dict) else ""
        return failure.exitcode != -signal.SIGKILL, OtherRankError.__name__ in message, failure.timestamp

    rank, failure = min(failures.items(), key=priority)
    if isinstance(failure.message, dict):  # the rank has recorded its exception
        return RanksFailedError(rank, failure.message["message"], failure.message["extraInfo"]["py_callstack"])
    killed = (
        f"killed by {failure.signal_name()}, perhaps because memory ran out; "
        "the same command resumes from the last checkpoint"
    )
    return RanksFailedError(rank, killed if failure.exitcode < 0 else failure.message, "")


def exit_without_cleanup(code: int) -> NoReturn:
    """Flush stdout and stderr, and end this process without closing the interpreter.

    A thread of the process group may still have a tensor to release. If the thread releases the tensor while the
    interpreter closes, the process aborts.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
