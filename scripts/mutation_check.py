"""Break the code in ways that have happened or could, one at a time, and see that a test fails each time.

    python -m scripts.mutation_check                    every mutation of scripts/mutations/*.toml
    python -m scripts.mutation_check --room data model  those of some rooms
    python -m scripts.mutation_check --draw 10          ten of them, others on each day

Mutations are made in copies of the checkout, so nothing here is changed. What was found is kept in a file, and is not
tried again as long as the code, the tests and the mutation are the same: a check that was broken off goes on. Prints
two Markdown tables; the exit code is 1 if a mutation survives, and 2 if one says nothing.
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
ROOMS = ("config", "data", "diffusion", "evaluation", "inference", "model", "runs", "system", "training", "top")
# what verdicts depend on, and what is copied
TESTED = ("protlig_dd", "configs", "scripts", "tests", "docs", "README.md", "pyproject.toml", "constraints.txt")
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
        """The folder of the package; at its top are the verbs, and the batch that all rooms know."""
        parts = Path(self.file).parts
        return parts[1] if len(parts) > 2 else "top"


KEYS = tuple(field.name for field in fields(Mutation))


def read_mutations(path: Path) -> list[Mutation]:
    """Those of a TOML file.

    Raises:
        ValueError: an entry that lacks a key or has another, or names a text that its file does not have once.
    """
    found = []
    try:
        entries = tomllib.loads(path.read_text()).get("mutation", [])
    except ValueError as error:  # TOML or UTF-8 that it is not
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: no [[mutation]] in it")
    for number, entry in enumerate(entries, 1):
        if {key: type(value) for key, value in entry.items()} != dict.fromkeys(KEYS, str):
            raise ValueError(f"{path}, mutation {number}: want the texts {', '.join(KEYS)}, got {', '.join(entry)}")
        mutation = Mutation(**entry)
        if not (ROOT / mutation.file).is_file():
            raise ValueError(f"{path}: {mutation.what}: no such file {mutation.file}")
        if (times := (ROOT / mutation.file).read_text().count(mutation.old)) != 1:
            raise ValueError(f"{path}: {mutation.what}: {mutation.old!r} occurs {times} times in {mutation.file}")
        found.append(mutation)
    return found


def check(mutations: Sequence[Mutation], results: Path, jobs: int) -> dict[Mutation, str]:
    """The test that fails first for each mutation, or SURVIVED; each is appended to `results` once it is known.

    Raises:
        ValueError: at the end, for mutations that say nothing, and for a damaged file of results.
    """
    state = digest_of_checkout()
    keys = {mutation: hashlib.sha256(f"{state}{asdict(mutation)}".encode()).hexdigest() for mutation in mutations}
    known = read_results(results)
    left = [mutation for mutation in mutations if keys[mutation] not in known]
    problems: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="mutation_check.") as folder,
        results.open("a") as file,
        ending(ThreadPoolExecutor(jobs)) as pool,
        started(left) as server,  # ends before the pool does, and with it what the pool waits for
        ProgressBar("mutations", len(mutations), len(mutations) - len(left)) as bar,
    ):
        copies = queue.Queue[Path]()
        for number in range(min(jobs, len(left))):
            copies.put(copy_checkout(Path(folder) / str(number)))

        def one(mutation: Mutation) -> str:
            copy = copies.get()
            try:
                return verdict(mutation, copy, server)
            finally:
                copies.put(copy)

        running = {pool.submit(one, mutation): mutation for mutation in left}
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
    """Verdicts by key; a line that a kill cut short is dropped."""
    if not path.exists():
        return {}
    drop_partial_line(path)
    try:
        return {row["key"]: row["verdict"] for row in map(json.loads, path.read_text().splitlines())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what this program writes ({error}); move it away") from error


def digest_of_checkout() -> str:
    """SHA-256 of what verdicts depend on, but for the lists of mutations: names and contents of files."""
    digest = hashlib.sha256(sys.version.encode())
    for folder in TESTED:
        for path in sorted((ROOT / folder).rglob("*") if (ROOT / folder).is_dir() else [ROOT / folder]):
            if path.is_file() and path.suffix != ".pyc" and path.parent != LISTS:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def copy_checkout(folder: Path) -> Path:
    """A copy of the checkout, with a temporary folder of its own: epochs' plans are kept there."""
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
def ending(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """What has not begun when something ends the check (Ctrl-C, say) is left out."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def started(left: Sequence[Mutation]) -> Iterator[Server | None]:
    """The interpreter that the tests of each mutation are a fork of: it has imported torch. None for no mutation."""
    server = start_server() if left else None
    try:
        yield server
    finally:
        if server is not None:
            server.close()


def verdict(mutation: Mutation, copy: Path, server: Server | None) -> str:
    """The name of the first test that fails on the copy with this mutation and passes without it, or SURVIVED.

    Raises:
        ValueError: pytest found no test or did not end, or the test that fails does so without the mutation too.
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
        raise ValueError(f"pytest {mutation.tests} ended with {code}:\n{output}")
    if run_tests([failed[1]], copy, server)[0] != 0:
        raise ValueError(f"{failed[1]} fails without the mutation, too")
    return f"`{failed[1].partition('[')[0]}`"


def run_tests(arguments: Sequence[str], copy: Path, server: Server | None) -> tuple[int, str]:
    """Exit code and output of pytest in the copy.

    Raises:
        ValueError: it did not end within LONGEST.
    """
    assert server is not None
    command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments]
    own = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(copy.parent / "tmp")}
    process = server.start(command, cwd=copy, env={**os.environ, **own}, new_session=True)
    try:
        output, errors = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise ValueError(f"pytest {' '.join(arguments)} did not end within {LONGEST} s") from error
    return process.returncode or 0, output + errors


