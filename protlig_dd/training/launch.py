"""From a composed config to a run: validate, resolve every `auto`, open the run folder, hand over to the job."""

import atexit
import contextlib
import json
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from protlig_dd import __version__
from protlig_dd.data.build import bundled_store
from protlig_dd.data.loader import PackDataset
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.diffusion.score import is_time_free
from protlig_dd.evaluation.page import PAGE, read_json, write_run_page
from protlig_dd.model.attention import resolve_attention_backend
from protlig_dd.runtime.checkpoint import (
    complete_checkpoints,
    find_checkpoint,
    newest_sound_checkpoint,
    put_aside_newer,
    read_state,
    remove_unfinished,
    step_of,
)
from protlig_dd.runtime.config import (
    TrainConfig,
    build_graph,
    changed_keys,
    flatten,
    graph_with_rates,
    read_config,
    shorten,
    spelt,
)
from protlig_dd.runtime.distributed import (
    OtherRankError,
    Processes,
    RankLostError,
    acknowledge,
    busy,
    count_devices,
    from_first,
    in_one_line,
    join_group,
    launch_ranks,
    leave_group,
    leave_without_closing,
    leave_word,
    losses_named,
    opened_by,
    processes_from_environment,
    together,
    words_of_others,
)
from protlig_dd.runtime.environment import (
    describe_environment,
    missing_to_compile,
    resolve_compile,
    resolve_device,
    resolve_precision,
)
from protlig_dd.runtime.files import free_name, locked, replacing, sha256, write_atomic, written_to
from protlig_dd.runtime.meeting import Meeting, meeting_of
from protlig_dd.runtime.metrics import announce, console, import_wandb
from protlig_dd.runtime.output import let_output_fail
from protlig_dd.runtime.stop import STOPPED, Stopped, StopRequests, seconds_of
from protlig_dd.runtime.trained import find_saved
from protlig_dd.training.finetune import FREE_KEYS, taken_over
from protlig_dd.training.job import plan_version, train
from protlig_dd.training.plan import count_steps, print_plan, with_data
from protlig_dd.training.validate import RESUME, check_train_config

UNIREF50 = Path("data/uniref50.h5")
PATIENCE = 10.0  # seconds within which all ranks get a signal that is sent to all of them


@dataclass(frozen=True)
class Resolved:
    """What this start made of the config's `auto` values; printed, and kept in environment.json."""

    device: str
    precision: str
    attention_backend: str
    compiled: bool
    world_size: int
    data_path: str
    data_fingerprint: str


@dataclass(frozen=True)
class RunFolder:
    path: Path
    attempt: int
    checkpoint: Path | None
    state: dict[str, Any]
    """state.json of that checkpoint."""
    weights: Path | None
    """Of `from=`, where there is no checkpoint yet."""
    seconds_left: float | None
    """Until the run is to stop, by no host's clock; a process that is started again gets no more of it."""
    finished: int | None
    """The last step of a run that has made its report and is not to go on."""


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


def starting_from(config: TrainConfig, path: Path) -> TrainConfig:
    """The config of a run that begins with another model's averaged weights: its network, graph, noise and
    parametrisation are that model's, and the checksum of the weights is kept with it.

    Raises:
        ValueError: no such model, or another than the command line describes.
    """
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    given = {override.key_or_group for override in overrides}
    recipe = set_by_experiment()
    begun = None
    if has_steps(path) and not config.run.fresh:  # it remembers, whatever has become of what it began with
        begun = read_config(OmegaConf.load(path / "config.yaml"), TrainConfig)  # type: ignore[arg-type]
    if begun is not None and begun.from_ == config.from_:
        source, found = begun, begun.from_sha256
    else:
        saved = find_saved(str(config.from_))
        source, found = saved.config, sha256(saved.weights)
    if config.from_sha256 not in (None, found):
        raise ValueError(f"from={config.from_} has weights of SHA-256 {found}, not from_sha256={config.from_sha256}")
    taken = taken_over(config, source, given | (recipe & FREE_KEYS))
    before, after = flatten(spelt(config)), flatten(spelt(taken))
    left_out = [
        f"{key}={shorten(str(value))} ({shorten(str(after.get(key)))} there)"
        for key, value in before.items()
        if (key in recipe or key.partition(".")[0] in recipe) and value != after.get(key)
    ]
    if left_out:
        announce(
            f"from={config.from_} is another model than the experiment's, of which is left out: {', '.join(left_out)}",
            processes_from_environment(),
        )
    return replace(taken, from_sha256=found)


