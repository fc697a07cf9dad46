"""Say what each group of tests proves and how long it takes, as the table of docs/testing.md.

scripts/test.sh --junitxml=times.xml
scripts/test.sh -m "system or campaign" --hypothesis-profile=thorough --junitxml=rest.xml
python -m scripts.test_times times.xml rest.xml           the groups, in Markdown
python -m scripts.test_times times.xml --slowest 20
"""

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    """Tests that prove something together; a test belongs to the first group that names its marker or file."""

    name: str
    proves: str
    files: tuple[str, ...]
    tests: tuple[str, ...] = ()
    """Beginnings of names, for single tests of a file that belongs to another group."""


GROUPS = (
    Group("Slurm", "a real Slurm queues a job again at its limit and when preempted, and the bits are those of an "
          "undisturbed run", ("test_clusters",), ("test_a_slurm_job",)),
    Group("browser", "pages in Chromium at two widths, light and dark: nothing overflows, contrast, hover, no request",
          ("test_report_page",), ("test_pages_in_a_browser",)),
    Group("MMseqs2", "the bundled splits share no homolog; homologs leave the held-out splits; relatives of samples",
          ("test_build", "test_judge", "test_readme"),
          ("test_bundled_held_out", "test_homologs_of", "test_the_folder_of_tables", "test_the_commands_with_mmseqs")),
    Group("compiler", "a compiled run has the losses of an eager one, and compiles once for packs of all sizes",
          ("test_training",), ("test_a_compiled_run",)),
    Group("fault campaign", "kills, lost ranks, hangs, damage and a full disk: no bit is lost",
          ("test_faults",), ("test_the_short_fault_campaign", "test_the_fault_campaign",)),
    Group("README commands", "every command of the README, in order, in a copy with an empty HOME", ("test_readme",)),
    Group("maths", "graphs, noise, scores, losses, bounds and samplers against brute force and exact models",
          ("test_graph", "test_noise", "test_rates", "test_score", "test_loss", "test_likelihood", "test_sampling")),
    Group("packing", "alone = packed, packs and crops as keyed, any rank and worker reads the same, lengths disagree = "
          "error", ("test_batch", "test_attention", "test_rotary", "test_dit", "test_loader", "test_plan")),
    Group("data", "FASTA to store: every fault is one line, any flipped bit is noticed, killed at any moment nothing "
          "half-made is left", ("test_fasta", "test_encode", "test_tokenizer", "test_build", "test_store",
                                "test_prepare", "test_download")),
    Group("training and resume", "stop + resume = undisturbed to the bit; other configs, data and weights are refused; "
          "optimizers; the wheel trains", ("test_training", "test_trainer", "test_loop", "test_optim",
                                           "test_checkpoint", "test_finetune", "test_plan_of_a_run")),
    Group("faults and DDP", "signals, time limits, lost ranks and loaders, damaged checkpoints; 1, 2 and 4 processes "
          "make the same run; ranks that were started otherwise refuse", ("test_faults", "test_meeting")),
    Group("two hosts", "network namespaces: what disagrees is refused on both, cuts and lost hosts change no bit",
          ("test_hosts",)),
    Group("schedulers", "submitit, PBS and the Slurm launcher's config", ("test_clusters",)),
    Group("using a model", "sample, infill, evaluate, judge, variants, embed, linear probe, export and hub",
          ("test_sample", "test_infill", "test_evaluate", "test_judge", "test_variants", "test_embed",
           "test_linear_probe", "test_export")),
    Group("report page", "the page says what the run's files say, safely", ("test_report_page", "test_metrics")),
    Group("configs and command line", "every config composes, every wrong one is one line, help, exit codes, "
          "what cannot be printed",
          ("test_configs", "test_environment", "test_output", "test_warm")),
    Group("scripts and docs", "benchmarks print the tables of the docs; a mutation is caught; set-up",
          ("test_scripts", "test_setup", "test_testing")),
    Group("earlier versions", "seeded runs give the recorded figures, on the recording machine to the bit; what an "
          "earlier version wrote is read and continued", ("test_golden",)),
    Group("structure", "who may import whom; annotated shapes are enforced and leave no bytecode behind",
          ("test_layering", "test_typecheck")),
)  # fmt: skip


def group_of(file: str, test: str) -> Group:
    """The first group that has the test by name, or its file.

    Raises:
        ValueError: none has; the file wants a group in this script.
    """
    for group in GROUPS:
        if file in group.files and (not group.tests or test.startswith(group.tests)):
            return group
    raise ValueError(f"tests/{file}.py is in no group of scripts/test_times.py")


def read_times(path: Path) -> list[tuple[str, str, float]]:
    """File, test and seconds (set-up and tear-down included) of each test that ran, from pytest's JUnit XML."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is None:
            file = case.attrib["classname"].removeprefix("tests.")
            found.append((file, case.attrib["name"], float(case.attrib["time"])))
    return found


def table(times: list[tuple[str, str, float]]) -> list[str]:
    """Rows of Markdown, one for each group."""
    counts: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for file, test, took in times:
        group = group_of(file, test)
        counts[group.name] += 1
        seconds[group.name] += took
    rows = ["| group | what is proved | files | tests | seconds |", "| --- | --- | --- | ---: | ---: |"]
    for group in GROUPS:
        files = ", ".join(file.removeprefix("test_") for file in group.files)
        numbers = f"{counts[group.name]} | {seconds[group.name]:.0f}"
        rows.append(f"| {group.name} | {group.proves} | {files} | {numbers} |")
    return [*rows, f"| all | | | {len(times)} | {sum(seconds.values()):.0f} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("xml", type=Path, nargs="+", help="written by pytest --junitxml, of tests that differ")
    parser.add_argument("--slowest", type=int, metavar="N", help="print the N slowest tests instead")
    arguments = parser.parse_args()
    times = []
    for path in arguments.xml:
        try:
            times += read_times(path)
            lines = table(times)
        except (OSError, ValueError, ElementTree.ParseError) as error:
            sys.exit(f"error: {path}: {error}")
    if arguments.slowest:
        slowest = sorted(times, key=lambda one: -one[2])[: arguments.slowest]
        lines = [f"{took:6.1f} s  {file}::{test}" for file, test, took in slowest]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
