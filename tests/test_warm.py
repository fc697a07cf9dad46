"""Forks of the warm interpreters behave like new interpreters, and each command imports all that it needs.

Warm interpreters have imported the libraries, or the libraries and the package, already (tests/warm.py).
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from protlig_dd.data.store import SequenceStore

from .conftest import ROOT, Command, Start, thorough, wait_for
from .esm import random_esm
from .test_training import overrides_for
from .warm import Server, start_server

PROBE = """
import atexit, os, sys, threading, time
what = sys.argv[1]
atexit.register(print, "at exit")
print(os.getcwd(), os.environ.get("MINE"), sys.path[0] == os.getcwd(), __name__, sys.argv[1:], sys.stdin.read())
if what == "text":
    sys.exit("some text")
if what == "number":
    sys.exit(7)
if what == "raise":
    {}["key"]
if what == "interrupt":
    raise KeyboardInterrupt
if what == "thread":
    threading.Thread(target=lambda: (time.sleep(0.2), print("from a thread"))).start()
if what == "leave":
    os._exit(3)
if what == "wait":
    open("waiting", "w").close()
    time.sleep(60)
"""


@pytest.fixture
def probe(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "probe.py").write_text(PROBE)
    return "-m", "probe"


@pytest.mark.parametrize("what", ["nothing", "text", "number", "raise", "interrupt", "thread", "leave"])
def test_a_fork_has_the_output_and_exit_code_of_a_new_interpreter(
    probe: tuple[str, str], what: str, warm: Server, libraries: Server, tmp_path: Path
) -> None:
    env = os.environ | {"MINE": "here"}
    new = subprocess.run(
        [sys.executable, *probe, what],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    for server in (warm, libraries):
        forked = server.run([*probe, what], cwd=tmp_path, env=env)
        assert (forked.returncode, forked.stdout) == (new.returncode, new.stdout)
        assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_a_fork_is_a_separate_process(
    probe: tuple[str, str], start: Start, run_python: Command, tmp_path: Path
) -> None:
    process = start(*probe, "wait")
    wait_for((tmp_path / "waiting").exists)
    assert process.pid != os.getpid()
    assert process.poll() is None
    assert os.getsid(process.pid) == process.pid  # `start` creates a session
    assert run_python(*probe, "nothing").returncode == 0  # this fork runs while the other fork waits
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


SPAWNING = """
import multiprocessing, os, signal, sys, time

def child(connection):
    connection.send("torch" in sys.modules)
    if connection.recv() == "exit":
        sys.exit(3)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    for what in ("exit", "SIGTERM", "SIGKILL"):
        parent_end, child_end = context.Pipe()
        process = context.Process(target=child, args=(child_end,))
        process.start()
        child_end.close()
        print("imported torch already:", parent_end.recv(), file=sys.stderr)
        parent_end.send(what)
        if what != "exit":
            os.kill(process.pid, signal.Signals[what])
        process.join()
        try:
            parent_end.recv()
        except (EOFError, ConnectionResetError):  # no process has the other end open any more
            print(what, process.exitcode, "gone")
"""


def test_processes_spawned_by_a_fork_have_the_right_exit_codes(run_python: Command, tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    for new in (False, True):
        process = run_python("-m", "spawning", new=new)
        assert process.stdout == "exit 3 gone\nSIGTERM -15 gone\nSIGKILL -9 gone\n", process.stderr
        assert process.stderr == f"imported torch already: {not new}\n" * 3


def test_a_command_that_a_fork_cannot_run_is_an_error(warm: Server, libraries: Server, tmp_path: Path) -> None:
    for server, name in ((warm, "PYTHONPATH"), (warm, "TORCH_LOGS"), (libraries, "TORCH_LOGS")):
        with pytest.raises(ValueError, match=f"{name}=/other, but the interpreter has read {name}=.* at import"):
            server.run(["-m", "probe"], cwd=tmp_path, env=os.environ | {name: "/other"})
    with pytest.raises(ValueError, match=r"a fork runs -m MODULE or -c PROGRAM, not python probe\.py"):
        warm.run(["probe.py"], cwd=tmp_path, env=os.environ)


def test_a_fork_of_the_libraries_interpreter_imports_the_package_anew(libraries: Server, tmp_path: Path) -> None:
    """The environment of the fork sets the shape checks and the folder from which the package is imported."""
    program = "import sys; print('torch' in sys.modules, 'protlig_dd' in sys.modules);"
    program += "import protlig_dd.batch; print(hasattr(protlig_dd.batch.PackedBatch.pack, '__wrapped__'))"
    for checked in ("0", "1"):
        process = libraries.run(["-c", program], cwd=tmp_path, env=os.environ | {"PROTLIG_TYPECHECK": checked})
        assert process.stdout == f"True False\n{checked == '1'}\n", process.stderr
    (tmp_path / "protlig_dd").mkdir()
    (tmp_path / "protlig_dd/__init__.py").write_text("print('another')\n")
    process = libraries.run(["-c", "import protlig_dd"], cwd=Path("/"), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout == "another\n", process.stderr


STARTING = """
import os, sys
from pathlib import Path
from tests.warm import READ_BY_LIBRARIES, Server, start_server
if sys.argv[1:]:
    server = Server(READ_BY_LIBRARIES, os.environ, sys.argv[1]).import_package(Path.cwd(), os.environ)
