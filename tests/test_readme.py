"""Run the README's commands and Python blocks as a new user would: in a copy of the repository, with an empty HOME.

The commands are shortened to seconds: the overrides of SHORT are appended, and UniRef50 is downloaded from a server on
loopback that serves the bundled proteins. `./scripts/test.sh` is not run, because it would run this test. The set-up
finds an existing environment; test_setup.py tests how an environment is created.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from protlig_dd.data.fasta import read_fasta
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER

from .conftest import ROOT, require_program
from .esm import random_esm
from .test_download import serving
from .test_export import hub_server
from .warm import READ_BY_LIBRARIES, Server

Shell = Callable[..., str]

QUICK = "trainer.eval_every=0 report.draws=1 report.steps=4 report.max_sequences=4 report.untrained=false"
NARROW = "model.hidden_size=64 model.n_heads=2 model.n_blocks=1 model.cond_dim=16"
FULL_SIZE = f"{QUICK} {NARROW} trainer.max_steps=1 optim.packs_per_step=1 data.max_len=200 data.tokens_per_pack=400 "
FULL_SIZE += "report.samples=0"
SHORT = {
    "./start_fresh_training.sh": f"{QUICK} {NARROW} trainer.max_steps=6 report.samples=4",
    "run_train_uniref50_optimized": FULL_SIZE,
    "-m protlig_dd.training": f"{QUICK} {NARROW} trainer.max_steps=22 data.tokens_per_pack=600 report.samples=2",
    "protlig_dd.sample": "steps=4",
    "protlig_dd.infill": "steps=4",
    "protlig_dd.evaluate": "draws=2 max_sequences=20 near=false",
    "protlig_dd.judge": "bootstrap=5 mmseqs=false",
}
WITH_MMSEQS = "checked.h5"  # the store that the README builds with MMseqs2


def commands_of(page: str) -> list[str]:
    """Return the commands of a page's bash blocks, and its Python blocks as commands."""
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return [
        command
        for language, block in blocks
        for command in (block.splitlines() if language == "bash" else [f"python -c {shlex.quote(block)}"])
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git would clone, and the FASTA files that the README's commands expect from a user."""
    folder = tmp_path_factory.mktemp("clone") / "protlig_dd"
    list_files = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(list_files, capture_output=True, text=True, check=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    records = read_fasta(SAMPLE_FOLDER / "train.fasta.gz")
    for name, count in (("my", 300), ("a", 60), ("b", 20), ("c", 20)):
        text = "".join(f">{record.id}\n{record.sequence}\n" for record in itertools.islice(records, count))
        (folder / f"{name}.fasta").write_text(text)
    wild_type = next(r.sequence for r in read_fasta(SAMPLE_FOLDER / "test.fasta.gz") if 60 <= len(r.sequence) <= 90)
    (folder / "wt.fasta").write_text(f">wt\n{wild_type}\n")
    (folder / "partial.fasta").write_text(f">partial\n{wild_type[:20]}{'_' * 12}{wild_type[32:]}\n")
    random_esm(folder / "downloads/esm2")
    return folder


def shortened(command: str) -> str:
    for part, overrides in SHORT.items():
        if part in command and "--help" not in command and "plan=true" not in command:
            fixed = ("model.",) if "from=" in command else ()  # the network is that of the source run
            if "data.max_len=1022" in command:
                overrides = overrides.replace("data.tokens_per_pack=600", "data.tokens_per_pack=1100")
            kept = [o for o in overrides.split() if o.split("=")[0] not in command and not o.startswith(fixed)]
            return " ".join([command, *kept])
    return command


@pytest.fixture(scope="module")
def shell(checkout: Path, libraries: Server) -> Iterator[Shell]:
    """Run a command line in the checkout, as a new user's shell would.

    Modules (-m) run in forks of an interpreter that has imported the package of the checkout. Programs (-c) run in
    forks of an interpreter that has imported only the libraries (tests/warm.py).
    """
    (checkout / "home").mkdir()
    venv = checkout / "venv"  # a stand-in for .venv: pip does nothing, and the packages are those of the tests
    (venv / "bin").mkdir(parents=True)
    environment = {
        "HOME": str(checkout / "home"),
        "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
        "PROTLIG_VENV": str(venv),
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "PROTLIG_TYPECHECK": os.environ.get("PROTLIG_TYPECHECK", "0"),
    }
    environment |= {name: os.environ[name] for name in READ_BY_LIBRARIES if name in os.environ}
    server = libraries.import_package(checkout, environment)
    server.connect().close()
    environment["PYTHON_EXEC"] = str(server.executable)
    wrapper = venv / "bin/python"
    wrapper.write_text(
        f"""#!/bin/sh
[ "$1 $2" = "-m pip" ] && exit 0
[ "$1" = -c ] && exec {libraries.executable} "$@"
exec {server.executable} "$@"
"""
    )
    wrapper.chmod(0o755)

    def run(command: str, **variables: str) -> str:
        process = subprocess.run(
            ["bash", "-c", shortened(command)],
            cwd=checkout,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
        return process.stdout

    yield run
    server.close()


@pytest.fixture
def hub(checkout: Path) -> Iterator[dict[str, str]]:
    """Serve a random ESM-2 under every name on a hub; yield the environment variables with which it is downloaded."""
    with hub_server() as (address, files):
        files |= {path.name: path.read_bytes() for path in (checkout / "downloads/esm2").iterdir()}
        yield {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.mark.slow
def test_the_commands_work_in_order(checkout: Path, shell: Shell, hub: dict[str, str]) -> None:
    require_program("curl")
    commands = [command for command in commands_of("README.md") if WITH_MMSEQS not in command]
    assert len(commands) >= 12
    assert any("from_pretrained" in command for command in commands)
    outputs = {}
    with serving((SAMPLE_FOLDER / "train.fasta.gz").read_bytes()) as server:
        for command in commands:
            if command not in ("./scripts/test.sh", "source .venv/bin/activate") and "PIP_" not in command:
                outputs[command] = shell(command, UNIREF_URL=server.url, **hub)
    demo = outputs["./start_fresh_training.sh"]
    assert "run folder             runs/demo" in demo
    assert "NLL bound" in demo
    assert "unigram NLL" in demo
    assert "report page            runs/demo/report.html" in demo
    assert outputs["python -m protlig_dd.report runs=[runs/short]"] == "runs/short/report.html: short\n"
    assert (checkout / "comparison.html").is_file()
    assert (checkout / "designs.fasta").read_text().count(">demo_") == 10
    fixed = next(read_fasta(checkout / "partial.fasta")).sequence.replace("_", "")
    for record in read_fasta(checkout / "filled.fasta"):
        assert record.sequence[:20] + record.sequence[32:] == fixed
    assert "| bigram model, NLL |" in (checkout / "evaluation/report.md").read_text()
    assert "| 3-mers, divergence in nats |" in (checkout / "judged/table.md").read_text()
    resumed = outputs["python -m protlig_dd.training experiment=demo run.name=halves"]
    assert "resuming from runs/halves/checkpoints/step_00000020" in resumed
    assert len(list((checkout / "runs/lr_sweep").glob("*/report.json"))) == 2
    assert (checkout / "runs/uniref50_stable.1").is_dir()
    assert "data/uniref50.fasta.gz: release 2026_04" in outputs["scripts/download_uniref50.sh"]
    assert "data: data/uniref50.h5" in outputs["./run_train_uniref50_optimized.sh"]


@pytest.mark.slow
def test_the_commands_of_the_page_on_pretrained_models_work(checkout: Path, shell: Shell, hub: dict[str, str]) -> None:
    shutil.rmtree(checkout / "models", ignore_errors=True)  # the README's commands may have converted a model too
    commands = commands_of("docs/pretrained.md")
    assert len(commands) >= 8
    for command in commands:
        shell(command, **hub)
    for name in ("esm2_35m", "esm2_local"):
        assert (checkout / f"models/{name}/model.safetensors").is_file()
    assert len(list(read_fasta(checkout / "esm2_samples.fasta"))) == 5


@pytest.mark.slow
@pytest.mark.system
def test_the_commands_with_mmseqs_work(checkout: Path, shell: Shell) -> None:
    require_program("mmseqs")
    prepare, inspect = (command for command in commands_of("README.md") if WITH_MMSEQS in command)
    assert "held-out sequences similar to a training sequence (>= " in shell(prepare)
    assert "all checksums match" in shell(inspect)


def test_one_command_installs_the_cpu_wheel() -> None:
    """The command is not run, because PyTorch's index may be unreachable.

    The version of torch in constraints.txt allows 2.13.0 and 2.13.0+cpu, and pip prefers the latter.
    """
    (line,) = (command for command in commands_of("README.md") if "PIP_" in command)
    assert re.fullmatch(r"PIP_EXTRA_INDEX_URL=https://download\.pytorch\.org/whl/cpu scripts/setup\.sh", line)
    (pin,) = re.findall(r"^torch(==\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert SpecifierSet(pin).contains(Version(pin[2:] + "+cpu"))
    assert Version(pin[2:] + "+cpu") > Version(pin[2:])


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^):]+)\)", text):
        assert (ROOT / target).exists(), target
