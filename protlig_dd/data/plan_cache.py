"""Store the plans of epochs (see packing.py) as files that the processes of a node share."""

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
    """Create and return this user's folder for plans, inside the node's temporary folder (TMPDIR).

    Raises:
        ValueError: the folder belongs to another user or cannot be created.
    """
    folder = Path(tempfile.gettempdir()) / f"protlig_dd-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise _storage_error(folder, error) from error
    if owner != os.getuid():
        raise ValueError(f"{folder} belongs to user {owner}, not to {os.getuid()}; set TMPDIR to another folder")
    return folder


def _storage_error(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"{folder}: cannot store the plan of an epoch ({error}); set TMPDIR to another folder")


def shared_plan(key: str, epoch: int, make: Callable[[], Plan], *, wait: bool = True) -> Plan | None:
    """Return the plan of an epoch, memory-mapped.

    The first process of the node that requests the plan makes and stores it. Other processes wait until the plan is
    stored. The process that makes a plan also removes the stored plans of the same key for epochs before `epoch - 1`.

    Args:
        key: hash of the data and the settings that determine the plans of all epochs.
        make: returns the plan; called only if the plan is not stored.
        wait: False returns None, instead of waiting, if another process is making the plan.
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
                    _remove(path)  # if the folder exists, a crash or a clean-up of TMPDIR has left it incomplete
                    remove_plans(key, before=epoch - 1)
                    partial = Path(tempfile.mkdtemp(dir=folder, prefix=f"{key}-{epoch}."))
                    try:
                        for name, values in make()._asdict().items():
                            np.save(partial / f"{name}.npy", values)
                        with contextlib.suppress(FileExistsError):  # without file locks, another process may be faster
                            partial.rename(path)
                    finally:
                        shutil.rmtree(partial, ignore_errors=True)
                finally:
                    # unlock, as closing is not enough: a process forked meanwhile has the file open and keeps the lock
                    with contextlib.suppress(OSError):
                        fcntl.flock(lock, fcntl.LOCK_UN)
    except OSError as error:
        raise _storage_error(folder, error) from error
    return plan


def _map(path: Path) -> Plan | None:
    """Return a stored plan, memory-mapped; None if the plan is missing or incomplete, or is removed meanwhile."""
    with contextlib.suppress(FileNotFoundError, EOFError, ValueError):
        # slicing a plain array takes a tenth of the time of slicing a memmap
        return Plan(*(np.asarray(np.load(path / f"{name}.npy", mmap_mode="r")) for name in Plan._fields))
    return None


def _remove(path: Path) -> None:
    """Rename a stored plan, then delete it, so that readers never see a partial plan."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.old."))
    with contextlib.suppress(OSError):
        path.rename(aside / "plan")
    shutil.rmtree(aside, ignore_errors=True)


def remove_plans(key: str, before: int | None = None) -> None:
    """Remove the key's stored plans; with `before`, only the plans of epochs below `before`.

    Processes that have already mapped a plan can still read it.
    """
    for path in _plans(key):
        epoch = path.name.rpartition("-")[2]
        if before is None or int(epoch.partition(".")[0]) < before:
            _remove(path)


def _plans(key: str) -> Iterator[Path]:
    return (path for path in plan_folder().glob(f"{key}-*") if path.is_dir())