else:
    server = start_server(libraries=[])
fork = server.start(["-c", "import time; time.sleep(600)"], cwd=Path.cwd(), env=os.environ)
print(server.process.pid, fork.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("imported", ["nothing", "the package"])
def test_a_server_and_its_forks_end_with_the_process_that_started_it(imported: str, libraries: Server) -> None:
    libraries.connect().close()
    address = [libraries.address] if imported == "the package" else []
    killed = subprocess.run(
        [sys.executable, "-c", STARTING, *address], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    pids = killed.stdout.split()
    assert len(pids) == 2, killed.stderr
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: str) -> bool:
    """Whether the process runs; a zombie does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False).stdout.strip()
    return state != "" and not state.startswith("Z")


def test_a_server_that_cannot_start_reports_the_error(tmp_path: Path) -> None:
    server = start_server(libraries=["no_such_library"])
    other_client = Server((), {}, server.address)  # a client that did not start the server, as in other test processes
    for client in (server, other_client, server):
        with pytest.raises(RuntimeError, match=r"the interpreter that forks has ended: [\s\S]*No module named"):
            client.run(["-m", "probe"], cwd=tmp_path, env=os.environ)
    for client in (server, other_client):
        client.close()


def test_a_client_that_disconnects_early_does_not_stop_the_server(libraries: Server, tmp_path: Path) -> None:
    with libraries.connect() as connection, Path(os.devnull).open() as file:
        socket.send_fds(connection, [(1000).to_bytes(8, "big")], [file.fileno()])
        connection.sendall(b"{")
    assert libraries.run(["-c", "print('served')"], cwd=tmp_path, env=os.environ).stdout == "served\n"


def test_a_program_runs_as_the_main_module(libraries: Server, tmp_path: Path) -> None:
    program = "import pickle, sys\ndef f(): pass\nprint(pickle.loads(pickle.dumps(f)) is f, sys.argv, __name__)"
    new = subprocess.run([sys.executable, "-c", program, "a"], capture_output=True, text=True, check=True)
    assert libraries.run(["-c", program, "a"], cwd=tmp_path, env=os.environ).stdout == new.stdout


VERBS: dict[str, Callable[[Path, Path], list[str]]] = {
    "training": lambda run, store: overrides_for(SequenceStore(store), "out", "trainer.max_steps=1"),
    "prepare": lambda run, store: ["input=in.fasta", "output=out", "split.validation_fraction=0.2"],
    "sample": lambda run, store: [f"from={run}", "n=1", "steps=2", "output=out"],
    "infill": lambda run, store: [f"from={run}", "input=in.fasta", "free=[2]", "n=1", "steps=2", "output=out"],
    "evaluate": lambda run, store: [f"from={run}", f"input={store}", "draws=1", "max_sequences=2", "output=out"],
    "judge": lambda run, store: ["samples=in.fasta", f"natural={store}", "mmseqs=false", "bootstrap=2", "output=out"],
    "score": lambda run, store: [f"from={run}", "input=in.fasta", "output=out.csv"],
    "variants": lambda run, store: [f"from={run}", "target=one.fasta", "output=out.csv"],
    "embed": lambda run, store: [f"from={run}", "input=in.fasta", "output=out.npz"],
    "export": lambda run, store: [f"from={run}", "to=out"],
    "convert": lambda run, store: ["from=esm", "to=out"],
    "report": lambda run, store: [f"runs=[{run},{run}]", "output=out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_imports_all_that_it_needs(
    verb: str, trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    """By default only imports of the package's modules are tested. With --all, imports of libraries are tested too."""
    (tmp_path / "in.fasta").write_text("".join(f">p{i}\nMKV{'ACDE'[i % 4] * (i + 1)}\n" for i in range(8)))
    (tmp_path / "one.fasta").write_text(">p\nMKVA\n")
    if verb == "convert":
        random_esm(tmp_path / "esm")
    command = ["-m", f"protlig_dd.{verb}", *VERBS[verb](trained_run, store.path)]
    if thorough():
        process = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=os.environ | {"PROTLIG_TYPECHECK": "0"},
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )
    else:
        process = run_python(*command, new=True, PROTLIG_TYPECHECK="0")
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.rglob("out*"))
