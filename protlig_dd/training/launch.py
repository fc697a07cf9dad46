"""Start the processes of a run, connect them and open the run folder."""

import atexit
import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from protlig_dd import __version__
from protlig_dd.config.read import as_dict
from protlig_dd.config.train import DataConfig, TrainConfig, all_settings
from protlig_dd.data.context import check_designed
from protlig_dd.data.members import ClusterGroup, Members
from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.report.page import write_run_page
from protlig_dd.evaluation.report.run import PAGE
from protlig_dd.model.mixers.attention import check_backend
from protlig_dd.system.device import resolve_device, resolve_precision
from protlig_dd.system.distributed import (
    OtherRankError,
    Processes,
    RankLostError,
    acknowledge,
    broadcast_from_first,
    busy,
    in_one_line,
    join_group,
    leave_group,
    lost_ranks_named,
    post_status,
    processes_from_environment,
    run_on_all_ranks,
    statuses_of_others,
)
from protlig_dd.system.files import locked, redirected_to, write_atomic
from protlig_dd.system.launcher import count_devices, exit_without_cleanup, launch_ranks, recorded_environment
from protlig_dd.system.meeting import Meeting, meeting_of
from protlig_dd.system.output import tolerate_output_errors
from protlig_dd.system.signals import STOPPED, Stopped, StopRequests, seconds_of
from protlig_dd.system.terminal import announce, console
from protlig_dd.training.context import Resolved, RunContext, RunFolder
from protlig_dd.training.cost import print_plan, with_available_data
from protlig_dd.training.machine import compiles_on_cpu, resolve_machine
from protlig_dd.training.resume import is_continued, move_aside, open_run_folder, seconds_left, shares_launcher

UNIREF50 = Path("data/uniref50.h5")
PATIENCE = 10.0  # seconds within which a signal that is sent to all ranks reaches each of them

Deadline = float | None
"""Value of time.monotonic() at which the run stops; None for no limit."""

TrainRank = Callable[[TrainConfig, Path, Deadline], None]


def launch(train_rank: TrainRank, config: TrainConfig, path: Path) -> None:
    """Call `train_rank` with the config, the run folder and the deadline.

    If torchrun started this process, or if one process is enough and restarts are off, this process makes the call.
    Otherwise this function starts processes, and each of them makes the call.

    Raises:
        ValueError: optim.packs_per_step is not divisible by the number of processes, or `train_rank` raised this error.
        RanksFailedError: a process started by this function has failed.
        Stopped: a signal or trainer.max_time stopped the run.
    """
    seconds = None if config.trainer.max_time is None else seconds_of(config.trainer.max_time)
    deadline = None if seconds is None else time.monotonic() + seconds
    devices = count_processes(config)
    if processes_from_environment().launch is not None or (devices == 1 and not config.trainer.max_restarts):
        train_rank(config, path, deadline)
        return
    launch_ranks(
        rank_entry,
        (train_rank, config, path, deadline),
        processes=devices,
        max_restarts=config.trainer.max_restarts,
        stop_within=config.trainer.stop_within,
        timeout=config.trainer.timeout,
        run_folder=path,
    )


def count_processes(config: TrainConfig) -> int:
    """Return the number of processes of the run.

    Raises:
        ValueError: optim.packs_per_step is not divisible by this number.
    """
    processes, control = processes_from_environment(), config.trainer
    devices = processes.world_size if processes.launch is not None else count_devices(control.devices, control.device)
    if config.optim.packs_per_step % devices:
        raise ValueError(f"optim.packs_per_step={config.optim.packs_per_step} is not divisible by {devices} processes")
    return devices


def print_cost(config: TrainConfig) -> None:
    """On rank 0, print the estimated FLOPs, memory and time of a run.

    Raises:
        ValueError: the chosen attention backend is unknown, or cannot compute this network on any machine.
    """
    processes, devices = processes_from_environment(), count_processes(config)
    if not processes.first:
        return
    check_backend(config.model.attention_backend, config.model.head_dim, config.model.positions)
    device, available = resolve_device(config.trainer.device), with_available_data(config)
    store, precision = open_data(available.data, processes), resolve_precision(config.trainer.precision, device)
    print_plan(available, store, device, precision, devices, own_data=available is config)


