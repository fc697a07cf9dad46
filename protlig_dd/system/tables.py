"""Reading tables that users wrote."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
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


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV; numbers that are not whole with six decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return text.getvalue()


def as_csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
