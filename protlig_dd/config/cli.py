"""The command line that every verb shares: Hydra composes the config, and a failure is reported in one line.

Exit codes: 0 done, 1 error, 75 stopped by a signal or a time limit (repeat the command to resume), 130 interrupted.
HYDRA_FULL_ERROR=1 adds the traceback.
"""

import argparse
import contextlib
import hashlib
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from protlig_dd.config.components import unknown_key
from protlig_dd.config.read import config_folder, known_keys
from protlig_dd.system.distributed import Processes, leave_group, lost_ranks_named, processes_from_environment
from protlig_dd.system.files import DISK_FULL
from protlig_dd.system.launcher import RanksFailedError, exit_without_cleanup
from protlig_dd.system.meeting import meeting_of
from protlig_dd.system.output import tolerate_output_errors
from protlig_dd.system.signals import SIGNALS, Stopped

LONGEST_NAME = 200


def run_verb(verb: Callable[[DictConfig], None], config_name: str, schema: type, *, rank0_only: bool = False) -> None:
    """Compose `config_name` with the command line's overrides, run the verb, and exit with one of the exit codes above.

    Args:
        schema: the config's dataclass; its keys are suggested for a misspelt key.
        rank0_only: rank 0 does all the work, and the other processes of torchrun return without doing anything.
    """
    tolerate_output_errors()
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own report
    code, processes = 0, Processes(0, 1, 0)
    try:
        processes = processes_from_environment()
        if rank0_only and not processes.first:
            if processes.launch is None:
                print_to_stderr(f"nothing to do: RANK={processes.rank} is set, and rank 0 does all the work", processes)
            return
        sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
        if not print_help_if_requested(config_name):
            compose_and_run(Task(verb, schema, sys.argv[1:], rank0_only), config_name)
    except KeyboardInterrupt as interrupt:
        print_to_stderr(str(interrupt) or "interrupted", processes)
        code = 130
    except (Exception, VerbEnded, Stopped) as error:
        cause = error.args[0] if isinstance(error, VerbEnded) else error
        message, code = message_and_code(cause, schema)
        if isinstance(cause, Stopped):
            for number in SIGNALS:  # schedulers repeat signals; a repeated signal must not change the code
                signal.signal(number, signal.SIG_IGN)
            # torchrun takes any code except 0 for a failure; stopped.json in the run folder records the stop
            code = 0 if processes.launch is not None else code
        else:
            if show_traceback:
                traceback.print_exc()
            elif isinstance(cause, RanksFailedError) and cause.trace and not cause.foreseen:
                print(cause.trace, file=sys.stderr)
            if processes.launch is not None:
                ErrorHandler().record_exception(cause)  # torchrun prints the error of the first rank that failed
        print_to_stderr(message, processes)
    finally:
        leave_group()
        GlobalHydra.instance().clear()
    if processes.world_size > 1:
        exit_without_cleanup(code)
    if code:
        sys.exit(code)


def compose_and_run(task: "Task", config_name: str) -> None:
    """Compose the config and run the task; for a sweep, run it for each job.

    `hydra.main` composes every config twice; the first composition only shows whether the command is a sweep. The
    config of a plain command (see `is_plain`) is composed once here; `hydra.main` handles every other command.
    """
    cfg, arguments = None, get_args_parser().parse_args()
    if is_plain(arguments):
        with (
            # after an error, hydra.main below composes again: it raises the error, unless the command is a sweep
            contextlib.suppress(HydraException),
            hydra.initialize_config_dir(arguments.config_path or str(config_folder()), version_base="1.3"),
        ):
            name = arguments.config_name or config_name
            cfg = hydra.compose(name, arguments.overrides, return_hydra_config=True)
    if cfg is not None and cfg.hydra.mode != RunMode.MULTIRUN:
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        task(cfg)
        return
    # the shipped configs are always on the search path, so that a user's own config can use their groups
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(task)()


def is_plain(arguments: argparse.Namespace) -> bool:
    """Whether the command line has nothing but overrides, a config name and an absolute config path, and sets no key of
    Hydra except hydra.searchpath.
    """
    usual = {"overrides", "config_name", "run"}
    if Path(arguments.config_path or "").is_absolute():
        usual.add("config_path")
    settings = [override.lstrip("+~") for override in arguments.overrides if override.lstrip("+~").startswith("hydra")]
    return not any(value for name, value in vars(arguments).items() if name not in usual) and all(
        setting.startswith("hydra.searchpath=") for setting in settings
    )


