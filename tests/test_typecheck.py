"""PROTLIG_TYPECHECK=1 enforces every annotated shape. Without it the project's own checks must still raise."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Command

WRONG_SHAPE = (
    "import torch; from protlig_dd.diffusion.graphs.absorbing import Absorbing; "
    "Absorbing().prior_kl(torch.zeros(3, dtype=torch.int64), torch.zeros(4))"
)


def test_wrong_shapes_are_errors_only_if_the_variable_is_set(run_python: Command) -> None:
    checked = run_python("-c", WRONG_SHAPE, PROTLIG_TYPECHECK="1", PYTHONPATH=str(ROOT))
    assert checked.returncode == 1
    assert "TypeCheckError" in checked.stderr
    plain = run_python("-c", WRONG_SHAPE, PROTLIG_TYPECHECK="0", PYTHONPATH=str(ROOT))
    assert "TypeCheckError" not in plain.stderr


@pytest.mark.slow
def test_invalid_values_are_rejected_without_the_variable_too(run_python: Command) -> None:
    tests = [
        f"{path.name}::{function.name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
        if any(
            isinstance(node, ast.Call) and ast.unparse(node.func) == "raises_value_error" for node in ast.walk(function)
        )
    ]
    assert len(tests) > 10
    imported = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *imported, *tests]
    process = run_python(*command, cwd=ROOT / "tests", new=True, PROTLIG_TYPECHECK="0")
    assert process.returncode == 0, process.stdout
    assert "passed" in process.stdout


VERBS = (
    "convert",
    "embed",
    "evaluate",
    "export",
    "infill",
    "judge",
    "prepare",
    "report",
    "sample",
    "score",
    "variants",
    "training",
)
# for each verb, print its help as `python -m` does, and print whether the functions of its module are checked
START_ALL = """
import runpy, sys
for verb in sys.argv[1:]:
    sys.argv = [verb, "--help"]
    started = runpy.run_module(f"protlig_dd.{verb}", run_name="__main__", alter_sys=True)
    print(f"{verb} checked: {hasattr(started['main'], '__wrapped__')}")
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package and its configs without any bytecode, as in a fresh clone."""
    for folder in ("protlig_dd", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("order", [("1", "0"), ("0", "1")], ids=["checked, then plain", "plain, then checked"])
def test_checked_and_plain_runs_do_not_share_bytecode(
    order: tuple[str, str], package: Path, run_python: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command starts with or without checks, as requested, whatever ran before it in this checkout."""
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
        monkeypatch.delenv(name, raising=False)
    for checked in order:
        environment = {"PYTHONPATH": str(package), "PROTLIG_TYPECHECK": checked}
        process = run_python("-c", START_ALL, *VERBS, cwd=package, **environment)
        assert process.returncode == 0, process.stderr
        for verb in VERBS:
            assert f"{verb} checked: {checked == '1'}" in process.stdout.splitlines(), (order, checked)
    written = [path.name for path in (package / "protlig_dd").rglob("*.pyc")]
    assert any("sample" in name and "shapes" in name for name in written)
    assert any("sample" in name and "shapes" not in name for name in written)


@pytest.mark.slow
def test_checks_do_not_change_the_bytecode_of_other_packages(package: Path, tmp_path: Path) -> None:
    """The package imports einops, whose bytecode files must keep the names that the interpreter looks for."""
    (tmp_path / "site").mkdir()
    import einops

    assert einops.__file__ is not None
    folder = tmp_path / "site/einops"
    shutil.copytree(Path(einops.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [sys.executable, "-c", "import protlig_dd.model.dit"],
        cwd=package,
        check=True,
        env=environment | {"PYTHONPATH": f"{package}:{tmp_path / 'site'}", "PROTLIG_TYPECHECK": "1"},
    )
    assert {path.name.count(".") for path in folder.rglob("*.pyc")} == {2}  # two dots, as in name.cpython-311.pyc
