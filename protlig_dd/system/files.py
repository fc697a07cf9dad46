"""Writing files so that nothing half-written ever stands under a final name."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, or a limit on a file


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that is written inside where the disk is full: an error of `write` names none, that of a file which
    gets its name later an invisible one, and HDF5 and safetensors have kinds of their own.

    Raises:
        OSError: of FULL, with `path` as its filename.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        told = re.search(r"(?:errno = |os error )(\d+)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        named = getattr(error, "filename", None)
        elsewhere = isinstance(named, str) and not Path(named).absolute().is_relative_to(path.parent.absolute())
        if number not in FULL or elsewhere:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_atomic(path: Path, text: str) -> None:
    """Write, sync and rename; readers see the old file or the new one."""
    write_atomic_bytes(path, text.encode())


def write_atomic_bytes(path: Path, content: bytes) -> None:
    """The same of bytes. Who may read it follows from the umask, as for any new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with writing(path), temporary.open("xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_new(path: Path, text: str) -> None:
    """Write and sync a file that is not there yet.

    Raises:
        ValueError: something has that name by then; it stays as it is.
    """
    with replacing(path) as temporary:
        write_atomic(temporary, text)


def write_folder(path: Path, files: Mapping[str, str]) -> None:
    """Write a new folder of text files, which is there whole or not at all.

    Raises:
        ValueError: `path` exists.
    """
    with replacing(path) as folder:
        folder.mkdir()
        for name, text in files.items():
            write_atomic(folder / name, text)
        sync_folder(folder)
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder at, which gets the name once all is written.

    Raises:
        ValueError: something has that name by then; it stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with writing(path):
            yield temporary / path.name
        try:
            _name(temporary / path.name, path)
        except FileExistsError:
            raise ValueError(f"{path} exists already; give another output or move it away") from None
    finally:
        shutil.rmtree(temporary)


def _name(written: Path, path: Path) -> None:
    """Give a file or folder its name; FileExistsError if anything has it, however lately (a rename would replace it).

    A folder may be renamed over an empty one, and a file linked to no name but a new one.
    """
    if written.is_dir():
        path.mkdir()
        written.rename(path)
        return
    try:
        os.link(written, path)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # a file system without links
        path.touch(exist_ok=False)
        written.replace(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make the folder's entries durable (a rename is, only after this)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_partial_line(path: Path) -> None:
    """Cut what a killed writer left behind the last newline of a JSON-lines file, so that appending is safe."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without them, as some NFS and Lustre are


@contextlib.contextmanager
def lock_may_fail(folder: Path) -> Iterator[None]:
    """Take or leave a lock in here: where the file system has none, say so once and go on without."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _tell_of_no_locks(folder, error.errno)


@functools.cache
def _tell_of_no_locks(folder: Path, number: int) -> None:
    print(
        f"warning: {folder} is on a file system without locks ({os.strerror(number)}): a second process that writes "
        "there would not be noticed",
        file=sys.stderr,
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a lock of POSIX, which ends with the process however that ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+") as file:
        try:
            with lock_may_fail(folder):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise ValueError(f"{folder} is in use by another run ({file.read().strip()})") from error
        with writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def redirected_to(log: Path) -> Iterator[None]:
    """What this process and its children print goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        earlier = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), earlier, strict=True):
                os.dup2(original, descriptor)
                os.close(original)


def free_name(path: Path) -> Path:
    """`path` with the first of .1, .2, ... behind it that does not exist."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def check_free(output: str) -> Path:
    """The path to write, which must not exist, in a folder where it can be made."""
    path = Path(output)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; give another output or move it away")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: {folder} is no folder that one can write in")
    return path
