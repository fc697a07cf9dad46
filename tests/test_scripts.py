"""The scripts behind the tables of the docs run, and their tables are in the docs."""

import re
from pathlib import Path

import pytest

from scripts import mutation_check
from scripts.diffusion_report import RUNS, samplers

from .conftest import ROOT, Command
from .test_sampling import NOISES, SAMPLERS


def test_the_sampler_table_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    samplers(chains=300, steps=[2, 4])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 7 + 3
    assert all(0 <= float(cell.strip(" |")) < 1 for row in rows[2:] for cell in row[1:])


@pytest.mark.slow
def test_a_mutation_fails_a_test_and_leaves_the_checkout_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = [m for m in mutation_check.MUTATIONS if m.what.startswith("Q[x, y]")]
    harmless = mutation_check.Mutation(
        "a comment", first.file, first.old, f"{first.old}  # kept", "tests/test_noise.py"
    )
    before = (ROOT / first.file).read_text()
    monkeypatch.setattr(mutation_check, "MUTATIONS", [first, harmless])
    assert mutation_check.main() == 1
    table = capsys.readouterr().out
    assert "tests/test_graph.py::test_score_entropy" in table
    assert "| a comment | substitution.py | **none** |" in table
    assert (ROOT / first.file).read_text() == before


def test_every_mutation_can_still_be_made() -> None:
    for mutation in mutation_check.MUTATIONS:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.what


def test_the_docs_hold_every_row_of_the_tables() -> None:
    rows = {line.split(" | ")[0].removeprefix("| ") for line in (ROOT / "docs/diffusion.md").read_text().splitlines()}
    missing = {mutation.what for mutation in mutation_check.MUTATIONS} - rows
    missing |= {", ".join(sampler) for sampler in SAMPLERS} - rows
    missing |= {f"{graph}, analytic, infilled" for graph in NOISES} - rows
    missing |= set(RUNS) - rows
    assert not missing


@pytest.mark.parametrize("name", ["diffusion.md", "likelihood.md", "multinode.md", "reliability.md", "scaling.md"])
def test_the_commands_of_the_docs_are_there(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    for command in re.findall(r"`python -m (scripts\.\w+)|`python (scripts/\w+\.py)", text):
        script = Path(command[1] or command[0].replace(".", "/") + ".py")
        assert (ROOT / script).is_file()


def test_the_files_that_the_docs_name_are_there() -> None:
    for document in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\b(?:scripts|configs)/[\w/]+\.\w+", document.read_text()):
            assert (ROOT / name).is_file(), f"{document.name}: {name}"


@pytest.mark.slow
def test_the_checkpoint_benchmark_prints_the_table_of_the_docs(run_python: Command) -> None:
    process = run_python(
        "-m", "scripts.benchmark_checkpoint", "--models", "tiny", "--repeats", "2", PYTHONPATH=str(ROOT)
    )
    assert process.returncode == 0, process.stderr
    heading, rule, row = process.stdout.splitlines()
    text = (ROOT / "docs/reliability.md").read_text()
    assert f"{heading}\n{rule}\n{row.split(' | ')[0]} | {row.split(' | ')[1]} | " in text


@pytest.mark.slow
def test_the_data_benchmark_prints_the_tables_of_the_docs(run_python: Command) -> None:
    sizes = ("--gigabytes", "0.01", "--sequences", "100000", "--repeats", "1", "--seconds", "1")
    process = run_python("-m", "scripts.benchmark_data", *sizes, PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr
    printed = [line for line in process.stdout.splitlines() if line.startswith("|")]
    documented = [line for line in (ROOT / "docs/scaling.md").read_text().splitlines() if line.startswith("|")]

    def shape(lines: list[str]) -> list[str]:
        """Headings, first cells, and how many columns each row has."""
        return [line if line.startswith(("| ---", *HEADINGS)) else str(line.count("|")) for line in lines]

    assert shape(printed) == shape(documented)
    assert len(printed) == 4 * 2 + 2 + 3 + 2 + 2


HEADINGS = ("| input |", "| at step |", "| tokens a pack |", "| model |")
