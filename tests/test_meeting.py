"""The meeting, in which all ranks of a run compare their configs, data and versions before they start.

In most tests the ranks are threads of one process. They communicate through a store of torch.distributed.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from protlig_dd.data.store import SequenceStore
from protlig_dd.system import meeting as module
from protlig_dd.system.distributed import OtherRankError, Processes, in_one_line, within
from protlig_dd.system.meeting import Meeting, loopback_address
from protlig_dd.training.context import Resolved
from protlig_dd.training.launch import facts_to_compare
from protlig_dd.training.resume import is_continued, seconds_left

from .conftest import Command, Start, assert_one_line_error, free_port, node_of_two, train_config
from .test_training import overrides_for
from .warm import Server

Outcome = Exception | list[str]


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Outcome]]]:
    """Return a function that runs one meeting of ranks, as if each rank had a host of its own.

    The arguments are the facts of each rank: the config, data and versions that must be equal on all ranks. A rank
    whose argument is None does not start. A rank whose argument is an exception raises this exception before the
    meeting. The function returns a list with an entry for each rank that started: the exception that the rank raised,
    or the hosts of all ranks.
    """
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(module, "loopback_address", lambda: None)

    meetings = []  # keep rank 0's store open after the meeting

    def meet_as(rank: int, world_size: int, facts: dict[str, Any] | Exception, timeout: int | float) -> Outcome:
        meeting = Meeting(Processes(rank, world_size, 0))
        meetings.append(meeting)
        meeting.host = f"host-{rank}"
        try:
            with meeting:
                if isinstance(facts, Exception):
                    raise facts
                meeting.agree(facts, timeout)
        except Exception as error:
            return error
        return meeting.hosts

    def meet_all(*facts: dict[str, Any] | Exception | None, timeout: int | float = 20) -> list[Outcome]:
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        started = [(rank, rank_facts) for rank, rank_facts in enumerate(facts) if rank_facts is not None]
        with ThreadPoolExecutor(len(started)) as pool:
            return list(pool.map(lambda item: meet_as(item[0], len(facts), item[1], timeout), started))

    return meet_all


def test_ranks_with_equal_facts_learn_the_hosts_of_all_ranks(meet: Callable[..., list[Outcome]]) -> None:
    assert meet(*[{"optim.lr": 0.1, "optim.betas": [0.9, 0.99]}] * 3) == [["host-0", "host-1", "host-2"]] * 3


def test_differing_ranks_show_both_values_of_a_key_even_if_one_is_the_default() -> None:
    """A config file leaves out newer keys that have their default value.

    The message about ranks with different configs still shows both values of such a key.
    """
    resolved = Resolved("cpu", "fp32", "sdpa", False, 2, "a.h5", "0")
    default, other = (
        facts_to_compare(train_config(*overrides), resolved)
        for overrides in ((), ("data.context=lower", "model.positions=t5"))
    )
    differing = {
        key: (default.get(key), other.get(key)) for key in default | other if default.get(key) != other.get(key)
    }
    assert differing == {"data.context": ("none", "lower"), "model.positions": ("rope", "t5")}


def test_every_rank_reports_which_facts_differ(meet: Callable[..., list[Outcome]]) -> None:
    errors = meet({"optim.lr": 0.1, "seed": 0}, {"optim.lr": 0.1, "seed": 0}, {"optim.lr": 0.2, "seed": 0, "new": 1})
    assert [str(error) for error in errors] == [
        "the ranks differ in their config, data or versions: "
        "new is None for rank 0 on host-0 and 1 for rank 2 on host-2; "
        "optim.lr is 0.1 for rank 0 on host-0 and 0.2 for rank 2 on host-2"
    ] * 3
    assert all(isinstance(error, ValueError) for error in errors)


def test_a_message_names_five_differences_and_shortens_long_values(meet: Callable[..., list[Outcome]]) -> None:
    message = str(meet({f"key{i}": "x" * 200 for i in range(8)}, {f"key{i}": "y" for i in range(8)})[1])
    assert message.count(" for rank 0 on ") == 5
    assert message.endswith("; and 3 more")
    assert f"key0 is {'x' * 80}... for rank 0" in message
    paths = [f"/{'scratch/' * 30}{name}/x.h5" for name in ("one", "two")]
    message = str(meet({"x": paths[0]}, {"x": paths[1]})[0])
    assert re.search(r"x is \.\.\.\S+/one/x.h5 for rank 0 on host-0 and \.\.\.\S+/two/x.h5 for rank 1", message)


def test_all_ranks_report_a_rank_that_failed_before_the_meeting(meet: Callable[..., list[Outcome]]) -> None:
    for failing in range(3):
        facts: list[Any] = [{}, {}, {}]
        facts[failing] = ValueError("x.h5: no such\ndata file")
        began = time.monotonic()
        errors = meet(*facts)
        assert time.monotonic() - began < 15  # no rank waits for the timeout
        assert errors[failing] is facts[failing]
        for rank in {0, 1, 2} - {failing}:
            assert isinstance(errors[rank], OtherRankError)
            assert str(errors[rank]) == f"rank {failing} on host-{failing}: x.h5: no such data file"


def test_rank_0_ends_after_the_others_have_read_its_error(
    meet: Callable[..., list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store closes when the process of rank 0 ends, and the other ranks read the error from this store."""
    mark_as_read, ended = Meeting._mark_as_read, []

    def mark_slowly(meeting: Meeting) -> None:
        if not meeting.processes.first:
            time.sleep(1)
            ended.append(meeting.processes.rank)
        mark_as_read(meeting)

    leave = Meeting.__exit__

    def leave_and_record(meeting: Meeting, *raised: Any) -> None:
        leave(meeting, *raised)
        ended.append(meeting.processes.rank)

    monkeypatch.setattr(Meeting, "_mark_as_read", mark_slowly)
    monkeypatch.setattr(Meeting, "__exit__", leave_and_record)
    meet(ValueError("no"), {})
    assert ended[0] == 1