def rank_entry(train_rank: TrainRank, config: TrainConfig, path: Path, deadline: Deadline) -> None:
    """Call `train_rank` in a process that `launch_ranks` started."""
    code = 1
    tolerate_output_errors()
    try:
        with meeting_of(processes_from_environment()):
            train_rank(config, path, deadline)
        code = 0
    except Stopped:  # not a failure: stopped.json in the run folder records the stop
        # Torch would wait until the launcher has read the return value, but a launcher that has forwarded a signal
        # never reads it. So this process exits after at most one second.
        code = 0
        leave = threading.Timer(1, exit_without_cleanup, [code])
        leave.daemon = True
        leave.start()
    finally:
        atexit.register(exit_without_cleanup, code)


@contextlib.contextmanager
def opened_run(
    config: TrainConfig, path: Path, deadline: Deadline
) -> Iterator[tuple[TrainConfig, StoreGroup, RunContext] | None]:
    """Connect to the other processes of the run and open the run folder.

    Yields the config as recorded in the folder, the data, and the context of this process. If the run has already
    finished, prints a message and yields None. Inside the `with` block, an error is logged in the run folder, and a
    request to stop the run writes stopped.json.

    Raises:
        ValueError: a problem with the machine, the data or the run folder, or a difference between the ranks.
    """
    processes = processes_from_environment()
    count_processes(config)
    resolved, device = resolve_machine(config, processes)
    with contextlib.ExitStack() as stack:
        patience = PATIENCE if processes.world_size > 1 else 0.0
        insist = processes.launch is None
        notice = "finishing the steps that have begun, then writing a checkpoint"
        notice += "; Ctrl-C again stops at once, without a checkpoint" if insist else ""
        stop = StopRequests(insist=insist, notice=notice if processes.first else None, patience=patience)
        stack.enter_context(stop)
        stack.callback(leave_group)
        store = open_data(config.data, processes)
        resolved = replace(resolved, data_path=store.name, data_fingerprint=store.fingerprint)
        if isinstance(store, ClusterGroup):
            members = store.members
            resolved = replace(resolved, members_path=str(members.path), members_fingerprint=members.fingerprint)
        if config.trainer.compile == "auto" and device.type == "cpu":
            resolved = replace(resolved, compiled=compiles_on_cpu(config, path, store, processes))
        meeting = meeting_of(processes)
        meeting.agree(facts_to_compare(config, resolved), config.trainer.timeout)
        join_group(processes, device, config.trainer.timeout, meeting.store)

        def open_on_first_rank() -> RunFolder | None:
            if not processes.first:
                return None
            if meeting.restart:
                max_restarts = config.trainer.max_restarts
                count = f"{meeting.restart} of {max_restarts}" if max_restarts else f"{meeting.restart}"
                console.print(f"a process was lost: restarting all processes (restart {count})")
            adapted, left = config_and_time_left(config, path, meeting, deadline)
            if adapted.run.fresh:
                move_aside(path)
            stack.enter_context(locked(path))
            return open_run_folder(path, adapted, store, resolved, meeting, left)

        try:
            stack.enter_context(lost_ranks_named(f"rank {processes.rank}"))
            with busy(f"opens the run folder {path}"):
                folder: RunFolder = broadcast_from_first(run_on_all_ranks(open_on_first_rank))
            if folder.finished is not None:
                announce_finished(folder, processes)
                yield None
                return
            log = folder.path / "logs" / f"rank_{processes.rank}.log"
            if not processes.first and processes.local_rank == 0:
                name = f"rank {processes.rank} of {processes.world_size} on {meeting.host}"
                print(f"{name} writes its output to {log}; rank 0 prints the progress of the run", flush=True)
            run_on_all_ranks(lambda: None if processes.first else stack.enter_context(redirected_to(log)))
            left = folder.seconds_left
            context = RunContext(
                folder=folder.path,
                attempt=folder.attempt,
                start=folder.start,
                device=device,
                precision=resolved.precision,
                attention_backend=resolved.attention_backend,
                compiled=resolved.compiled,
                processes=processes,
                stop=stop,
                deadline=None if left is None else time.monotonic() + left,
            )
            with failures_logged(log):
                yield folder.config, store, context
        except Stopped as stopped:
            # when one rank fails, torchrun stops all ranks; then the run has failed and gets no stopped.json
            if (
                processes.first
                and (path / "config.yaml").is_file()
                and not any(" failed: " in word for word in statuses_of_others())
            ):
                write_atomic(path / STOPPED, json.dumps({"reason": stopped.reason, "when": stopped.when}) + "\n")
            raise


