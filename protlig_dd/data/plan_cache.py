"""Plans of epochs as files that the processes of a node share."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from protlig_dd.data.packing import Plan
from protlig_dd.system.files import lock_may_fail


def plan_folder() -> Path:
    """This user's folder for plans in the node's temporary folder (TMPDIR).

    Raises:
        ValueError: it is somebody else's, or cannot be made.
    """
    folder = Path(tempfile.gettempdir()) / f"protlig_dd-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise ValueError(f"{folder}: cannot keep the plan of an epoch there ({error}); set TMPDIR") from error
    if owner != os.getuid():
        raise ValueError(f"{folder} belongs to user {owner}, not to {os.getuid()}; set TMPDIR")
    return folder


def shared_plan(key: str, epoch: int, make: Callable[[], Plan], *, wait: bool = True) -> Plan | None:
    """The plan under this key, memory-mapped. The first process of the node to ask makes it, the others wait for it.

    Plans of the key before the last epoch are removed.

    Args:
        wait: False returns None where another process is making it.
    """
    folder = plan_folder()
    path = folder / f"{key}-{epoch}"
    try:
        while (plan := _map(path)) is None:
            with (folder / f"{key}.lock").open("w") as lock:
                try:
                    with lock_may_fail(folder):
                        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    return None
                try:
                    if (plan := _map(path)) is not None:
                        return plan
                    _remove(path)  # what a cleaner of old files or a crash of the machine left of one
                    remove_plans(key, before=epoch - 1)
                    partial = Path(tempfile.mkdtemp(dir=folder, prefix=f"{key}-{epoch}."))
                    try:
                        for name, values in make()._asdict().items():
                            np.save(partial / f"{name}.npy", values)
                        with contextlib.suppress(FileExistsError):  # another's, on a file system without locks
                            partial.rename(path)
                    finally:
                        shutil.rmtree(partial, ignore_errors=True)
                finally:
                    # Closing would not do: a process forked meanwhile has the descriptor too, and would keep the lock.
                    with contextlib.suppress(OSError):
                        fcntl.flock(lock, fcntl.LOCK_UN)
    except OSError as error:
        raise ValueError(f"{folder}: cannot keep the plan of an epoch there ({error}); set TMPDIR") from error
    return plan


def _map(path: Path) -> Plan | None:
    """None where there is none, none any more, or not a whole one."""
    with contextlib.suppress(FileNotFoundError, EOFError, ValueError):
        # asarray: slices of a plain array cost a tenth of slices of a memmap
        return Plan(*(np.asarray(np.load(path / f"{name}.npy", mmap_mode="r")) for name in Plan._fields))
    return None


def _remove(path: Path) -> None:
    """Away under another name first, so that nobody meets half of it."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.old."))
    with contextlib.suppress(OSError):
        path.rename(aside / "plan")
    shutil.rmtree(aside, ignore_errors=True)


def remove_plans(key: str, before: int | None = None) -> None:
    """Remove the key's plans (of epochs before `before`). Who has mapped one keeps reading it."""
    for path in _plans(key):
        epoch = path.name.rpartition("-")[2]
        if before is None or int(epoch.partition(".")[0]) < before:
            _remove(path)


def _plans(key: str) -> Iterator[Path]:
    return (path for path in plan_folder().glob(f"{key}-*") if path.is_dir())
