"""Start `python -m MODULE` in milliseconds: each run is a fork of an interpreter that has imported what it needs.

A fork is a process of its own: it has its own folder, environment, output, signals and exit code, and nothing that it
does reaches another test. It does not import torch, Hydra and scipy again, which is what most of a command's time goes
to. There are two interpreters to fork from: one has imported the libraries, the other, a fork of it, the package too.

    libraries = start_server()
    warm = libraries.import_package(ROOT, os.environ)
    warm.run(["-m", "protlig_dd.sample", "--help"], cwd=folder, env=os.environ).stdout
    process = warm.start(["-m", "protlig_dd.training", "experiment=demo"], cwd=folder, env=os.environ)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)

The first is this file as `python warm.py libraries SOCKET NAME ...`. It ends when its standard input closes, which
happens at the latest when the process that started it is gone; the second ends with the process that asked for it. With
PYTHON_EXEC=warm.executable in its environment, the processes that a command starts are forks too: modules, through
torchrun or sys.executable, and what multiprocessing spawns.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Read when libraries are imported: a fork would not see another value.
READ_BY_LIBRARIES = ("TORCH_LOGS", "TORCH_COMPILE_DISABLE", "MPLCONFIGDIR")
# And by the package. PROTLIG_TYPECHECK is read then too: a fork is checked if the tests are, and the variable holds for
# the interpreters that it starts.
READ_BY_PACKAGE = (*READ_BY_LIBRARIES, "PYTHONPATH")
# a command of one thread, unless it asks for more; threads that wait keep no core busy
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# what the package imports, also where it is used only; torch's optimizers import torch._dynamo
LIBRARIES = (
    "Bio.Align.substitution_matrices",
    "beartype",
    "einops",
    "h5py",
    "hydra.main",
    "isal.igzip",
    "jaxtyping",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "omegaconf",
    "rich.progress",
    "safetensors.torch",
    "scipy.spatial.distance",
    "scipy.stats",
    "torch._dynamo",
    "torch.distributed.launcher.api",
    "torch.utils.tensorboard",
    "xxhash",
)

# a `python` of which modules, programs and spawned processes are forks
EXECUTABLE = """#!/bin/sh
[ "$1" = -u ] && shift
case "$*" in
    # submitit knows this one by its process id; the other is small
    "-m submitit.local._local "* | *"multiprocessing.resource_tracker import main"*) exec {python} "$@" ;;
    "-m "* | "-c "* | *"multiprocessing.spawn import spawn_main"*) exec {python} -S {file} command {address} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""


def start_server(
    env: Mapping[str, str] = os.environ, libraries: Sequence[str] = LIBRARIES, inside: Sequence[str] = ()
) -> "Server":
    """An interpreter that has imported the libraries and not the package.

    Args:
        inside: a command that runs another one in its own place, as unshare does.
    """
    server = Server(READ_BY_LIBRARIES, env)
    server.process = subprocess.Popen(
        [*inside, sys.executable, __file__, "libraries", server.address, *libraries],
        env={name: value for name, value in env.items() if name != "PYTHONPATH"} | THREADS,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return server


class Server:
    """An interpreter that forks; its `executable` is a `python` that runs modules so.

    Args:
        read: variables that were read already, and that a fork cannot change.
        env: has their values.
        address: of the server where another process has started it.
    """

    def __init__(self, read: Sequence[str], env: Mapping[str, str], address: str | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.address = address or str(Path(self.folder.name) / "socket")
        self.environment = {name: env.get(name) for name in read}
        self.executable = Path(self.folder.name) / "python"
        words = {"python": sys.executable, "file": __file__, "address": self.address}
        self.executable.write_text(EXECUTABLE.format(**{name: shlex.quote(word) for name, word in words.items()}))
        self.executable.chmod(0o755)
        self.process: subprocess.Popen[bytes] | Process | None = None

    def import_package(self, root: Path, env: Mapping[str, str]) -> "Server":
        """A fork that has imported the package of this folder too; it ends when this process does."""
        server = Server(READ_BY_PACKAGE, env)
        arguments = ["-m", "tests.warm", "package", server.address]
        server.process = self.start(arguments, cwd=root, env=dict(env) | THREADS)
        return server

    def start(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], new_session: bool = False
    ) -> "Process":
        """Fork for `["-m", MODULE, ...]` or `["-c", PROGRAM, ...]`.

        Raises:
            ValueError: neither, or a variable that a fork would not see; such a command needs a new interpreter.
        """
        if arguments[0] not in ("-m", "-c"):
            raise ValueError(f"a fork runs -m MODULE or -c PROGRAM, not python {arguments[0]}")
        for name, value in self.environment.items():
            if env.get(name) != value:
                raise ValueError(f"{name}={env.get(name)} is read at import, here {value}")
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

    def connect(self, seconds: float = 300) -> socket.socket:
        """Wait for the server to have imported everything.

        Raises:
            RuntimeError: it has ended; with its traceback, if it left one.
        """
        deadline, failure = time.monotonic() + seconds, Path(f"{self.address}.failed")
        while True:
            ended = self.process is not None and self.process.poll() is not None
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self.address)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if ended or failure.exists():
                    why = failure.read_text() if failure.exists() else ""
                    raise RuntimeError(f"the interpreter that forks has ended: {why}") from None
                assert time.monotonic() < deadline, f"nothing listens at {self.address}"
                time.sleep(0.02)
            else:
                return connection

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(RuntimeError):  # the one that forked it has ended before
                self.process.kill()
                self.process.communicate()
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
            told = self.lines.readline()
            self.lines.close()
            self.connection.close()
            if not told:
                raise RuntimeError(f"the interpreter that forked python {' '.join(self.args)} has ended")
            self.returncode = int(told)
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
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
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


