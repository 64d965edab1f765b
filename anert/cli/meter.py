"""A line of progress on stderr: how much, how fast, how long still."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from anert.events import Event, Notice, Progress

EVERY_S = 0.5
EVERY_S_WITHOUT_TERMINAL = 10.0


class Meter:
    """Shows the events of a long verb. On a terminal one line is rewritten, elsewhere a line comes now and then."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._every = EVERY_S if self._terminal else EVERY_S_WITHOUT_TERMINAL
        self._task, self._whole = "", False

    def show(self, event: Event) -> None:
        if isinstance(event, Notice):
            print(f"anert: {event.text}", file=sys.stderr)
        if not isinstance(event, Progress):
            return
        now = time.monotonic()
        if event.task != self._task:
            self._task, self._start, self._whole = event.task, now, False
        was_whole, self._whole = self._whole, event.done >= event.total > 0
        if was_whole or (
            not self._whole and now - self._last < (EVERY_S if self._terminal else EVERY_S_WITHOUT_TERMINAL)
        ):
            return
        self._last = now
        line = progress_line(event, now - self._start)
        print(f"\r\033[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line off the terminal, before something else is printed."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def progress_line(event: Progress, seconds: float) -> str:
    """`tokenize  12.0 of 48.0 MB  25%  9.1 MB/s  ETA 0:04`; without a total only how much and how fast."""
    scale, unit = (1e6, "MB") if event.unit == "B" else (1.0, event.unit)
    digits = 1 if event.unit == "B" else 0
    rate = event.done / scale / seconds if seconds > 0 else 0.0
    done, per_s = f"{event.done / scale:.{digits}f}", f"{rate:.{digits}f} {unit}/s"
    if not event.total:
        return f"{event.task}  {done} {unit}  {per_s}"
    left = (event.total - event.done) / scale / rate if rate else 0.0
    share = f"{event.done / event.total:.0%}"
    return f"{event.task}  {done} of {event.total / scale:.{digits}f} {unit}  {share}  {per_s}  ETA {clock(left)}"


def clock(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


@contextmanager
def interrupts_end_workers() -> Iterator[None]:
    """SIGINT and SIGTERM inside the block: end the worker processes, then KeyboardInterrupt, so that all is removed
    that is not whole."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        end_workers()
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_workers() -> None:
    """Ask every child process to leave its task."""
    for child in multiprocessing.active_children():
        child.terminate()


def as_worker() -> None:
    """Initializer of a worker: Ctrl-C, which reaches the whole process group, is the parent's to answer; SIGTERM leaves
    the task by an exception, so that it removes what it has begun, and by another one where that fell into a finalizer,
    which cannot raise."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        sys.exit(143)

    def again(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is SystemExit:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            sys.__unraisablehook__(lost)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGALRM, leave)
    sys.unraisablehook = again
