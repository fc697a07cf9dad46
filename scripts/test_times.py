"""Print what each group of tests checks and how long the group takes, as in the table of docs/testing.md.

    scripts/test.sh --junitxml=times.xml
    scripts/test.sh -m "system or campaign" --hypothesis-profile=thorough --junitxml=rest.xml
    python -m scripts.test_times times.xml rest.xml           a Markdown table with a row for each group
    python -m scripts.test_times times.xml --slowest 20       the 20 slowest tests

The first two commands run the tests and write the XML files.
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
    """Prefixes of test names. They are set if other tests of the same files belong to another group."""


GROUPS = (
    Group(
        "Slurm",
        "a real Slurm requeues a job at its time limit and after preemption; the run ends bit-identical to an "
        "undisturbed run",
        ("test_clusters",),
        ("test_a_slurm_job",),
    ),
    Group(
        "browser",
        "in Chromium, at two widths, in light and dark mode: pages do not overflow, texts have enough contrast, values "
        "appear under the pointer, and nothing is fetched from the network",
        ("test_report_page",),
        ("test_pages_in_a_browser",),
    ),
    Group(
        "MMseqs2",
        "the bundled splits share no homologs; `split.check=mmseqs` removes held-out proteins that resemble training "
        "proteins; `judge` finds training proteins that resemble samples",
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
        "a compiled run has the same losses as an eager run, and compiles only once for packs of all sizes; a long run "
        "on a CPU is compiled, and resumes bit-identically",
        ("test_training", "test_lora"),
        ("test_a_compiled_run", "test_a_long_run_on_a_cpu"),
    ),
    Group(
        "fault campaign",
        "kills, lost ranks, hangs, damaged checkpoints and a full disk: runs end bit-identical to undisturbed ones",
        ("test_faults",),
        ("test_the_short_fault_campaign", "test_the_fault_campaign"),
    ),
    Group(
        "README commands",
        "every command of the README works; the commands run in order, in a copy of the repository with an empty HOME",
        ("test_readme",),
    ),
    Group(
        "maths",
        "graphs, noise, scores, losses, bounds and samplers agree with brute force and exact models",
        ("test_graph", "test_noise", "test_rates", "test_score", "test_loss", "test_likelihood", "test_sampling"),
    ),
    Group(
        "packing",
        "a sequence gives the same result alone and in a pack; packs and crops do not depend on the rank "
        "or worker; lengths that do not sum to the number of tokens are errors",
        ("test_batch", "test_attention", "test_matmul", "test_rotary", "test_dit", "test_loader", "test_plan"),
    ),
    Group(
        "order of an epoch",
        "with data.order=blocks an epoch reads each sequence at most once, whatever the ranks, the workers and the "
        "step at which a run starts; a rank needs no memory in proportion to the number of sequences",
        ("test_blocks",),
    ),
    Group(
        "mixers",
        "the mixers of test-time training compute the same as plain gradient steps in float64; each block can have its "
        "own mixer; earlier configs with one mixer for all blocks are still read",
        ("test_mixers", "test_ttt"),
    ),
    Group(
        "kinds of networks",
        "position encodings follow their formulas on every backend; networks of every kind can be trained, exported "
        "and used",
        ("test_positions", "test_kinds_of_networks"),
    ),
    Group(
        "data",
        "from FASTA to store: every wrong input is a one-line error, any flipped bit of a store is detected, a kill "
        "leaves no partial store",
        (
            "test_fasta",
            "test_encode",
            "test_tokenizer",
            "test_build",
            "test_store",
            "test_prepare",
            "test_prepare_workers",
            "test_workers",
            "test_download",
            "test_members",
        ),
    ),
    Group(
        "training and resume",
        "a run that was stopped and resumed ends bit-identical to an undisturbed run; a run does not resume with "
        "another config, other data or other weights; optimizers follow their formulas; a model can be trained from "
        "the installed package alone",
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
        "adapters",
        "low-rank adapters follow their formula; runs train them and nothing else, resume bit for bit, and are used, "
        "exported and fine-tuned as merged models; the plan counts what they cost",
        ("test_lora",),
    ),
    Group(
        "faults and DDP",
        "signals and time limits stop a run with a checkpoint; errors name lost ranks and loaders; damaged checkpoints "
        "are skipped; 1, 2 and 4 processes give the same run; ranks whose configs or stores differ are rejected",
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
        "jobs of submitit and PBS continue after their time limit; Hydra composes the config of the Slurm launcher",
        ("test_clusters",),
    ),
    Group(
        "using a model",
        "the commands `sample`, `infill`, `evaluate`, `score`, `judge`, `variants`, `embed` and `export`; their "
        "figures in Python; the linear probe; a model can be pushed to a hub and pulled; attention maps, hooks and "
        "single sampling steps in Python",
        (
            "test_sample",
            "test_infill",
            "test_evaluate",
            "test_judge",
            "test_variants",
            "test_embed",
            "test_score_verb",
            "test_python",
            "test_inspect",
            "test_steps",
            "test_linear_probe",
            "test_export",
        ),
    ),
    Group(
        "pretrained models",
        "a converted ESM-2 has the logits, gradients, embeddings and mutation scores that transformers computes; a "
        "source that is not ESM-2 is a one-line error that names the difference",
        ("test_convert",),
    ),
    Group(
        "transformers",
        "exported models have the same logits, hidden states, gradients and token ids in transformers 5 and in version "
        "4; every weight is loaded; wrong inputs and weights are errors",
        ("test_transformers",),
    ),
    Group(
        "report page",
        "the page shows the contents of the run's files, and escapes HTML in them",
        ("test_report_page", "test_metrics"),
    ),
    Group(
        "configs and command line",
        "every config composes; every wrong config is a one-line error; help explains every key; a run that cannot "
        "print continues; an error names a file that cannot be written",
        ("test_configs", "test_environment", "test_output", "test_warm"),
    ),
    Group(
        "scripts and docs",
        "benchmarks print the tables of the docs; `mutation_check` plants a fault in the code and names the test "
        "that fails; a second run of `scripts/setup.sh` does nothing unless a requirement has changed",
        ("test_scripts", "test_architecture", "test_setup", "test_testing"),
    ),
    Group(
        "earlier versions",
        "seeded runs give the figures that an earlier version recorded, bit for bit on the machine of the record; "
        "files of earlier versions can be read, and their runs can be resumed",
        ("test_golden",),
    ),
    Group(
        "structure",
        "modules import only lower layers; wrong shapes are errors with PROTLIG_TYPECHECK=1; runs with and without "
        "this variable do not share bytecode",
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
    """Read JUnit XML, and return (file, test, seconds) of each test that ran. Seconds include set-up and tear-down."""
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