def set_by_experiment() -> set[str]:
    """The keys and groups that the file of the chosen experiment sets, and those of experiments that it builds on."""
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) / "experiment" for source in runtime.config_sources if source.schema == "file"]

    def named(experiment: str) -> set[str]:
        file = next((file for folder in folders if (file := folder / f"{experiment}.yaml").is_file()), None)
        if file is None:
            return set()
        content = dict(OmegaConf.to_container(OmegaConf.load(file)) or {})  # type: ignore[arg-type]
        found: set[str] = set()
        for entry in content.pop("defaults", []):
            if isinstance(entry, dict):  # `override /model: tiny`
                found |= {str(key).split()[-1].lstrip("/") for key in entry}
            elif entry != "_self_":
                found |= named(entry)
        return found | set(flatten(content))

    chosen = runtime.choices.get("experiment")
    return named(chosen) if chosen else set()


def first_weights(config: TrainConfig) -> Path:
    """The weights of `from=`, if they are still those that the run has begun with.

    Raises:
        ValueError: they are not; names both checksums.
    """
    saved = find_saved(str(config.from_))
    for problem in saved.skipped:
        console.print(f"skipped: {problem}")
    if (found := sha256(saved.weights)) != config.from_sha256:
        raise ValueError(
            f"{saved.path}: weights of SHA-256 {found[:12]}, and this run began with {str(config.from_sha256)[:12]}; "
            "run.fresh=true moves it aside and begins with these"
        )
    console.print(f"starting from the averaged weights of {saved.path}")
    return saved.weights


def graph_of_run(path: Path) -> dict[str, Any]:
    """The graph's config of the run in this folder; {} where there is none."""
    file = path / "config.yaml"
    return dict(OmegaConf.to_container(OmegaConf.load(file))["graph"]) if file.is_file() else {}  # type: ignore


def open_run_folder(
    path: Path,
    config: TrainConfig,
    store: StoreGroup,
    resolved: Resolved,
    meeting: Meeting,
    left: float | None,
) -> RunFolder:
    """Make or reopen the run folder, and find the checkpoint to go on from: on rank 0.

    Raises:
        ValueError: a run that exists and may not be resumed, or whose config or data differ; names what differs. Or one
            that a newer version of the program has begun.
    """
    started = has_steps(path)
    (path / STOPPED).unlink(missing_ok=True)
    remove_unfinished(path)
    if started and config.run.resume == "never":
        raise ValueError(f"{path} exists and run.resume=never; use another run.name, or run.fresh=true")
    attempt, finished, earlier = 1, None, {}
    if started:
        earlier = check_same_run(path, config, resolved)
        check_extension(path, config)
        attempt, finished = int(earlier["attempt"]) + 1, finished_at(path)
        if finished is not None and not reports_otherwise(path, config):
            return RunFolder(path, attempt, None, {}, None, left, finished)
    checkpoint, skipped = newest_sound_checkpoint(path)
    if skipped and checkpoint is None:
        raise ValueError(
            f"{path}: none of its checkpoints can be read ({'; '.join(skipped)}); "
            "run.fresh=true moves it aside and starts anew"
        )
    if checkpoint is None and config.run.resume not in RESUME:
        checkpoint, skipped = find_checkpoint(Path(config.run.resume))
        check_same_data(checkpoint, config, resolved)
    for problem in skipped:
        console.print(f"skipped: {problem}")
    for aside in put_aside_newer(path, checkpoint) if checkpoint is not None else []:
        console.print(f"{aside} is what is left of it, and may be deleted")
    state = read_state(checkpoint) if checkpoint is not None else {}
    plan_version(checkpoint, state)  # refused before anything is written
    weights = first_weights(config) if checkpoint is None and config.from_ is not None else None
    if state:
        check_not_beyond(checkpoint, state["step"], config, store)
    if started:
        say_what_changed(path, config, resolved, earlier)
    if finished is not None:
        console.print(f"the earlier report is now in {put_report_aside(path, finished)}")
    processes = meeting.processes
    record = {
        "attempt": attempt,
        "agents": sorted(set(meeting.agents)),
        "launch": processes.launch,
        "job": processes.job,
        "requeues": processes.requeues,
        "seconds_left": left,
        **vars(resolved),
        **describe_environment(torch.device(resolved.device)),
    }
    write_atomic(path / "environment.json", json.dumps(record, indent=1) + "\n")
    write_atomic(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(spelt(config))))  # last: now it is a run
    return RunFolder(path, attempt, checkpoint, state, weights, left, None)


