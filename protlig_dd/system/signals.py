"""Stopping in time: signals of schedulers and Ctrl-C end a run at once, but wait for the step while one is made."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGHUP": 75, "SIGUSR1": 75, "SIGUSR2": 75, "max_time": 75}
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


def handled_signals() -> set[signal.Signals]:
    """SIGNALS, without SIGHUP where it is ignored, as under nohup."""
    return {number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}


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

    Outside of `deferred()` the first signal raises Stopped where it arrives. Inside, it is only noted, and `asked()`
    tells: there the ranks agree on the step after which all of them stop.

    Args:
        insist: whether a second Ctrl-C interrupts at once. A launcher repeats signals, so its ranks do not.
        patience: seconds to wait for a signal of our own where something else fails in `immediate()`: another rank has
            got its signal before, and is gone.
    """

    def __init__(self, *, insist: bool = True, patience: float = 0.0) -> None:
        self.insist, self.patience = insist, patience
        self.noted: set[str] = set()
        self._deferring = False

    def __enter__(self) -> "StopRequests":
        self._earlier = {}
        if threading.current_thread() is threading.main_thread():  # signals cannot be handled elsewhere
            self._earlier = {
                number: signal.signal(number, self._handle) for number in {*handled_signals(), signal.SIGALRM}
            }
        return self

    def __exit__(self, *exception: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        reason = "max_time" if number == signal.SIGALRM else signal.Signals(number).name
        if self.insist and reason == "SIGINT" and reason in self.noted:
            raise KeyboardInterrupt
        on_its_way = bool(self.noted)
        self.noted.add(reason)
        if not self._deferring and not on_its_way:
            raise Stopped(reason)

    def at(self, deadline: float | None) -> None:
        """Have max_time come at this time.monotonic(), or at once where that is over; None for never."""
        if deadline is not None and self._earlier:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, deadline - time.monotonic()))

    def stopped(self, reason: str, when: str) -> Stopped:
        """To be raised for what the ranks agreed on, of which this one may not have heard itself."""
        self.noted.add(reason)
        return Stopped(reason, when)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Raises Stopped at its end for what was noted and not asked for."""
        with self._switched(True):
            yield
        self._raise_noted()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside `deferred()`: signals raise after all, first of all those that were noted."""
        with self._switched(False):
            self._raise_noted()
            try:
                yield
            except RuntimeError:
                time.sleep(self.patience)
                raise

    def _raise_noted(self) -> None:
        for reason in REASONS:
            if reason in self.noted:
                raise Stopped(reason)

    @contextlib.contextmanager
    def _switched(self, value: bool) -> Iterator[None]:
        earlier, self._deferring = self._deferring, value
        try:
            yield
        finally:
            self._deferring = earlier

    def asked(self) -> list[int]:
        """1 or 0 for each of REASONS."""
        return [int(reason in self.noted) for reason in REASONS]
