"""Break the code in ways that have happened or could, one at a time, and see that a test fails each time.

    python -m scripts.mutation_check                    every mutation of scripts/mutations/*.toml
    python -m scripts.mutation_check --room data model  those of some rooms
    python -m scripts.mutation_check --draw 10          ten of them, others on each day

Mutations are made in copies of the checkout, so nothing here is changed. What was found is kept in a file, and is not
tried again as long as the code, the tests and the mutation are the same: what was broken off goes on. Prints two
Markdown tables; the exit code is 1 if a mutation survives.
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
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from protlig_dd.runtime.metrics import ProgressBar
from tests.warm import Server, start_server

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "scripts/mutations"
TESTED = ("protlig_dd", "configs", "scripts", "tests")  # what a verdict depends on
LONGEST = 600  # seconds of the tests of one mutation
SURVIVED = "**none**"


@dataclass(frozen=True)
class Mutation:
    """A fault: in `file`, `new` for `old`, which is there once; `tests` are the arguments of pytest."""

    what: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def room(self) -> str:
        """The folder of the package; its top has the verbs and the batch that all rooms know."""
        parts = Path(self.file).parts
        return parts[1] if len(parts) > 2 else "verbs, batch"


def read_mutations(path: Path) -> list[Mutation]:
    """Those of a TOML file.

    Raises:
        ValueError: an entry that lacks a key or has another, or names a text that its file does not have once.
    """
    found = []
    for number, entry in enumerate(tomllib.loads(path.read_text())["mutation"], 1):
        try:
            mutation = Mutation(**entry)
        except TypeError as error:
            raise ValueError(f"{path}, mutation {number}: {error}") from error
        if (times := (ROOT / mutation.file).read_text().count(mutation.old)) != 1:
            raise ValueError(f"{path}: {mutation.what}: {mutation.old!r} occurs {times} times in {mutation.file}")
        found.append(mutation)
    return found


def check(mutations: Sequence[Mutation], results: Path, jobs: int) -> dict[Mutation, str]:
    """The test that fails first for each mutation, or SURVIVED; appended to `results` as they come.

    Raises:
        ValueError: at the end, for mutations that say nothing.
    """
    state = digest_of(TESTED)
    keys = {mutation: hashlib.sha256(f"{state}{asdict(mutation)}".encode()).hexdigest() for mutation in mutations}
    known = {}
    if results.exists():
        known = {row["key"]: row["verdict"] for row in map(json.loads, results.read_text().splitlines())}
    left = [mutation for mutation in mutations if keys[mutation] not in known]
    problems: list[str] = []
    with copies(min(jobs, len(left))) as free, started() as server, results.open("a") as file:

        def one(mutation: Mutation) -> tuple[Mutation, str, str]:
            copy = free.get()
            try:
                return mutation, verdict(mutation, copy, server), ""
            except ValueError as error:
                return mutation, "", str(error)
            finally:
                free.put(copy)

        with (
            ThreadPoolExecutor(jobs) as pool,
            ProgressBar("mutations", len(mutations), len(mutations) - len(left)) as bar,
        ):
            for mutation, found, problem in pool.map(one, left):
                bar.advance(note=mutation.what)
                if problem:
                    problems.append(problem)
                    continue
                known[keys[mutation]] = found
                file.write(json.dumps({"key": keys[mutation], "what": mutation.what, "verdict": found}) + "\n")
                file.flush()
    if problems:
        raise ValueError("\n".join(problems))
    return {mutation: known[keys[mutation]] for mutation in mutations}


def digest_of(folders: Sequence[str]) -> str:
    """SHA-256 of the names and contents of the text files in them."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml", ".yaml", ".jinja", ".sh"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def copies(number: int) -> Iterator["queue.Queue[Path]"]:
    """Copies of the checkout, one for each job."""
    free: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(number):
            copy = Path(folder) / str(i) / "checkout"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "data.h5", "*.egg-info"))
            free.put(copy)
        yield free


@contextmanager
def started() -> Iterator[Server]:
    """The interpreter that the tests of each mutation are a fork of: it has imported torch already."""
    server = start_server()
    try:
        yield server
    finally:
        server.close()


def verdict(mutation: Mutation, copy: Path, server: Server) -> str:
    """The name of the first test that fails on the copy with this mutation, or SURVIVED.

    Raises:
        ValueError: pytest found no test, or the mutated code cannot be imported: such a mutation says nothing.
    """
    file, source = copy / mutation.file, (ROOT / mutation.file).read_text()
    file.write_text(source.replace(mutation.old, mutation.new))
    arguments = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *shlex.split(mutation.tests)]
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    process = server.start(arguments, cwd=copy, env=env, new_session=True)
    try:
        output, errors = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"no end within {LONGEST} s"
    finally:
        file.write_text(source)
    if process.returncode == 0:
        return SURVIVED
    failed = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", output, re.MULTILINE)
    if process.returncode != 1 or failed is None:
        raise ValueError(f"{mutation.what}: pytest {mutation.tests} ended with {process.returncode}:\n{output}{errors}")
    return f"`{failed[1]}`"


def by_room(found: dict[Mutation, str]) -> list[str]:
    """Rows of Markdown: how many mutations of each room were killed, and by the tests of which files."""
    made = Counter(mutation.room for mutation in found)
    killed = Counter(mutation.room for mutation, test in found.items() if test != SURVIVED)
    rows = ["| room | mutations | killed | by tests of |", "| --- | ---: | ---: | --- |"]
    for room in sorted(made):
        tests = {re.sub(r"`tests/test_(\w+)\.py.*", r"\1", test) for one, test in found.items() if one.room == room}
        rows.append(f"| {room} | {made[room]} | {killed[room]} | {', '.join(sorted(tests - {SURVIVED}))} |")
    return [*rows, f"| all | {len(found)} | {sum(killed.values())} | |"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, nargs="+", help="of mutations; without it all of scripts/mutations/")
    parser.add_argument(
        "--room", nargs="+", help="data, diffusion, evaluation, model, runtime, training or verbs, batch"
    )
    parser.add_argument("--draw", type=int, metavar="N", help="so many of them, drawn by the date")
    parser.add_argument("--date", default=date.today().isoformat(), help="that they are drawn by; today without it")
    parser.add_argument("--results", type=Path, default=Path("mutations.jsonl"), help="what was found before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once")
    options = parser.parse_args(arguments)
    try:
        mutations = [one for path in options.list or sorted(LISTS.glob("*.toml")) for one in read_mutations(path)]
        if options.room:
            mutations = [one for one in mutations if one.room in options.room]
        if options.draw:
            mutations = random.Random(options.date).sample(mutations, min(options.draw, len(mutations)))
            print(f"{len(mutations)} mutations, drawn by --date {options.date}")
        found = check(mutations, options.results, options.jobs)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| mutation | file | the test that fails |\n| --- | --- | --- |")
    for mutation, test in found.items():
        print(f"| {mutation.what} | {Path(mutation.file).name} | {test} |")
    print("", *by_room(found), sep="\n")
    return int(SURVIVED in found.values())


if __name__ == "__main__":
    sys.exit(main())
