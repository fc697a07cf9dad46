"""Stopping in time: signals of schedulers and Ctrl-C end a run at once, but wait for the step while one is made."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGUSR2": 75, "max_time": 75}
"""Exit code for each reason to stop; of several the first counts, as a launcher that is interrupted twice sends SIGTERM
after the SIGINT. 75 (EX_TEMPFAIL of sysexits.h) means: the same command goes on with the run."""
REASONS = tuple(EXIT_CODES)
SIGNALS = {signal.Signals[reason] for reason in REASONS if reason.startswith("SIG")}
STOPPED = "stopped.json"  # in the run folder: why the run stopped, while it waits to be gone on with
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(time_limit: str) -> float:
    """Seconds of 90s, 30m, 11.5h or 2d.

    Raises:
        ValueError: anything else.
    """
    number, unit = time_limit[:-1], time_limit[-1:]
    if unit not in UNITS or re.fullmatch(r"\d+(\.\d+)?", number) is None:
        raise ValueError(f"trainer.max_time={time_limit}: give a number and its unit, 90s, 30m, 11.5h or 2d")
    return float(number) * UNITS[unit]


class Stopped(BaseException):
    """The run was asked to stop, and has. No Exception, so that nothing takes it for a failure."""

    def __init__(self, reason: str, when: str = "before training began or after it ended") -> None:
        super().__init__(f"stopped by {reason} {when}")
        self.reason, self.when = reason, when

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.reason]


class StopRequests:
    """What this process was asked, by signals or by its time limit.

    Outside of `deferred()` a signal raises Stopped where it arrives. Inside, it is only noted, and `asked()` tells:
    there the ranks agree on the step after which all of them stop.

    Args:
        deadline: seconds of time.monotonic() from which on `asked` reports max_time; None for no limit.
        insist: whether a second Ctrl-C interrupts at once. A launcher repeats signals, so its ranks do not.
    """

    def __init__(self, deadline: float | None = None, *, insist: bool = True) -> None:
        self.deadline, self.insist = deadline, insist
        self.noted: set[str] = set()
        self._deferring = False

    def __enter__(self) -> "StopRequests":
        self._earlier = {}
        if threading.current_thread() is threading.main_thread():  # signals cannot be handled elsewhere
            self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        reason = signal.Signals(number).name
        if self._deferring and self.insist and number == signal.SIGINT and reason in self.noted:
            raise KeyboardInterrupt
        if not self._deferring:
            raise Stopped(reason)
        self.noted.add(reason)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        with self._switched(True):
            yield

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside `deferred()`: signals raise after all, first of all those that were noted."""
        with self._switched(False):
            for reason in REASONS:
                if reason in self.noted:
                    raise Stopped(reason)
            yield

    @contextlib.contextmanager
    def _switched(self, value: bool) -> Iterator[None]:
        earlier, self._deferring = self._deferring, value
        try:
            yield
        finally:
            self._deferring = earlier

    def asked(self) -> list[int]:
        """1 or 0 for each of REASONS."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return [int(reason in self.noted or (reason == "max_time" and late)) for reason in REASONS]
