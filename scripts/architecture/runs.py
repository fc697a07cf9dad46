"""Train a run for each arm (kind of network) and seed, and measure each run as soon as it is trained.

A run that has results is not trained again.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from protlig_dd.data.prepare.bundled import bundled_store
from protlig_dd.data.store import SequenceStore
from protlig_dd.system.terminal import ProgressBar, console
from scripts.architecture import results
from scripts.architecture.arms import BASELINE, overrides, run_name
from scripts.arms import train

REPORT = ["report.draws=2", "report.max_sequences=2"]  # a small report, because only its `step` is read


class Job(NamedTuple):
    """A run to train."""

    arm: str
    seed: int
    arguments: list[str]

    @property
    def name(self) -> str:
        return run_name(self.arm, self.seed, self.arguments)

    def folder(self, base: Path) -> Path:
        return base / "runs" / self.name


def store_of(arguments: argparse.Namespace) -> SequenceStore:
    """Return the store of --data, or else of the bundled proteins."""
    return bundled_store() if arguments.data is None else SequenceStore(arguments.data)


def job(arguments: argparse.Namespace, arm: str, seed: int, steps: int | None, options: Sequence[str] = ()) -> Job:
    data = store_of(arguments).path.resolve()
    return Job(arm, seed, overrides(arm, seed=seed, data=data, steps=steps, options=options))


def trained(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the run's report. The run is trained first if it is not finished.

    If the training fails, return only the error message, in the key `error`.
    """
    arguments.folder.mkdir(parents=True, exist_ok=True)
    return train(job.name, job.arguments, arguments.threads, arguments.folder)


def measure(
    jobs: Sequence[Job],
    arguments: argparse.Namespace,
    finish: Callable[[Job, dict[str, Any]], dict[str, Any]],
) -> bool:
    """Train the runs whose results are not in the results file, and append a row for each.

    Args:
        finish: function of (job, report of the run) that returns the run's measurements, to add to its row. A
            ValueError from `finish` is recorded as a failure of the run, like a failed training.

    Returns:
        Whether all `jobs` have results. Results of earlier commands count. Runs that failed in an earlier command are
            tried again.
    """
    known = results.read(arguments.results)
    with ProgressBar(arguments.part, len(jobs)) as bar:
        for job in jobs:
            key = (arguments.command, job.arm, job.seed)
            found = known.get(key)
            if found is None or "error" in found or found["run"] != job.name:
                row = {"part": arguments.part, "command": arguments.command, "arm": job.arm, "seed": job.seed}
                row |= {"run": job.name, "overrides": job.arguments}
                report = trained(job, arguments)
                try:
                    row |= {"error": report["error"]} if "error" in report else finish(job, report)
                except ValueError as error:
                    row["error"] = str(error)
                known[key] = row
                results.append(arguments.results, row)
                if "error" in row:
                    console.print(f"{job.arm}, seed {job.seed} failed: {row['error']}")
            bar.advance(note=job.arm)
    return not any("error" in known[arguments.command, job.arm, job.seed] for job in jobs)


def bounds(arguments: argparse.Namespace) -> bool:
    """Train every arm with each seed. The rows contain the NLL bound of each protein of the test split, in nats."""
    seeds = {arm: arguments.seeds or (3 if arm == BASELINE else 2) for arm in arguments.only}
    jobs = [
        job(arguments, arm, seed, arguments.steps)
        for seed in range(max(seeds.values()))
        for arm in arguments.only
        if seed < seeds[arm]
    ]
    columns = ("parameters", "step", "nll", "nll_se", "estimator", "nats", "lengths", "peak_memory_gib")
    return measure(jobs, arguments, lambda _, report: {key: report[key] for key in columns})
