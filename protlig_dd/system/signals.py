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
Exit code 75 (EX_TEMPFAIL of sysexits.h) means that the same command resumes the run."""
REASONS = tuple(EXIT_CODES)
SIGNALS = {signal.Signals[reason] for reason in REASONS if reason.startswith("SIG")}
STOPPED = "stopped.json"  # file in the run folder that records why the run stopped; deleted when the run resumes
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(time_limit: str) -> float:
    """Return the seconds of a time limit such as 90s, 30m, 11.5h or 2d.

    Raises:
        ValueError: the time limit has another form.
    """
    number, unit = time_limit[:-1], time_limit[-1:]
    if unit not in UNITS or re.fullmatch(r"\d+(\.\d+)?", number) is None:
        raise ValueError(f"trainer.max_time={time_limit}: give a number and its unit, such as 90s, 30m, 11.5h or 2d")
    return float(number) * UNITS[unit]


def handled_signals() -> set[signal.Signals]:
    """Return SIGNALS, without SIGHUP if the process ignores SIGHUP, as under nohup."""
    return {number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}


class Stopped(BaseException):
    """The run has stopped on request. Not a subclass of Exception, so that `except Exception` does not catch it."""

    def __init__(
        self, reason: str, when: str = "outside the training steps (before the first or after the last)"
    ) -> None:
        super().__init__(f"stopped by {reason} {when}")
        self.reason, self.when = reason, when

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.reason]


class StopRequests:
    """Requests to stop this process, by signals or by its time limit.

    Outside a `deferred()` block, the first signal raises Stopped immediately. Inside such a block, signals are only
    recorded and `requested()` returns them. The ranks then agree on the step after which all of them stop.

    Args:
        insist: whether a second Ctrl-C interrupts immediately. It is False for the ranks of a launcher, because
            launchers repeat signals.
        notice: text printed with the first signal that is recorded inside `deferred()`; None prints nothing.
        patience: seconds to wait before an error inside `immediate()` is raised again. If another rank receives its
            signal first and exits, a call that waits for that rank fails in this process. During these seconds, this
            process's own signal can arrive and raise Stopped instead of the error.
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
            raise KeyboardInterrupt(
                "interrupted; the same command resumes from the last checkpoint, if there is one, unless it sets "
                "run.fresh=true"
            )
        is_stopping = bool(self.noted)
        self.noted.add(reason)
        if is_stopping:
            return
        if not self._deferring:
            raise Stopped(reason)
        if self.notice is not None:
            with contextlib.suppress(OSError):  # the terminal may be closed
                # print() must not run inside itself, and the signal may have interrupted a print()
                os.write(1, f"\n{reason}: {self.notice}\n".encode())

    def set_deadline(self, deadline: float | None) -> None:
        """Request a stop (reason: max_time) when time.monotonic() reaches `deadline`, or immediately if it already has.

        If `deadline` is None, there is no time limit.
        """
        if deadline is not None and self._earlier:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, deadline - time.monotonic()))

    def stopped(self, reason: str, when: str) -> Stopped:
        """Return the exception for a stop on which the ranks agreed. This rank need not have received the request."""
        self.noted.add(reason)
        return Stopped(reason, when)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside the block. After the block, raise Stopped if a signal was recorded."""
        with self._switched(True):
            yield
        self._raise_noted()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Within a `deferred()` block, let signals raise Stopped immediately again while this inner block runs.

        On entry, raise Stopped if a signal has already been recorded.
        """
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
        """Return 1 or 0 for each of REASONS: whether this process was requested to stop for that reason."""
        return [int(reason in self.noted) for reason in REASONS]
