"""The processes of a run: started, met, and given the run folder."""

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
from protlig_dd.config.read import flatten, spelt
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.evaluation.report.page import write_run_page
from protlig_dd.evaluation.report.run import PAGE
from protlig_dd.model.mixers.attention import resolve_attention_backend
from protlig_dd.runs.metrics import import_wandb
from protlig_dd.system.device import missing_to_compile, resolve_compile, resolve_device, resolve_precision
from protlig_dd.system.distributed import (
    OtherRankError,
    Processes,
    RankLostError,
    acknowledge,
    busy,
    from_first,
    in_one_line,
    join_group,
    leave_group,
    leave_word,
    losses_named,
    processes_from_environment,
    together,
    words_of_others,
)
from protlig_dd.system.files import locked, redirected_to, write_atomic
from protlig_dd.system.launcher import count_devices, launch_ranks, leave_without_closing, recorded_environment
from protlig_dd.system.meeting import Meeting, meeting_of
from protlig_dd.system.output import let_output_fail
from protlig_dd.system.signals import STOPPED, Stopped, StopRequests, seconds_of
from protlig_dd.system.terminal import announce, console
from protlig_dd.training.context import Resolved, RunContext, RunFolder
from protlig_dd.training.cost import print_plan, with_data
from protlig_dd.training.resume import is_continued, move_aside, open_run_folder, seconds_left, shares_launcher

UNIREF50 = Path("data/uniref50.h5")
PATIENCE = 10.0  # seconds within which all ranks get a signal that is sent to all of them

Deadline = float | None
"""time.monotonic() at which to stop."""

TrainRank = Callable[[TrainConfig, Path, Deadline], None]


