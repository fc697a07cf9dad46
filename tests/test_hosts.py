"""Two hosts that disagree or lose one another: network namespaces, torchrun on each, one trial a test."""

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from scripts.host_trials import TRIALS, Trials
from scripts.hosts import APART, ENVIRONMENT, NAMES, Host, join_hosts, missing_here, wait_until_apart

from .conftest import ROOT
from .warm import Process, Server, start_server

pytestmark = [pytest.mark.slow, pytest.mark.system]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, warm: Server) -> Iterator[Trials]:
    """On each host lives an interpreter that forks, and in the switch between them a process that sleeps."""
    if missing := missing_here():
        pytest.skip(f"this machine lacks {missing}")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PROTLIG_TYPECHECK": "0"} | ENVIRONMENT

    def start(server: Server, arguments: list[str], folder: Path) -> Process:
        forks = env | {"PYTHON_EXEC": str(server.executable)}
        return server.start(arguments, cwd=folder, env=forks, new_session=True)

    def start_here(arguments: list[str], folder: Path) -> Process:
        return warm.start(arguments, cwd=folder, env=os.environ | {"PYTHON_EXEC": str(warm.executable)})

    switch = subprocess.Popen([*APART, "sleep", "infinity"])
    servers = [start_server(inside=APART) for _ in NAMES]
    packages = []
    try:
        hosts = []
        for name, server in zip(NAMES, servers, strict=True):
            assert server.process is not None
            package = server.import_package(ROOT, env)
            packages.append(package)
            package.connect().close()
            hosts.append(Host(name, wait_until_apart(server.process.pid), partial(start, package)))
        join_hosts(hosts, wait_until_apart(switch.pid))
        yield Trials(tmp_path_factory.mktemp("hosts"), hosts, start_here)
    finally:
        for server in (*packages, *servers):
            server.close()
        switch.kill()
        switch.wait()


@pytest.mark.parametrize("name", TRIALS)
def test_on_two_hosts(name: str, trials: Trials) -> None:
    trial = TRIALS[name](trials)
    assert not trial.found, trial
