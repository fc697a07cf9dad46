"""Tables that `judge` writes."""

from collections.abc import Sequence

import numpy as np

from protlig_dd.evaluation.samples.statistics import SETS, Rows, format_figure, low_complexity, tandem_repeats
from protlig_dd.system.tables import csv_text


def markdown(rows: Rows) -> str:
    lines = [f"| | {' | '.join(SETS)} |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(map(format_figure, row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def per_sequence(ids: Sequence[str], samples: list[np.ndarray], columns: dict[str, Sequence[float]]) -> str:
    """Return a CSV table with a row for each sample.

    Args:
        columns: further columns, {name: (samples,) values}.
    """
    first_index: dict[bytes, int] = {}
    rows = []
    for i, (id_, sample) in enumerate(zip(ids, samples, strict=True)):
        first = first_index.setdefault(sample.tobytes(), i)
        flags = low_complexity(sample), tandem_repeats(sample)
        fractions = [float(flag.mean()) for flag in flags]
        same_as = ids[first] if first != i else ""
        rows.append([id_, len(sample), same_as, *fractions, *(values[i] for values in columns.values())])
    return csv_text(["id", "length", "same_as", "low_complexity", "tandem_repeats", *columns], rows)
