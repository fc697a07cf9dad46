"""`python -m protlig_dd.prepare` as a user runs it: every fault is a one-line error and leaves no file behind."""

import gzip
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.prepare.describe import length_plot
from protlig_dd.data.store import SPLITS, SequenceStore

from .conftest import ROOT, Command, MadeOnce, Start, assert_one_line_error, require
from .warm import Process

LETTERS_OF_BITS = {ord("0"): "A", ord("1"): "K"}
PREPARE = ("-m", "protlig_dd.prepare")
MANY = "".join(f">p{i} x\nMKV\nMKA\n" for i in range(30_000)).encode()


def test_prepare_and_inspect_report_the_contents_of_the_store(run_python: Command, tmp_path: Path) -> None:
    text = "".join(f">p{i} [b]\nmkV{'ACDEFGHIKL'[i % 10] * (i + 9)}\n" for i in range(300))
    (tmp_path / "my.fasta").write_text(text + ">same\nMKVAAAAAAAAA\n")
    options = ("split.validation_fraction=0.2", "filter.max_length=307")
    process = run_python(*PREPARE, "input=my.fasta", "output=d/my.h5", *options)
    assert process.returncode == 0, process.stderr
    assert "d/my.h5: 296 sequences" in process.stdout
    assert "dropped 4 by max_length, 1 by duplicates" in process.stdout
    assert "600 lower-case letters are stored like upper-case letters" in process.stdout
    n_test = len(SequenceStore(tmp_path / "d/my.h5").split("test"))
    assert 0 < n_test < 10
    few = f"the test split has only {n_test} sequences, but training evaluates on it: prepare again with a larger split"
    assert f"warning: {few}.test_fraction\n" in process.stdout
    assert "the validation split" not in process.stdout
    assert 30 < len(SequenceStore(tmp_path / "d/my.h5").split("validation")) < 90
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["my.h5", "my.h5.manifest.json"]
    # count the reported numbers again in the input
    lengths = {f"p{i}": i + 12 for i in range(296)}
    store = SequenceStore(tmp_path / "d/my.h5")
    kept = {name: [lengths[store.id(row)] for row in store.split(name)] for name in SPLITS}
    assert sorted(itertools.chain(*kept.values())) == sorted(lengths.values())
    assert f"d/my.h5: 296 sequences, {sum(lengths.values()):,} residues\n" in process.stdout
    for name, split_lengths in kept.items():
        assert f"  {name:<10} {len(split_lengths):,} sequences, {sum(split_lengths):,} residues\n" in process.stdout
    shown = run_python(*PREPARE, "inspect=d/my.h5")
    assert shown.returncode == 0, shown.stderr
    for part in (
        '"max_length": 307',
        '"created": "20',
        *(f"{i:>5}-{i + 49:<5} {sum(i <= n < i + 50 for n in lengths.values()):>11,} █" for i in range(0, 300, 50)),
        ">p0 [b]\nmkVAAAAAAAAA\n",
        "all checksums match",
    ):
        assert part in shown.stdout
    again = run_python(*PREPARE, "input=my.fasta", "output=d/my.h5")
    assert_one_line_error(again, "d/my.h5 exists already")
    manifest = tmp_path / "d/my.h5.manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"created": "20', '"created": "1999').replace('print": "', 'print": "x')
    )
    # the manifest file now has the fingerprint of another store, so it is ignored
    assert "1999" not in run_python(*PREPARE, "inspect=d/my.h5").stdout
    content = bytearray((tmp_path / "d/my.h5").read_bytes())
    content[3000] ^= 1
    (tmp_path / "d/my.h5").write_bytes(content)
    assert_one_line_error(run_python(*PREPARE, "inspect=d/my.h5"), "d/my.h5: tokens is damaged")


def test_the_last_row_of_the_length_plot_counts_all_longer_sequences() -> None:
    splits = {"train": {"lengths": [2, 4]}, "validation": {"lengths": []}, "test": {"lengths": [0, 0, 1]}}
    lines = length_plot({"length_bin": 50, "splits": splits})
    assert [line.split()[:2] for line in lines[1:]] == [["0-49", "2"], ["50-99", "4"], ["100-149", "1"]]
    assert lines[2].count("█") == 2 * lines[1].count("█") == 50
    splits["test"] = {"lengths": [1] * 30}
    lines = length_plot({"length_bin": 50, "splits": splits})
    assert len(lines) == 21
    assert lines[-1].split()[:2] == ["950+", "11"]


