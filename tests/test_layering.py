"""Who may import whom, and how large a file may grow: read off the source, not off sys.modules."""

import ast
import re
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "protlig_dd"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

# From the ground up. A room may import what stands on a lower floor, and itself; rooms of one floor do not know each
# other. Files that stand in no room are the verbs, and the package's own.
FLOORS = (
    ("system", "tokenizer"),
    ("batch",),
    ("runs", "model", "diffusion", "data"),
    ("config",),
    ("inference",),
    ("evaluation",),
    ("training",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONGEST, MEDIAN = 350, 150  # lines of a file
MOST_PARAMETERS = 8


def room_of(module: str) -> str:
    """The first part of its name within the package."""
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
def test_imports_go_downwards(module: str) -> None:
    room = room_of(module)
    floor = FLOOR_OF.get(room, len(FLOORS))
    for name in imports_of(MODULES[module]):
        other = room_of(name)
        assert other in FLOOR_OF, f"{module} imports {name}: a verb imports no other verb"
        assert other == room or FLOOR_OF[other] < floor, f"{module} imports {name}, which does not stand below it"


def test_only_verbs_and_training_see_the_config() -> None:
    below = {"system", "tokenizer", "batch", "runs", "model", "diffusion", "data"}
    files = [path for name, path in MODULES.items() if room_of(name) in below]
    assert len(files) > 30
    for path in files:
        assert not re.search(r"^\s*(import|from) omegaconf", path.read_text(), re.MULTILINE), path
        assert "cfg" not in path.read_text(), path


def test_files_are_short() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
    counts = sorted(lines.values())
    assert counts[len(counts) // 2] < MEDIAN


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function and method of the package, with the name of its module."""
    found = []
    for name, path in MODULES.items():
        nodes = ast.walk(ast.parse(path.read_text()))
        found += [(name, node) for node in nodes if isinstance(node, ast.FunctionDef)]
    return found


def test_no_function_takes_more_than_eight_parameters() -> None:
    for module, function in functions():
        arguments = function.args
        names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        names += [one.arg for one in (arguments.vararg, arguments.kwarg) if one is not None]
        taken = [name for name in names if name not in ("self", "cls")]
        assert len(taken) <= MOST_PARAMETERS, f"{module}.{function.name} takes {len(taken)} parameters"


def test_nothing_assigns_to_a_config() -> None:
    """`resolve` and what follows make others with dataclasses.replace."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                text = ast.unparse(target) if isinstance(target, ast.Attribute | ast.Subscript) else ""
                assert not re.match(r"(self\.)?(config|data|optim|control|trainer\.config)[.\[]", text), (
                    f"{name}: {text}"
                )


def test_earlier_places_of_public_functions_work() -> None:
    from protlig_dd.diffusion.graph import Absorbing
    from protlig_dd.model.attention import varlen_attention
    from protlig_dd.model.rotary import apply_rotary_pos_emb, rotary_cos_sin

    assert Absorbing.__module__ == "protlig_dd.diffusion.graphs.absorbing"
    assert varlen_attention.__module__ == "protlig_dd.model.mixers.attention"
    assert {one.__module__ for one in (apply_rotary_pos_emb, rotary_cos_sin)} == {"protlig_dd.model.positions.rotary"}
