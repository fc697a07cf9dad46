"""Commands continue if their output cannot be printed, files follow the umask, and errors name unwritable files."""

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from protlig_dd.data.store import SequenceStore
from protlig_dd.runs.checkpoint import complete_checkpoints
from protlig_dd.system.output import TolerantStream, tolerate_output_errors

from .conftest import Command, thorough
from .test_training import overrides_for
from .warm import Server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "reason"), [("| head -n 1", "Broken pipe"), ("> /dev/full", "No space left on device")]
)
def test_a_run_that_cannot_print_continues(
    redirection: str, reason: str, store: SequenceStore, tmp_path: Path, warm: Server
) -> None:
    options = overrides_for(store, "silent", "trainer.max_steps=25", "trainer.log_every=1")
    command = " ".join([str(warm.executable), "-m protlig_dd.training", *options])
    process = subprocess.run(
        ["bash", "-c", f"{command} {redirection}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHON_EXEC": str(warm.executable)},
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == f"stdout cannot be written ({reason}): the command continues without it\n"
    assert (tmp_path / "runs/silent/report.json").is_file()
    assert complete_checkpoints(tmp_path / "runs/silent")[-1].name == "step_00000025"


def test_a_character_that_the_locale_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="iso-8859-2"))
    tolerate_output_errors()
    tolerate_output_errors()  # a second call has no effect
    assert isinstance(sys.stdout, TolerantStream)
    assert not isinstance(sys.stdout.stream, TolerantStream)
    print("2.85 ± 0.01, größe")
    sys.stdout.flush()
    assert written.getvalue() == "2.85 ? 0.01, größe\n".encode("iso-8859-2")


@pytest.mark.slow
def test_the_permissions_of_written_files_follow_the_umask(
    trained_run: Path, tmp_path: Path, run_python: Command
) -> None:
    """Check all files that the commands below write, including the tensors of an exported model."""
    for mask, mode in ((0o077, 0o600), (0o002, 0o664))[: None if thorough() else 1]:
        folder = tmp_path / f"{mask:o}"
        folder.mkdir()
        (folder / "wt.fasta").write_text(">wt\nMKVLAWGCDEFH\n")
        code = (
            f"import os, runpy, sys; os.umask({mask}); sys.argv[:2] = ['x']; runpy.run_module('VERB', None, '__main__')"
        )
        source, common = f"from={trained_run}", ["device=cpu", "precision=fp32"]
        for verb, *options in (
            ("sample", source, "output=a.fasta", "n=1", "steps=2", "lengths=9", *common),
            ("infill", source, "input=wt.fasta", "output=b.fasta", "free=2", "n=1", "steps=2", "free_draws=2", *common),
            ("variants", source, "target=wt.fasta", "output=c.csv", *common),
            ("embed", source, "input=wt.fasta", "output=d.h5", *common),
            ("prepare", "input=wt.fasta", "output=e.h5"),
            ("export", source, "to=model"),
        ):
            process = run_python("-c", code.replace("VERB", f"protlig_dd.{verb}"), verb, *options, cwd=folder)
            assert process.returncode == 0, process.stderr
        modes = {
            path.relative_to(folder): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
        }
        modes.pop(Path("wt.fasta"))
        assert len(modes) > 12
        assert set(modes.values()) == {mode}, modes


LIMITED = """import os, resource, runpy
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the test's stdout is a file, which would be limited too
resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, SIZE))
runpy.run_module("VERB", run_name="__main__")"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "limit", "file", "options"),
    [
        ("sample", 400, "out.fasta", ["from=RUN", "n=9", "steps=2", "output=out.fasta"]),
        (
            "infill",
            400,
            "out.map.csv",
            ["from=RUN", "input=wt.fasta", "free=2-9", "n=30", "steps=2", "free_draws=2", "output=out.fasta"],
        ),
        ("evaluate", 400, "out", ["from=RUN", "input=wt.fasta", "draws=1", "near=false", "output=out"]),
        ("judge", 400, "out", ["samples=wt.fasta", "natural=STORE", "mmseqs=false", "bootstrap=2", "output=out"]),
        ("variants", 400, "out.json", ["from=RUN", "target=wt.fasta", "output=out.csv"]),
        ("embed", 400, "out.npz", ["from=RUN", "input=wt.fasta", "output=out.npz"]),
        ("embed", 400, "out.h5", ["from=RUN", "input=wt.fasta", "output=out.h5"]),
        ("export", 400, "out", ["from=RUN", "to=out"]),
        ("export", 60_000_000, None, ["from=RUN", "to=out"]),  # a limit above the size of the export
        ("report", 400, "out.html", ["runs=[RUN]", "output=out.html"]),
        ("training", 400, "runs/out/environment.json", []),
        ("training", 6000, "runs/out/metrics.jsonl", []),
        ("training", 50_000, "checkpoints/step_00000002/model.safetensors", []),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    verb: str,
    limit: int,
    file: str | None,
    options: list[str],
    trained_run: Path,
    store: SequenceStore,
    tmp_path: Path,
    run_python: Command,
) -> None:
    """The limit on file sizes acts like a full disk: writing fails in the middle of a file."""
    (tmp_path / "wt.fasta").write_text(">wt\nMKVLAWGCDEFH\n")
    before = {path.name for path in tmp_path.iterdir()}
    overrides = [option.replace("RUN", str(trained_run)).replace("STORE", str(store.path)) for option in options]
    overrides += (
        ["device=cpu", "precision=fp32"] if verb in ("sample", "infill", "evaluate", "variants", "embed") else []
    )
    if verb == "training":
        steps = 2 if limit > 6000 else 30  # until the checkpoint at the end, or until metrics.jsonl reaches the limit
        overrides = overrides_for(store, "out", f"trainer.max_steps={steps}", "trainer.log_every=1", "report.samples=0")
        overrides.append("logger.tensorboard=false")
    code = LIMITED.replace("(SIZE, SIZE)", f"({limit}, {limit})").replace("VERB", f"protlig_dd.{verb}")
    process = run_python("-c", code, *overrides, HYDRA_FULL_ERROR="0")
    if file is None:
        assert process.returncode == 0, process.stderr
        return
    assert process.returncode == 1
    line = process.stderr.strip().splitlines()[-1]
    assert "File too large" in line
    assert file in line
    if verb != "training":
        assert file == "out.h5" or len(process.stderr.splitlines()) == 1, process.stderr  # h5py prints more lines
        assert {path.name for path in tmp_path.iterdir()} == before
