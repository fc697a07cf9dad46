"""Plant faults in the code, one at a time, and check that a test fails each time.

    python -m scripts.mutation_check                      every mutation of scripts/mutations/*.toml
    python -m scripts.mutation_check --folder data model  the mutations in protlig_dd/data and protlig_dd/model
    python -m scripts.mutation_check --draw 10            ten random mutations, different ones each day

A mutation is a planted fault. It survives if no test fails. The faults are planted in copies of the checkout, so the
checkout itself is not changed. Results are saved in a file and reused while the code, the tests and the mutation are
unchanged. To resume an interrupted check, run the same command again. Prints two Markdown tables; the exit code is 1 if
a mutation survives, and 2 if a mutation cannot be tested.
"""

import argparse
import hashlib
import json
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

from protlig_dd.system.files import drop_partial_line
from protlig_dd.system.terminal import ProgressBar
from tests.warm import Server, start_server

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "scripts/mutations"
FOLDERS = ("config", "data", "diffusion", "evaluation", "inference", "model", "runs", "system", "training", "top")
# the files and folders to copy; a saved result is reused only while they are unchanged (mutation lists may change)
TESTED = ("protlig_dd", "configs", "scripts", "tests", "docs", "README.md", "pyproject.toml")
TESTED += ("constraints.txt", "constraints-transformers4.txt")
TIMEOUT = 600  # seconds for the tests of one mutation
SURVIVED = "**none**"


