import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, assert_one_line_error


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "scripts/setup.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that set-up reads, with a stand-in interpreter that records pip's arguments."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt", "constraints-transformers4.txt"):
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
    _, installed, compiled, version_4 = calls.read_text().splitlines()
    assert installed.endswith("--no-compile -c constraints.txt -e .[dev,esm,hmm,hub,slurm,wandb]")
    assert "compileall" in compiled
    assert version_4.endswith("--no-deps --target .venv-transformers4 -r constraints-transformers4.txt")
    for arguments in ((), ("--dev",)):  # --dev has installed what training needs
        assert run_setup(checkout, *arguments, PYTHON=sys.executable).returncode == 0
    assert len(calls.read_text().splitlines()) == 4
    with (checkout / "constraints.txt").open("a") as file:
        file.write("six==1.17.0\n")
    assert run_setup(checkout, "--dev", PYTHON=sys.executable).returncode == 0
    assert len(calls.read_text().splitlines()) == 6
    with (checkout / "constraints-transformers4.txt").open("a") as file:
        file.write("six==1.17.0\n")
    assert run_setup(checkout, "--dev", PYTHON=sys.executable).returncode == 0
    assert len(calls.read_text().splitlines()) == 7


def test_set_up_succeeds_if_transformers_4_cannot_be_installed(checkout: Path) -> None:
    assert run_setup(checkout, "--dev", PYTHON=sys.executable).returncode == 0
    python, stamp = checkout / ".venv/bin/python", checkout / ".venv-transformers4/.protlig_setup"
    works = python.read_text()
    python.write_text(works.replace("#!/bin/sh\n", '#!/bin/sh\ncase "$*" in *transformers4*) exit 1 ;; esac\n'))
    stamp.write_text("of other versions")
    process = run_setup(checkout, "--dev", PYTHON=sys.executable)
    assert process.returncode == 0
    assert process.stderr == "transformers 4 cannot be installed; the test of exported models with it will be skipped\n"
    assert not stamp.parent.exists()
    python.write_text(works)
    assert run_setup(checkout, "--dev", PYTHON=sys.executable).returncode == 0
    assert stamp.is_file()


def test_a_failed_install_is_not_recorded_as_done(checkout: Path) -> None:
    (checkout / ".venv/bin/python").write_text('#!/bin/sh\n[ "$3" = --version ] || exit 3\n')
    assert run_setup(checkout, PYTHON=sys.executable).returncode == 3
    assert not (checkout / ".venv/.protlig_setup").exists()


def test_an_unknown_argument_is_an_error_and_help_is_printed(checkout: Path) -> None:
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


def test_a_verb_without_the_environment_prints_how_to_create_it(tmp_path: Path) -> None:
    """Run an interpreter without site-packages, in a checkout and in the folder of an installed wheel."""

    def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *arguments]
        env = os.environ | {"PYTHONPATH": "", "HYDRA_FULL_ERROR": "0", "PROTLIG_TYPECHECK": "0"} | environment
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)

    overview = run("-m", "protlig_dd")  # needs no packages
    assert overview.returncode == 0, overview.stderr
    verbs = re.findall(r"^([a-z]+) +[A-Z]", overview.stdout, re.MULTILINE)
    assert len(verbs) == 12
    for verb in (*verbs, "training.run_train_uniref50_optimized"):
        for typecheck in "01":
            process = run("-m", f"protlig_dd.{verb}", "--help", PROTLIG_TYPECHECK=typecheck)
            assert_one_line_error(process, "is not installed for", "run scripts/setup.sh in", ".venv/bin/python")
    # an installed wheel has no scripts/ next to the package
    shutil.copytree(ROOT / "protlig_dd", tmp_path / "site/protlig_dd", ignore=shutil.ignore_patterns("sample", "*.pyc"))
    assert_one_line_error(run("-m", "protlig_dd.sample", cwd=tmp_path / "site"), "pip install the wheel again")
    assert "Traceback" in run("-m", "protlig_dd.sample", HYDRA_FULL_ERROR="1").stderr
    assert "Traceback" in run("-c", "import protlig_dd.sample").stderr  # a user's own program gets the usual traceback
    unknown = run("-m", "protlig_dd.nosuch")
    assert "No module named protlig_dd.nosuch" in unknown.stderr