def import_libraries(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)


def import_package() -> None:
    """Every module of the package but the verbs, Hydra's plugins, and its parser's tables."""
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
    Plugins.instance()
    with initialize_config_dir(str(Path.cwd() / "configs"), version_base="1.3"):
        compose("train", ["experiment=demo", "optim.lr=0.1"])
    GlobalHydra.instance().clear()


def serve(address: str, until: TextIO | None = None) -> None:
    """Fork for each connection, tell the process id and how it ended; until the file ends, or can be read.

    A fork whose connection closes is killed: nobody waits for it any more.
    """
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # the libraries have thousands; a command's own are run when it ends
    gc.collect()
    gc.freeze()  # the collector writes to what it looks at, and a page that is written to is copied
    hears, says = os.pipe()
    os.set_blocking(says, False)
    signal.set_wakeup_fd(says, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    asked: dict[int, socket.socket] = {}  # by process id
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            watched = [listener, hears, *asked.values(), *([until] if until else [])]
            ready, _, _ = select.select(watched, [], [])
            for pid in [pid for pid, connection in asked.items() if connection in ready or until in ready]:
                os.kill(pid, signal.SIGKILL)
                asked.pop(pid).close()
            if until in ready:
                return
            if hears in ready:
                os.read(hears, 1000)
                tell_ends(asked)
            if listener in ready:
                connection, _ = listener.accept()
                fork(connection, asked, [listener.fileno(), hears, says])


def tell_ends(asked: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):  # there is none left
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if connection := asked.pop(found[0], None):
                with connection, contextlib.suppress(ConnectionError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(found[1])}\n".encode())


def fork(connection: socket.socket, asked: dict[int, socket.socket], own: list[int]) -> None:
    """For what this connection asks; the fork closes the files that are the server's own."""
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 100)
    if not header:  # somebody only waited for the server
        connection.close()
        return
    size, message = int.from_bytes(header, "big"), b""
    while len(message) < size:
        part = connection.recv(size - len(message))
        if not part:  # whoever asked has gone meanwhile
            for file in (*descriptors, connection.detach()):
                os.close(file)
            return
        message += part
    request = json.loads(message)
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        end_with_parent(server)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for file in (*own, connection.detach(), *(other.detach() for other in asked.values())):
            os.close(file)
        become(request, dict(zip(request["files"], descriptors, strict=True)))
    for descriptor in descriptors:  # a pipe ends when all who may write to it have gone
        os.close(descriptor)
    asked[pid] = connection
    with contextlib.suppress(ConnectionError):
        connection.sendall(f"{pid}\n".encode())


def end_with_parent(parent: int) -> None:
    """Linux kills this process when its parent is gone; elsewhere a killed server may leave forks behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


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
    if "OMP_NUM_THREADS" in os.environ and "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [request["cwd"], *(path for path in more if path and path not in sys.path), *sys.path[1:]]
    tempfile.tempdir = None  # as TMPDIR says
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.pycache_prefix = os.environ.get("PYTHONPYCACHEPREFIX") or None
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
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(arguments[flag + 1], vars(sys.modules["__main__"]))


def import_and_serve(address: str, imports: Callable[[], None], until: TextIO | None = None) -> None:
    """If that fails, leave the traceback beside the socket."""
    try:
        imports()
        serve(address, until)
    except Exception:
        Path(f"{address}.failed").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["libraries", address, *names]:
            import_and_serve(address, functools.partial(import_libraries, names), until=sys.stdin)
        case ["package", address]:
            import_and_serve(address, import_package)
        case ["command", address, *arguments]:
            command(address, arguments)
