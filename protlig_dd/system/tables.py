"""Tables and JSON: read as users wrote them, and written."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def csv_lines(path: Path) -> list[tuple[str, list[str]]]:
    """The cells of each line, with what error messages call it; empty lines are left out.

    Raises:
        ValueError: no CSV in UTF-8 (which may begin with a byte-order mark); named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            return [(f"{path} line {reader.line_num}", row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """CSV of rows of cells, as they are."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with a header; numbers that are not whole with six decimals."""
    rounded = ([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return as_csv(itertools.chain([header], rounded))


def as_json(content: Mapping[str, Any]) -> str:
    """JSON for people to read, too."""
    return json.dumps(content, indent=1) + "\n"


def read_json(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object in a file; {} where there is no file.

    Raises:
        ValueError: something else, or one without one of these keys; names the file.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        wanted = f"an object with {', '.join(keys)}" if keys else "an object"
        raise ValueError(f"{path}: not what protlig_dd has written, {wanted}")
    return found
