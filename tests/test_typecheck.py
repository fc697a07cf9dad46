"""PROTLIG_TYPECHECK=1 enforces every annotated shape; without it, the project's own checks must still stand."""

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


def test_wrong_shapes_are_caught_with_the_variable_and_only_then(run_python: Command) -> None:
    checked = run_python("-c", WRONG_SHAPE, PROTLIG_TYPECHECK="1", PYTHONPATH=str(ROOT))
    assert checked.returncode == 1
    assert "TypeCheckError" in checked.stderr
    plain = run_python("-c", WRONG_SHAPE, PROTLIG_TYPECHECK="0", PYTHONPATH=str(ROOT))
    assert "TypeCheckError" not in plain.stderr


@pytest.mark.slow
def test_what_is_refused_is_refused_without_it_too(run_python: Command) -> None:
    tests = [
        f"{path.name}::{function.name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) == "refuses" for node in ast.walk(function))
    ]
    assert len(tests) > 10
    imported = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *imported, *tests]
    process = run_python(*command, cwd=ROOT / "tests", new=True, PROTLIG_TYPECHECK="0")
    assert process.returncode == 0, process.stdout
    assert "passed" in process.stdout


VERBS = ("embed", "evaluate", "export", "infill", "judge", "prepare", "report", "sample", "variants", "training")
# for each verb, as `python -m` starts it: its help, and whether functions of the module that was started are checked
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
def test_bytecode_of_checked_and_of_plain_runs_lies_apart(
    order: tuple[str, str], package: Path, run_python: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verb starts, and is checked or not, whatever ran before it in this checkout."""
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
        monkeypatch.delenv(name, raising=False)
    for checked in order:
        own = {"PYTHONPATH": str(package), "PROTLIG_TYPECHECK": checked}
        process = run_python("-c", START_ALL, *VERBS, cwd=package, **own)
        assert process.returncode == 0, process.stderr
        for verb in VERBS:
            assert f"{verb} checked: {checked == '1'}" in process.stdout.splitlines(), (order, checked)
    written = [path.name for path in (package / "protlig_dd").rglob("*.pyc")]
    assert any("sample" in name and "shapes" in name for name in written)
    assert any("sample" in name and "shapes" not in name for name in written)


@pytest.mark.slow
def test_checking_the_package_compiles_no_other_package(package: Path, tmp_path: Path) -> None:
    """einops is imported by the package: its bytecode stays where the interpreter looks for it."""
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
    assert {path.name.count(".") for path in folder.rglob("*.pyc")} == {2}  # name.cpython-311.pyc
