"""Compute in worker processes, which start fast and end with this process, and in a thread beside the main thread.

A worker is a new Python interpreter, connected to this process by two pipes. It imports only the module of the function
that it calls. A process of multiprocessing would import the main module too. That takes seconds for a verb, which
imports torch, and fails for a script without `if __name__ == "__main__"`. A worker ends when its pipes close, and so at
the latest when this process ends, even if this process is killed.
"""

import contextlib
import fcntl
import itertools
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NoReturn

FEW = 8  # `map` computes so many items in this process before it starts workers, because most inputs are small
MOST = 8  # the most workers that `auto` chooses, because one process reads and writes for all of them
PIPE_BYTES = 1 << 20  # with Linux's default of 64 KiB, sending a large item takes many switches between the processes
START = "import sys; sys.path[:] = sys.argv[1:]; from protlig_dd.system.workers import serve; serve()"


def count_workers(requested: int | str) -> int:
    """Return the number of workers: `requested`, or for `auto` the number of CPUs of this process, at most MOST."""
    if isinstance(requested, int):
        return requested
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(MOST, len(usable))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation, instead of returning each large block to the system.

    Without this call, the system has to provide and clear the pages of each large array again, which took a tenth of
    the time of `prepare`. glibc keeps blocks that are not larger than the largest block that was ever freed, up to
    32 MiB. So this function allocates and frees such a block, without writing to it.
    """
    bytes(31 << 20)


class Workers:
    """Worker processes. They start when `map` needs them, and are killed at the end of the `with` block.

    Args:
        number: the number of workers. With the number 1, this process computes everything itself.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(number)  # each of these threads waits for one worker

    @property
    def started(self) -> bool:
        """Whether worker processes are running."""
        return bool(self._workers)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.kill()  # the thread that waits for the worker ends too
        self._threads.shutdown()
        for worker in self._workers:
            worker.close()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield `function(item)` for each item, in order. At most 2 * number items are computed ahead.

        An error of an item, or an error that `items` raises, is raised after the results of all earlier items.

        Args:
            function: a function that can be pickled. It is sent to each worker only once.

        Raises:
            ValueError: a worker was killed or cannot be started.
        """
        items, pending = iter(items), deque[Future[Any]]()
        alone = None if self.number == 1 else 0 if self.started else FEW
        for item in itertools.islice(items, alone):
            yield function(item)
        while True:
            try:
                item = next(items)
            except StopIteration:
                break
            except Exception as error:
                pending.append(Future())
                pending[-1].set_exception(error)
                break
            if len(self._workers) < self.number:
                self._workers.append(_Worker())
                self._idle.put(self._workers[-1])
            pending.append(self._threads.submit(self._call, function, item))
            if len(pending) > 2 * self.number:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _call(self, function: Callable[[Any], Any], item: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(function, item)
        finally:
            self._idle.put(worker)


class Background:
    """Call functions in another thread, one after the other. Use it as a context manager.

    Args:
        enabled: False calls them in the calling thread.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._thread = ThreadPoolExecutor(1) if enabled else None
        self._last: Future[None] | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        if kind is None and self._last is not None:
            self._last.result()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Wait for the previous call, raise its error if it failed, and begin to call `function(*arguments)`."""
        if self._thread is None:
            function(*arguments)
            return
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(function, *arguments)


class _Worker:
    """One worker process."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", START, *sys.path]
        try:
            # a process group of its own: Ctrl-C reaches only this process, which then kills the worker
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        except OSError as error:
            raise ValueError(f"a worker process cannot be started: {error.strerror}; set workers=1") from error
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        for pipe in (self.requests, self.answers):
            with contextlib.suppress(OSError, AttributeError):  # beyond the user's limit, or not on Linux
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.function: Callable[[Any], Any] | None = None

    def call(self, function: Callable[[Any], Any], item: Any) -> Any:
        """Return `function(item)`, computed by the worker, or raise its error."""
        try:
            request = None if function is self.function else function, item
            pickle.dump(request, self.requests, protocol=5)
            self.requests.flush()
            self.function = function
            result, error = pickle.load(self.answers)
        except (EOFError, OSError, pickle.UnpicklingError) as problem:
            code = self.process.wait()
            ended = f"ended with exit code {code}"
            if code < 0:
                ended = f"was killed by {signal.Signals(-code).name}, perhaps because memory ran out"
            raise ValueError(f"a worker process {ended}; repeat the command, if need be with workers=1") from problem
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Close the pipes and wait until the process has ended."""
        for pipe in (self.requests, self.answers):
            with contextlib.suppress(OSError):  # unsent bytes cannot be flushed to a process that has ended
                pipe.close()
        self.process.wait()


def serve() -> NoReturn:
    """Answer the requests of the process that started this worker, until that process closes the pipe."""
    keep_freed_memory()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently if that process has ended
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that a message that a library prints is not taken for an answer
    function: Callable[[Any], Any] | None = None
    while True:
        try:
            sent, item = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):  # UnpicklingError: the process has ended while it wrote
            sys.exit()
        function = sent or function
        assert function is not None
        result, problem = None, None
        try:
            result = function(item)
        except Exception as error:
            error.add_note(traceback.format_exc())
            problem = error
        pickle.dump((result, problem), answers, protocol=5)
        answers.flush()
