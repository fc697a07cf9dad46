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
latest when the process that started it is gone. With PYTHON_EXEC=server.executable in its environment, the modules that
a command starts are forks too, through torchrun or sys.executable.
"""

import atexit
import contextlib
import gc
import importlib
import json
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

# a `python` of which modules are forks
EXECUTABLE = """#!/bin/sh
[ "$1" = -u ] && shift
[ "$1" = -m ] && exec {python} -S {root}/tests/warm.py {address} "$@"
exec {python} "$@"
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
        flag, module, *rest = arguments
        if flag != "-m":
            raise ValueError(f"only modules are run in a fork, not python {flag}")
        for name in READ_AT_IMPORT:
            if env.get(name) != self.environment[name]:
                raise ValueError(f"{name}={env.get(name)} is read at import, here {self.environment[name]}")
        connection = self.connect()
        outputs = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        request = {"module": module, "arguments": rest, "cwd": str(cwd), "env": dict(env), "new_session": new_session}
        with Path(os.devnull).open() as nothing:
            send(connection, request, [file.fileno() for file in (nothing, *outputs)])
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
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def send(connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> None:
    """Ask for a fork, with its standard input, output and errors."""
    message = json.dumps(request).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], descriptors)
    connection.sendall(message)


def command(address: str, module: str, arguments: list[str]) -> NoReturn:
    """Be a command line: run in a fork with this process' own environment and files, and end with its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {"module": module, "arguments": arguments, "cwd": str(Path.cwd()), "env": dict(os.environ)}
    send(connection, request | {"new_session": False}, [0, 1, 2])
    with connection.makefile("r") as lines:
        pid = int(lines.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(lines.readline())
    sys.exit(code if code >= 0 else 128 - code)


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
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
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
        become(request, descriptors)
    with contextlib.suppress(BrokenPipeError):  # a test that was broken off listens no more
        connection.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Be `python -m MODULE ARGUMENTS`, from its first line to its exit code."""
    if request["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path[0] = request["cwd"]
    sys.path.append(str(ROOT))  # for scripts.*
    sys.argv = ["-m", *request["arguments"]]
    sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)
    code = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    # as the interpreter ends
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:  # it ends by the signal, so that a shell stops too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        command(sys.argv[1], sys.argv[3], sys.argv[4:])
