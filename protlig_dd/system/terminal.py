"""What a command prints while it works: lines and progress bars."""

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from protlig_dd.system.distributed import Processes

console = Console(highlight=False, markup=False, soft_wrap=True)  # brackets in paths are not markup


def announce(message: str, processes: Processes) -> None:
    """Print a message on rank 0."""
    if processes.first:
        console.print(message)


class ProgressBar:
    """A live progress bar on a terminal. If the output is not a terminal, plain lines are printed instead.

    Args:
        total: number of steps.
        done: number of steps that were done before.
        lines: a plain line is printed each time that another `1 / lines` of the total is done.
    """

    def __init__(self, description: str, total: int, done: int = 0, *, shown: bool = True, lines: int = 10) -> None:
        self.total, self.done, self.description = total, done, description
        self.plain = shown and not console.is_terminal
        self.every, self.next_line = max(1, total // lines), done
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *self.columns(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self.plain,
        )
        self.task = self.bar.add_task(description, total=total, completed=done, note="")

    def columns(self) -> list[ProgressColumn]:
        return [MofNCompleteColumn()]

    def count(self) -> str:
        """Return the progress as printed in a plain line."""
        return f"{self.done}/{self.total}"

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self.done += steps
        self.bar.update(self.task, completed=self.done)
        if note is not None:
            self.bar.update(self.task, note=note)
        if self.plain and (self.done >= self.total or self.done >= self.next_line):
            self.next_line = self.done + self.every
            left = self.bar.tasks[0].time_remaining
            time_left = f"  {left:.0f} s left" if left else ""
            note = self.bar.tasks[0].fields["note"]
            console.print(f"{self.description} {self.count()}  {note}{time_left}".rstrip())


class ByteBar(ProgressBar):
    """A progress bar of bytes.

    If the total is unknown (None), a terminal shows only the bytes so far. Plain lines are then printed once per GiB.
    """

    def __init__(self, description: str, total: int | None) -> None:
        super().__init__(description, total or sys.maxsize)
        if total is None:
            self.bar.update(self.task, total=None)
            self.every = 1 << 30

    def columns(self) -> list[ProgressColumn]:
        return [DownloadColumn(), TransferSpeedColumn()]

    def count(self) -> str:
        total = "" if self.total == sys.maxsize else f"/{self.total / 1e6:,.1f}"
        return f"{self.done / 1e6:,.1f}{total} MB"