def check_not_beyond(checkpoint: Path | None, step: int, config: TrainConfig, store: StoreGroup) -> None:
    """Raise for a run that is to end before the step of its checkpoint."""
    control, data = config.trainer, config.data
    most, told = control.max_steps, f"trainer.max_steps={control.max_steps}"
    if most is None:
        most = count_steps(config, PackDataset(store, store.split("train"), max_len=data.max_len, seed=config.seed,
                                               tokens_per_pack=data.tokens_per_pack, weights=data.weights))  # fmt: skip
        told = f"the {most} steps of trainer.epochs={control.epochs:g}"
    if step > most:
        raise ValueError(f"{checkpoint} is beyond {told}")


def finished_at(path: Path) -> int | None:
    """The last step of a run that has made its report; None of one that has not, or has gone on since."""
    step, checkpoints = read_json(path / "report.json").get("step"), complete_checkpoints(path)
    if not checkpoints or step != step_of(checkpoints[-1]) or not at_its_end(path, checkpoints[-1]):
        return None
    # an earlier version may have been told to go on, and been killed before it had a checkpoint
    ends = [ends_of(OmegaConf.load(folder / "config.yaml")) for folder in (path, checkpoints[-1])]
    return step if ends[0] == ends[1] else None


def at_its_end(path: Path, checkpoint: Path) -> bool:
    """Whether the learning rate of the run has come to the end of its schedule at this checkpoint."""
    step, config = step_of(checkpoint), OmegaConf.load(checkpoint / "config.yaml")
    most = read_json(checkpoint / "state.json").get("max_steps", config.trainer.max_steps)
    if most is None:  # an earlier version's, of trainer.epochs: the report tells
        return bool(read_json(path / "report.json").get("step") == step)
    return bool(step >= most)


def ends_of(config: Any) -> dict[str, Any]:
    """trainer.max_steps and trainer.epochs of a config."""
    return {key: flatten(config)[key] for key in ("trainer.max_steps", "trainer.epochs")}


def check_extension(path: Path, config: TrainConfig) -> None:
    """Compare the steps that a run has been told to make with those that it is to make now.

    Raises:
        ValueError: more, after it has come to the end of its schedule: the learning rate would jump from there to the
            middle of a longer one.
    """
    before, now = ends_of(OmegaConf.load(path / "config.yaml")), ends_of(spelt(config))
    longer = [
        key for key in now
        if before[key] != now[key] and (before[key] is None or now[key] is None or before[key] < now[key])
    ]  # fmt: skip
    level = config.optim.min_lr_ratio == 1 or (config.optim.schedule == "wsd" and config.optim.decay_share == 0)
    checkpoints = complete_checkpoints(path)
    if longer and checkpoints and at_its_end(path, checkpoints[-1]) and not level and config.run.resume != "extend":
        told = " and ".join(f"{key} was {before[key]}, now {now[key]}" for key in longer)
        raise ValueError(
            f"{path} has come to its end, step {step_of(checkpoints[-1])} ({told}): its learning rate is down to "
            f"{config.optim.min_lr_ratio:g} of optim.lr={config.optim.lr:g}, and a longer schedule would raise it "
            f"again. run.resume=extend does that; another run.name with from={path} fine-tunes its weights"
        )


def reports_otherwise(path: Path, config: TrainConfig) -> bool:
    """Whether a run that has finished is to take other steps than it did, or to report otherwise."""
    before, now = (flatten(cfg) for cfg in (OmegaConf.load(path / "config.yaml"), spelt(config)))
    ends = ("trainer.max_steps", "trainer.epochs", "report.")
    return any(before.get(key) != now[key] for key in now if key.startswith(ends))


def put_report_aside(path: Path, step: int) -> Path:
    """Copy a finished run's report to a folder of its own and take it out of the run, which will make another. Killed
    on the way, it is in one place at least as a whole.
    """
    folder = path / "reports" / f"step_{step:08d}"
    folder = free_name(folder) if folder.exists() else folder
    files = [file for name in ("report.json", "report.csv", PAGE) if (file := path / name).is_file()]
    with replacing(folder) as temporary:
        temporary.mkdir()
        for file in files:
            shutil.copy2(file, temporary)
    for file in files:  # report.json first: without it the run is no finished one
        file.unlink()
    return folder


