"""The verbs behind `anert run`: training with its events shown and logged, sampling, and what a plugin's command gets.

The engine is reached through three names only: train.train, sample.generate and runtime.open_runtime.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from anert import events as ev
from anert.dist import world
from anert.errors import InputError
from anert.options import Job
from anert.plugin import Plugin
from anert.report import UI, EventLog, Json, Off, Plain, dumps, follow

EXIT_CODES = {"steps": 0, "time": 0, "interrupted": 130}
"""By RunDone.reason; any other reason is a run that failed: 1."""


class Stop:
    """Turns true at the first SIGINT or SIGTERM, so that a run can save and end; the second one exits at once."""

    def __init__(self, ui: UI) -> None:
        self.asked = False
        self.ui = ui

    def __call__(self) -> bool:
        return self.asked

    def ask(self) -> None:
        self.asked = True

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked:
            self.ui.restore()
            os._exit(130)
        self.asked = True
        self.ui.interrupt("stopping after this step, then saving; Ctrl-C again quits at once")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside this block; only the main thread may."""
        before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(job: Job, *, ui: str | None = None, log: Path | None = None, as_json: bool = False) -> int:
    """Train, show and log; returns the exit code. With `as_json` the summary is stdout's last line."""
    trainer: Callable[..., Iterator[ev.Event]] = job.plugin.train_with or _engine("train", "train")
    ranks = world()
    if ranks.size > 1 and job.plugin.train_with:
        raise InputError(
            f"plugin {job.plugin.name!r} brings its own trainer, which runs as one process: leave out mpiexec"
        )
    shown = ranks.rank == 0  # the other ranks train, and rank 0 tells
    view = open_ui(ui, sys.stderr if as_json else sys.stdout) if shown else Off()
    stop, events = Stop(view), EventLog(log if shown else Path(os.devnull))
    try:
        with stop.installed():
            done = follow(
                trainer(job.plugin, job.preset, job.config, job.options, stop), view, events, on_lost=stop.ask
            )
    finally:
        view.close()
        events.close()
    ranks.close()
    if as_json and shown:
        sys.stdout.write(dumps({"reason": done.reason, **done.summary}) + "\n")
        sys.stdout.flush()
    return EXIT_CODES.get(done.reason, 1)


def sample(
    plugin: Plugin, checkpoint: Path, prompt: str, n: int, settings: Mapping[str, Any], *, as_json: bool = False
) -> int:
    """Write `n` texts as they are made; returns the exit code. With `as_json` they also end as one object."""
    if not checkpoint.exists():
        raise InputError(f"{checkpoint}: no checkpoint there; a training run leaves one in its --out directory")
    generate: Callable[..., Iterator[str]] = plugin.sample_with or _engine("sample", "generate")
    stream = sys.stderr if as_json else sys.stdout
    texts, start = [], time.perf_counter()
    for i in range(n):
        pieces = []
        for piece in generate(checkpoint, prompt, plugin=plugin, **{**settings, "seed": settings["seed"] + i}):
            stream.write(piece)
            stream.flush()
            pieces.append(piece)
        stream.write("\n" if i + 1 == n else "\n---\n")
        stream.flush()
        texts.append("".join(pieces))
    if as_json:
        seconds = time.perf_counter() - start
        sys.stdout.write(dumps({"prompt": prompt, "samples": texts, "seconds": seconds, **settings}) + "\n")
    return 0


def open_ui(kind: str | None, stream: TextIO) -> UI:
    """The view of this kind on this stream; without a kind, and for `rich` off a terminal, what the stream can show."""
    capable = stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
    if kind in (None, "rich"):
        kind = "rich" if capable else "plain"
    if kind == "rich":
        from anert.dashboard import Dashboard

        return Dashboard(stream)
    if kind == "plain":
        return Plain(stream)
    return Json(stream) if kind == "json" else Off()


def runtime_factory(*args: Any, **kwargs: Any) -> Any:
    """anert.runtime.open_runtime, loaded when a plugin's command first calls it."""
    return _engine("runtime", "open_runtime")(*args, **kwargs)


def _engine(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(f"anert.{module}"), name)
    return found