def test_restarts_and_requeued_jobs_continue_the_earlier_launch() -> None:
    """A launch after a change in the number of hosts also continues the earlier launch.

    An unrelated launch with the same id does not continue it.
    """

    def continued(
        launch: str | None, earlier: dict[str, Any], *, restart: int = 0, agents: str = "a 1", **slurm: Any
    ) -> bool:
        meeting = Meeting(Processes(0, 2, 0, 0, launch, slurm.get("job"), slurm.get("requeues", 0)))
        meeting.restart, meeting.agents = restart, [agents, "b 2"]
        return is_continued({"requeues": 0, "agents": ["a 7", "c 3"], **earlier}, meeting)

    assert continued("x", {"launch": "x"}, restart=1)
    assert not continued("none", {"launch": "none"}, restart=1)  # torchrun's default id, which other launches share
    assert continued("x", {"launch": "x"}, agents="a 7")  # a host has joined
    assert continued("none", {"launch": "none"}, agents="c 3")
    assert not continued("x", {"launch": "x"})
    assert not continued("x", {"launch": "y"}, restart=1, agents="a 7")
    assert not continued(None, {"launch": None}, agents="a 7")  # two launches from one shell, both without an id
    assert not continued("x", {}, restart=1)
    assert continued("y", {"launch": "x", "job": "4"}, job="4", requeues=1)
    assert not continued("y", {"launch": "x", "job": "4"}, job="4")