def launch(train_rank: TrainRank, config: TrainConfig, path: Path) -> None:
    """Call `train_rank` with the config, the run folder and the deadline: here, in several processes that this starts,
    or as one rank under torchrun.

    Raises:
        ValueError: packs that do not go with the number of processes; what `train_rank` raises.
        RanksFailedError: what a process that was started from here met.
        Stopped: by a signal or trainer.max_time.
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
    """How many make the run.

    Raises:
        ValueError: they cannot share the packs of a step.
    """
    processes, control = processes_from_environment(), config.trainer
    devices = processes.world_size if processes.launch is not None else count_devices(control.devices, control.device)
    if config.optim.packs_per_step % devices:
        raise ValueError(f"optim.packs_per_step={config.optim.packs_per_step} is not divisible by {devices} processes")
    return devices


def print_cost(config: TrainConfig) -> None:
    """What a run will cost, on rank 0."""
    processes, devices = processes_from_environment(), count_processes(config)
    if not processes.first:
        return
    device, config = resolve_device(config.trainer.device), with_data(config)
    store = open_data(config.data.path, processes)
    print_plan(config, store, device, resolve_precision(config.trainer.precision, device), devices)


def rank_entry(train_rank: TrainRank, config: TrainConfig, path: Path, deadline: Deadline) -> None:
    """What each process that `launch_ranks` starts runs."""
    code = 1
    let_output_fail()
    try:
        with meeting_of(processes_from_environment()):
            train_rank(config, path, deadline)
        code = 0
    except Stopped:  # the marker in the run folder tells; a launcher that passed a signal on does not wait for returns
        code = 0
        leave = threading.Timer(1, leave_without_closing, [code])
        leave.daemon = True
        leave.start()
    finally:
        atexit.register(leave_without_closing, code)


@contextlib.contextmanager
def opened_run(
    config: TrainConfig, path: Path, deadline: Deadline
) -> Iterator[tuple[TrainConfig, StoreGroup, RunContext] | None]:
    """Meet the other processes of the run, open its folder, and give the config as the folder has it, the data and the
    context of this process; None, and a message, for a run that has finished already. A failure inside is logged in the
    run folder; a stop leaves its marker there.

    Raises:
        ValueError: what is wrong with the machine, the data or the run folder, or differs between the ranks.
    """
    processes = processes_from_environment()
    resolved, device = resolve_machine(config, processes)
    with contextlib.ExitStack() as stack:
        patience = PATIENCE if processes.world_size > 1 else 0.0
        stop = stack.enter_context(StopRequests(insist=processes.launch is None, patience=patience))
        stack.callback(leave_group)
        store = open_data(config.data.path, processes)
        resolved = replace(resolved, data_path=store.name, data_fingerprint=store.fingerprint)
        meeting = meeting_of(processes)
        meeting.agree(facts_of(config, resolved), config.trainer.timeout)
        join_group(processes, device, config.trainer.timeout, meeting.store)

        def open_as_first() -> RunFolder | None:
            if not processes.first:
                return None
            if meeting.restart:
                most = config.trainer.max_restarts
                console.print(f"a process was lost: all start again ({meeting.restart}{f' of {most}' if most else ''})")
            wanted, left = as_continued(config, path, meeting, deadline)
            if wanted.run.fresh:
                move_aside(path)
            stack.enter_context(locked(path))
            return open_run_folder(path, wanted, store, resolved, meeting, left)

        try:
            stack.enter_context(losses_named(f"rank {processes.rank}"))
            with busy(f"opens {path}"):
                folder: RunFolder = from_first(together(open_as_first))
            if folder.finished is not None:
                say_finished(folder, processes)
                yield None
                return
            log = folder.path / "logs" / f"rank_{processes.rank}.log"
            if not processes.first and processes.local_rank == 0:
                told = f"rank {processes.rank} of {processes.world_size} on {meeting.host}"
                print(f"{told}: what it prints goes to {log}, the run's course to the terminal of rank 0", flush=True)
            together(lambda: None if processes.first else stack.enter_context(redirected_to(log)))
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
            # torchrun ends all ranks when one fails
            if (
                processes.first
                and (path / "config.yaml").is_file()
                and not any(" failed: " in word for word in words_of_others())
            ):
                write_atomic(path / STOPPED, json.dumps({"reason": stopped.reason, "when": stopped.when}) + "\n")
            raise


def resolve_machine(config: TrainConfig, processes: Processes) -> tuple[Resolved, torch.device]:
    """What this process computes on and in; the data are not known yet.

    Raises:
        ValueError: a device, precision or kernel that this machine does not have.
    """
    count_processes(config)
    device = resolve_device(config.trainer.device, processes.local_rank)
    if processes.world_size > 1 and device.type == "cuda" and config.trainer.device not in ("auto", "cuda"):
        raise ValueError(
            f"trainer.device={config.trainer.device} with {processes.world_size} processes: use auto or cuda"
        )
    precision = resolve_precision(config.trainer.precision, device)
    backend = resolve_attention_backend(config.model.attention_backend, device, precision, config.model.head_dim)
    compiled = resolve_compile(config.trainer.compile, device)
    if config.trainer.compile == "auto" and device.type == "cuda" and not compiled:
        announce(f"not compiled, as that needs {missing_to_compile(device)}", processes)
    if config.logger.wandb_project:
        import_wandb()
    return Resolved(str(device), precision, backend, compiled, processes.world_size, "", ""), device


def as_continued(
    config: TrainConfig, path: Path, meeting: Meeting, deadline: Deadline
) -> tuple[TrainConfig, float | None]:
    """The config without `run.fresh` where this start continues one that has made the folder, and the seconds left."""
    left, earlier = None if deadline is None else deadline - time.monotonic(), recorded_environment(path)
    if not is_continued(earlier, meeting):
        return config, left
    resume = "auto" if config.run.resume == "never" else config.run.resume
    if shares_launcher(earlier, meeting) and earlier["requeues"] == meeting.processes.requeues:
        left = seconds_left(path, earlier)
    return replace(config, run=replace(config.run, fresh=False, resume=resume)), left


def say_finished(folder: RunFolder, processes: Processes) -> None:
    """Say that there is nothing to do, and write the page if a kill has left it out."""
    if processes.first and not (folder.path / PAGE).is_file():
        write_run_page(folder.path)
    announce(
        f"{folder.path} has finished, at step {folder.finished:,}: {folder.path / PAGE}. To go on: run.resume=extend "
        f"with a larger trainer.max_steps, or another run.name with from={folder.path}",
        processes,
    )


@contextlib.contextmanager
def failures_logged(log: Path) -> Iterator[None]:
    """Append the traceback and the message of what fails inside to a file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OtherRankError, RankLostError)):
            leave_word(f"failed: {in_one_line(error)}")
            acknowledge()
        with contextlib.suppress(OSError):  # where the disk is full, the error itself is still to be told
            log.parent.mkdir(exist_ok=True)
            with log.open("a") as file:  # its last line is the whole message
                file.write(f"{traceback.format_exc()}{type(error).__name__}: {' '.join(str(error).split())}\n")
        raise


def facts_of(config: TrainConfig, resolved: Resolved) -> dict[str, Any]:
    """What all ranks of a run must have alike. A host may keep its copies of the data, and of the model that the run
    begins from, under other paths: their checksums are compared.
    """
    same = {
        key: value for key, value in flatten(spelt(config)).items() if key != "from" and not key.startswith("data.path")
    }
    found = {key: value for key, value in vars(resolved).items() if key not in ("data_path", "world_size")}
    versions = {"protlig_dd": __version__, "torch": str(torch.__version__)}
    return {**same, **found, "device": resolved.device.partition(":")[0], **versions}


def open_data(path: str | list[str], processes: Processes) -> StoreGroup:
    """The stores of `data.path`; `auto` is data/uniref50.h5 where it was prepared, else the bundled sample."""
    if path != "auto":
        return StoreGroup([SequenceStore(one) for one in (path if isinstance(path, list) else [path])])
    if UNIREF50.is_file():
        announce(f"data: {UNIREF50}", processes)
        return StoreGroup([SequenceStore(UNIREF50)])
    store = bundled_store()
    announce(f"data: the bundled sample of {len(store):,} proteins ({UNIREF50} has not been prepared)", processes)
    return StoreGroup([store])