class Task:
    """The function that Hydra runs for each job: in this process or, after unpickling, in a job of a Hydra launcher.

    Args:
        arguments: the command line's arguments.
        rank0_only: rank 0 does all the work, and no other process waits for it.
    """

    def __init__(
        self, verb: Callable[[DictConfig], None], schema: type, arguments: list[str], rank0_only: bool = False
    ) -> None:
        self.verb, self.schema, self.arguments, self.rank0_only = verb, schema, arguments, rank0_only
        self.__name__ = "task"  # Hydra reads this attribute
        OmegaConf.register_new_resolver("swept", partial(swept_name, arguments=arguments), replace=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # unpickling calls the constructor, because the launcher's job needs the resolver too
        return Task, (self.verb, self.schema, self.arguments, self.rank0_only)

    def __call__(self, cfg: DictConfig) -> None:
        in_launcher_job, requeue = "SUBMITIT_EXECUTOR" in os.environ, signal.getsignal(signal.SIGUSR2)
        try:
            processes = processes_from_environment()
            with (
                contextlib.nullcontext() if self.rank0_only else meeting_of(processes),
                lost_ranks_named(f"rank {processes.rank}", "an hour"),
            ):
                self.verb(cfg)
        except (Exception, Stopped) as error:
            if not in_launcher_job:
                raise VerbEnded(error) from error
            if isinstance(error, Stopped) and error.reason == "SIGUSR2" and callable(requeue):
                requeue(signal.SIGUSR2, None)  # submitit's handler, which queues the job again and ends this process
            raise JobFailedError(*message_and_code(error, self.schema)) from error


class JobFailedError(Exception):
    """A job of a Hydra launcher has failed; the arguments are the job's error line and its exit code."""


class VerbEnded(BaseException):
    """Carries the exception that ended a verb. Hydra prints its own report for an Exception, but not for this class."""


def message_and_code(error: BaseException, schema: type) -> tuple[str, int]:
    """Return the error as one line, and the exit code."""
    if isinstance(error, JobFailedError):
        message, code = error.args
        return message, code
    if isinstance(error, Stopped):
        return f"{error}; the same command resumes the run, unless it sets run.fresh=true", error.exit_code
    return one_line(error, schema), 1


def quoted(argument: str) -> str:
    """Return an override, with its value in quotes if Hydra's grammar rejects it without quotes.

    File names such as größe.fasta, a=1.fasta and uniprot (1).fasta need the quotes.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    parser = OverridesParser.create()
    try:
        parser.parse_override(argument)
    except HydraException:
        escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
        trailing = len(escaped) - len(escaped.rstrip("\\"))
        candidate = f'{key}="{escaped}{chr(92) * trailing}"'
        with contextlib.suppress(HydraException):
            parser.parse_override(candidate)
            return candidate
    return argument


def print_help_if_requested(config_name: str) -> bool:
    """Check the form of the arguments. If --help is among them, print the help. Return whether the help was printed.

    Raises:
        ValueError: an unknown flag, or an argument that is not key=value.
    """
    parser = get_args_parser()

    def fail(message: str) -> NoReturn:
        raise ValueError(f"{message}; write arguments as key=value, --help lists the keys")

    parser.error = fail  # type: ignore[method-assign]
    arguments = parser.parse_args()
    for override in arguments.overrides:
        if "=" not in override and not override.startswith("~"):
            fail(f"unknown argument {override!r} (write several values as one list, key=[a,b]; quote spaces)")
    if arguments.help:
        print(help_text(arguments.config_name or config_name, arguments.overrides))
    return bool(arguments.help)


def help_text(config_name: str, overrides: Sequence[str] = ()) -> str:
    """Return the verb's description and the text of its config files: every key, its default and what it means.

    A config group is shown with the option that the command line, the experiment or the defaults list selects.

    Raises:
        ValueError: `group=option` with an unknown option.
    """
    folder = config_folder()
    path = folder / f"{config_name}.yaml"
    description = (sys.modules["__main__"].__doc__ or "").strip()
    composed = OmegaConf.to_container(OmegaConf.load(path))
    defaults = composed.get("defaults", []) if isinstance(composed, dict) else []
    groups = {group: option for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}
    chosen: dict[str, str | None] = {}
    for override in overrides:
        group, equals, value = override.lstrip("+").partition("=")
        if equals and group in groups:  # a sweep lists several options; show the first
            chosen[group] = None if value == "null" else value.split(",")[0]
    groups |= options_of_experiment(chosen.get("experiment")) | chosen
    heading = "\nEvery key, its default (???: it must be given) and what it means:\n"
    parts = [description, heading, without_hydra(path.read_text())]
    for group, option in groups.items():
        options = " | ".join(sorted(file.stem for file in (folder / group).glob("*.yaml")))
        if option and option not in options.split(" | "):
            raise ValueError(f"{group}={option}: choose from {options.replace(' | ', ', ')}")
        body = (folder / group / f"{option}.yaml").read_text() if option else ""
        parts += [f"{group}={option or ''}  ({options})", textwrap.indent(body, "  ")]
    return "\n".join(parts)


def options_of_experiment(name: str | None) -> dict[str, str]:
    """Return {group: option} for the config groups that an experiment sets; {} if `name` is None or unknown."""
    path = config_folder() / "experiment" / f"{name}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    entries = content.get("defaults", []) if isinstance(content, dict) else []
    pairs = (pair for entry in entries if isinstance(entry, dict) for pair in entry.items())
    return {group.removeprefix("override /"): option for group, option in pairs}


def without_hydra(text: str) -> str:
    """Return the text of a verb's config without the defaults list, the settings for Hydra and the example command."""
    blocks = re.split(r"\n(?=\S)", text)
    return "\n".join(block for block in blocks if not block.startswith(("defaults:", "hydra:", "# python")))


def one_line(error: BaseException, schema: type) -> str:
    """Return `error: ` and the error's message, in one line."""
    text = str(error).partition("\nConfig search path")[0]
    if "Original Traceback" in text:  # raised in a loader worker: the last line is the error
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split())
    if (misspelt := re.search(r"Could not override '([^']+)'", text)) is not None:
        groups = [folder.name for folder in config_folder().iterdir() if folder.is_dir()]
        return "error: " + unknown_key(misspelt.group(1), [*known_keys(schema), *groups])
    if (found := re.search(r"Could not find '(\w+)/([^']+)' Available options in '\w+': (.+)", text)) is not None:
        group, option, options = found.groups()
        return f"error: {group}={option}: choose from {', '.join(options.split())}"
    if (found := re.search(r"Ambiguous value for argument '(\w[\w.]*)=([^']*)'", text)) is not None:
        return f"error: {found[1]}={found[2]}: write several values as one list: {found[1]}=[{found[2]}]"
    if isinstance(error, RanksFailedError):
        return f"error: {text}"
    if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename:
        return f"error: {error.filename}: cannot be written: {error.strerror}"
    if not isinstance(error, ValueError) and not type(error).__module__.startswith(("hydra", "omegaconf")):
        text = f"{type(error).__name__}: {text}"  # an unexpected error: its text may mean little without the type
    return f"error: {text}"


def swept_name(task_overrides: Sequence[str], job_number: int, arguments: Sequence[str]) -> str:
    """Return the name of a sweep job's folder: the overrides that vary in the sweep, as `optim.lr-0.001_model-tiny`."""
    parser = OverridesParser.create()
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    swept = {override.key_or_group for override in parser.parse_overrides(overrides) if override.is_sweep_override()}
    parts = [override for override in task_overrides if override.lstrip("+").partition("=")[0] in swept]
    name = re.sub(r"[^\w.+-]+", "-", "_".join(parts))  # so that `from=` accepts the folder without quotes
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return name or str(job_number)


def print_to_stderr(message: str, processes: Processes) -> None:
    """Print a line on stderr, with the rank in front if there are several processes."""
    prefix = f"[rank {processes.rank}] " if processes.world_size > 1 else ""
    sys.stderr.write(f"{prefix}{message}\n")  # in one call, as the ranks share stderr
    sys.stderr.flush()
