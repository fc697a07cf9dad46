"""Worker processes. The functions that they compute come from the standard library, so the workers start fast."""

import math
import operator
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from protlig_dd.system import workers
from protlig_dd.system.workers import Workers, count_workers

from .conftest import ROOT, children_of, is_running, wait_for

IN_THIS_PROCESS = workers.FEW


@pytest.fixture(autouse=True)
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers start faster without the libraries that check shapes."""
    monkeypatch.setenv("PROTLIG_TYPECHECK", "0")


def until_error(results: Iterator[Any]) -> tuple[list[Any], str]:
    """Return the results before the first ValueError, and the message of this error."""
    found = []
    try:
        for result in results:
            found.append(result)
    except ValueError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_are_in_the_order_of_the_items(number: int) -> None:
    with Workers(number) as pool:
        items = range(IN_THIS_PROCESS + 12)
        assert list(pool.map(operator.neg, items)) == [-i for i in items]
        assert list(pool.map(partial(operator.add, 1), range(3))) == [1, 2, 3]
        assert pool.started == (number > 1)


def test_few_items_are_computed_without_starting_a_process() -> None:
    others = children_of(os.getpid())  # a server of the tests
    with Workers(4) as pool:
        assert len(list(pool.map(operator.neg, range(IN_THIS_PROCESS)))) == IN_THIS_PROCESS
        assert not pool.started
        assert len(list(pool.map(operator.neg, range(IN_THIS_PROCESS + 2)))) == IN_THIS_PROCESS + 2
        assert len(children_of(os.getpid())) == len(others) + 2  # no more processes than items


@pytest.mark.parametrize("bad", [2, IN_THIS_PROCESS + 5])
@pytest.mark.parametrize("source", ["function", "items"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_error_is_raised_after_the_results_of_all_earlier_items(number: int, source: str, bad: int) -> None:
    def items() -> Iterator[int]:
        yield from range(bad)
        if source == "items":
            raise ValueError("math domain error")
        yield -1
        yield from range(9)
        raise ValueError("a later error")

    with Workers(number) as pool:
        results, error = until_error(pool.map(math.sqrt, items()))
    assert results == [math.sqrt(i) for i in range(bad)]
    assert error == "math domain error"


def test_only_a_few_items_are_taken_ahead_of_the_results() -> None:
    items = iter(range(60))
    with Workers(2) as pool:
        for i, _ in enumerate(pool.map(operator.neg, items)):
            taken = 60 - operator.length_hint(items)
            assert taken <= i + 1 + 2 * 2
    assert taken == 60


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_error_for_a_killed_worker_names_the_signal(number: signal.Signals) -> None:
    others = children_of(os.getpid())  # a server of the tests
    items = [0] * (IN_THIS_PROCESS + 3) + [number] + [0] * 20
    with Workers(2) as pool:
        results, error = until_error(pool.map(signal.raise_signal, items))
    assert len(results) == IN_THIS_PROCESS + 3
    assert error.startswith(f"a worker process was killed by {number.name}, perhaps because memory ran out; ")
    assert children_of(os.getpid()) == others


@pytest.mark.slow
def test_no_worker_survives_the_process_that_started_it(tmp_path: Path) -> None:
    """One worker waits for an item, and the other for this process to read its result."""
    code = (
        "import itertools, signal, sys, time; from protlig_dd.system.workers import Workers\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background ignores SIGINT
        "with Workers(2) as pool:\n"
        "    for i, _ in enumerate(pool.map(bytes, itertools.chain([9] * 9, [2 << 20] * 4))):\n"
        "        if i == 8: print('ready', flush=True); time.sleep(600)\n"
    )
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                children = children_of(process.pid)
                assert len(children) == 2
                # Ctrl-C in a terminal reaches only the process group of this process
                assert process.pid not in map(os.getpgid, children)
            finally:
                os.killpg(process.pid, number)
            _, errors = process.communicate()
        assert process.returncode == -number
        assert errors.count("Traceback") == (number == signal.SIGINT)
        wait_for(lambda pids=children: not any(map(is_running, pids)))


def test_a_library_that_prints_in_a_worker_does_not_disturb_the_results(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(2) as pool:
        assert list(pool.map(partial(os.write, 1), [b"noise\n"] * (IN_THIS_PROCESS + 3))) == [6] * (IN_THIS_PROCESS + 3)
    assert capfd.readouterr().err == "noise\n" * 3


def test_auto_counts_the_cpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_workers(5) == 5
    for cpus, expected in ((1, 1), (3, 3), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cpus=cpus: set(range(cpus)))
        assert count_workers("auto") == expected


def test_a_worker_that_cannot_be_started_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Workers(2) as pool:
        results, error = until_error(pool.map(operator.neg, range(IN_THIS_PROCESS + 1)))
    assert len(results) == IN_THIS_PROCESS
    assert error == "a worker process cannot be started: No such file or directory; set workers=1"
