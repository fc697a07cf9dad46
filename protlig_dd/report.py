"""Rebuild a run's report.html from its folder, or compare several runs on one page.

python -m protlig_dd.report runs=[runs/demo]
python -m protlig_dd.report runs=[runs/demo,runs/mine] output=comparison.html
python -m protlig_dd.report runs=runs/lr_sweep output=sweep.html
python -m protlig_dd.report 'runs=multirun/*/0*' output=firsts.html

A page is one self-contained file: it can be opened from disk, sent and printed.
"""

import glob
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import ReportPageConfig
from protlig_dd.evaluation.report.page import comparison_page, run_page
from protlig_dd.evaluation.report.run import CONFIG, METRICS, PAGE, read_run
from protlig_dd.system.files import check_free, write_atomic, write_new
from protlig_dd.system.terminal import console


def report(cfg: DictConfig) -> None:
    """Read the run folders and write the page."""
    config = read_config(cfg, ReportPageConfig)
    folders = find_runs(config.runs)
    run_page_path = folders[0] / PAGE if len(folders) == 1 else None
    output = Path(config.output or run_page_path or "comparison.html")
    rebuilds = run_page_path is not None and output.resolve() == run_page_path.resolve()
    if not rebuilds:
        check_free(str(output))
    runs = [read_run(folder) for folder in folders]
    write = write_atomic if rebuilds else write_new
    write(output, run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
    console.print(f"{output}: {', '.join(run.name for run in runs)}")


def find_runs(wanted: Any) -> list[Path]:
    """Return the run folders that `runs=` selects, each once.

    Args:
        wanted: a run folder, a folder of runs (a sweep's or Hydra's multirun, up to two levels deep), a pattern (`*`,
            `?`, `[...]`), or a list of these.

    Raises:
        ValueError: `wanted` is of another type, or an entry selects no run; the message names the entry.
    """
    entries = [str(wanted)] if isinstance(wanted, str | int | float) else wanted
    if not isinstance(entries, list) or not all(isinstance(entry, str | int | float) for entry in entries):
        raise ValueError("runs: give a folder, a pattern, or a list of them")
    if not entries:
        raise ValueError("runs=[] names no run folder; give runs=[runs/demo]")
    found: dict[Path, Path] = {}
    for entry in map(str, entries):
        folders = [Path(entry)]
        if not os.path.lexists(entry):
            if not glob.has_magic(entry):
                raise ValueError(f"runs={entry} does not exist")
            folders = [path for path in map(Path, glob.iglob(entry)) if path.is_dir()]  # noqa: PTH207
            if not folders:
                raise ValueError(f"runs={entry}: no folder matches this pattern")
        runs = [run for folder in sorted(folders, key=natural_order) for run in runs_in(folder)]
        if not runs:
            raise ValueError(f"runs={entry}: no run in this folder or the two levels below it")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def runs_in(folder: Path, levels: int = 2) -> list[Path]:
    """Return [folder] if it is a run folder, else the run folders in up to `levels` levels of folders below it."""
    if (folder / CONFIG).is_file():
        return [folder]
    found = []
    for path in sorted(folder.iterdir(), key=natural_order) if folder.is_dir() and levels else ():
        if (path / CONFIG).is_file() and not (path / METRICS).is_file():
            console.print(f"{path} is skipped: it has no {METRICS}, so its training has not started")
        else:
            found += runs_in(path, levels - 1)
    return found


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers by value: job 10 comes after job 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def main() -> None:
    """The command line."""
    run_verb(report, "report", ReportPageConfig, rank0_only=True)


if __name__ == "__main__":
    main()
