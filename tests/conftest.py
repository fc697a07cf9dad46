"""Shared fixtures: real proteins, a small store, a small model, and functions that run commands."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from hypothesis import settings
from jaxtyping import TypeCheckError
from omegaconf import DictConfig

from protlig_dd.batch import PackedBatch
from protlig_dd.config.read import config_folder, read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.bundled import SAMPLE_FOLDER
from protlig_dd.data.store import SPLITS, SequenceStore
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.substitution import SubstitutionGraph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.model.positions import POSITIONS

from . import brute_force
from .warm import READ_BY_LIBRARIES, Process, Server, start_server

ROOT = Path(__file__).resolve().parents[1]

# `scripts/test.sh --all`, which .ci/run calls, selects the profile `thorough`
settings.register_profile("thorough", max_examples=60, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("project", settings.get_profile("thorough"), max_examples=20)
settings.load_profile("project")


def thorough() -> bool:
    """Whether to use as many examples, chains and steps as .ci/run."""
    return settings().max_examples == settings.get_profile("thorough").max_examples


# The models of the tests are small: one thread is as fast as several, and does not stall when another core is busy.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

Command = Callable[..., subprocess.CompletedProcess[str]]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]
Start = Callable[..., Process]


@pytest.fixture(scope="session")
def proteins() -> list[FastaRecord]:
    """The first 400 training proteins of the bundled sample."""
    records = read_fasta(SAMPLE_FOLDER / "train.fasta.gz")
    return [next(records) for _ in range(400)]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Return a function that fills a folder once and returns the folder's path.

    All test processes share the folder, so tests must not change it.
    """
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        path = root / "made_once" / name
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.done").exists():
                fill(path)
                (root / f"{name}.done").touch()
        return path

    return folder


@pytest.fixture(scope="session")
def store(proteins: list[FastaRecord], made_once: MadeOnce) -> SequenceStore:
    """A store of `proteins`: 360 to train on, 20 for validation and 20 for testing."""

    def fill(folder: Path) -> None:
        make_store(folder / "small.h5", proteins, train=360, held_out=20)

    return SequenceStore(made_once("store", fill) / "small.h5")


def make_store(path: Path, proteins: list[FastaRecord], *, train: int, held_out: int) -> None:
    """Build a store of the first `proteins`: `train` to train on, then `held_out` each for validation and testing."""
    records, inputs = iter(proteins), {}
    for split in SPLITS:
        inputs[split] = path.with_name(f"{split}.fasta")
        selected = itertools.islice(records, train if split == "train" else held_out)
        inputs[split].write_text("".join(f">{r.id} {r.description}\n{r.sequence}\n" for r in selected))
    build_store(inputs, path)


def marked(record: FastaRecord, designed: int = 12) -> str:
    """Return the record as FASTA, with `designed` consecutive residues in upper case and the others in lower case.

    Lower-case letters can mark context, which a model reads but does not design. A third of the lower-case residues are
    before the upper-case residues. A protein with at most `designed` residues is all upper case.
    """
    start = max(0, len(record.sequence) - designed) // 3
    middle, end = record.sequence[start : start + designed], record.sequence[start + designed :]
    return f">{record.id} {record.description}\n{record.sequence[:start].lower()}{middle}{end.lower()}\n"


@pytest.fixture(scope="session")
def marked_store(proteins: list[FastaRecord], made_once: MadeOnce) -> SequenceStore:
    """A store with the proteins and splits of `store`. In each protein, all residues except 12 are lower case."""

    def fill(folder: Path) -> None:
        rows, inputs = iter(proteins), {split: folder / f"{split}.fasta" for split in SPLITS}
        for split, path in inputs.items():
            path.write_text("".join(marked(r) for r in itertools.islice(rows, 360 if split == "train" else 20)))
        build_store(inputs, folder / "marked.h5")

    return SequenceStore(made_once("marked_store", fill) / "marked.h5")


TRAINED = [
    "experiment=demo",
    "run.name=small",
    "data.tokens_per_pack=1200",
    "data.max_len=300",
    "model.hidden_size=32",
    "model.n_heads=2",
    "trainer.max_steps=40",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.eval_every=20",
    "trainer.eval_max_sequences=10",
    "report.samples=3",
    "report.steps=4",
    "report.draws=2",
    "report.untrained=false",
]


