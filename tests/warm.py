"""Start `python -m MODULE` in milliseconds: each run is a fork of one interpreter that has imported the package.

A fork is a process of its own: it has its own folder, environment, output, signals and exit code, and nothing that it
does reaches another test. It does not import torch, Hydra and scipy again, which is what most of a command's time goes
to. What only a new interpreter shows (import order, variables that are read at import, the end of the interpreter) is
tested with one.

    server = Server()
    server.run(["-m", "protlig_dd.sample", "--help"], cwd=folder, env=os.environ).stdout
    process = server.start(["-m", "protlig_dd.training", "experiment=demo"], cwd=folder, env=os.environ)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)

The server is this file as `python -m tests.warm SOCKET`. It ends when its standard input closes, which happens at the
latest when the process that started it is gone. With PYTHON_EXEC=server.executable in its environment, the processes
that a command starts are forks too: modules, through torchrun or sys.executable, and what multiprocessing spawns.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# Read when modules are imported: a fork would not see another value. PROTLIG_TYPECHECK is read then too: a fork is
# checked if the tests are, and the variable holds for the interpreters that it starts.
READ_AT_IMPORT = ("PYTHONPATH", "TORCH_LOGS", "MPLCONFIGDIR")
# a command of one thread, unless it asks for more; threads that wait keep no core busy
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# imported where they are used; torch's optimizers import torch._dynamo
ALSO = ("scipy.stats", "scipy.spatial.distance", "matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2",
        "torch._dynamo", "torch.utils.tensorboard", "torch.distributed.launcher.api",
        "Bio.Align.substitution_matrices")  # fmt: skip

# a `python` of which modules and spawned processes are forks
EXECUTABLE = """#!/bin/sh
[ "$1" = -u ] && shift
case "$*" in
    "-m "* | *"multiprocessing.spawn import spawn_main"*) exec {python} -S {root}/tests/warm.py {address} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""


class Server:
    """The interpreter that forks, for one process of the tests; its `executable` is a `python` that runs modules so."""

    def __init__(self, root: Path = ROOT, env: Mapping[str, str] = os.environ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.address = str(Path(self.folder.name) / "socket")
        self.environment = {name: env.get(name) for name in READ_AT_IMPORT}
        self.log = (Path(self.folder.name) / "log").open("w+")
        self.executable = Path(self.folder.name) / "python"
        self.executable.write_text(EXECUTABLE.format(python=sys.executable, root=root, address=self.address))
        self.executable.chmod(0o755)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", self.address],
            cwd=root, env=dict(env) | THREADS, start_new_session=True,
            stdin=subprocess.PIPE, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def start(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], new_session: bool = False
    ) -> "Process":
        """Fork for `["-m", MODULE, ...]`.

        Raises:
            ValueError: no module, or a variable that a fork would not see; such a command needs a new interpreter.
        """
        if arguments[0] != "-m":
            raise ValueError(f"only modules are run in a fork, not python {arguments[0]}")
        for name in READ_AT_IMPORT:
            if env.get(name) != self.environment[name]:
                raise ValueError(f"{name}={env.get(name)} is read at import, here {self.environment[name]}")
        connection = self.connect()
        outputs = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "new_session": new_session}
        with Path(os.devnull).open() as nothing:
            send(connection, request, {n: file.fileno() for n, file in enumerate((nothing, *outputs))})
        return Process(connection, outputs, list(arguments))

    def run(self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        process = self.start(arguments, cwd=cwd, env=env)
        try:
            output, errors = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode is not None
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def connect(self) -> socket.socket:
        """Wait for the server to have imported everything."""
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(self.address)
            except (FileNotFoundError, ConnectionRefusedError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.05)
                    connection.close()
                    self.log.seek(0)
                    raise RuntimeError(f"the interpreter that forks has ended: {self.log.read()}") from None
            else:
                return connection

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()
        self.folder.cleanup()


class Process:
    """The part of subprocess.Popen that the tests use; output goes to files."""

    def __init__(self, connection: socket.socket, outputs: tuple[Any, Any], arguments: list[str]) -> None:
        self.connection, self.args = connection, arguments
        self.stdout, self.stderr = outputs
        self.lines = connection.makefile("r")
        self.pid = int(self.lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self.connection], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self.lines.readline())
            self.lines.close()
            self.connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        texts = []
        for file in (self.stdout, self.stderr):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ends just now
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def send(connection: socket.socket, request: dict[str, Any], files: dict[int, int]) -> None:
    """Ask for a fork that has our file `files[n]` as its file n."""
    message = json.dumps(request | {"files": list(files)}).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], list(files.values()))
    connection.sendall(message)


