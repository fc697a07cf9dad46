"""Print Markdown tables from the rows of the results file."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from protlig_dd.evaluation.averages import per_residue
from scripts.architecture.arms import ARMS, BASELINE, label
from scripts.architecture.results import Row
from scripts.architecture.robustness import CHECKS
from scripts.arms import paired
from scripts.benchmarks.tables import table

Arms = dict[str, list[Row]]
"""{arm: rows}. The arms are in the order of ARMS, and the rows of each arm in the order of their seeds."""


def print_tables(rows: Iterable[Row], only: str | None = None) -> None:
    """Print a table for each command that has rows, or only for the command `only`."""
    commands: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        commands.setdefault((row["part"], row["command"]), []).append(row)
    for name, print_table in TABLES.items():
        for (of_part, command), found in commands.items():
            if of_part == name and only in (None, command):
                print(f"\n```\n{command}\n```\n", flush=True)
                print_table(found)


def by_arm(rows: Sequence[Row]) -> Arms:
    order = list(ARMS)
    arms: Arms = {}
    for row in sorted(
        rows, key=lambda row: (order.index(row["arm"]) if row["arm"] in ARMS else len(ARMS), row["seed"])
    ):
        arms.setdefault(row["arm"], []).append(row)
    return arms


def failures(rows: Sequence[Row], columns: int) -> list[list[str]]:
    """Return a table row with `columns` cells for each failed run (arm and seed)."""
    cells = []
    for row in rows:
        if "error" in row:
            message = row["error"].replace("|", "\\|")
            cells.append([label(row["arm"]), f"seed {row['seed']} failed: {message}", *[""] * (columns - 2)])
    return cells


def mean_over_seeds(rows: Sequence[Row]) -> Row:
    """Return each protein's bound in nats, averaged over the rows (one row a seed), and each protein's length."""
    if any(row["lengths"] != rows[0]["lengths"] for row in rows):
        raise ValueError(f"the seeds of {rows[0]['arm']} were evaluated on different proteins")
    return {"nats": np.mean([row["nats"] for row in rows], axis=0), "lengths": rows[0]["lengths"]}


def bound_cell(row: Row) -> str:
    bound, error = per_residue(np.array(row["nats"]), np.array(row["lengths"]))
    return f"{bound:.4f} ± {error:.4f}"


def difference_cell(rows: Sequence[Row], baseline: Sequence[Row]) -> str:
    """Return the arm's paired difference to the baseline, over the seeds that both arms have.

    The result is empty for the baseline itself, and for an arm that has no seed in common with the baseline.
    """
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in baseline}
    if not seeds or rows[0]["arm"] == BASELINE:
        return ""
    return paired(*(mean_over_seeds([row for row in arm if row["seed"] in seeds]) for arm in (rows, baseline)))


def print_missing_baseline(valid: Arms) -> None:
    """Print a line if there are rows, but none of the baseline."""
    if valid and BASELINE not in valid:
        print(f"No differences, because the baseline was not measured; --only {BASELINE} measures it.\n")


def bounds_table(rows: Sequence[Row]) -> None:
    valid = by_arm([row for row in rows if "error" not in row])
    print_missing_baseline(valid)
    cells = []
    for arm, seeds in valid.items():
        bounds = [row["nll"] for row in seeds]
        cells.append(
            [
                label(arm),
                f"{seeds[0]['parameters']:,}",
                f"{len(seeds)}",
                bound_cell(mean_over_seeds(seeds)),
                difference_cell(seeds, valid.get(BASELINE, [])),
                f"{max(bounds) - min(bounds):.4f}" if len(seeds) > 1 else "",
                f"{max(row['peak_memory_gib'] for row in seeds):.2f}",
            ]
        )
    for seeds in list(valid.values())[:1]:
        proteins, residues = len(seeds[0]["lengths"]), sum(seeds[0]["lengths"])
        print(f"{seeds[0]['step']:,} steps; {proteins:,} test proteins, {residues:,} residues; nats/residue\n")
    columns = ["network", "parameters", "seeds", "NLL bound, mean over seeds", "paired difference to the baseline"]
    columns += ["range of the bound over seeds", "peak memory of the process, GiB"]
    table(columns, cells + failures(rows, len(columns)))


def speed_table(rows: Sequence[Row]) -> None:
    (found,) = rows
    how = "compiled" if found["compiled"] else "eager"
    print(f"{found['rows'][0]['model']}, {found['tokens']:,} tokens, {found['precision']}, {how}, {found['device']}\n")
    table(
        ["network", "residues/s", "ratio to the baseline (lowest, highest)", "KiB of activations per token"],
        [
            [
                label(row["variant"]),
                f"{row['residues_per_s']:,.0f}",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f}, {row['ratio_high']:.2f})",
                f"{row['activation_bytes_per_token'] / 1024:,.1f}",
            ]
            for row in found["rows"]
        ],
    )


def lengths_table(rows: Sequence[Row]) -> None:
    valid = by_arm([row for row in rows if "error" not in row])
    print_missing_baseline(valid)
    columns: list[str] = ["network"]
    cells: list[list[str]] = []
    for (row,) in list(valid.values())[:1]:
        counts = ", ".join(f"{len(bound['lengths']):,}" for bound in row["bounds"] if "lengths" in bound)
        print(f"{row['step']:,} steps; {counts} held-out proteins of L residues; nats/residue\n")
        for low, high in row["ranges"]:
            name = f"{low} < L <= {high}" if low else f"L <= {high}"
            columns += [name, f"{name}: difference to the baseline"]
    for arm, (row,) in valid.items():
        baseline: list[dict[str, Any]] = valid.get(BASELINE, [{}])[0].get("bounds", [])
        cells.append([label(arm)])
        for i, bound in enumerate(row["bounds"]):
            if "rejected" in bound:
                cells[-1] += [f"rejected: {bound['rejected'].partition(';')[0]}", ""]
            else:
                compared = arm != BASELINE and i < len(baseline) and baseline[i].get("lengths") == bound["lengths"]
                cells[-1] += [bound_cell(bound), paired(bound, baseline[i]) if compared else ""]
    table(columns, cells + failures(rows, max(2, len(columns))))


def robustness_table(rows: Sequence[Row]) -> None:
    counted = by_arm([row for row in rows if "counts" in row])
    cells = [
        [label(arm), f"{row['step']:,}", *(f"{row['counts'][check]} of {row['proteins']}" for check in CHECKS)]
        for arm, (row,) in counted.items()
    ]
    for (row,) in list(counted.values())[:1]:
        print(f"proteins of the families {', '.join(row['families'])}\n")
    columns = ["network", "training steps", *CHECKS]
    table(columns, cells + failures(rows, len(columns)))


TABLES: dict[str, Callable[[Sequence[Row]], None]] = {
    "bounds": bounds_table,
    "speed": speed_table,
    "lengths": lengths_table,
    "robustness": robustness_table,
}
