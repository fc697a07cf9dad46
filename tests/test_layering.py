"""Which modules may import which, and how long files may be. The tests read the source, not sys.modules."""

import ast
import re
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "protlig_dd"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

# Folders and modules of the package, from the lowest layer to the highest. Each of them may import itself and all lower
# layers, but nothing else in its own layer. Other files, such as sample.py, are above all layers.
LAYERS = (
    ("system", "tokenizer"),
    ("batch",),
    ("runs", "model", "diffusion", "data"),
    ("config",),
    ("inference",),
    ("evaluation",),
    ("training",),
)
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}
LONGEST, MEDIAN = 350, 150  # limits on the number of lines of a file, and on the median over the files
COPIED = "protlig_dd.inference.modeling_protlig_dd"  # longer: exported models contain a copy, which must be one file
MOST_PARAMETERS = 8


def part_of(module: str) -> str:
    """Return the first part of the module's name within the package."""
    return module.removeprefix("protlig_dd").lstrip(".").partition(".")[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "protlig_dd"}
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith("protlig_dd.") and name != "protlig_dd.__version__"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_import_lower_layers_only(module: str) -> None:
    part = part_of(module)
    layer = LAYER_OF.get(part, len(LAYERS))
    for name in imports_of(MODULES[module]):
        other = part_of(name)
        assert other in LAYER_OF, f"{module} imports {name}, which is in no layer; verbs may not be imported"
        assert other == part or LAYER_OF[other] < layer, f"{module} imports {name}, which is not in a lower layer"


def test_lower_layers_do_not_read_configs() -> None:
    below = {"system", "tokenizer", "batch", "runs", "model", "diffusion", "data"}
    files = [path for name, path in MODULES.items() if part_of(name) in below]
    assert len(files) > 30
    for path in files:
        assert not re.search(r"^\s*(import|from) omegaconf", path.read_text(), re.MULTILINE), path
        assert "cfg" not in path.read_text(), path


def test_files_are_short() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST and name != COPIED} == {}
    counts = sorted(lines.values())
    assert counts[len(counts) // 2] < MEDIAN


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Return every function and method of the package, with the name of its module."""
    found = []
    for name, path in MODULES.items():
        nodes = ast.walk(ast.parse(path.read_text()))
        found += [(name, node) for node in nodes if isinstance(node, ast.FunctionDef)]
    return found


def test_no_function_takes_more_than_eight_parameters() -> None:
    for module, function in functions():
        arguments = function.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        names += [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
        parameters = [name for name in names if name not in ("self", "cls")]
        assert len(parameters) <= MOST_PARAMETERS, f"{module}.{function.name} takes {len(parameters)} parameters"


def test_nothing_assigns_to_a_config() -> None:
    """Code that changes a config creates a new config with dataclasses.replace."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                text = ast.unparse(target) if isinstance(target, ast.Attribute | ast.Subscript) else ""
                assert not re.match(r"(self\.)?(config|data|optim|control|trainer\.config)[.\[]", text), (
                    f"{name}: {text}"
                )


def test_public_functions_can_be_imported_from_their_earlier_modules() -> None:
    from protlig_dd.diffusion.graph import Absorbing
    from protlig_dd.model.attention import varlen_attention
    from protlig_dd.model.rotary import apply_rotary_pos_emb, rotary_cos_sin

    assert Absorbing.__module__ == "protlig_dd.diffusion.graphs.absorbing"
    assert varlen_attention.__module__ == "protlig_dd.model.mixers.attention"
    assert {function.__module__ for function in (apply_rotary_pos_emb, rotary_cos_sin)} == {
        "protlig_dd.model.positions.rotary"
    }