@pytest.fixture(scope="session")
def trained_run(store: SequenceStore, python: Command, made_once: MadeOnce) -> Path:
    """The folder of a run of 40 steps on `store`, for tests of the commands that use a model."""

    def fill(folder: Path) -> None:
        process = python("-m", "protlig_dd.training", *TRAINED, f"data.path={store.path}", cwd=folder)
        assert process.returncode == 0, process.stderr

    return made_once("trained", fill) / "runs/small"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of test processes.

    PYTEST_XDIST_AUTO_NUM_WORKERS is used if it is set. Otherwise the number is one per core, plus one with `--all`, but
    at most 4. The additional process is useful because `--all` includes tests of schedulers and of hanging ranks, which
    mostly wait.
    """
    requested = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    return (
        int(requested)
        if requested
        else min(4, (os.cpu_count() or 1) + (config.getoption("hypothesis_profile") == "thorough"))
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # slow tests first
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def graph_of(name: str, n: int) -> Graph:
    """Return a graph of n states: `absorbing`, `uniform` or `substitution`.

    `substitution` has the rates of `brute_force.rate_matrix`.
    """
    if name == "substitution":
        return SubstitutionGraph(brute_force.rate_matrix(name, n).numpy())
    return {"absorbing": Absorbing, "uniform": Uniform}[name](n)


def exact_score_fn(toy: brute_force.Toy, parametrisation: str = "log_score") -> ScoreFn:
    """Return a ScoreFn with the exact scores of a toy distribution.

    It takes sequences of `toy.sites` residues. In a batch, either all sequences have <bos> and <eos>, or none has.
    """
    graph = graph_of(toy.graph, toy.n)
    states = torch.cartesian_prod(*[torch.arange(toy.n + (toy.graph == "absorbing"))] * toy.sites).view(-1, toy.sites)
    # the states of a sequence are the digits of its row number in `states`; `weights` has the values of the digits
    weights = (int(states.max()) + 1) ** torch.arange(toy.sites - 1, -1, -1)

    @functools.lru_cache(maxsize=4096)
    def table(sigma: float) -> torch.Tensor:
        """Return logits (states, sites, n) that give the exact scores at total noise `sigma`."""
        if parametrisation == "x0":
            return toy.posterior(states, sigma).log()
        flat = states.reshape(-1)
        zeros = torch.zeros(len(flat), toy.n, dtype=torch.float64)
        offset = graph.log_score(zeros, flat, torch.full((len(flat),), sigma, dtype=torch.float64))
        return toy.log_score(states, sigma) - offset.view(*states.shape, toy.n)

    def network(batch: PackedBatch, sigma: torch.Tensor) -> torch.Tensor:
        tokens = batch.tokens.view(len(sigma), -1)
        edges = (tokens.shape[1] - toy.sites) // 2
        index = (tokens[:, edges : edges + toy.sites] * weights).sum(1)
        logits = torch.empty(len(sigma), toy.sites, toy.n, dtype=torch.float64)
        for level in sigma.unique():
            at_level = sigma == level
            logits[at_level] = table(float(level))[index[at_level]]
        return F.pad(logits, (0, 0, edges, edges)).view(-1, toy.n)

    return ScoreFn(network, graph, LogLinearNoise(), parametrisation)


SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "n_heads": 4,
    "n_blocks": 2,
    "cond_dim": 16,
    "dropout": 0.0,
    "attention_backend": "sdpa",
    "norm": "layer",
    "mlp": "gelu",
    "qk_norm": False,
    "checkpointing": False,
}


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """Compose the shipped config `name` with overrides, as a command line does."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@functools.lru_cache
def train_config(*overrides: str) -> TrainConfig:
    """Return the training config with overrides. It is cached, so do not change it."""
    return read_config(composed(*overrides), TrainConfig)