@dataclass(frozen=True)
class Mutation:
    """A fault. `what` describes it. It is planted by replacing `old`, which occurs exactly once in `file`, with `new`.

    `tests` are the arguments of pytest that select the tests to run.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def folder(self) -> str:
        """The folder of protlig_dd that contains the file; `top` for files directly in protlig_dd or outside it."""
        package, *folders, _ = Path(self.file).parts
        return folders[0] if package == "protlig_dd" and folders else "top"


KEYS = tuple(field.name for field in fields(Mutation))


def read_mutations(path: Path) -> list[Mutation]:
    """Read the mutations of a TOML file.

    Raises:
        ValueError: an entry has missing or unknown keys, or its `old` does not occur exactly once in its file.
    """
    found = []
    try:
        entries = tomllib.loads(path.read_text()).get("mutation", [])
    except ValueError as error:  # invalid TOML or UTF-8
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: no [[mutation]] entries")
    for number, entry in enumerate(entries, 1):
        if {key: type(value) for key, value in entry.items()} != dict.fromkeys(KEYS, str):
            raise ValueError(f"{path}, mutation {number}: needs the strings {', '.join(KEYS)}, got {', '.join(entry)}")
        mutation = Mutation(**entry)
        if not (ROOT / mutation.file).is_file():
            raise ValueError(f"{path}: {mutation.what}: no such file {mutation.file}")
        if (times := (ROOT / mutation.file).read_text().count(mutation.old)) != 1:
            raise ValueError(f"{path}: {mutation.what}: {mutation.old!r} occurs {times} times in {mutation.file}")
        found.append(mutation)
    return found


def check(mutations: Sequence[Mutation], results: Path, jobs: int) -> dict[Mutation, str]:
    """Return the verdict on each mutation: the first test that fails, or SURVIVED.

    Args:
        results: file with the saved verdicts. Each new verdict is appended to the file immediately.
        jobs: number of mutations tested at the same time.

    Raises:
        ValueError: the file of results is damaged, or some mutations cannot be tested. In the second case all other
            mutations have been tested before.
    """
    state = digest_of_checkout()
    keys = {mutation: hashlib.sha256(f"{state}{asdict(mutation)}".encode()).hexdigest() for mutation in mutations}
    known = read_results(results)
    remaining = [mutation for mutation in mutations if keys[mutation] not in known]
    problems: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="mutation_check.") as folder,
        results.open("a") as file,
        cancelled_at_exit(ThreadPoolExecutor(jobs)) as pool,
        warm_server(remaining) as server,  # closed before the pool; this ends the tests for which the pool waits
        ProgressBar("mutations", len(mutations), len(mutations) - len(remaining)) as bar,
    ):
        copies = queue.Queue[Path]()
        for number in range(min(jobs, len(remaining))):
            copies.put(copy_checkout(Path(folder) / str(number)))

        def test_mutation(mutation: Mutation) -> str:
            copy = copies.get()
            try:
                return verdict(mutation, copy, server)
            finally:
                copies.put(copy)

        running = {pool.submit(test_mutation, mutation): mutation for mutation in remaining}
        for done in as_completed(running):
            mutation = running[done]
            bar.advance(note=mutation.what)
            try:
                found = known[keys[mutation]] = done.result()
            except (ValueError, RuntimeError) as error:
                problems.append(f"{mutation.what}: {error}")
                continue
            file.write(json.dumps({"key": keys[mutation], "what": mutation.what, "verdict": found}) + "\n")
            file.flush()
    if problems:
        raise ValueError("\n".join(problems))
    return {mutation: known[keys[mutation]] for mutation in mutations}


def read_results(path: Path) -> dict[str, str]:
    """Return {key: verdict} of a file of results, after removing a partial last line that a killed check left."""
    if not path.exists():
        return {}
    drop_partial_line(path)
    try:
        return {row["key"]: row["verdict"] for row in map(json.loads, path.read_text().splitlines())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a file of results ({error}); move it or choose another with --results"
        ) from error


def digest_of_checkout() -> str:
    """Return the SHA-256 of the Python version and of the names and contents of the files in TESTED.

    The mutation lists and bytecode files are left out.
    """
    digest = hashlib.sha256(sys.version.encode())
    for folder in TESTED:
        for path in sorted((ROOT / folder).rglob("*") if (ROOT / folder).is_dir() else [ROOT / folder]):
            if path.is_file() and path.suffix != ".pyc" and path.parent != LISTS:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def copy_checkout(folder: Path) -> Path:
    """Copy TESTED to folder/checkout, and return the copy's path.

    Also create folder/tmp, the temporary folder of the tests that run in the copy (epoch plans are cached there).
    """
    (folder / "tmp").mkdir(parents=True)
    copy = folder / "checkout"
    copy.mkdir()
    for name in TESTED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@contextmanager
def cancelled_at_exit(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Yield the pool; when the block ends, for example by Ctrl-C, cancel the jobs that have not started."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def warm_server(mutations: Sequence[Mutation]) -> Iterator[Server | None]:
    """Yield a server that forks an interpreter which has imported torch, or None if there are no mutations.

    The forks run the tests.
    """
    server = start_server() if mutations else None
    try:
        yield server
    finally:
        if server is not None:
            server.close()


def verdict(mutation: Mutation, copy: Path, server: Server | None) -> str:
    """Plant a mutation in the copy, and return the first test that fails, or SURVIVED if none fails.

    Raises:
        ValueError: pytest found no test or timed out, or the test that fails also fails without the mutation.
    """
    file = copy / mutation.file
    source = file.read_text()
    file.write_text(source.replace(mutation.old, mutation.new))
    try:
        code, output = run_tests(shlex.split(mutation.tests), copy, server)
    finally:
        file.write_text(source)
    if code == 0:
        return SURVIVED
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", output, re.MULTILINE)
    if code != 1 or failed is None:
        raise ValueError(f"pytest {mutation.tests} exited with {code}:\n{output}")
    if run_tests([failed[1]], copy, server)[0] != 0:
        raise ValueError(f"{failed[1]} also fails without the mutation")
    return f"`{failed[1].partition('[')[0]}`"


def run_tests(arguments: Sequence[str], copy: Path, server: Server | None) -> tuple[int, str]:
    """Run pytest in the copy and return its exit code and output.

    Raises:
        ValueError: pytest did not end within TIMEOUT.
    """
    assert server is not None
    command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments]
    variables = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(copy.parent / "tmp")}
    process = server.start(command, cwd=copy, env={**os.environ, **variables}, new_session=True)
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise ValueError(f"pytest {' '.join(arguments)} did not end within {TIMEOUT} s") from error
    return process.returncode or 0, output + errors


def by_folder(found: dict[Mutation, str]) -> list[str]:
    """Return a Markdown table with one row for each folder.

    A row has the number of mutations, the number that tests detected, and the files of these tests.
    """
    total = Counter(mutation.folder for mutation in found)
    killed = Counter(mutation.folder for mutation, test in found.items() if test != SURVIVED)
    rows = ["| folder | mutations | killed | by tests in |", "| --- | ---: | ---: | --- |"]
    for folder in sorted(total):
        tests = {
            re.sub(r"`tests/test_(\w+)\.py.*", r"\1", test)
            for mutation, test in found.items()
            if mutation.folder == folder
        }
        rows.append(f"| {folder} | {total[folder]} | {killed[folder]} | {', '.join(sorted(tests - {SURVIVED}))} |")
    return [*rows, f"| all | {len(found)} | {sum(killed.values())} | |"]


def count(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list", type=Path, nargs="+", help="TOML files of mutations; default: all in scripts/mutations/"
    )
    parser.add_argument(
        "--folder",
        nargs="+",
        choices=FOLDERS,
        help="test only mutations in these folders of protlig_dd; `top`: all other files; default: all",
    )
    parser.add_argument(
        "--draw", type=count, metavar="N", help="test N random mutations, chosen by the date; default: all"
    )
    parser.add_argument(
        "--date",
        default=date.today().isoformat(),
        help="the date that chooses the mutations of --draw; default: %(default)s",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("mutations.jsonl"),
        metavar="FILE",
        help="file to save results in and to reuse them from; default: %(default)s in the current folder",
    )
    parser.add_argument(
        "--jobs",
        type=count,
        default=os.cpu_count() or 1,
        help="number of mutations tested at the same time; default: %(default)s",
    )
    options = parser.parse_args(arguments)
    try:
        paths = options.list or sorted(LISTS.glob("*.toml"))
        mutations = [mutation for path in paths for mutation in read_mutations(path)]
        mutations = [mutation for mutation in mutations if mutation.folder in (options.folder or FOLDERS)]
        if options.draw is not None:
            mutations = random.Random(options.date).sample(mutations, min(options.draw, len(mutations)))
            print(f"{len(mutations)} mutations, chosen by --date {options.date}", flush=True)
        if not mutations:
            raise ValueError("no mutation to test")
        found = check(mutations, options.results, options.jobs)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; repeat the command to resume with the results in {options.results}", file=sys.stderr)
        return 130
    print("| mutation | file | the test that fails |\n| --- | --- | --- |")
    for mutation, test in found.items():
        print(f"| {mutation.what} | {Path(mutation.file).name} | {test} |")
    print("", *by_folder(found), sep="\n")
    return int(SURVIVED in found.values())


if __name__ == "__main__":
    sys.exit(main())
