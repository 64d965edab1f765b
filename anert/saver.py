"""Saves from a worker thread, on a snapshot, so that the training loop hardly waits.

saver.save(step, state, best=False)      # returns at once; the worker copies, then writes
...forward, backward...                  # weights are only read meanwhile
saver.settle()                           # before they change: waits until the copy is taken
outcome = saver.finished()               # what became of it, once it ended
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anert import checkpoint
from anert.errors import AnertError, NonFiniteError, StateError
from anert.param import ParamStore
from anert.runtime import memory_available
from anert.surface import Surface
from anert.tokenizer import Tokenizer

SPARE = 64 << 20
"""Bytes of memory that a snapshot leaves free; where they are not there a save reads the live weights instead, and the
loop waits for it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended. ms: from its start to the rename; stall_ms: how long the training loop waited for it."""

    step: int
    best: bool
    ms: float
    stall_ms: float = 0.0
    path: Path | None = None
    error: Exception | None = None

    @property
    def sick(self) -> bool:
        """The weights, not the disk, are what was refused."""
        return isinstance(self.error, NonFiniteError)


class Saver:
    """One save at a time of a store's masters and moments."""

    def __init__(self, store: ParamStore, run_dir: Path, tokenizer: Tokenizer | None, keep: int) -> None:
        self.store, self.run_dir, self.tokenizer, self.keep = store, run_dir, tokenizer, keep
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._copied, self._idle = threading.Event(), threading.Event()
        self._copied.set()
        self._idle.set()
        self._stall = 0.0
        self._buffers: list[np.ndarray] = []
        self._thread: threading.Thread | None = None

    def reserve(self) -> None:
        """Begin to set memory aside for snapshots, so that the first save need not."""
        self._put(self._reserve)

    def save(self, step: int, state: Mapping[str, Any], best: bool = False) -> None:
        """Begin a save of the weights as they are; they must not change until `settle` has returned.

        Raises StateError while another save is under way.
        """
        if not self._idle.is_set() or not self._outcomes.empty():
            raise StateError("a save is under way, or its outcome was not read: call finished(wait=True) before")
        start = time.perf_counter()
        self._idle.clear()
        self._copied.clear()
        self._put(partial(self._save, step, state, best))
        self._stall = time.perf_counter() - start

    def settle(self) -> None:
        """Wait until the snapshot is taken: from here on the weights may change."""
        if not self._copied.is_set():
            start = time.perf_counter()
            self._copied.wait()
            self._stall += time.perf_counter() - start

    def finished(self, wait: bool = False) -> Outcome | None:
        """How the save ended that was begun last, told once; with `wait`, after waiting for its end."""
        if wait and not self._idle.is_set():
            start = time.perf_counter()
            self._idle.wait()
            self._stall += time.perf_counter() - start
        if self._outcomes.empty():
            return None
        return replace(self._outcomes.get(), stall_ms=self._stall * 1e3)

    def close(self) -> None:
        """Wait for the save under way, and end the thread. Idempotent."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._buffers = []

    def _put(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="anert-saver", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _save(self, step: int, state: Mapping[str, Any], best: bool) -> None:
        start, path, error = time.perf_counter(), None, None
        try:
            model, optim = self.store.named(self._snapshot())
            path = checkpoint.save(self.run_dir, step, model, optim, state, self.tokenizer, best, self.keep)
        except Exception as found:  # the training thread decides what to do about it
            error = found
        self._copied.set()
        self._outcomes.put(Outcome(step, best, (time.perf_counter() - start) * 1e3, path=path, error=error))
        self._idle.set()

    def _reserve(self) -> None:
        """Memory for a snapshot, every page touched; none where it is short."""
        live = self.store.flats
        if self._buffers or memory_available() < sum(flat.nbytes for flat in live) + SPARE:
            return
        with suppress(AnertError):
            self._buffers = [Surface(self.store.heap, flat.nbytes).array(np.float32, flat.shape) for flat in live]
        for buffer in self._buffers:
            buffer.fill(0.0)

    def _snapshot(self) -> list[np.ndarray]:
        """Copies of the store's buffers, in memory that is kept for the next save; the live ones where it is short."""
        live = self.store.flats
        self._reserve()
        if not self._buffers:
            return live
        for copy, flat in zip(self._buffers, live, strict=True):
            np.copyto(copy, flat)
        self._copied.set()
        return self._buffers
