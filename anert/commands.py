"""The verbs behind `anert run`: training with its events shown and logged, sampling, and what a plugin's command gets.

The engine is reached through three names only: train.train, sample.sample and runtime.open_runtime.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from anert import events as ev
from anert.dist import world
from anert.errors import InputError
from anert.files import silence
from anert.report import UI, EventLog, Json, Off, Plain, dumps, follow

if TYPE_CHECKING:
    from anert.options import Job
    from anert.plugin import Plugin

EXIT_CODES = {"steps": 0, "time": 0, "budget": 0, "interrupted": 130}
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


def train(
    job: Job, *, ui: str | None = None, log: Path | None = None, as_json: bool = False,
    again: Callable[[str], int] | None = None,
) -> int:  # fmt: skip
    """Train, show and log; returns the exit code. With `as_json` the summary is stdout's last line.

    again(run directory): goes on with a run whose process has spent its compiles; saved, logged and told before.
    """
    trainer: Callable[..., Iterator[ev.Event]] = job.plugin.train_with or _engine("train", "train")
    ranks = world()
    if ranks.size > 1 and job.plugin.train_with:
        raise InputError(
            f"plugin {job.plugin.name!r} brings its own trainer, which runs as one process: leave out mpiexec"
        )
    shown = ranks.rank == 0  # the other ranks train, and rank 0 tells
    stream = sys.stderr if as_json else sys.stdout
    view = open_ui(ui, stream) if shown else Off()
    stop, events = Stop(view), EventLog(log if shown else Path(os.devnull))

    def lost() -> None:
        silence(stream)
        stop.ask()

    try:
        with stop.installed():
            done = follow(trainer(job.plugin, job.preset, job.config, job.options, stop), view, events, on_lost=lost)
    finally:
        view.close()
        events.close()
    ranks.close()
    if done.reason == "budget" and again:
        return again(str(done.summary["out"]))
    if as_json and shown:
        sys.stdout.write(dumps({"reason": done.reason, **done.summary}) + "\n")
        sys.stdout.flush()
    return EXIT_CODES.get(done.reason, 1)


def sample(plugin: Plugin, checkpoint: Path, prompt: str, settings: Mapping[str, Any], *, as_json: bool = False) -> int:
    """Write texts as they are made, their speed on stderr; returns the exit code. With `as_json` they also end as one
    object."""
    if not checkpoint.exists():
        raise InputError(f"{checkpoint}: no checkpoint there; a training run leaves one in its --out directory")
    stream = sys.stderr if as_json else sys.stdout
    start = time.perf_counter()
    first = math.nan
    texts: list[str] = []
    told: list[ev.Told] = []
    for event in _begun(_told(plugin, checkpoint, prompt, settings)):
        if isinstance(event, ev.Text):
            first = time.perf_counter() - start if math.isnan(first) else first
            if event.index == len(texts):
                stream.write("\n---\n" if texts else "")
                texts.append("")
            texts[-1] += event.text
            stream.write(event.text)
        else:
            if texts and isinstance(event, ev.Notice):
                stream.write("\n")
            stream.flush()
            _aside(event)
            told += [event] if isinstance(event, ev.Told) else []
        stream.flush()
    stream.write("\n")
    stream.flush()
    if as_json:
        seconds = time.perf_counter() - start
        runs = [{**t.as_dict(), "prefill_tokens_per_s": t.prefill_tokens_per_s,
                 "decode_tokens_per_s": t.decode_tokens_per_s} for t in told]  # fmt: skip
        found = {
            "prompt": prompt,
            "samples": texts,
            "seconds": seconds,
            "first_text_s": first,
            "runs": runs,
            **settings,
        }
        sys.stdout.write(dumps(found) + "\n")
    return 0


def _begun(events: Iterator[ev.Event]) -> Iterator[ev.Event]:
    """The events. Until the first of them Python does not look for garbage, and never among what is there by then: what
    an engine's start makes stays."""
    gc.disable()
    try:
        first = next(events, None)
        gc.freeze()
    finally:
        gc.enable()
    if first is not None:
        yield first
    yield from events


def _told(plugin: Plugin, checkpoint: Path, prompt: str, settings: Mapping[str, Any]) -> Iterator[ev.Event]:
    """Events of anert.sample.sample, or of the plugin's own sampler, which yields text for one sample a call."""
    if plugin.sample_with is None:
        yield from _engine("sample", "sample")(checkpoint, prompt, plugin=plugin, **settings)
        return
    n = settings["num_samples"]
    rest = {k: v for k, v in settings.items() if k != "num_samples"}
    for i in range(n):
        for piece in plugin.sample_with(checkpoint, prompt, plugin=plugin, **{**rest, "seed": settings["seed"] + i}):
            yield ev.Text(piece, i)


def _aside(event: ev.Event) -> None:
    """What is not text, as a line on stderr."""
    if isinstance(event, ev.Notice):
        sys.stderr.write(f"anert: {event.text}\n")
    elif isinstance(event, ev.Told):
        speed = f"in {event.prefill_ms:.1f} ms ({event.prefill_tokens_per_s:.0f} tok/s)"
        speeds = [f"prefill {event.prompt_tokens} tokens {speed if event.prefill_ms else 'before'}"]
        if event.tokens > 1:
            speeds.append(f"decode {event.tokens} tokens ({event.decode_tokens_per_s:.0f} tok/s)")
        sys.stderr.write(f"\nanert: {', '.join(speeds)}, ended by {event.reason}\n")


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
