"""Start `python -m MODULE` in milliseconds, as a fork of an interpreter that has imported the modules already.

A fork is a separate process: it has its own folder, environment, output, signals and exit code, and does not affect
other tests. A fork saves the import of torch, Hydra and scipy, which takes most of a command's time. There are two
interpreters to fork from. The first has imported the libraries. The second is a fork of the first, and has imported
the package too.

    libraries = start_server()
    warm = libraries.import_package(ROOT, os.environ)
    warm.run(["-m", "protlig_dd.sample", "--help"], cwd=folder, env=os.environ).stdout
    process = warm.start(["-m", "protlig_dd.training", "experiment=demo"], cwd=folder, env=os.environ)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)

The first interpreter runs this file as `python warm.py libraries SOCKET NAME ...`. It ends when its standard input
closes, and so at the latest when the process that started it ends. The second interpreter ends with the process that
called `import_package`. With PYTHON_EXEC=warm.executable in a command's environment, the processes that the command
starts are forks too: modules started by torchrun or with sys.executable, and processes spawned by multiprocessing.
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

# Environment variables that libraries read at import. Setting them for a fork would have no effect.
READ_BY_LIBRARIES = ("TORCH_LOGS", "TORCH_COMPILE_DISABLE", "MPLCONFIGDIR", "CXX")
# READ_BY_LIBRARIES, and variables that take effect when the package is imported. PROTLIG_TYPECHECK does too, but is not
# in the list, so that a command may set it: its fork has shape checks if the tests have them, and the variable affects
# only the new interpreters that the fork starts.
READ_BY_PACKAGE = (*READ_BY_LIBRARIES, "PYTHONPATH")
# Forks use one thread unless their environment sets OMP_NUM_THREADS, and waiting threads do not keep a core busy.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# Libraries that the package imports, at once or when it first needs them. torch's optimizers import torch._dynamo.
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

# Script that replaces `python`: it runs modules, programs (-c) and processes spawned by multiprocessing in forks.
EXECUTABLE = """#!/bin/sh
[ "$1" = -u ] && shift
case "$*" in
    # submitit identifies its process by the process id; the resource tracker is small and needs no fork
    "-m submitit.local._local "* | *"multiprocessing.resource_tracker import main"*) exec {python} "$@" ;;
    "-m "* | "-c "* | *"multiprocessing.spawn import spawn_main"*) exec {python} -S {file} command {address} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""


def start_server(
    env: Mapping[str, str] = os.environ, libraries: Sequence[str] = LIBRARIES, inside: Sequence[str] = ()
) -> "Server":
    """Start an interpreter that imports the libraries, but not the package.

    Args:
        inside: a command that starts the interpreter, such as `unshare --net`. It must replace itself with the command
            in its last arguments, which starts the interpreter.
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
    """An interpreter that runs commands in forks of itself.

    `executable` is a script that replaces `python`. It runs modules and programs in forks of this interpreter.

    Args:
        read: environment variables that the interpreter has read at import. A fork cannot change them.
        env: the environment in which the interpreter has read these variables.
        address: the server's socket, if another process has started the server.
    """

    def __init__(self, read: Sequence[str], env: Mapping[str, str], address: str | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.address = address or str(Path(self.folder.name) / "socket")
        self.environment = {name: env.get(name) for name in read}
        self.executable = Path(self.folder.name) / "python"
        fields = {"python": sys.executable, "file": __file__, "address": self.address}
        self.executable.write_text(EXECUTABLE.format(**{name: shlex.quote(text) for name, text in fields.items()}))
        self.executable.chmod(0o755)
        self.process: subprocess.Popen[bytes] | Process | None = None

    def import_package(self, root: Path, env: Mapping[str, str]) -> "Server":
        """Start a fork that imports the package in the folder `root`, and return this fork as a new server.

        The fork ends when the present process ends.
        """
        server = Server(READ_BY_PACKAGE, env)
        arguments = ["-m", "tests.warm", "package", server.address]
        server.process = self.start(arguments, cwd=root, env=dict(env) | THREADS)
        return server

    def start(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], new_session: bool = False
    ) -> "Process":
        """Start `["-m", MODULE, ...]` or `["-c", PROGRAM, ...]` in a fork.

        Raises:
            ValueError: the arguments have neither form, or `env` changes a variable that was read at import. Such a
                command needs a new interpreter.
        """
        if arguments[0] not in ("-m", "-c"):
            raise ValueError(f"a fork runs -m MODULE or -c PROGRAM, not python {arguments[0]}")
        for name, value in self.environment.items():
            if env.get(name) != value:
                raise ValueError(f"{name}={env.get(name)}, but the interpreter has read {name}={value} at import")
        connection = self.connect()
        outputs = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env), "new_session": new_session}
        with Path(os.devnull).open() as null_device:
            send_request(connection, request, {n: file.fileno() for n, file in enumerate((null_device, *outputs))})
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
        """Connect to the server, after waiting for its imports to finish.

        Raises:
            RuntimeError: the server has ended. The message contains the server's traceback if the server wrote one.
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
                    trace = failure.read_text() if failure.exists() else ""
                    raise RuntimeError(f"the interpreter that forks has ended: {trace}") from None
                assert time.monotonic() < deadline, f"nothing listens at {self.address}"
                time.sleep(0.02)
            else:
                return connection

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(RuntimeError):  # the server that forked this process has ended already
                self.process.kill()
                self.process.communicate()
        self.folder.cleanup()