def seconds_left(path: Path, earlier: dict[str, Any]) -> float | None:
    """Seconds left of the time limit of the start that opened the folder, by the clock that stamps the folder's files:
    mostly a file server's, and so the same for every host.
    """
    if earlier["seconds_left"] is None:
        return None
    opened = (path / "environment.json").stat().st_mtime
    with tempfile.NamedTemporaryFile(dir=path) as file:
        return float(earlier["seconds_left"] - (Path(file.name).stat().st_mtime - opened))


def move_aside(path: Path) -> None:
    """Give an earlier run in this folder another name.

    Raises:
        ValueError: it is still going on.
    """
    if (path / "config.yaml").is_file():
        with locked(path):
            aside = free_name(path)
            path.replace(aside)
        console.print(f"the earlier {path} is now {aside}")


def is_continued(earlier: dict[str, Any], meeting: Meeting) -> bool:
    """Whether this start continues the one that opened the folder last: after a lost process, with another number of
    hosts, or as the same Slurm job that was queued again since.
    """
    processes = meeting.processes
    same_launch = processes.launch is not None and earlier.get("launch") == processes.launch
    restarted = meeting.restart > 0 and processes.launch != "none"  # torchrun's default
    requeued = processes.job is not None and earlier.get("job") == processes.job
    return (same_launch and (restarted or shares_launcher(earlier, meeting))) or (
        requeued and earlier["requeues"] < processes.requeues
    )


def shares_launcher(earlier: dict[str, Any], meeting: Meeting) -> bool:
    """Whether a launcher of the start that opened the folder last has started ranks of this one too."""
    return bool(set(earlier.get("agents", ())) & set(meeting.agents))


def has_steps(path: Path) -> bool:
    """Whether a run has got beyond its start: one that failed there may be started again with another config."""
    metrics = path / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(complete_checkpoints(path))


def check_same_data(checkpoint: Path, config: TrainConfig, resolved: Resolved) -> None:
    """Compare with the run that another run's checkpoint is of.

    Raises:
        ValueError: another config (bar the keys that may change) or other data.
    """
    changed = changed_keys(
        OmegaConf.to_container(OmegaConf.load(checkpoint / "config.yaml")),  # type: ignore[arg-type]
        spelt(config),
    )
    if changed:
        raise ValueError(f"{checkpoint} was made with another config ({'; '.join(changed)})")
    found = read_state(checkpoint)["data_fingerprint"]
    if found != resolved.data_fingerprint:
        raise ValueError(f"{checkpoint} was made with data_fingerprint {found}, now {resolved.data_fingerprint}")


def check_same_run(path: Path, config: TrainConfig, resolved: Resolved) -> dict[str, Any]:
    """Compare with the run that stands in `path`; returns its environment.json.

    Raises:
        ValueError: another config (bar the keys that may change), precision or data.
    """
    remedy = f"use another run.name, or run.fresh=true to move {path} aside"
    changed = changed_keys(
        OmegaConf.to_container(OmegaConf.load(path / "config.yaml")),  # type: ignore[arg-type]
        spelt(config),
    )
    if changed:
        raise ValueError(f"{path} was started with another config ({'; '.join(changed)}); {remedy}")
    try:
        earlier = json.loads((path / "environment.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'environment.json'} cannot be read ({error}); {remedy}") from error
    for key in ("precision", "data_fingerprint"):
        if earlier[key] != getattr(resolved, key):
            raise ValueError(f"{path} was started with {key} {earlier[key]}, now {getattr(resolved, key)}; {remedy}")
    return earlier


def say_what_changed(path: Path, config: TrainConfig, resolved: Resolved, earlier: dict[str, Any]) -> None:
    """Print what may differ between two starts of a run, and does."""
    before, now = (flatten(cfg) for cfg in (OmegaConf.load(path / "config.yaml"), spelt(config)))
    for key in ("trainer.max_steps", "trainer.epochs"):
        if before[key] != now[key]:
            console.print(
                f"{key} was {before[key]}, now {now[key]}: the learning rate follows its new course from here"
            )
    for key in ("device", "attention_backend", "compiled", "world_size", "data_path"):
        if earlier[key] != getattr(resolved, key):
            console.print(f"{key} was {earlier[key]}, now {getattr(resolved, key)}")
