"""What cannot be printed never ends the work, and what is written follows the umask."""

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from protlig_dd.data.store import SequenceStore
from protlig_dd.runtime.checkpoint import complete_checkpoints
from protlig_dd.runtime.output import Unfailing, let_output_fail

from .conftest import Command, thorough
from .test_training import overrides_for
from .warm import Server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "reason"), [("| head -n 1", "Broken pipe"), ("> /dev/full", "No space left on device")]
)
def test_a_run_that_cannot_print_goes_on(
    redirection: str, reason: str, store: SequenceStore, tmp_path: Path, warm: Server
) -> None:
    options = overrides_for(store, "silent", "trainer.max_steps=25", "trainer.log_every=1")
    command = " ".join([str(warm.executable), "-m protlig_dd.training", *options])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHON_EXEC": str(warm.executable)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"stdout cannot be written ({reason}): the work goes on without it\n"
    assert (tmp_path / "runs/silent/report.json").is_file()
    assert complete_checkpoints(tmp_path / "runs/silent")[-1].name == "step_00000025"


def test_a_character_that_the_locale_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="iso-8859-2"))
    let_output_fail()
    let_output_fail()  # once is enough
    assert isinstance(sys.stdout, Unfailing)
    assert not isinstance(sys.stdout.stream, Unfailing)
    print("2.85 ± 0.01, größe")
    sys.stdout.flush()
    assert written.getvalue() == "2.85 ? 0.01, größe\n".encode("iso-8859-2")


@pytest.mark.slow
def test_who_may_read_what_is_written_follows_the_umask(trained_run: Path, tmp_path: Path, run_python: Command) -> None:
    """Of every verb's kinds of files, a checkpoint's and an export's tensors among them."""
    for mask, mode in ((0o077, 0o600), (0o002, 0o664))[: None if thorough() else 1]:
        folder = tmp_path / f"{mask:o}"
        folder.mkdir()
        (folder / "wt.fasta").write_text(">wt\nMKVLAWGCDEFH\n")
        code = (
            f"import os, runpy, sys; os.umask({mask}); sys.argv[:2] = ['x']; runpy.run_module('VERB', None, '__main__')"
        )
        source, alike = f"from={trained_run}", ["device=cpu", "precision=fp32"]
        for verb, *options in (
            ("sample", source, "output=a.fasta", "n=1", "steps=2", "lengths=9", *alike),
            ("infill", source, "input=wt.fasta", "output=b.fasta", "free=2", "n=1", "steps=2", "free_draws=2", *alike),
            ("variants", source, "target=wt.fasta", "output=c.csv", *alike),
            ("embed", source, "input=wt.fasta", "output=d.h5", *alike),
            ("prepare", "input=wt.fasta", "output=e.h5"),
            ("export", source, "to=model"),
        ):
            done = run_python("-c", code.replace("VERB", f"protlig_dd.{verb}"), verb, *options, cwd=folder)
            assert done.returncode == 0, done.stderr
        found = {
            path.relative_to(folder): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
        }
        found.pop(Path("wt.fasta"))
        assert len(found) > 12
        assert set(found.values()) == {mode}, found