def config_and_time_left(
    config: TrainConfig, path: Path, meeting: Meeting, deadline: Deadline
) -> tuple[TrainConfig, float | None]:
    """Return the config for this launch, and the seconds left until trainer.max_time (None for no limit).

    If this launch continues an earlier launch in the same folder, it must neither move the run aside nor reject it.
    `run.fresh` is then false, and `run.resume=never` becomes `auto`. A restart by the same launcher has only the time
    that is left of the earlier launch's time limit.
    """
    left, earlier = None if deadline is None else deadline - time.monotonic(), recorded_environment(path)
    if not is_continued(earlier, meeting):
        return config, left
    resume = "auto" if config.run.resume == "never" else config.run.resume
    if shares_launcher(earlier, meeting) and earlier["requeues"] == meeting.processes.requeues:
        left = seconds_left(path, earlier)
    return replace(config, run=replace(config.run, fresh=False, resume=resume)), left


def announce_finished(folder: RunFolder, processes: Processes) -> None:
    """Print that the run has already finished. Write its report page if the page is missing, as after a kill."""
    if processes.first and not (folder.path / PAGE).is_file():
        write_run_page(folder.path)
    announce(
        f"{folder.path} has already finished at step {folder.finished:,}; its report is {folder.path / PAGE}. "
        "To train longer, set run.resume=extend and a larger trainer.max_steps; "
        f"to fine-tune it, set another run.name and from={folder.path}",
        processes,
    )


@contextlib.contextmanager
def failures_logged(log: Path) -> Iterator[None]:
    """If an error is raised inside this context, append its traceback and message to a log file.

    Unless the error is about another rank, its message is also posted for the other ranks.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OtherRankError, RankLostError)):
            post_status(f"failed: {in_one_line(error)}")
            acknowledge()
        with contextlib.suppress(OSError):  # if the disk is full, still raise the error itself
            log.parent.mkdir(exist_ok=True)
            with log.open("a") as file:  # `launch_ranks` reads the whole message from the last line
                file.write(f"{traceback.format_exc()}{type(error).__name__}: {' '.join(str(error).split())}\n")
        raise


def facts_to_compare(config: TrainConfig, resolved: Resolved) -> dict[str, Any]:
    """Return the settings and versions that must be the same on all ranks of a run, by name.

    The paths of the data and of the source model (`from=`) may differ between hosts. The checksums of the data and the
    model are compared instead.
    """
    settings = {
        key: value
        for key, value in all_settings(as_dict(config)).items()
        if key not in ("from", "data.members") and not key.startswith("data.path")
    }
    own = ("data_path", "members_path", "world_size")
    machine = {key: value for key, value in vars(resolved).items() if key not in own}
    versions = {"protlig_dd": __version__, "torch": str(torch.__version__)}
    return {**settings, **machine, "device": resolved.device.partition(":")[0], **versions}


def open_data(data: DataConfig, processes: Processes) -> StoreGroup:
    """Open the stores of `data.path`. `auto` is data/uniref50.h5 if it exists, else the bundled sample.

    Returns:
        With `data.members`, a ClusterGroup.

    Raises:
        ValueError: a store or the file of members cannot be read, the file was written for other stores, a store does
            not keep the letter case that `data.context` needs, or one of its records has only context residues.
    """
    path = data.path
    if path != "auto":
        stores = [SequenceStore(file) for file in (path if isinstance(path, list) else [path])]
    elif UNIREF50.is_file():
        announce(f"data: {UNIREF50}", processes)
        stores = [SequenceStore(UNIREF50)]
    else:
        stores = [bundled_store()]
        count = f"{len(stores[0]):,} proteins"
        announce(f"data: the bundled sample of {count} ({UNIREF50} has not been prepared)", processes)
    if data.members is None:
        group = StoreGroup(stores, data.context)
        check_designed(group)
        return group
    clusters = ClusterGroup(stores[0], Members(data.members), data.context)
    check_designed(clusters.joint)
    return clusters
