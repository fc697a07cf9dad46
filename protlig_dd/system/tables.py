"""Read and write CSV tables and JSON."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def csv_lines(path: Path) -> list[tuple[str, list[str]]]:
    """Return (name, cells) for each line that is not empty. The name identifies the line in error messages.

    Raises:
        ValueError: the file is not CSV in UTF-8 (a byte-order mark is allowed); the message names the file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            return [(f"{path} line {reader.line_num}", row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Return rows of cells as CSV; floats are not rounded."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return CSV with a header; floats have six decimals."""
    rounded = ([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return as_csv(itertools.chain([header], rounded))


def as_json(content: Mapping[str, Any]) -> str:
    """Return indented JSON with a final newline."""
    return json.dumps(content, indent=1) + "\n"


def read_json(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is no file.

    Raises:
        ValueError: the file is not a JSON object, or lacks one of `keys`; the message names the file.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        expected = f"a JSON object with {', '.join(keys)}" if keys else "a JSON object"
        raise ValueError(f"{path}: damaged, or not written by protlig_dd; expected {expected}")
    return content


def as_written(value: Any) -> str:
    """Return a value in the notation of config files and overrides, such as null, true or [a, b]."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {as_written(item)}' for key, item in value.items())}}}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