class Process:
    """A command in a fork, with the methods of subprocess.Popen that the tests use. Its output goes to files."""

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
            code = self.lines.readline()
            self.lines.close()
            self.connection.close()
            if not code:
                raise RuntimeError(f"the interpreter that forked python {' '.join(self.args)} has ended")
            self.returncode = int(code)
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
            with contextlib.suppress(ProcessLookupError):  # the process has just ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def send_request(connection: socket.socket, request: dict[str, Any], files: dict[int, int]) -> None:
    """Request a fork whose file descriptor n is this process's file descriptor `files[n]`."""
    message = json.dumps(request | {"files": list(files)}).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], list(files.values()))
    connection.sendall(message)


def run_command(address: str, arguments: list[str]) -> NoReturn:
    """Run `python ARGUMENTS` in a fork with this process's environment and open files. Exit with the fork's exit code.

    If this process is killed, so is the fork.
    """
    files = {n: n for n in range(256) if is_inheritable(n)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {"arguments": arguments, "cwd": str(Path.cwd()), "env": dict(os.environ), "new_session": False}
    send_request(connection, request, files)
    with connection.makefile("r") as lines:
        pid = int(lines.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(lines.readline())
    exit_with(code)


def is_inheritable(file: int) -> bool:
    """Whether the file descriptor is open, and child processes inherit it."""
    try:
        return os.get_inheritable(file)
    except OSError:
        return False


def exit_with(code: int) -> NoReturn:
    """End this process with the exit code. If the code is negative, end it by signal number -code."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def import_libraries(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)


def import_package() -> None:
    """Import the subpackages of the package, but not the modules that are run as commands.

    The code for transformers is not imported either, because no command needs it. Load Hydra's plugins and the tables
    of its parser.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    import protlig_dd

    for module in pkgutil.iter_modules(protlig_dd.__path__, "protlig_dd."):
        if module.ispkg:
            package = importlib.import_module(module.name)
            for inner in pkgutil.walk_packages(package.__path__, f"{module.name}."):
                if not inner.name.endswith((".__main__", ".run_train_uniref50_optimized", ".modeling_protlig_dd")):
                    importlib.import_module(inner.name)
    Plugins.instance()
    with initialize_config_dir(str(Path.cwd() / "configs"), version_base="1.3"):
        compose("train", ["experiment=demo", "optim.lr=0.1"])
    GlobalHydra.instance().clear()


def serve(address: str, until: TextIO | None = None) -> None:
    """Fork once for each connection. Send the fork's process id at once, and its exit code when the fork ends.

    A fork whose connection closes is killed, because no process waits for this fork any more.

    Args:
        until: a file. The server ends when this file has data or is closed.
    """
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        # skip the libraries' thousands of finalizers; finalizers that a command adds still run when the command ends
        finalizer.atexit = False
    gc.collect()
    gc.freeze()  # the collector writes to every object that it visits, which would copy memory pages in a fork
    wakeup, wakeup_writer = os.pipe()
    os.set_blocking(wakeup_writer, False)
    signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    forks: dict[int, socket.socket] = {}  # connections by process id
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            watched = [listener, wakeup, *forks.values(), *([until] if until else [])]
            ready, _, _ = select.select(watched, [], [])
            for pid in [pid for pid, connection in forks.items() if connection in ready or until in ready]:
                os.kill(pid, signal.SIGKILL)
                forks.pop(pid).close()
            if until in ready:
                return
            if wakeup in ready:
                os.read(wakeup, 1000)
                send_exit_codes(forks)
            if listener in ready:
                connection, _ = listener.accept()
                fork(connection, forks, [listener.fileno(), wakeup, wakeup_writer])


def send_exit_codes(forks: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):  # no child process is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if connection := forks.pop(ended[0], None):
                with connection, contextlib.suppress(ConnectionError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())


def fork(connection: socket.socket, forks: dict[int, socket.socket], server_files: list[int]) -> None:
    """Start the fork that this connection requests, and add it to `forks`. The fork closes the server's files."""
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 100)
    if not header:  # the client only waited for the server
        connection.close()
        return
    size, message = int.from_bytes(header, "big"), b""
    while len(message) < size:
        part = connection.recv(size - len(message))
        if not part:  # the client has disconnected
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
        for file in (*server_files, connection.detach(), *(other.detach() for other in forks.values())):
            os.close(file)
        run_as_python(request, dict(zip(request["files"], descriptors, strict=True)))
    for descriptor in descriptors:  # else pipes would not end: a pipe ends when all writers have closed it
        os.close(descriptor)
    forks[pid] = connection
    with contextlib.suppress(ConnectionError):
        connection.sendall(f"{pid}\n".encode())


def end_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent ends. On other systems a killed server may leave forks behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def run_as_python(request: dict[str, Any], files: dict[int, int]) -> NoReturn:
    """Run `python ARGUMENTS` in this fork, and exit."""
    if request["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # first move the files to descriptors of at least 1000, because dup2 below overwrites the lower ones
    moved = {n: fcntl.fcntl(file, fcntl.F_DUPFD, 1000) for n, file in files.items()}
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
    tempfile.tempdir = None  # read TMPDIR again
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.pycache_prefix = os.environ.get("PYTHONPYCACHEPREFIX") or None
    sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)
    multiprocessing.set_executable(sys.executable)
    # torch's launcher often inspects its stack; without this entry it would search all modules for runpy every time
    inspect.modulesbyfile[inspect.getabsfile(runpy.run_module)] = "runpy"
    code = 0
    try:
        run_main(request["arguments"])
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT  # so that a shell stops too
    except BaseException:
        traceback.print_exc()
        code = 1
    # what an interpreter does before it exits
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    exit_with(code)


def run_main(arguments: list[str]) -> None:
    """Run `-m MODULE ...` or `-c PROGRAM ...`. Ignore the options that multiprocessing adds before `-c`."""
    if arguments[0] == "-m":
        sys.argv = ["-m", *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        flag = arguments.index("-c")
        sys.argv = ["-c", *arguments[flag + 2 :]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(arguments[flag + 1], vars(sys.modules["__main__"]))


def import_and_serve(address: str, imports: Callable[[], None], until: TextIO | None = None) -> None:
    """Call `imports`, then `serve`. If either fails, write the traceback to a file beside the socket."""
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
            run_command(address, arguments)
