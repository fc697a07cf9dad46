"""`prepare` gives the same store and the same errors with any number of workers."""

import contextlib
import gzip
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pytest

from protlig_dd.data import fasta
from protlig_dd.data.fasta import FastaFile, FastaRecord
from protlig_dd.data.prepare import read, spool
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.filters import Filters
from protlig_dd.data.prepare.output import manifest_path
from protlig_dd.data.prepare.parse import parse
from protlig_dd.data.prepare.splits import Split
from protlig_dd.data.store import SequenceStore
from protlig_dd.system import workers
from protlig_dd.system.workers import Workers

from .conftest import Start, children_of, is_running, marked, wait_for
from .warm import Process

PREPARE = ("-m", "protlig_dd.prepare")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small inputs into many batches, and start workers at the first batch."""
    monkeypatch.setattr(fasta, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 3 << 10)
    monkeypatch.setattr(read, "BATCH_BYTES", 8 << 10)
    monkeypatch.setattr(workers, "FEW", 1)
    monkeypatch.setattr(spool, "COPY_BYTES", 9 << 10)


def copies(proteins: list[FastaRecord], number: int) -> Iterator[FastaRecord]:
    """Yield copies of the proteins with different ids, each rotated by a different number of residues."""
    for rotation in range(number):
        for record in proteins:
            sequence = record.sequence[rotation:] + record.sequence[:rotation]
            yield record._replace(id=f"{record.id}_{rotation}", sequence=sequence)


def text_of(records: Iterator[FastaRecord] | list[FastaRecord]) -> str:
    return "".join(f">{record.id} {record.description}\n{record.sequence}\n" for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "filtered", "named", "lower case"])
def test_the_store_and_its_manifest_are_the_same_for_any_number_of_workers(
    tmp_path: Path, proteins: list[FastaRecord], small_batches: None, case: str
) -> None:
    repeated = [record._replace(id=f"again_{record.id}") for record in proteins[:30]] if case != "plain" else []
    (tmp_path / "a.fasta").write_text(text_of([*copies(proteins, 2)]))
    (tmp_path / "b.gz").write_bytes(gzip.compress(text_of(repeated + proteins[:99]).encode()))
    (tmp_path / "c.fasta").write_text(
        "".join(
            marked(record._replace(id=f"m_{record.id}", sequence=record.sequence[::-1])) for record in proteins[5:50]
        )
        if case == "lower case"
        else ">x\nMKV\n"
    )
    names = {"train": "a.fasta", "test": "b.gz", "validation": "c.fasta"}
    paths = {name: tmp_path / path for name, path in names.items()}
    made = {}
    for number in (1, 2, 3):
        build_store(
            paths if case == "named" else list(paths.values()),
            tmp_path / f"{number}.h5",
            filters=Filters(min_length=60, max_unknown=0.001, fragments=False) if case == "filtered" else None,
            split=Split() if case == "named" else Split(0.2, 0.1),
            workers=number,
        )
        manifest = json.loads(manifest_path(tmp_path / f"{number}.h5").read_text())
        made[number] = (tmp_path / f"{number}.h5").read_bytes(), manifest | dict.fromkeys(("created", "seconds"))
    assert made[1] == made[2] == made[3]
    manifest = made[1][1]
    assert manifest["records"] == 2 * len(proteins) + len(repeated) + 99 + (45 if case == "lower case" else 1)
    assert ("case" in manifest) == (case == "lower case")
    assert (manifest["dropped"]["min_length"] > 0) == (case == "filtered")
    assert manifest["dropped"]["duplicates"] >= len(repeated)


FAULTS = {
    "no residues": b">bad\n",
    "illegal character": b">bad\nMK\nM1V\n",
    "gap after a lower-case letter": b">bad\nmkV-V\n",
    "no id": b"> bad\nMKV\n",
    "header not UTF-8": b">bad \xe9\nMKV\n",
    "PIR": b">P1;bad\ndescription\nMKV*\n",
    "stop inside": b">bad\r\nMK\r\nM*V\r\n",
    "two faults in one block": b">bad\n>bad2 \xe9\nMKV\n",
    "a second fault in a later batch": b">bad\nM1\n" + b">good\nMKVLA\n" * 4000 + b">bad2\nM2\n",
}
TOO_LONG = fasta.LONGEST_RECORD + 1


def files_with(fault: bytes, text: bytes) -> Iterator[bytes]:
    """Yield files with the fault in the middle or at the end of a text, also gzipped and with damaged gzip."""
    middle = text.index(b"\n>", len(text) // 2) + 1
    whole = text[:middle] + fault + text[middle:]
    yield whole
    yield text + fault
    zipped = gzip.compress(whole, 1)
    yield zipped
    yield zipped[: len(zipped) // 3]  # the fault is in the missing part
    yield zipped[:-5]  # the fault is before the damage
    for distance in (2000, 3500, 5000, 6500):  # the fault is in the last texts before the damage
        near_end = text.index(b"\n>", len(text) - distance) + 1
        yield gzip.compress(text[:near_end] + fault + text[near_end:], 1)[:-5]


def error_of(content: bytes, pool: Workers, folder: Path) -> str:
    """Return the message of the error that reading and parsing a file raises."""
    (folder / "bad.fasta").write_bytes(content)
    batches = read.read_batches([FastaFile(folder / "bad.fasta")], [None])
    with pytest.raises(ValueError, match=r"bad\.fasta") as error:
        list(pool.map(partial(parse, Filters(), None), batches))
    return str(error.value)


@pytest.mark.slow
def test_errors_are_the_same_for_any_number_of_workers(
    tmp_path: Path, proteins: list[FastaRecord], small_batches: None
) -> None:
    text = text_of(proteins).encode()
    files = [file for fault in FAULTS.values() for file in files_with(fault, text)]
    files += [b"", b"MKV\n" + text, gzip.compress(text)[:-8] + bytes(8)]
    with Workers(1) as alone, Workers(2) as pool:
        messages = [error_of(file, alone, tmp_path) for file in files]
        assert [error_of(file, pool, tmp_path) for file in files] == messages
        assert pool.started
    bad = re.compile(r"bad\.fasta: record \d+ \((P1;)?(bad2?)?\), line \d+")
    damaged = "truncated or damaged gzip; the last record"
    assert [bad.search(message) is None for message in messages] == [
        damaged in message or message.endswith(("empty, no FASTA records in it", "header: 'MKV'"))
        for message in messages
    ]
    # only the short files and the last file: in the other damaged files, the fault is found before the damage
    assert sum(damaged in message for message in messages) == len(FAULTS) + 1


@pytest.mark.slow
def test_a_too_long_record_is_the_same_error_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FEW", 1)
    good, fault = b">good\nMKVLA\n" * 400_000, b">bad\n" + b"M" * TOO_LONG
    lines = b">bad\n" + (b"M" * 999 + b"\n") * (TOO_LONG // 999 + 1)
    with Workers(1) as alone, Workers(2) as pool:
        for file in (good + fault, good + lines + good, good + b">first\nM1\n" + good + fault):
            message = error_of(file, alone, tmp_path)
            assert ("is longer than" in message) == (b"first" not in file)
            assert error_of(file, pool, tmp_path) == message
        assert pool.started


class Preparing(NamedTuple):
    """`prepare` with 2 workers, which has read the first part of its input and waits for more."""

    process: Process
    workers: list[int]
    """Process ids."""
    write_rest: Callable[[], None]
    """Write the other part of the input."""


@pytest.fixture
def begin(tmp_path: Path, proteins: list[FastaRecord], start: Start) -> Iterator[Callable[[], Preparing]]:
    """Return a function that starts `prepare` on a pipe, and writes 32 MB of FASTA to the pipe."""
    os.mkfifo(tmp_path / "pipe")
    text = text_of([*copies(proteins, 160)]).encode()
    pipes: list[BinaryIO] = []

    def begin_once() -> Preparing:
        process = start(*PREPARE, "input=pipe", "output=d/a.h5", "workers=2", new=True)
        pipes.append((tmp_path / "pipe").open("wb", buffering=0))
        pipes[-1].write(text)
        wait_for(lambda: len(children_of(process.pid)) == 2)
        return Preparing(process, children_of(process.pid), partial(write_rest, pipes[-1]))

    def write_rest(pipe: BinaryIO) -> None:
        with contextlib.suppress(BrokenPipeError), pipe:
            pipe.write(text.replace(b">", b">rest_"))

    yield begin_once
    for pipe in pipes:
        pipe.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_survives_an_interrupted_or_killed_command(
    tmp_path: Path, begin: Callable[[], Preparing], number: signal.Signals
) -> None:
    process, children, _ = begin()
    process.send_signal(number)
    _, errors = process.communicate()
    assert (process.returncode, errors) == ((130, "interrupted\n") if number == signal.SIGINT else (-number, ""))
    wait_for(lambda: not any(map(is_running, children)))
    assert not (tmp_path / "d/a.h5").exists()
    assert (tmp_path / "d/.a.h5.partial").exists() == (number != signal.SIGINT)


@pytest.mark.slow
def test_a_killed_worker_is_a_one_line_error_and_leaves_no_file(tmp_path: Path, begin: Callable[[], Preparing]) -> None:
    process, children, write_rest = begin()
    os.kill(children[0], signal.SIGKILL)
    write_rest()
    _, errors = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch("error: a worker process was killed by SIGKILL, perhaps because memory ran out; .*\n", errors)
    assert list((tmp_path / "d").iterdir()) == []
    wait_for(lambda: not is_running(children[1]))


@pytest.mark.slow
def test_a_pipe_that_needs_workers_gives_the_same_store_as_a_file(
    tmp_path: Path, proteins: list[FastaRecord], begin: Callable[[], Preparing]
) -> None:
    process, _, write_rest = begin()
    write_rest()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    found = SequenceStore(tmp_path / "d/a.h5")
    text = text_of([*copies(proteins, 160)])
    (tmp_path / "a.fasta").write_text(text + text.replace(">", ">rest_"))
    expected = build_store([tmp_path / "a.fasta"], tmp_path / "a.h5", split=Split(0.01, 0.01))
    assert found.fingerprint == expected.fingerprint
    assert found.manifest["inputs"][0]["sha256"] == expected.manifest["inputs"][0]["sha256"]
