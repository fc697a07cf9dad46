"""Measure the time and memory of Python code."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def measured(code: str, folder: Path) -> dict[str, Any]:
    """Run Python code in a new process. The last line that the code prints must be a JSON object.

    Returns:
        The JSON object, extended by the code's wall time (`wall`) and CPU time (`cpu`) in seconds, and by its peak
            memory in bytes (`peak`).
    """
    began, before = time.perf_counter(), os.times()
    # VmHWM is the peak memory of the process; ru_maxrss can be that of the parent, because a new process inherits it
    code += "\nprint(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    # the code may import this package from any folder
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"benchmark: {done.stderr.strip().splitlines()[-1]}")
    after = os.times()
    values, peak = done.stdout.strip().splitlines()[-2:]
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {**json.loads(values), "wall": time.perf_counter() - began, "cpu": cpu, "peak": int(peak) * 1024}


@contextlib.contextmanager
def peak_of_memory() -> Iterator[dict[str, int]]:
    """Yield a dictionary that gets, at the end, the peak of this process's own memory in bytes, as `peak`.

    Mapped files are not part of it. The kernel records no peak of this figure, so a thread reads it every few
    milliseconds.
    """
    found, ended = {"peak": 0}, threading.Event()

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            found["peak"] = max(found["peak"], int(status.partition("RssAnon:")[2].split()[0]) * 1024)
            if ended.wait(0.005):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
