"""Who may import whom: read off the source, not off sys.modules."""

import ast
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "protlig_dd"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

PROCESS = ["diffusion.score", "diffusion.graph", "diffusion.noise", "diffusion.numerics"]
# longest matching prefix wins; each may import these and itself
ALLOWED = {
    "protlig_dd.tokenizer": [],
    "protlig_dd.batch": ["tokenizer"],
    "protlig_dd.data.fasta": [],
    "protlig_dd.data.encode": ["data.fasta", "tokenizer"],
    "protlig_dd.data.store": ["data.fasta", "tokenizer"],
    "protlig_dd.data.homology": [],
    "protlig_dd.data.build": ["data", "tokenizer", "runtime.files"],
    "protlig_dd.data.draws": [],
    "protlig_dd.data.plan": ["data.draws", "runtime.files"],
    "protlig_dd.data.loader": ["data.store", "data.plan", "data.draws", "batch"],
    "protlig_dd.model": ["batch", "tokenizer"],
    "protlig_dd.diffusion.noise": [],
    "protlig_dd.diffusion.rates": ["tokenizer"],
    "protlig_dd.diffusion.numerics": ["batch"],
    "protlig_dd.diffusion.substitution": ["diffusion.numerics", "diffusion.rates", "tokenizer"],
    "protlig_dd.diffusion.graph": ["diffusion.numerics", "diffusion.substitution", "tokenizer"],
    "protlig_dd.diffusion.score": ["diffusion.numerics", "diffusion.graph", "batch"],
    "protlig_dd.diffusion.loss": [*PROCESS, "batch"],
    "protlig_dd.diffusion.likelihood": [*PROCESS, "batch"],
    "protlig_dd.diffusion.sampling": [*PROCESS, "diffusion.likelihood", "batch", "tokenizer"],
    "protlig_dd.runtime": ["model", "diffusion", "batch", "tokenizer"],
    "protlig_dd.evaluation": ["runtime", "data", "diffusion", "model", "batch", "tokenizer"],
    "protlig_dd.training": ["evaluation", "runtime", "data", "diffusion", "model", "batch", "tokenizer"],
    "protlig_dd": ["evaluation", "runtime", "data", "diffusion", "model", "batch", "tokenizer"],  # the verbs
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith("protlig_dd.")}  # the package itself is its version


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downwards(module: str) -> None:
    layer = max((name for name in ALLOWED if f"{module}.".startswith(f"{name}.")), key=len)
    allowed = [layer] if layer != "protlig_dd" else []  # a verb imports no other verb
    allowed += [*(f"protlig_dd.{name}" for name in ALLOWED[layer])]
    for name in imports_of(MODULES[module]):
        assert any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed), f"{module} imports {name}"


def test_only_verbs_and_training_see_the_config() -> None:
    below = [path for name, path in MODULES.items() if ".".join(name.split(".")[:2]) in (
        "protlig_dd.model", "protlig_dd.diffusion", "protlig_dd.data", "protlig_dd.batch", "protlig_dd.tokenizer"
    )]  # fmt: skip
    assert len(below) > 10
    for path in below:
        assert "omegaconf" not in path.read_text(), path
        assert "cfg" not in path.read_text(), path
