"""The figures of a judgement as tables."""

from collections.abc import Sequence

import numpy as np

from protlig_dd.evaluation.samples.statistics import SETS, Rows, low_complexity, tandem_repeats, written
from protlig_dd.system.tables import csv_text


def markdown(rows: Rows) -> str:
    lines = [f"| | {' | '.join(SETS)} |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(map(written, row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def per_sequence(ids: Sequence[str], samples: list[np.ndarray], columns: dict[str, Sequence[float]]) -> str:
    """A row for each sample."""
    seen: dict[bytes, int] = {}
    rows = []
    for i, (id_, one) in enumerate(zip(ids, samples, strict=True)):
        first = seen.setdefault(one.tobytes(), i)
        flags = low_complexity(one), tandem_repeats(one)
        shares = [float(flag.mean()) for flag in flags]
        rows.append(
            [id_, len(one), ids[first] if first != i else "", *shares, *(values[i] for values in columns.values())]
        )
    return csv_text(["id", "length", "same_as", "low_complexity", "tandem_repeats", *columns], rows)
