"""Print what each group of tests checks and how long it takes, as in the table of docs/testing.md.

scripts/test.sh --junitxml=times.xml
scripts/test.sh -m "system or campaign" --hypothesis-profile=thorough --junitxml=rest.xml
python -m scripts.test_times times.xml rest.xml           the groups, as a Markdown table
python -m scripts.test_times times.xml --slowest 20
"""

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    """Tests of one subject.

    A group matches a test if `files` contains the test's file and the test's name starts with one of the prefixes in
    `tests`. If `tests` is empty, all tests of these files match. A test belongs to the first group that matches it.
    """

    name: str
    checks: str
    files: tuple[str, ...]
    tests: tuple[str, ...] = ()
    """Prefixes of test names, for single tests of a file whose other tests are in another group."""


GROUPS = (
    Group(
        "Slurm",
        "a real Slurm requeues a job at its time limit and when preempted; the run ends bit-identical to an "
        "undisturbed run",
        ("test_clusters",),
        ("test_a_slurm_job",),
    ),
    Group(
        "browser",
        "pages in Chromium at two widths, light and dark: overflow, contrast, hover and network requests",
        ("test_report_page",),
        ("test_pages_in_a_browser",),
    ),
    Group(
        "MMseqs2",
        "the bundled splits share no homologs; `split.check=mmseqs` removes held-out proteins that resemble training "
        "proteins; judge finds relatives of samples",
        ("test_build", "test_judge", "test_readme"),
        (
            "test_bundled_held_out",
            "test_homologs_of",
            "test_the_output_folder_reports",
            "test_the_commands_with_mmseqs",
        ),
    ),
    Group(
        "compiler",
        "a compiled run has the losses of an eager run, and compiles once for packs of all sizes",
        ("test_training",),
        ("test_a_compiled_run",),
    ),
    Group(
        "fault campaign",
        "kills, lost ranks, hangs, damaged checkpoints and a full disk: runs end bit-identical to undisturbed ones",
        ("test_faults",),
        ("test_the_short_fault_campaign", "test_the_fault_campaign"),
    ),
    Group(
        "README commands",
        "every command of the README, in order, in a copy of the repository with an empty HOME",
        ("test_readme",),
    ),
    Group(
        "maths",
        "graphs, noise, scores, losses, bounds and samplers against brute force and exact models",
        ("test_graph", "test_noise", "test_rates", "test_score", "test_loss", "test_likelihood", "test_sampling"),
    ),
    Group(
        "packing",
        "a sequence gives the same result alone and in a pack; packs and crops do not depend on the rank "
        "or worker; lengths that do not sum to the number of tokens are errors",
        ("test_batch", "test_attention", "test_rotary", "test_dit", "test_loader", "test_plan"),
    ),
    Group(
        "mixers",
        "test-time training equals gradient steps in float64; each block can have its own mixer; earlier configs "
        "with one mixer are still read",
        ("test_mixers", "test_ttt"),
    ),
    Group(
        "kinds of networks",
        "position encodings by their formulas and on every backend; every kind is trained, exported and used",
        ("test_positions", "test_kinds_of_networks"),
    ),
    Group(
        "data",
        "FASTA to store: every fault is a one-line error, any flipped bit is detected, a kill leaves no partial store",
        ("test_fasta", "test_encode", "test_tokenizer", "test_build", "test_store", "test_prepare", "test_download"),
    ),
    Group(
        "training and resume",
        "stop + resume is bit-identical to an undisturbed run; a run does not resume with another config, "
        "other data or other weights; optimizers; a model can be trained from the installed package alone",
        (
            "test_training",
            "test_trainer",
            "test_loop",
            "test_optim",
            "test_checkpoint",
            "test_finetune",
            "test_plan_of_a_run",
            "test_context",
        ),
    ),
    Group(
        "faults and DDP",
        "signals, time limits, lost ranks and loaders, damaged checkpoints; 1, 2 and 4 processes "
        "give the same run; ranks whose configs or stores differ are rejected",
        ("test_faults", "test_meeting"),
    ),
    Group(
        "two hosts",
        "two hosts simulated by network namespaces: both exit with an error if their configs or stores "
        "differ; network cuts and lost hosts do not change the run",
        ("test_hosts",),
    ),
    Group(
        "schedulers",
        "submitit, PBS and the Slurm launcher's config",
        ("test_clusters",),
    ),
    Group(
        "using a model",
        "sample, infill, evaluate, judge, variants, embed, linear probe, export and hub, a look inside a model",
        (
            "test_sample",
            "test_infill",
            "test_evaluate",
            "test_judge",
            "test_variants",
            "test_embed",
            "test_inspect",
            "test_steps",
            "test_linear_probe",
            "test_export",
        ),
    ),
    Group(
        "report page",
        "the page shows the contents of the run's files, and escapes them",
        ("test_report_page", "test_metrics"),
    ),
    Group(
        "configs and command line",
        "every config composes, every wrong config is a one-line error; help, exit codes, output errors",
        ("test_configs", "test_environment", "test_output", "test_warm"),
    ),
    Group(
        "scripts and docs",
        "benchmarks print the tables of the docs; a fault planted in the code makes a test fail; set-up",
        ("test_scripts", "test_architecture", "test_setup", "test_testing"),
    ),
    Group(
        "earlier versions",
        "seeded runs give the figures in the golden record, bit for bit on the machine that made it; files of earlier "
        "versions can be read, and their runs resumed",
        ("test_golden",),
    ),
    Group(
        "structure",
        "which modules may import which; annotated shapes are enforced; runs with and without "
        "PROTLIG_TYPECHECK=1 do not share bytecode",
        ("test_layering", "test_typecheck"),
    ),
)


def group_of(file: str, test: str) -> Group:
    """Return the group of a test (see Group).

    Raises:
        ValueError: no group lists the file.
    """
    for group in GROUPS:
        if file in group.files and (not group.tests or test.startswith(group.tests)):
            return group
    raise ValueError(f"tests/{file}.py is in no group; add it to GROUPS in scripts/test_times.py")


def read_times(path: Path) -> list[tuple[str, str, float]]:
    """Return file, test and seconds (including set-up and tear-down) of each test that ran, from JUnit XML."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is None:
            file = case.attrib["classname"].removeprefix("tests.")
            found.append((file, case.attrib["name"], float(case.attrib["time"])))
    return found


def table(times: list[tuple[str, str, float]]) -> list[str]:
    """Return a Markdown table with one row for each group."""
    counts: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for file, test, took in times:
        group = group_of(file, test)
        counts[group.name] += 1
        seconds[group.name] += took
    rows = ["| group | what is checked | files | tests | seconds |", "| --- | --- | --- | ---: | ---: |"]
    for group in GROUPS:
        files = ", ".join(file.removeprefix("test_") for file in group.files)
        numbers = f"{counts[group.name]} | {seconds[group.name]:.0f}"
        rows.append(f"| {group.name} | {group.checks} | {files} | {numbers} |")
    return [*rows, f"| all | | | {len(times)} | {sum(seconds.values()):.0f} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "xml", type=Path, nargs="+", help="files from pytest --junitxml; their tests are counted together"
    )
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
        slowest = sorted(times, key=lambda row: -row[2])[: arguments.slowest]
        lines = [f"{took:6.1f} s  {file}::{test}" for file, test, took in slowest]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
