"""Write files so that a partial file never has its final name."""

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

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a used-up quota, or a limit on file sizes


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Replace an error about a full disk that is raised inside the block with an OSError that names `path`.

    The original error may name no file or only a temporary file, or its type may come from HDF5 or safetensors.
    An error about a file outside the folder of `path` is raised unchanged.

    Raises:
        OSError: with an errno of DISK_FULL and `path` as its filename.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        match = re.search(r"(?:errno = |os error )(\d+)", str(error))
        number = int(match[1]) if match else getattr(error, "errno", None)
        file = getattr(error, "filename", None)
        in_other_folder = isinstance(file, str) and not Path(file).absolute().is_relative_to(path.parent.absolute())
        if number not in DISK_FULL or in_other_folder:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_atomic(path: Path, text: str) -> None:
    """Write and sync a temporary file, then rename it to `path`. Readers see either the old file or the new file."""
    write_atomic_bytes(path, text.encode())


def write_atomic_bytes(path: Path, content: bytes) -> None:
    """Like `write_atomic`, for bytes. The umask sets the file's permissions, as for any new file."""
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
    """Write and sync a file that does not exist yet.

    Raises:
        ValueError: `path` exists, even if it was created during this call. The existing file stays unchanged.
    """
    with creating(path) as temporary:
        write_atomic(temporary, text)


def write_folder(path: Path, files: Mapping[str, str]) -> None:
    """Write a new folder of text files. Either all files appear in the folder at once, or none.

    Raises:
        ValueError: `path` exists.
    """
    with creating(path) as folder:
        folder.mkdir()
        for name, text in files.items():
            write_atomic(folder / name, text)
        sync_folder(folder)
    sync_folder(path.parent)


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder, and rename that file or folder to `path` after the block.

    Raises:
        ValueError: `path` exists, even if it was created during the block. The existing path stays unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with writing(path):
            yield temporary / path.name
        try:
            move_to_new_name(temporary / path.name, path)
        except FileExistsError:
            raise ValueError(f"{path} exists already; choose another output, or rename or delete it") from None
    finally:
        shutil.rmtree(temporary)


def move_to_new_name(written: Path, path: Path) -> None:
    """Move a file or folder to a new name. Raise FileExistsError if the name exists, even if it was just created.

    A file gets the new name as a hard link, because creating a link fails if the name exists, whereas a rename would
    replace the existing file. For a folder, an empty folder with the new name is created first, which also fails if the
    name exists. The rename then replaces the empty folder.
    """
    if written.is_dir():
        path.mkdir()
        written.rename(path)
        return
    try:
        os.link(written, path)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # a file system without hard links
        path.touch(exist_ok=False)
        written.replace(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to disk. A rename in the folder is durable only after this call."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_partial_line(path: Path) -> None:
    """Remove the partial last line that a killed writer left in a JSON-lines file, so that appending is safe."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


# Errors of file systems without locks, such as some NFS and Lustre.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def lock_may_fail(folder: Path) -> Iterator[None]:
    """Let the block take or release a lock. If the file system has no locks, warn once and continue without a lock."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_missing_locks(folder, error.errno)


@functools.cache
def _warn_of_missing_locks(folder: Path, number: int) -> None:
    print(
        f"warning: {folder} is on a file system without locks ({os.strerror(number)}): a second process that writes "
        "there would not be detected",
        file=sys.stderr,
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process during the block, with a POSIX lock.

    The operating system releases the lock when the process ends, even if the process is killed.

    Raises:
        ValueError: another process has the lock.
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
    """Append to the file `log` what this process and its children print inside the block."""
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
    """Return `path` with the first of the suffixes .1, .2, ... that is not in use."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate


def check_free(output: str) -> Path:
    """Return `output` as a path, after checking that it can be created.

    Raises:
        ValueError: the path exists already, or cannot be created because its folder is not writable.
    """
    path = Path(output)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; choose another output, or rename or delete it")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: {folder} is not a writable folder")
    return path
