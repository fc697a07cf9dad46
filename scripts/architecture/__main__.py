"""Measure the kinds of networks of docs/architecture.md, and print Markdown tables.

    python -m scripts.architecture bounds       train every kind of network; NLL bounds of test proteins
    python -m scripts.architecture speed        speed and memory of a training step; needs an otherwise idle machine
    python -m scripts.architecture lengths      train on short proteins; NLL bounds of short and longer proteins
    python -m scripts.architecture robustness   forward pass, sampling and infilling of real proteins
    python -m scripts.architecture tables       print all tables again

A kind of network is called an arm. By default `bounds` and `lengths` train each arm for as many steps as
experiment=demo (the demo), which takes minutes for each run. `robustness` uses the networks that `bounds` has trained,
so run `bounds` first. By default, missing networks are trained for a few steps only.

The result of each finished run is appended to the results file, and the run is not trained again. So repeat an
interrupted command to resume it. The results file also records failed runs. If a run failed, the exit code is 1, and
the same command, when repeated, tries the run again.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from protlig_dd.system.terminal import console
from scripts.architecture import results
from scripts.architecture.arms import ARMS, ENCODINGS
from scripts.architecture.lengths import MAX_LEN, lengths
from scripts.architecture.robustness import FEW, robustness
from scripts.architecture.runs import bounds
from scripts.architecture.speed import speed
from scripts.architecture.tables import print_tables
from scripts.benchmarks.variants import MODELS

PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "bounds": bounds,
    "speed": speed,
    "lengths": lengths,
    "robustness": robustness,
}
SELECTING = ("part", "results", "folder", "only", "seeds", "threads")  # these options do not change a row's results


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", type=Path, default=Path("runs/architecture"), help="the runs are in FOLDER/runs")
    shared.add_argument("--results", type=Path, help="results file; default: FOLDER/results.jsonl")
    trained = argparse.ArgumentParser(add_help=False, parents=[shared])
    trained.add_argument("--steps", type=int, help="training steps; default: the demo's")
    trained.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a training run")

    top = argparse.ArgumentParser(prog="scripts.architecture", description=__doc__, formatter_class=formatter)
    parts = top.add_subparsers(dest="part", required=True)
    part = parts.add_parser("bounds", parents=[trained], help="NLL bound of test proteins for every kind of network")
    part.add_argument("--seeds", type=int, help="seeds of each arm; default: 3 for the baseline, 2 for other arms")
    select_arms(part, list(ARMS))
    part = parts.add_parser("speed", parents=[shared], help="speed and memory of a training step for every kind")
    part.add_argument("--model", choices=list(MODELS), default="256 x 2", help="width x blocks")
    part.add_argument("--tokens", type=int, default=4096, help="maximum number of tokens per step")
    part.add_argument("--steps", type=int, default=3, help="steps of each arm in each round")
    part.add_argument("--warmup", type=int, default=2, help="steps of each arm before the first round")
    part.add_argument("--repeats", type=int, default=9, help="rounds; a round measures all arms, the table has medians")
    part.add_argument("--device", default="auto")
    part.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    select_arms(part, list(ARMS))
    part = parts.add_parser(
        "lengths", parents=[trained], help=f"train with data.max_len={MAX_LEN}; NLL bounds of longer proteins too"
    )
    part.add_argument("--draws", type=int, default=8, help="noise draws per protein")
    part.add_argument("--proteins", type=int, help="maximum number of proteins per length range; default: all")
    select_arms(part, ENCODINGS)
    part = parts.add_parser(
        "robustness",
        parents=[trained],
        help="forward pass, sampling and infilling of 20 real proteins, with the networks of `bounds`; missing "
        f"networks are trained for --steps steps, by default {FEW}",
    )
    part.add_argument("--sampling-steps", type=int, default=16)
    select_arms(part, ENCODINGS)
    parts.add_parser("tables", parents=[shared], help="print all tables from the results file")
    return top


def select_arms(part: argparse.ArgumentParser, default: list[str]) -> None:
    """Add the options that choose the proteins and the kinds of networks.

    Each part gets its own copy of these options, because `default` differs between parts. If the parts shared the
    options through a parent parser, a default set for one part would apply to all parts.
    """
    part.add_argument("--data", type=Path, help="a store written by prepare; default: the bundled proteins")
    names = f"choose from {', '.join(ARMS)}; default: {'all' if default == list(ARMS) else 'the position encodings'}"
    part.add_argument("--only", nargs="+", choices=list(ARMS), default=default, metavar="ARM", help=names)


def command_of(arguments: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """Return the command without the options in SELECTING and without options set to their default."""
    words = ["python -m scripts.architecture", arguments.part]
    for name, value in vars(arguments).items():
        if name not in SELECTING and value != getattr(defaults, name):
            shown = f'"{value}"' if " " in str(value) else value
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def main() -> None:
    top = parser()
    arguments = top.parse_args()
    arguments.command = command_of(arguments, top.parse_args([arguments.part]))
    arguments.results = arguments.results or arguments.folder / "results.jsonl"
    try:
        succeeded = PARTS[arguments.part](arguments) if arguments.part in PARTS else True
        rows = results.read(arguments.results)
        if arguments.part not in PARTS and not rows:
            raise ValueError(f"{arguments.results}: no results; run bounds, speed, lengths or robustness first")
        print_tables(rows.values(), arguments.command if arguments.part in PARTS else None)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print(f"interrupted; repeat the command to resume with the results in {arguments.results}")
        sys.exit(130)
    sys.exit(not succeeded)


if __name__ == "__main__":
    main()
