"""The command-line face that every verb shares: Hydra composes, one line reports a failure, the exit code tells.

Exit codes: 0 done, 1 error, 75 stopped in time (the same command goes on), 130 interrupted. HYDRA_FULL_ERROR=1 adds the
traceback.
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
from protlig_dd.system.distributed import Processes, leave_group, losses_named, processes_from_environment
from protlig_dd.system.files import FULL
from protlig_dd.system.launcher import RanksFailedError, leave_without_closing
from protlig_dd.system.meeting import meeting_of
from protlig_dd.system.output import let_output_fail
from protlig_dd.system.signals import SIGNALS, Stopped

LONGEST_NAME = 200


def run_verb(verb: Callable[[DictConfig], None], config_name: str, schema: type, *, alone: bool = False) -> None:
    """Compose `config_name` with the command line's overrides, run the verb, and exit with its code.

    Args:
        schema: the config's dataclass, from which a misspelt key's nearest neighbour is suggested.
        alone: the first of torchrun's processes does all the work, and the others return at once.
    """
    let_output_fail()
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own report
    code, processes = 0, Processes(0, 1, 0)
    try:
        processes = processes_from_environment()
        if alone and not processes.first:
            if processes.launch is None:
                say(f"nothing to do: RANK={processes.rank} is set, and rank 0 does it all", processes)
            return
        sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
        if not wants_help(config_name):
            compose_and_run(Task(verb, schema, sys.argv[1:], alone), config_name)
    except KeyboardInterrupt:
        say("interrupted", processes)
        code = 130
    except (Exception, VerbEnded, Stopped) as error:
        cause = error.args[0] if isinstance(error, VerbEnded) else error
        message, code = told(cause, schema)
        if isinstance(cause, Stopped):
            for number in SIGNALS:  # schedulers repeat themselves; the exit code stands
                signal.signal(number, signal.SIG_IGN)
            code = 0 if processes.launch is not None else code  # it takes any other code for a failure; a marker tells
        else:
            if show_traceback:
                traceback.print_exc()
            elif isinstance(cause, RanksFailedError) and cause.trace and not cause.foreseen:
                print(cause.trace, file=sys.stderr)
            if processes.launch is not None:
                ErrorHandler().record_exception(cause)  # torchrun prints that of the first rank that failed
        say(message, processes)
    finally:
        leave_group()
        GlobalHydra.instance().clear()
    if processes.world_size > 1:
        leave_without_closing(code)
    if code:
        sys.exit(code)


def compose_and_run(task: "Task", config_name: str) -> None:
    """Compose the config and run the task, for each job of a sweep.

    `hydra.main` composes everything twice, the first time to see whether it is a sweep. A plain command, which has
    overrides and a config's name at most, is composed once; what else Hydra can do is left to it.
    """
    cfg, arguments = None, get_args_parser().parse_args()
    if is_plain(arguments):
        with (
            contextlib.suppress(HydraException),  # which it raises again below, unless the user's own config sweeps
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
    # one search path for every launch: a config of the user's own may build on the shipped groups
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(task)()


def is_plain(arguments: argparse.Namespace) -> bool:
    """Whether the command line has overrides, a config's name and an absolute path at most, none of them for Hydra."""
    usual = {"overrides", "config_name", "run"}
    if Path(arguments.config_path or "").is_absolute():
        usual.add("config_path")
    settings = [override.lstrip("+~") for override in arguments.overrides if override.lstrip("+~").startswith("hydra")]
    return not any(value for name, value in vars(arguments).items() if name not in usual) and all(
        setting.startswith("hydra.searchpath=") for setting in settings
    )