def command(address: str, arguments: list[str]) -> NoReturn:
    """Be a command line: run in a fork with this process' environment and open files, and end as it ends.

    If this process is killed, so is the fork.
    """
    files = {n: n for n in range(256) if is_handed_on(n)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {"arguments": arguments, "cwd": str(Path.cwd()), "env": dict(os.environ), "new_session": False}
    send(connection, request, files)
    with connection.makefile("r") as lines:
        pid = int(lines.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(lines.readline())
    end(code)


def is_handed_on(file: int) -> bool:
    """Whether it is open, and whoever started us left it to us."""
    try:
        return os.get_inheritable(file)
    except OSError:
        return False


def end(code: int) -> NoReturn:
    """With this exit code; if it is negative, by that signal."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def serve(address: str) -> None:
    """Import everything once; then fork for each connection until standard input closes."""
    import_everything()
    gc.collect()
    gc.freeze()  # the collector writes to what it looks at, and a page that is written to is copied
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watching processes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                watch(connection)
            connection.close()


def import_everything() -> None:
    """Every module of the package but the verbs, what they import late, Hydra's plugins, and its parser's tables."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    import protlig_dd

    for module in pkgutil.iter_modules(protlig_dd.__path__, "protlig_dd."):
        if module.ispkg:
            package = importlib.import_module(module.name)
            for inner in pkgutil.walk_packages(package.__path__, f"{module.name}."):
                if not inner.name.endswith((".__main__", ".run_train_uniref50_optimized")):
                    importlib.import_module(inner.name)
    for name in ALSO:
        importlib.import_module(name)
    Plugins.instance()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose("train", ["experiment=demo", "optim.lr=0.1"])
    GlobalHydra.instance().clear()


def watch(connection: socket.socket) -> NoReturn:
    """Fork once more for the command itself; tell its process id, and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 100)
    if not header:  # somebody only waited for the server
        os._exit(0)
    size = int.from_bytes(header, "big")
    message = b""
    while len(message) < size:
        message += connection.recv(size - len(message))
    request = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(request, dict(zip(request["files"], descriptors, strict=True)))
    for descriptor in descriptors:  # a pipe ends when all who may write to it have gone
        os.close(descriptor)

    def end_with_who_asked() -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)  # nothing is ever sent: it returns when the other end is closed
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=end_with_who_asked, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], files: dict[int, int]) -> NoReturn:
    """Be `python ARGUMENTS`, from its first line to its end."""
    if request["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    moved = {n: fcntl.fcntl(file, fcntl.F_DUPFD, 1000) for n, file in files.items()}  # none is in another's place
    for file in files.values():
        os.close(file)
    for n, file in moved.items():
        os.dup2(file, n)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path[0] = request["cwd"]
    sys.path.append(str(ROOT))  # for scripts.*
    sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)
    multiprocessing.set_executable(sys.executable)
    # torch's launcher inspects its stack often; each time it would look for this file among all modules
    inspect.modulesbyfile[inspect.getabsfile(runpy.run_module)] = "runpy"
    code = 0
    try:
        start_as(request["arguments"])
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT  # so that a shell stops too
    except BaseException:
        traceback.print_exc()
        code = 1
    # as the interpreter ends
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    end(code)


def start_as(arguments: list[str]) -> None:
    """`-m MODULE ...`, or what multiprocessing spawns: `... -c PROGRAM ...`."""
    if arguments[0] == "-m":
        sys.argv = ["-m", *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        flag = arguments.index("-c")
        sys.argv = ["-c", *arguments[flag + 2 :]]
        exec(arguments[flag + 1], {"__name__": "__main__"})


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        command(sys.argv[1], sys.argv[2:])
