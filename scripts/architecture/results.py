"""The results file: one JSON line for each measurement, appended as soon as the measurement is finished."""

import json
import os
from pathlib import Path
from typing import Any

from protlig_dd.system.files import drop_partial_line

Row = dict[str, Any]
Key = tuple[str, str, int]
"""(command, arm, seed). An arm is one of the compared kinds of networks.

Two rows with the same command, arm and seed measured the same thing: options that do not change what is measured, such
as --seeds or --threads, are left out of the command.
"""


def key_of(row: Row) -> Key:
    return row["command"], row["arm"], row["seed"]


def read(path: Path) -> dict[Key, Row]:
    """Return the newest row of each measurement. If the file does not exist, the result is empty.

    A partial last line is removed from the file.

    Raises:
        ValueError: a line is not a row of results; the message names the file and the line.
    """
    drop_partial_line(path)
    rows: dict[Key, Row] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            row["part"]
            rows[key_of(row)] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of results ({error!r}); choose another file with --results"
            ) from error
    return rows


def append(path: Path, row: Row) -> None:
    """Append a row, and wait until the row is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
