"""From a composed config to a run: validate, resolve every `auto`, open the run folder, hand over to the job."""

import atexit
import contextlib
import json
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from protlig_dd import __version__
from protlig_dd.config.components import build_graph, graph_with_rates
from protlig_dd.config.read import flatten, read_config, spelt
from protlig_dd.config.train import TrainConfig, check_train_config
from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.diffusion.score import is_time_free
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
from protlig_dd.system.files import locked, write_atomic, written_to
from protlig_dd.system.launcher import count_devices, launch_ranks, leave_without_closing, opened_by
from protlig_dd.system.meeting import meeting_of
from protlig_dd.system.output import let_output_fail
from protlig_dd.system.signals import STOPPED, Stopped, StopRequests, seconds_of
from protlig_dd.system.terminal import announce, console
from protlig_dd.training.build import train
from protlig_dd.training.context import Resolved, RunFolder
from protlig_dd.training.cost import print_plan, with_data
from protlig_dd.training.finetune import starting_from
from protlig_dd.training.resume import (
    graph_of_run,
    is_continued,
    move_aside,
    open_run_folder,
    seconds_left,
    shares_launcher,
)

UNIREF50 = Path("data/uniref50.h5")
PATIENCE = 10.0  # seconds within which all ranks get a signal that is sent to all of them


def run(cfg: DictConfig) -> None:
    """Train as the config says: here, on several processes started from here, or as one rank under torchrun.

    Raises:
        ValueError: whatever is wrong with the config, the machine or the data, before any training; and what ends a
            run, such as a loss that stopped being a number.
        RanksFailedError: what a process that was started from here met.
        Stopped: by a signal or trainer.max_time.
    """
    processes = processes_from_environment()
    config = read_config(cfg, TrainConfig)
    path = run_path(config)
    if config.from_ is not None:
        config = starting_from(config, path)
    config.graph = graph_with_rates(config.graph, {} if config.run.fresh else graph_of_run(path))
    check_train_config(config)
    if config.time_conditioning == "auto":
        config.time_conditioning = not is_time_free(build_graph(config.graph), config.parametrisation)
    seconds = None if config.trainer.max_time is None else seconds_of(config.trainer.max_time)
    deadline = None if seconds is None else time.monotonic() + seconds
    launched = processes.launch is not None
    devices = processes.world_size if launched else count_devices(config.trainer.devices, config.trainer.device)
    check_shares(config, devices)
    if config.plan:
        if processes.first:
            device, config = resolve_device(config.trainer.device), with_data(config)
            store = open_data(config.data.path, processes)
            print_plan(config, store, device, resolve_precision(config.trainer.precision, device), devices)
    elif launched or (devices == 1 and not config.trainer.max_restarts):
        run_rank(config, path, deadline)
    else:
        launch_ranks(
            rank_entry,
            (config, path, deadline),
            processes=devices,
            max_restarts=config.trainer.max_restarts,
            stop_within=config.trainer.stop_within,
            timeout=config.trainer.timeout,
            run_folder=path,
        )


def rank_entry(config: TrainConfig, path: Path, deadline: float | None) -> None:
    """What each process that `launch_ranks` starts runs."""
    code = 1
    let_output_fail()
    try:
        with meeting_of(processes_from_environment()):
            run_rank(config, path, deadline)
        code = 0
    except Stopped:  # the marker in the run folder tells; a launcher that passed a signal on does not wait for returns
        code = 0
        leave = threading.Timer(1, leave_without_closing, [code])
        leave.daemon = True
        leave.start()
    finally:
        atexit.register(leave_without_closing, code)


def check_shares(config: TrainConfig, processes: int) -> None:
    if config.optim.packs_per_step % processes:
        raise ValueError(
            f"optim.packs_per_step={config.optim.packs_per_step} is not divisible by {processes} processes"
        )


