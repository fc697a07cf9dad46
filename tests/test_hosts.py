"""Run each trial of scripts/host_trials.py as a test: two simulated hosts disagree or lose their connection."""

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from scripts.host_trials import TRIALS, Trials
from scripts.hosts import APART, ENVIRONMENT, NAMES, Host, join_hosts, missing_requirements, wait_until_apart

from .conftest import ROOT
from .warm import Process, Server, start_server

pytestmark = [pytest.mark.slow, pytest.mark.system]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, warm: Server) -> Iterator[Trials]:
    """Two simulated hosts that are connected by a switch.

    On each host, commands run in forks of an interpreter that waits on that host. The switch has its own network
    namespace, which exists as long as the process `sleep infinity` runs in this namespace.
    """
    if missing := missing_requirements():
        pytest.skip(f"this machine lacks {missing}")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PROTLIG_TYPECHECK": "0"} | ENVIRONMENT

    def start(server: Server, arguments: list[str], folder: Path) -> Process:
        forking = env | {"PYTHON_EXEC": str(server.executable)}
        return server.start(arguments, cwd=folder, env=forking, new_session=True)

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
def test_a_trial_on_two_hosts_has_the_expected_result(name: str, trials: Trials) -> None:
    trial = TRIALS[name](trials)
    assert not trial.found, trial
