"""Make a run's report.html again from its folder, or compare several runs on one page.

python -m protlig_dd.report runs=[runs/demo]
python -m protlig_dd.report runs=[runs/demo,runs/mine] output=comparison.html

A page is one file that needs nothing else: it opens from disk, and can be sent or printed.
"""

from pathlib import Path

from omegaconf import DictConfig

from protlig_dd.evaluation.page import PAGE, comparison_page, read_run, run_page
from protlig_dd.runtime.cli import run_verb
from protlig_dd.runtime.config import ReportPageConfig, read_config
from protlig_dd.runtime.files import write_atomic, write_new
from protlig_dd.runtime.metrics import console
from protlig_dd.runtime.trained import check_free


def report(cfg: DictConfig) -> None:
    """Read the run folders and write the page."""
    config = read_config(cfg, ReportPageConfig)
    if not config.runs:
        raise ValueError("runs=[] names no run folder; give runs=[runs/demo]")
    folders = [Path(run) for run in config.runs]
    own = folders[0] / PAGE if len(folders) == 1 else None
    output = Path(config.output or own or "comparison.html")
    remade = own is not None and output.resolve() == own.resolve()
    if not remade:
        check_free(str(output))
    runs = [read_run(folder) for folder in folders]
    write = write_atomic if remade else write_new
    write(output, run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
    console.print(f"{output}: {', '.join(run.name for run in runs)}")


def main() -> None:
    """The command line."""
    run_verb(report, "report", ReportPageConfig, alone=True)


if __name__ == "__main__":
    main()
