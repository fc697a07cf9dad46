"""Stop a run on request: on Ctrl-C, on a scheduler's signal or at its time limit.

During training the step in progress is finished first; otherwise the run stops immediately.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 75, "SIGHUP": 75, "SIGUSR1": 75, "SIGUSR2": 75, "max_time": 75}
"""Exit code for each reason to stop. If there are several reasons, the first in this order counts. SIGINT is first,
because a launcher that is interrupted twice also sends SIGTERM, although a person interrupted the run.
75 (EX_TEMPFAIL of sysexits.h): the same command resumes the run."""
REASONS = tuple(EXIT_CODES)
SIGNALS = {signal.Signals[reason] for reason in REASONS if reason.startswith("SIG")}
STOPPED = "stopped.json"  # in the run folder: why the run stopped; deleted when it resumes
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(time_limit: str) -> float:
    """Return the seconds of a time limit such as 90s, 30m, 11.5h or 2d.

    Raises:
        ValueError: anything else.
    """
    number, unit = time_limit[:-1], time_limit[-1:]
    if unit not in UNITS or re.fullmatch(r"\d+(\.\d+)?", number) is None:
        raise ValueError(f"trainer.max_time={time_limit}: give a number and its unit, such as 90s, 30m, 11.5h or 2d")
    return float(number) * UNITS[unit]


def handled_signals() -> set[signal.Signals]:
    """Return SIGNALS, without SIGHUP if it is ignored, as under nohup."""
    return {number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}


class Stopped(BaseException):
    """The run has stopped on request. It is not an Exception, so that nothing handles it as a failure."""

    def __init__(self, reason: str, when: str = "before training began or after it ended") -> None:
        super().__init__(f"stopped by {reason} {when}")
        self.reason, self.when = reason, when

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.reason]


class StopRequests:
    """Requests to stop this process, by signals or by its time limit.

    Outside `deferred()` the first signal raises Stopped where it arrives. Inside, signals are only noted and
    `requested()` returns them; the ranks then agree on the step after which all of them stop.

    Args:
        insist: whether a second Ctrl-C interrupts immediately. False for a launcher's ranks: launchers repeat signals.
        notice: printed with the first signal that is noted inside `deferred()`; None prints nothing.
        patience: if another rank receives its signal first and exits, a call inside `immediate()` fails here. Wait this
            many seconds before raising that error, so that this process's own signal can arrive and raise Stopped.
    """

    def __init__(self, *, insist: bool = True, notice: str | None = None, patience: float = 0.0) -> None:
        self.insist, self.notice, self.patience = insist, notice, patience
        self.noted: set[str] = set()
        self._deferring = False

    def __enter__(self) -> "StopRequests":
        self._earlier = {}
        if threading.current_thread() is threading.main_thread():  # other threads cannot handle signals
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
            raise KeyboardInterrupt("; the same command resumes from the last checkpoint")
        is_stopping = bool(self.noted)
        self.noted.add(reason)
        if is_stopping:
            return
        if not self._deferring:
            raise Stopped(reason)
        if self.notice is not None:
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(1, f"\n{reason}: {self.notice}\n".encode())  # print() must not run inside itself

    def set_deadline(self, deadline: float | None) -> None:
        """Stop for max_time when time.monotonic() reaches `deadline`, or now if it has passed; None: no time limit."""
        if deadline is not None and self._earlier:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, deadline - time.monotonic()))

    def stopped(self, reason: str, when: str) -> Stopped:
        """Return the exception for a stop that the ranks agreed on, even if this rank did not receive the request."""
        self.noted.add(reason)
        return Stopped(reason, when)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note signals inside the block instead of raising; at its end, raise Stopped if there were any."""
        with self._switched(True):
            yield
        self._raise_noted()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """For use inside `deferred()`: let signals raise Stopped again, and raise on entry if one was noted."""
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

    def requested(self) -> list[int]:
        """Return 1 or 0 for each of REASONS: whether this process was requested to stop for it."""
        return [int(reason in self.noted) for reason in REASONS]
