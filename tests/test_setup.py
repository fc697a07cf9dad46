import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "scripts/setup.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that set-up reads, with a stand-in for the interpreter that records pip's arguments."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    venv = tmp_path / ".venv/bin"
    venv.mkdir(parents=True)
    recorded = f'case "$*" in *install* | *compileall*) echo "$@" >> {tmp_path}/calls ;; esac'
    (venv / "python").write_text(f"#!/bin/sh\n{recorded}\n")
    (venv / "python").chmod(0o755)
    return tmp_path


def test_a_second_set_up_does_nothing_until_a_requirement_changes(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = checkout / "calls"
    for _ in range(2):
        assert run_setup(checkout, PYTHON=sys.executable).returncode == 0
    assert len(calls.read_text().splitlines()) == 1
    assert "--compile -c constraints.txt -e ." in calls.read_text()
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    assert run_setup(checkout, "--dev", PYTHON=sys.executable).returncode == 0
    _, installed, compiled = calls.read_text().splitlines()
    assert installed.endswith("--no-compile -c constraints.txt -e .[dev,esm,hmm,hub,slurm,wandb]")
    assert "compileall" in compiled
    assert run_setup(checkout, PYTHON=sys.executable).returncode == 0  # dev includes what training needs
    assert len(calls.read_text().splitlines()) == 3
    with (checkout / "constraints.txt").open("a") as file:
        file.write("six==1.17.0\n")
    assert run_setup(checkout, "--dev", PYTHON=sys.executable).returncode == 0
    assert len(calls.read_text().splitlines()) == 5


def test_a_failed_install_is_not_taken_for_done(checkout: Path) -> None:
    (checkout / ".venv/bin/python").write_text('#!/bin/sh\n[ "$3" = --version ] || exit 3\n')
    assert run_setup(checkout, PYTHON=sys.executable).returncode == 3
    assert not (checkout / ".venv/.protlig_setup").exists()


def test_unknown_arguments_and_help(checkout: Path) -> None:
    process = run_setup(checkout, "--prod")
    assert process.returncode == 1
    assert process.stderr == "error: unknown argument --prod; see scripts/setup.sh --help\n"
    assert "--system" in run_setup(checkout, "--help").stdout
    tests = subprocess.run([str(ROOT / "scripts/test.sh"), "--help"], capture_output=True, text=True, check=True)
    assert tests.stdout.startswith("Set up and run what must pass")


def test_constraints_pin_every_requirement() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["dev"], *extras["slurm"], *extras["wandb"]]:
        assert requirement.split(">=")[0].lower() in pinned, requirement
    assert "torch==2.13.0\n" in (ROOT / "constraints.txt").read_text()