def make_model(*, dropout: float = 0.0, seed: int = 0, **options: Any) -> DiT:
    """Return a small DiT. All weights are random, even those that a new model sets to zero.

    So every part of the network affects the output.
    """
    torch.manual_seed(seed)
    timed = options.pop("time_conditioning", True)
    if getattr(POSITIONS.get(options.get("positions", "rope")), "scaled", False):
        options.setdefault("sinusoid_scale", 0.02)
    config = ModelConfig(**{**SMALL_MODEL, "dropout": dropout, **options})
    model = DiT(config, config.attention_backend, time_conditioning=timed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_batch(lengths: list[int], seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    return PackedBatch.pack([torch.randint(0, 20, (length,), generator=generator) for length in lengths])


SERVER = pytest.StashKey[Server]()


def pytest_configure(config: pytest.Config) -> None:
    """Restore the default action of SIGHUP. If there are several test processes, start an interpreter for all of them.

    This is the interpreter of the fixture `libraries`. All test processes then run commands in its forks.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, processes inherit an ignored SIGHUP, but tests send it
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        config.stash[SERVER] = start_server()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    if SERVER in node.config.stash:
        node.workerinput["server"] = node.config.stash[SERVER].address


def pytest_unconfigure(config: pytest.Config) -> None:
    if SERVER in config.stash:
        config.stash[SERVER].close()


@pytest.fixture(scope="session")
def libraries(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The interpreter that has imported only the libraries. Its forks import the package, as a new interpreter does."""
    shared = getattr(request.config, "workerinput", {}).get("server")
    server = Server(READ_BY_LIBRARIES, os.environ, shared) if shared else start_server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def warm(libraries: Server) -> Iterator[Server]:
    """The interpreter that has imported the libraries and the package. Its forks do not import them again."""
    server = libraries.import_package(ROOT, os.environ)
    try:
        server.connect().close()  # wait until the imports have finished; the server's `executable` does not wait
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def python(warm: Server, libraries: Server) -> Command:
    """Return a function that runs `python ARGUMENTS` in the folder `cwd` and returns the completed process.

    A module (`-m`) and the processes that it starts run in forks of an interpreter that has imported the package
    (tests/warm.py).

    A program (`-c`), or a module with `new=True`, imports the package itself: it runs in a fork of an interpreter that
    has imported only the libraries. The Python processes that it starts are new interpreters. If `environment` sets a
    variable that libraries read at import, the program or module itself runs in a new interpreter too. Use `-c` or
    `new=True` to test effects of the import, and variables that the package reads at import.
    """

    def run(*arguments: str, cwd: Path, new: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | environment
        if arguments[0] == "-m" and not new:
            return warm.run(arguments, cwd=cwd, env={"PYTHON_EXEC": str(warm.executable)} | env)
        if not any(name in environment for name in READ_BY_LIBRARIES):
            return libraries.run(arguments, cwd=cwd, env=env)
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
        )

    return run


@pytest.fixture
def run_python(python: Command, tmp_path: Path) -> Command:
    """Return a function like that of `python`, which by default runs in `tmp_path`, the test's temporary folder."""

    def run(*arguments: str, cwd: Path = tmp_path, **options: Any) -> subprocess.CompletedProcess[str]:
        return python(*arguments, cwd=cwd, **options)

    return run


@pytest.fixture
def start(warm: Server, libraries: Server, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts `python ARGUMENTS` and returns the process without waiting for its end.

    The process has a session of its own. If it has not ended when the test ends, its process group is killed.
    """
    started: list[Process] = []

    def start_process(*arguments: str, new: bool = False, cwd: Path = tmp_path) -> Process:
        server, environment = (libraries, {}) if new else (warm, {"PYTHON_EXEC": str(warm.executable)})
        process = server.start(arguments, cwd=cwd, env=environment | os.environ, new_session=True)
        started.append(process)
        return process

    yield start_process
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for file in (process.stdout, process.stderr):
            file.close()


@pytest.fixture
def spawned_in_forks(warm: Server) -> Iterator[None]:
    """Let the processes that a test spawns with multiprocessing run in forks of `warm`."""
    multiprocessing.set_executable(str(warm.executable))
    yield
    multiprocessing.set_executable(sys.executable)


RESUMES = "; the same command resumes the run, unless it sets run.fresh=true"  # end of a stopped run's message


def assert_one_line_error(process: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Check that the exit code is 1 and stderr is one line, which starts with `error: ` and contains all `parts`."""
    assert process.returncode == 1, process.stdout + process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait until the condition is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Return the process ids of a process's children that are running."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for task in tasks for child in map(int, task.read_text().split()) if is_running(child)]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def node_of_two() -> list[str]:
    """Return the arguments of `python` that start torchrun on one of two nodes.

    The two nodes connect over the loopback interface.
    """
    return [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=pair",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    ]


def require_program(name: str) -> None:
    """Skip the test if a system program is not installed. With PROTLIG_REQUIRE_SYSTEM=1 the test fails instead."""
    require(shutil.which(name) is not None, f"{name} is not installed (scripts/setup.sh --system)")


def require(available: bool, message: str) -> None:
    """Skip the test if a requirement is not available. With PROTLIG_REQUIRE_SYSTEM=1 the test fails instead."""
    if not available and os.environ.get("PROTLIG_REQUIRE_SYSTEM") == "1":
        pytest.fail(message)
    if not available:
        pytest.skip(message)


@contextlib.contextmanager
def raises_value_error(message: str) -> Iterator[None]:
    """Expect a ValueError in which the regular expression `message` is found.

    With PROTLIG_TYPECHECK=1 an error of jaxtyping is accepted too, because jaxtyping may reject an argument first.
    test_typecheck.py runs all tests that use this function again with PROTLIG_TYPECHECK=0, so that both errors are
    tested.
    """
    checked = os.environ.get("PROTLIG_TYPECHECK") == "1"
    with pytest.raises((ValueError, TypeCheckError) if checked else ValueError) as error:
        yield
    if not isinstance(error.value, TypeCheckError):
        assert re.search(message, str(error.value)), error.value
