"""Train with flags such as --seed 1, for launch scripts that use such flags instead of Hydra overrides.

The training itself is the same as with `python -m protlig_dd.training`.

    python -m protlig_dd.training.run_train_uniref50_optimized --work_dir . \
        --config configs/config_uniref50_stable.yaml --fresh --device auto --seed 1 --epochs 2

Hydra overrides may follow the flags.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from protlig_dd.config.cli import print_to_stderr, run_verb
from protlig_dd.config.read import config_folder
from protlig_dd.config.train import TrainConfig
from protlig_dd.system.distributed import Processes
from protlig_dd.training.build import run


def main() -> None:
    """Turn the flags into Hydra overrides and run the training command."""
    arguments = parse_arguments()
    if not arguments.work_dir.is_dir():
        fail(f"--work_dir {arguments.work_dir}: no such folder")
    folders = list(dict.fromkeys([Path.cwd(), arguments.work_dir.resolve()]))
    os.chdir(arguments.work_dir)
    config = next((file for folder in folders if (file := folder / arguments.config).is_file()), None)
    if config is None:
        fail(f"--config {arguments.config}: no such file (looked in {' and '.join(map(str, folders))})")
    for override in arguments.overrides:
        if "=" not in override:
            fail(f"unknown argument {override!r}; after the flags, give Hydra overrides (key=value)")
    overrides = [f"hydra.searchpath=[{quoted(f'file://{config_folder()}')}]"]
    if arguments.fresh:
        overrides.append("run.fresh=true")
    for key, value in (
        ("data.path", arguments.datafile),
        ("trainer.device", arguments.device),
        ("seed", arguments.seed),
        ("logger.wandb_project", arguments.wandb_project),
        ("logger.wandb_name", arguments.wandb_name),
    ):
        if value is not None:
            overrides.append(f"{key}={quoted(value) if isinstance(value, str) else value}")
    if arguments.epochs is not None:
        overrides += [f"trainer.epochs={arguments.epochs}", "trainer.max_steps=null"]
    path = ["--config-path", str(config.parent), "--config-name", config.stem]
    sys.argv = [sys.argv[0], *path, *overrides, *arguments.overrides]
    run_verb(run, config.stem, TrainConfig)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that prints an error in one line, like all other commands."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m protlig_dd.training.run_train_uniref50_optimized",
        description="Train a protein language model by score-entropy discrete diffusion (SEDD).",
    )
    parser.add_argument(
        "--work_dir", type=Path, default=Path(), help="folder that contains runs/ and data/ (default: .)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="path of the main config, relative to the current folder or to --work_dir; "
        "it may use the config groups of protlig_dd",
    )
    parser.add_argument(
        "--datafile", help="store written by `python -m protlig_dd.prepare` (default: the config's data.path)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="move an existing run with the same run.name aside and start from step 0"
    )
    parser.add_argument("--device", help="auto | cpu | cuda | cuda:1 | mps (default: the config's)")
    parser.add_argument("--seed", type=int, help="seed of all random numbers (default: the config's)")
    parser.add_argument(
        "--epochs", type=float, help="passes over the training split, instead of the config's max_steps"
    )
    parser.add_argument("--wandb_project", help="log to this Weights & Biases project")
    parser.add_argument("--wandb_name", help="name of the run in Weights & Biases")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as optim.lr=1e-3")
    return parser.parse_args()


def quoted(text: str) -> str:
    """Return a Hydra string literal for exactly this text."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def fail(message: str) -> NoReturn:
    print_to_stderr(f"error: {message}", Processes(0, 1, 0))
    sys.exit(1)


if __name__ == "__main__":
    main()