def run_rank(config: TrainConfig, path: Path, deadline: float | None) -> None:
    """Train in this process, which may be one of several."""
    processes = processes_from_environment()
    check_shares(config, processes.world_size)
    device = resolve_device(config.trainer.device, processes.local_rank)
    if processes.world_size > 1 and device.type == "cuda" and config.trainer.device not in ("auto", "cuda"):
        raise ValueError(
            f"trainer.device={config.trainer.device} with {processes.world_size} processes: use auto or cuda"
        )
    precision = resolve_precision(config.trainer.precision, device)
    head_dim = config.model.hidden_size // config.model.n_heads
    backend = resolve_attention_backend(config.model.attention_backend, device, precision, head_dim)
    compiled = resolve_compile(config.trainer.compile, device)
    if config.trainer.compile == "auto" and device.type == "cuda" and not compiled:
        announce(f"not compiled, as that needs {missing_to_compile(device)}", processes)
    if config.logger.wandb_project:
        import_wandb()
    with contextlib.ExitStack() as stack:
        patience = PATIENCE if processes.world_size > 1 else 0.0
        stop = stack.enter_context(StopRequests(insist=processes.launch is None, patience=patience))
        stack.callback(leave_group)
        store = open_data(config.data.path, processes)
        resolved = Resolved(
            str(device), precision, backend, compiled, processes.world_size, store.name, store.fingerprint
        )
        meeting = meeting_of(processes)
        meeting.agree(facts_of(config, resolved), config.trainer.timeout)
        join_group(processes, device, config.trainer.timeout, meeting.store)

        def open_as_first() -> RunFolder | None:
            if not processes.first:
                return None
            left = None if deadline is None else deadline - time.monotonic()
            if meeting.restart:
                most = config.trainer.max_restarts
                console.print(f"a process was lost: all start again ({meeting.restart}{f' of {most}' if most else ''})")
            earlier = opened_by(path)
            if is_continued(earlier, meeting):  # its first start has made the folder
                config.run.fresh = False
                config.run.resume = "auto" if config.run.resume == "never" else config.run.resume
                if shares_launcher(earlier, meeting) and earlier["requeues"] == processes.requeues:
                    left = seconds_left(path, earlier)
            if config.run.fresh:
                move_aside(path)
            stack.enter_context(locked(path))
            return open_run_folder(path, config, store, resolved, meeting, left)

        try:
            stack.enter_context(losses_named(f"rank {processes.rank}"))
            with busy(f"opens {path}"):
                folder: RunFolder = from_first(together(open_as_first))
            if folder.finished is not None:
                if processes.first and not (path / PAGE).is_file():  # killed just before it was written
                    write_run_page(path)
                announce(
                    f"{path} has finished, at step {folder.finished:,}: {path / PAGE}. To go on: run.resume=extend "
                    f"with a larger trainer.max_steps, or another run.name with from={path}",
                    processes,
                )
                return
            log = folder.path / "logs" / f"rank_{processes.rank}.log"
            if not processes.first and processes.local_rank == 0:
                told = f"rank {processes.rank} of {processes.world_size} on {meeting.host}"
                print(f"{told}: what it prints goes to {log}, the run's course to the terminal of rank 0", flush=True)
            together(lambda: None if processes.first else stack.enter_context(written_to(log)))
            left = folder.seconds_left
            with failures_logged(log):
                train(
                    config,
                    store,
                    run_folder=folder.path,
                    attempt=folder.attempt,
                    checkpoint=folder.checkpoint,
                    state=folder.state,
                    weights=folder.weights,
                    precision=precision,
                    attention_backend=backend,
                    compiled=compiled,
                    device=device,
                    processes=processes,
                    stop=stop,
                    deadline=None if left is None else time.monotonic() + left,
                )
        except Stopped as stopped:
            # torchrun ends all ranks when one fails
            if (
                processes.first
                and (path / "config.yaml").is_file()
                and not any(" failed: " in word for word in words_of_others())
            ):
                write_atomic(path / STOPPED, json.dumps({"reason": stopped.reason, "when": stopped.when}) + "\n")
            raise


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


def run_path(config: TrainConfig) -> Path:
    """runs/<run.name>, or the job's own folder in a sweep. No timestamps: the same command finds its run again."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return Path(hydra_config.runtime.output_dir)
    return Path("runs") / config.run.name