BAD = {
    "empty": (b"", ["bad.fasta", "empty"]),
    "no header": (b"MKV\n", ["bad.fasta", "line 1 is not a FASTA header", "'MKV'"]),
    "no sequence": (b">a\nMKV\n>b x\n>c\nMKV\n", ["bad.fasta: record 2 (b), line 3", "no residues"]),
    "no sequence at the end": (b">a\nMKV\n>b", ["bad.fasta: record 2 (b), line 3", "no residues"]),
    "truncated gzip": (
        gzip.compress(MANY)[:20_000],
        ["bad.fasta", "truncated or damaged gzip; the last record that was read is "],
    ),
    "corrupt gzip": (gzip.compress(MANY)[:-8] + bytes(8), ["bad.fasta", "truncated or damaged gzip", "CRC"]),
    "stop inside": (b">a\r\nMK\r\nM*V\r\n", ["bad.fasta: record 1 (a), line 3", "'*' at position 4 of 5"]),
    "gap": (MANY + b">a\nMK-V\n", ["bad.fasta: record 30001 (a), line 90002", "'-' at position 3"]),
    "digits": (b">good\nMKV\n>P2 x\nMK1V\n", ["bad.fasta: record 2 (P2), line 4", "'1' at position 3"]),
    "NUL": (b">a\nMK\x00V\n", ["bad.fasta: record 1 (a), line 2", r"'\x00' at position 3"]),
    "header not UTF-8": (b">a\nMKV\n>b \xe9\nMKV\n", ["bad.fasta: record 2 (b), line 3", "not UTF-8"]),
    "one endless line": (
        gzip.compress(b">a\n") + gzip.compress(b"M" * (64 << 20)) * 32,
        ["bad.fasta: record 1, line 1 is longer than 16,777,216 bytes"],
    ),
    "repeated id": (MANY + b">p7\nMKV\n", ["record 30001 (p7), line 90001", "record 8 (p7), line 22"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fasta_is_a_one_line_error_and_leaves_no_file(run_python: Command, tmp_path: Path, name: str) -> None:
    content, parts = BAD[name]
    (tmp_path / "bad.fasta").write_bytes(content)
    process = run_python(*PREPARE, "input=bad.fasta", "output=bad.h5", "filter.duplicates=true")
    assert_one_line_error(process, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.fasta"]


def test_unusual_but_valid_fasta_is_read(run_python: Command, tmp_path: Path) -> None:
    """The file has CRLF, lower case, a final `*`, blank lines, a record of 40,000 residues, and no final newline."""
    (tmp_path / "odd.fasta").write_bytes(b"\r\n>a b\r\nmKv\r\nAA*\r\n\r\n>titin\r\n" + b"MKVLA" * 8000)
    process = run_python(*PREPARE, "input=odd.fasta", "output=odd.h5")
    assert process.returncode == 0, process.stderr
    store = SequenceStore(tmp_path / "odd.h5")
    assert store.lengths[:].tolist() == [5, 40_000]
    assert store.header(0) == "a b"
    assert store.manifest["lower_case_letters"] == 2


def test_sequences_that_two_splits_share_are_counted(run_python: Command, tmp_path: Path) -> None:
    """The count does not depend on the order of the splits, on upper and lower case, or on filter.duplicates."""
    files = {
        "train": ">t1 x\nMKVA\n>t2\nMKVC\n>t3\nMKVD\n>t4\nMKVE\n>t5\nMKVF\n>t6\nMKVF\n",
        "validation": ">v1\nMKVW\n>v2\nMKVY\n",
        "test": ">s1 y\nmkva*\n>s2\nMKVC\n>s3\nMKVG\n>s4\nMKVD\n>s5\nMKVE\n>s6\nMKVW\n",
    }
    for split, text in files.items():
        (tmp_path / f"{split}.fasta").write_text(text)

    def prepare(output: str, *options: str, splits: tuple[str, ...] = SPLITS) -> str:
        inputs = ", ".join(f"{split}: {split}.fasta" for split in splits)
        process = run_python(*PREPARE, f"input={{{inputs}}}", f"output={output}", *options)
        assert process.returncode == 0, process.stderr
        return process.stdout

    out = prepare("a.h5")
    shared = "warning: 4 sequences of test are also in train and are kept in train only: "
    shared += "s1 = t1, s2 = t2, s4 = t3, ...\n"
    assert shared in out
    assert "warning: 1 sequences of test are also in validation and are kept in validation only: s6 = v1\n" in out
    assert out.count("are also in") == 2
    assert "dropped 6 by duplicates" in out
    assert shared in run_python(*PREPARE, "inspect=a.h5").stdout
    out = prepare("b.h5", "filter.duplicates=true")
    assert "warning: 4 sequences of test are also in train and are kept in both: s1 = t1" in out
    out = prepare("c.h5", splits=("test", "train"))
    shared = "warning: 4 sequences of train are also in test and are kept in test only: "
    assert shared + "t1 = s1, t2 = s2, t3 = s4, ...\n" in out
    (tmp_path / "all.fasta").write_text("".join(f">p{i}\nMKV\n" for i in range(40)))
    process = run_python(
        *PREPARE, "input=all.fasta", "output=d.h5", "filter.duplicates=true", "split.test_fraction=0.5"
    )
    assert "and are kept in both: p" in process.stdout
    process = run_python(*PREPARE, "input=all.fasta", "output=e.h5", "split.test_fraction=0.5")
    assert "are also in" not in process.stdout  # only one of the equal sequences is kept, in one split


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["input={train: short.fasta, test: long.fasta}", "filter.min_length=3"],
         ["no record of short.fasta, which has 2, passed the filters (of all 3 records, the filters dropped 2 by min"]),
        (["input={test: long.fasta, train: same.fasta}"], ["no record of same.fasta, which has 1,", "1 by duplicates"]),
        (["input=long.fasta", "split.test_fraction=0.9999"],
         ["split.validation_fraction and split.test_fraction hold out every sequence; lower them"]),
    ],
)  # fmt: skip
def test_an_empty_training_split_is_an_error(
    run_python: Command, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    (tmp_path / "short.fasta").write_text(">a\nMK\n>b\nMA\n")
    (tmp_path / "long.fasta").write_text(">c\nMKVAA\n")
    (tmp_path / "same.fasta").write_text(">d\nMKVAA\n")
    process = run_python(*PREPARE, *options, "split.validation_fraction=0", "output=d/a.h5")
    assert_one_line_error(process, "d/a.h5: the train split is empty: ", *parts)
    assert list((tmp_path / "d").iterdir()) == []


def test_wrong_arguments_are_one_line_errors(run_python: Command, tmp_path: Path) -> None:
    assert_one_line_error(run_python(*PREPARE), "give either input=", "inspect=")
    assert_one_line_error(run_python(*PREPARE, "inspect=a.h5", "output=b.h5"), "leave out output=b.h5")
    assert_one_line_error(run_python(*PREPARE, "input=a"), "output=")
    assert_one_line_error(run_python(*PREPARE, "input=a", "b.fasta"), "'b.fasta'", "key=[a,b]")
    assert_one_line_error(run_python(*PREPARE, "input=a", "filter.taxa=5"), "filter.taxa: give a list: [a]")
    assert_one_line_error(run_python(*PREPARE, "input=a", "test_fraction=0.1"), "split.test_fraction")
    for value in ("0", "many", "1.5", "true"):
        message = "workers must be auto or a whole number of at least 1, got "
        assert_one_line_error(run_python(*PREPARE, "input=a", f"workers={value}"), message)


@pytest.fixture
def big_fasta(tmp_path: Path, made_once: MadeOnce, proteins: list[FastaRecord]) -> Path:
    """About 25 MB of real proteins: 130 copies of each protein.

    The copies have different ids and are rotated by different numbers of residues.
    """

    def fill(folder: Path) -> None:
        with (folder / "big.fasta").open("w") as file:
            for rotation in range(130):
                for record in proteins:
                    sequence = record.sequence[rotation:] + record.sequence[:rotation]
                    file.write(f">{record.id}_{rotation}\n{sequence}\n")

    path = tmp_path / "big.fasta"
    path.hardlink_to(made_once("big_fasta", fill) / "big.fasta")
    return path


def wait_until(condition: Callable[[], object], process: Process) -> None:
    deadline = time.time() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_command_leaves_no_store_and_can_be_run_again(tmp_path: Path, big_fasta: Path, start: Start) -> None:
    partial = tmp_path / ".big.h5.partial"
    stages: list[Callable[[], object]] = [
        lambda: partial.exists(),
        lambda: (partial / "tokens").exists() and (partial / "tokens").stat().st_size > 5_000_000,
        lambda: (partial / "store.h5").exists(),
        lambda: (partial / "store.h5").exists() and (partial / "store.h5").stat().st_size > 10_000_000,
    ]
    for reached in stages:
        process = start(*PREPARE, "input=big.fasta", "output=big.h5")
        wait_until(reached, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "big.h5").exists()
        assert partial.exists()
    process = start(*PREPARE, "input=big.fasta", "output=big.h5")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not partial.exists()
    SequenceStore(tmp_path / "big.h5").verify()


@pytest.mark.slow
def test_ctrl_c_leaves_no_file(tmp_path: Path, big_fasta: Path, start: Start) -> None:
    process = start(*PREPARE, "input=big.fasta", "output=big.h5", new=True)
    wait_until((tmp_path / ".big.h5.partial/tokens").exists, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["big.fasta"]


@pytest.mark.slow
def test_a_second_process_cannot_write_the_same_output(tmp_path: Path, big_fasta: Path, start: Start) -> None:
    first = start(*PREPARE, "input=big.fasta", "output=big.h5")
    wait_until((tmp_path / ".big.h5.partial/tokens").exists, first)
    first.send_signal(signal.SIGSTOP)
    second = start(*PREPARE, "input=big.fasta", "output=big.h5")
    _, errors = second.communicate()
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "big.h5: another process is writing it" in errors
    _, errors = first.communicate()
    assert first.returncode == 0, errors
    SequenceStore(tmp_path / "big.h5").verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.fasta", "big.h5", "big.h5.manifest.json"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 12, 20])  # MB, reached in writing the first block, a temporary file or the store
def test_a_file_size_limit_is_a_one_line_error_and_leaves_no_file(
    tmp_path: Path, big_fasta: Path, size: int, run_python: Command
) -> None:
    limited = f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({size << 20}, {size << 20}));"
    limited += "runpy.run_module('protlig_dd.prepare', run_name='__main__')"
    process = run_python("-c", limited, "input=big.fasta", "output=d/big.h5")
    assert_one_line_error(process, "d/big.h5: cannot be written: File too large")
    assert list((tmp_path / "d").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a tmpfs of `size` megabytes and returns its folder. Mounting needs root."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{size}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", folder], check=True, capture_output=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def may_mount() -> bool:
    """Whether this process may mount file systems: try it in a temporary namespace."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("size", [1, 16, 36])
def test_a_full_disk_is_a_one_line_error_and_leaves_no_file(
    tmp_path: Path, big_fasta: Path, small_disk: Callable[[int], Path], size: int, start: Start
) -> None:
    require(may_mount(), "a small disk needs root to mount it")
    disk = small_disk(size)
    process = start(*PREPARE, "input=big.fasta", f"output={disk}/d/big.h5")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors == f"error: {disk}/d/big.h5: cannot be written: No space left on device\n"
    assert list((disk / "d").iterdir()) == []


def test_an_output_folder_that_cannot_be_created_is_a_one_line_error(run_python: Command, tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMKV\n")
    (tmp_path / "d").write_text("a file")
    process = run_python(*PREPARE, "input=a.fasta", "output=d/a.h5")
    assert_one_line_error(process, "d/a.h5: cannot be written: ")


@pytest.mark.slow
def test_memory_grows_by_less_than_40_bytes_a_sequence(tmp_path: Path) -> None:
    peaks = []
    for count in (100_000, 500_000):
        with (tmp_path / "a.fasta").open("w") as file:
            file.writelines(f">p{i}\n{i:024b}\n".translate(LETTERS_OF_BITS) for i in range(count))
        code = (
            "from pathlib import Path; from protlig_dd.data.prepare.build import build_store;"
            f"build_store([Path('a.fasta')], Path('a{count}.h5'));"
            "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PROTLIG_TYPECHECK": "0"},
        )
        peaks.append(int(done.stdout) * 1024)
        assert len(SequenceStore(tmp_path / f"a{count}.h5")) == count
    assert peaks[0] < 500e6
    assert peaks[1] - peaks[0] < 40 * 400_000