class Task:
    """What Hydra runs for each job: here, or elsewhere through a launcher that pickles it.

    Args:
        arguments: of the command line that was given.
        alone: whether one of torchrun's processes does it all, and no other waits for it.
    """

    def __init__(
        self, verb: Callable[[DictConfig], None], schema: type, arguments: list[str], alone: bool = False
    ) -> None:
        self.verb, self.schema, self.arguments, self.alone = verb, schema, arguments, alone
        self.__name__ = "task"  # Hydra wants one
        OmegaConf.register_new_resolver("swept", partial(swept_name, arguments=arguments), replace=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return Task, (self.verb, self.schema, self.arguments, self.alone)  # the resolver is wanted there, too

    def __call__(self, cfg: DictConfig) -> None:
        elsewhere, requeue = "SUBMITIT_EXECUTOR" in os.environ, signal.getsignal(signal.SIGUSR2)
        try:
            processes = processes_from_environment()
            with (
                contextlib.nullcontext() if self.alone else meeting_of(processes),
                losses_named(f"rank {processes.rank}", "an hour"),
            ):
                self.verb(cfg)
        except (Exception, Stopped) as error:
            if not elsewhere:
                raise VerbEnded(error) from error
            if isinstance(error, Stopped) and error.reason == "SIGUSR2" and callable(requeue):
                requeue(signal.SIGUSR2, None)  # submitit's: its job is queued again, and ends here
            raise JobFailedError(*told(error, self.schema)) from error


class JobFailedError(Exception):
    """A job that a launcher ran elsewhere: its one line and its exit code."""


class VerbEnded(BaseException):
    """Carries what ended a verb past Hydra, which would print a report of its own for an Exception."""


def told(error: BaseException, schema: type) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    if isinstance(error, JobFailedError):
        message, code = error.args
        return message, code
    if isinstance(error, Stopped):
        return str(error), error.exit_code
    return one_line(error, schema), 1


def quoted(argument: str) -> str:
    """An override that Hydra's grammar takes as it is; where it takes the value for none, the value in quotes.

    A file may be called größe.fasta, a=1.fasta or uniprot (1).fasta.
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


def wants_help(config_name: str) -> bool:
    """Check the command line's form; print the help and return True when it was asked for.

    Raises:
        ValueError: a flag that is none, or an argument that is not key=value.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; options are given as key=value, --help lists them")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_args()
    for override in arguments.overrides:
        if "=" not in override and not override.startswith("~"):
            refuse(f"unknown argument {override!r} (several values are one list, key=[a,b]; quote what has spaces)")
    if arguments.help:
        print(help_text(arguments.config_name or config_name, arguments.overrides))
    return bool(arguments.help)


def help_text(config_name: str, overrides: Sequence[str] = ()) -> str:
    """The verb's own description, then its config files: every key, its default and what it means.

    Of a group it shows the option that the command line names, not what an experiment would choose.

    Raises:
        ValueError: `group=option` with an option that is none.
    """
    folder = config_folder()
    path = folder / f"{config_name}.yaml"
    described = (sys.modules["__main__"].__doc__ or "").strip()
    composed = OmegaConf.to_container(OmegaConf.load(path))
    defaults = composed.get("defaults", []) if isinstance(composed, dict) else []
    groups = {group: option for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}
    for override in overrides:
        group, equals, wanted = override.lstrip("+").partition("=")
        if equals and group in groups:  # of a sweep, the first
            groups[group] = None if wanted == "null" else wanted.split(",")[0]
    parts = [described, "\nEvery key, its default and what it means:\n", without_hydra(path.read_text())]
    for group, option in groups.items():
        options = " | ".join(sorted(file.stem for file in (folder / group).glob("*.yaml")))
        if option and option not in options.split(" | "):
            raise ValueError(f"{group}={option}: there are {options}")
        body = (folder / group / f"{option}.yaml").read_text() if option else ""
        parts += [f"{group}={option or ''}  ({options})", textwrap.indent(body, "  ")]
    return "\n".join(parts)


def without_hydra(text: str) -> str:
    """A primary config without its list of defaults and its settings for Hydra."""
    blocks = re.split(r"\n(?=\S)", text)
    return "\n".join(block for block in blocks if not block.startswith(("defaults:", "hydra:", "# python")))


def one_line(error: BaseException, schema: type) -> str:
    """What a user needs to know of an error, in one line."""
    text = str(error).partition("\nConfig search path")[0]
    if "Original Traceback" in text:  # from a loader worker: its last line is the error
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split())
    if (misspelt := re.search(r"Could not override '([^']+)'", text)) is not None:
        groups = [folder.name for folder in config_folder().iterdir() if folder.is_dir()]
        return "error: " + unknown_key(misspelt.group(1), [*known_keys(schema), *groups])
    if isinstance(error, RanksFailedError):
        return f"error: {text}"
    if isinstance(error, OSError) and error.errno in FULL and error.filename:
        return f"error: {error.filename}: cannot be written: {error.strerror}"
    if not isinstance(error, ValueError) and not type(error).__module__.startswith(("hydra", "omegaconf")):
        text = f"{type(error).__name__}: {text}"  # not one of ours: the type says more than the text
    return f"error: {text}"


def swept_name(task_overrides: Sequence[str], job_number: int, arguments: Sequence[str]) -> str:
    """A sweep job's folder name: the overrides that vary in this sweep, `optim.lr-0.001_model-tiny`."""
    parser = OverridesParser.create()
    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    swept = {override.key_or_group for override in parser.parse_overrides(given) if override.is_sweep_override()}
    parts = [override for override in task_overrides if override.lstrip("+").partition("=")[0] in swept]
    name = re.sub(r"[^\w.+-]+", "-", "_".join(parts))  # so that `from=` takes it as it is
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return name or str(job_number)


def say(message: str, processes: Processes) -> None:
    prefix = f"[rank {processes.rank}] " if processes.world_size > 1 else ""
    sys.stderr.write(f"{prefix}{message}\n")  # in one piece, as ranks share it
    sys.stderr.flush()
