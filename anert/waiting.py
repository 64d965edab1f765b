"""Waits that show their progress: work in a thread, ticks as events."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from anert.events import Event, Progress

T = TypeVar("T")


def waited(task: str, unit: str, work: Callable[[Callable[[float, float], None]], T]) -> Generator[Event, None, T]:
    """Run `work(progress)` in a thread and yield its progress(done, total) at most four times a second; returns its
    result."""
    ticks: queue.SimpleQueue[tuple[float, float] | None] = queue.SimpleQueue()
    outcome: list[Any] = []
    last = 0.0

    def report(done: float, total: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.25 or done >= total > 0:
            last = now
            ticks.put((done, total))

    def run() -> None:
        try:
            outcome.extend((True, work(report)))
        except BaseException as error:  # handed to the caller's thread below
            outcome.extend((False, error))
        ticks.put(None)

    threading.Thread(target=run, name=f"anert-{task}", daemon=True).start()
    while (tick := ticks.get()) is not None:
        yield Progress(task, *tick, unit)
    ok, result = outcome
    if not ok:
        raise result
    return result