def by_room(found: dict[Mutation, str]) -> list[str]:
    """Rows of Markdown: how many mutations of each room were killed, and by the tests of which files."""
    made = Counter(mutation.room for mutation in found)
    killed = Counter(mutation.room for mutation, test in found.items() if test != SURVIVED)
    rows = ["| room | mutations | killed | by tests of |", "| --- | ---: | ---: | --- |"]
    for room in sorted(made):
        tests = {re.sub(r"`tests/test_(\w+)\.py.*", r"\1", test) for one, test in found.items() if one.room == room}
        rows.append(f"| {room} | {made[room]} | {killed[room]} | {', '.join(sorted(tests - {SURVIVED}))} |")
    return [*rows, f"| all | {len(found)} | {sum(killed.values())} | |"]


def count(text: str) -> int:
    """A number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a number from 1 on, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, nargs="+", help="files of mutations; default: all of scripts/mutations/")
    parser.add_argument(
        "--room", nargs="+", choices=ROOMS, help="folders of the package, `top` for the verbs; default: all"
    )
    parser.add_argument(
        "--draw", type=count, metavar="N", help="try N of the mutations, drawn by the date; default: all"
    )
    parser.add_argument("--date", default=date.today().isoformat(), help="the date to draw by; default: %(default)s")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("mutations.jsonl"),
        metavar="FILE",
        help="what was found before, which is not tried again; default: %(default)s here",
    )
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="tried at once; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        mutations = [one for path in options.list or sorted(LISTS.glob("*.toml")) for one in read_mutations(path)]
        mutations = [one for one in mutations if one.room in (options.room or ROOMS)]
        if options.draw is not None:
            mutations = random.Random(options.date).sample(mutations, min(options.draw, len(mutations)))
            print(f"{len(mutations)} mutations, drawn by --date {options.date}", flush=True)
        if not mutations:
            raise ValueError("no mutation is chosen")
        found = check(mutations, options.results, options.jobs)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what is in {options.results}", file=sys.stderr)
        return 130
    print("| mutation | file | the test that fails |\n| --- | --- | --- |")
    for mutation, test in found.items():
        print(f"| {mutation.what} | {Path(mutation.file).name} | {test} |")
    print("", *by_room(found), sep="\n")
    return int(SURVIVED in found.values())


if __name__ == "__main__":
    sys.exit(main())
