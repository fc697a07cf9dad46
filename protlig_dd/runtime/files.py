"""Writing files so that nothing half-written ever stands under a final name."""

import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Write, sync and rename; readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
        try:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
            os.fchmod(handle.fileno(), 0o644)
            os.replace(handle.name, path)
        except BaseException:
            os.unlink(handle.name)
            raise


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


def free_name(path: Path) -> Path:
    """`path` with the first of .1, .2, ... behind it that does not exist."""
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
