"""Reading tables that users wrote."""

import csv
from pathlib import Path


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
