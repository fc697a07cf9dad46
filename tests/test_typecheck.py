"""PROTLIG_TYPECHECK=1 enforces every annotated shape; without it, the project's own checks must still stand."""

from .conftest import ROOT, Command

WRONG_SHAPE = (
    "import torch; from protlig_dd.diffusion.graph import Absorbing; "
    "Absorbing().prior_kl(torch.zeros(3, dtype=torch.int64), torch.zeros(4))"
)


def test_wrong_shapes_are_caught_with_the_variable_and_only_then(run_python: Command) -> None:
    checked = run_python("-c", WRONG_SHAPE, PROTLIG_TYPECHECK="1", PYTHONPATH=str(ROOT))
    assert checked.returncode == 1
    assert "TypeCheckError" in checked.stderr
    plain = run_python("-c", WRONG_SHAPE, PROTLIG_TYPECHECK="0", PYTHONPATH=str(ROOT))
    assert "TypeCheckError" not in plain.stderr


def test_what_is_refused_is_refused_without_it_too(run_python: Command) -> None:
    modules = ["test_batch.py", "test_rotary.py", "test_attention.py", "test_dit.py", "test_likelihood.py"]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *modules]
    process = run_python(*command, cwd=ROOT / "tests", PROTLIG_TYPECHECK="0")
    assert process.returncode == 0, process.stdout
    assert "passed" in process.stdout
