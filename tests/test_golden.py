"""Compare seeded runs with the results of an earlier version, and read the files that the earlier version wrote.

tests/golden/make.py records the results and writes the files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from protlig_dd.data.store import SequenceStore
from protlig_dd.tokenizer import AMINO_ACIDS

from .conftest import Command, assert_one_line_error
from .golden import make

GOLDEN = Path(make.__file__).parent
RECORD: dict[str, Any] = json.loads((GOLDEN / "record.json").read_text())
SAME_MACHINE = make.machine() == RECORD["machine"]
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the files of the earlier version, and the proteins that these files were made from."""
    shutil.copytree(GOLDEN / "files", tmp_path, dirs_exist_ok=True)
    make.write_proteins(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", make.MODELS)
def test_seeded_runs_reproduce_the_record(model: str, folder: Path, python: Command) -> None:
    found, expected = make.record(python, folder, model), RECORD["models"][model]
    if SAME_MACHINE:  # sums are rounded differently on other machines
        assert found == expected
    assert found["losses"][:5] == pytest.approx(expected["losses"][:5], rel=1e-3)
    for fasta in found["samples"].values():
        designs = [line for line in fasta if not line.startswith(">")]
        assert len(designs) == 8
        assert all(30 <= len(design) <= 60 and set(design) <= set(AMINO_ACIDS) for design in designs)


def test_files_of_an_earlier_version_are_read_and_continued(folder: Path, python: Command) -> None:
    found, expected = make.continued(python, folder), RECORD["continued"]
    if SAME_MACHINE:
        assert found == expected
    before = make.STEPS // 2
    assert len(found["losses"]) == make.STEPS
    assert found["losses"][:before] == expected["losses"][:before]  # losses before the stop are not computed again
    assert found["losses"][before : before + 5] == pytest.approx(expected["losses"][before : before + 5], rel=1e-3)
    assert [len(line) for line in found["samples"] if not line.startswith(">")] == [40] * 4


def test_the_same_proteins_give_a_store_with_the_same_fingerprint(folder: Path, python: Command) -> None:
    earlier = SequenceStore(folder / "store.h5").fingerprint
    (folder / "store.h5").unlink()
    make.make_store(python, folder)
    assert SequenceStore(folder / "store.h5").fingerprint == earlier


def test_an_earlier_run_cannot_be_resumed_with_another_model(folder: Path, python: Command) -> None:
    done = python("-m", "protlig_dd.training", *make.SMALLER, "data.path=store.h5", "model.n_blocks=2", cwd=folder)
    assert_one_line_error(done, "model.n_blocks: 1 -> 2", "run.fresh=true")