def test_the_time_left_does_not_depend_on_a_hosts_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "environment.json"
    file.touch()
    os.utime(file, (file.stat().st_mtime - 100,) * 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert seconds_left(tmp_path, {"seconds_left": 1000.0}) == pytest.approx(900, abs=5)
    assert seconds_left(tmp_path, {"seconds_left": None}) is None
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_ranks_on_several_hosts_wait_longer_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(Processes(0, 4, 0))
    assert meeting._wait_limit() == module.READ_WITHIN
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert meeting._wait_limit() == module.READ_WITHIN_SEVERAL_HOSTS


def test_an_error_names_the_missing_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but MASTER_ADDR=None and MASTER_PORT=: torchrun sets all"):
        Meeting(Processes(0, 2, 0)).agree({}, 1)
    with pytest.raises(KeyError), Meeting(Processes(0, 2, 0)):
        raise KeyError("the original error is raised")


def test_a_store_that_does_not_answer_delays_a_process_only_for_the_given_time() -> None:
    began = time.monotonic()
    within(1, lambda: time.sleep(30))
    assert time.monotonic() - began < 10


def test_an_unexpected_error_is_reported_with_its_type() -> None:
    assert in_one_line(KeyError("x")) == "KeyError: 'x'"
    assert in_one_line(FileNotFoundError(2, "No such file", "a b")) == "[Errno 2] No such file: 'a b'"


def test_a_rank_that_does_not_start_is_named(
    meet: Callable[..., list[Outcome]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "REPORT_EVERY", 0.5)
    monkeypatch.setattr(module, "READ_WITHIN", 0.5)
    errors = meet({}, {}, None, timeout=1.2)
    assert [str(error) for error in errors] == [
        f"host-{rank} waited 1.2 s for rank 2, which did not start" for rank in (0, 1)
    ]
    assert "host-0 waits for rank 2 to start, 1 s so far" in capsys.readouterr().out
    without_first = meet(None, {}, timeout=0.7)
    assert re.match(r"host-1 did not reach rank 0 at localhost:\d+ within 0.7 s: ", str(without_first[0]))


def test_a_host_that_cannot_be_resolved_is_an_error(
    meet: Callable[..., list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setattr(module, "RESOLVE_WITHIN", 0.1)
    (error,) = meet(None, {})
    assert str(error).startswith("host-1 cannot resolve no-such-host.invalid, the host of rank 0: ")
    assert "--local-addr" in str(error)


def test_a_host_name_that_resolves_to_loopback_is_an_error(
    meet: Callable[..., list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "loopback_address", lambda: "127.0.1.1")
    for error in meet({}, {}):
        assert str(error).startswith("host-0: other hosts cannot reach the address of its own name (127.0.1.1)")
    read = Meeting._read
    monkeypatch.setattr(Meeting, "_read", lambda *arguments: dict(reversed(read(*arguments).items())))
    for error in meet({}, {}):  # the order in which the notes of the ranks are read does not matter
        assert str(error).startswith("host-0: ")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert loopback_address() == "127.0.0.1" or loopback_address() == "::1"
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert loopback_address() == "no address"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert loopback_address() is None


@pytest.mark.slow
def test_agents_with_different_commands_exit_with_an_error_and_do_not_train(
    store: SequenceStore, tmp_path: Path, start: Start, warm: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON_EXEC", str(warm.executable))
    agent = [*node_of_two(), "-m", "protlig_dd.training"]
    agents = [start(*agent, *overrides_for(store, "pair", f"optim.lr={lr}")) for lr in (0.001, 0.002)]
    for process in agents:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        message = r"^\[rank [01]\] error: the ranks differ in their config, data or versions: optim.lr is "
        assert re.search(message, errors, re.MULTILINE)
    assert not (tmp_path / "runs/pair").exists()


@pytest.mark.slow
def test_a_slow_disk_is_not_reported_as_a_lost_rank(run_python: Command, store: SequenceStore, tmp_path: Path) -> None:
    slow = "import runpy\nimport time\nimport protlig_dd.runs.writer as writer\n"
    slow += "save = writer.save_checkpoint\n"
    slow += "def save_slowly(*args, **kwargs):\n    time.sleep(7)\n    return save(*args, **kwargs)\n"
    slow += "writer.save_checkpoint = save_slowly\n"
    slow += "if __name__ == '__main__':\n    runpy.run_module('protlig_dd.training', run_name='__main__')\n"
    (tmp_path / "slow.py").write_text(slow)  # each rank imports this file too, because it is the main module
    overrides = overrides_for(store, "disk", "trainer.max_steps=5", "trainer.devices=2", "trainer.checkpoint_every=1")
    process = run_python("-m", "slow", *overrides, "trainer.timeout=3")
    assert_one_line_error(process, "rank 0 on ", "waits for a checkpoint to be written to runs/disk", "trainer.timeout")
