"""An output that appears under its name when it is complete, and is written by one process."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from protlig_dd.system.files import lock_may_fail


def put_in_place(file: Path, output: Path) -> None:
    """Give a file its final name, which must be free."""
    try:
        os.link(file, output)
    except FileExistsError:
        raise already_there(output) from None
    except OSError:  # no hard links here
        file.rename(output)


def manifest_path(store: Path) -> Path:
    return store.with_name(f"{store.name}.manifest.json")


class AlreadyThereError(ValueError):
    """The output exists, or another process is writing it."""


def already_there(output: Path) -> AlreadyThereError:
    return AlreadyThereError(f"{output} exists already; give another output or move it away")


def partial_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A locked folder `.NAME.partial` beside the output, removed at the end; what a killed process left is cleared.

    Raises:
        AlreadyThereError: another process holds it.
        ValueError: a folder of that name that is not ours.
    """
    folder = partial_path(output)
    lock = None
    while lock is None:
        if _is_foreign(folder):
            raise ValueError(f"{folder} is in the way and was not made by this program; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = (folder / "lock").open("w")
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            with lock_may_fail(folder):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise AlreadyThereError(f"{output}: another process is writing it (it holds {folder / 'lock'})") from None
        with contextlib.suppress(FileNotFoundError):
            if (folder / "lock").stat().st_ino == os.fstat(handle.fileno()).st_ino:
                lock = handle
        if lock is None:
            handle.close()
    try:
        _clear(folder)
        yield folder
    finally:
        _clear(folder)
        # the lock goes last: without it the rest would not be known for ours
        (folder / "lock").unlink()
        with contextlib.suppress(OSError):  # the next writer may be in it already
            folder.rmdir()
        lock.close()


def _is_foreign(folder: Path) -> bool:
    """Whether it has files and no lock. Others of this program may take and leave it meanwhile: a lock comes before all
    files and goes after them, so that of one who came between two looks the second sees it, or its files are gone."""
    try:
        found = [path for path in folder.iterdir() if path.name != "lock"]
    except FileNotFoundError:
        return False
    return bool(found) and not (folder / "lock").exists() and any(map(os.path.lexists, found))


def _clear(folder: Path) -> None:
    for leftover in folder.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != "lock":
            leftover.unlink()


@contextlib.contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """A full disk and the like as one line that names the output. (Inputs name themselves.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:  # HDF5 reports what it meets while closing a file as a RuntimeError
        found = re.search(r"errno = (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number is None:
            raise
        reason = os.strerror(number)
        raise ValueError(f"{output}: cannot be written: {reason}") from error
