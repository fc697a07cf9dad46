"""Make outputs appear under their name only when complete, and let only one process at a time write an output."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from protlig_dd.system.files import lock_may_fail, move_to_new_name


def put_in_place(file: Path, output: Path) -> None:
    """Give a file its final name, which must be free."""
    try:
        move_to_new_name(file, output)
    except FileExistsError:
        raise output_exists(output) from None


def manifest_path(store: Path) -> Path:
    return store.with_name(f"{store.name}.manifest.json")


class OutputExistsError(ValueError):
    """The output exists, or another process is writing it."""


def output_exists(output: Path) -> OutputExistsError:
    return OutputExistsError(f"{output} exists already; choose another output, or rename or delete it")


def partial_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Create and lock a folder `.NAME.partial` beside the output, and remove it at the end.

    Files that a killed process left in the folder are removed first.

    Raises:
        OutputExistsError: another process has locked the folder.
        ValueError: the folder exists, but this program did not create it.
    """
    folder = partial_path(output)
    lock = None
    while lock is None:
        if _is_foreign(folder):
            raise ValueError(
                f"{folder} exists and was not created by this program, which needs this name for temporary files; "
                "rename or move it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = (folder / "lock").open("w")
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            with lock_may_fail(folder):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise OutputExistsError(f"{output}: another process is writing it (lock: {folder / 'lock'})") from None
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
        # remove the lock last, because files in a folder without a lock count as foreign
        (folder / "lock").unlink()
        with contextlib.suppress(OSError):  # the next writer may already use the folder
            folder.rmdir()
        lock.close()


def _is_foreign(folder: Path) -> bool:
    """Whether the folder contains files but no lock.

    Other processes of this program may use the folder meanwhile. They create the lock before any files and remove it
    after all files. So if the lock is missing, such a process has removed all its files, perhaps after this function
    listed them. Listed files that still exist are therefore foreign.
    """
    try:
        files = [path for path in folder.iterdir() if path.name != "lock"]
    except FileNotFoundError:
        return False
    return bool(files) and not (folder / "lock").exists() and any(map(os.path.lexists, files))


def _clear(folder: Path) -> None:
    for leftover in folder.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != "lock":
            leftover.unlink()


@contextlib.contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Turn system errors, such as a full disk, into a ValueError that names the output.

    Errors in reading an input are already ValueErrors that name the input.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # HDF5 raises RuntimeError for errors while it closes a file
        found = re.search(r"errno = (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number is None:
            raise
        reason = os.strerror(number)
        raise ValueError(f"{output}: cannot be written: {reason}") from error
