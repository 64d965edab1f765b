"""Events as text: figures with their units, the plain and JSON views of a run, and the JSONL log.

A UI is anything with show, interrupt, restore, overhead_ms and close; the rich one is anert/dashboard.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

from anert import events as ev
from anert.errors import NativeError

PARTS = ("forward", "head", "backward", "weight_grads", "copy", "allreduce", "optimizer", "sync", "data", "dashboard")
"""The parts of a step in the order in which they run; StepDone.ms has them by name."""
SOMETIMES = ("copy", "allreduce")
"""Parts that only some runs have: between packed surfaces, between ranks."""


class UI(Protocol):
    """What shows a run. Every method returns quickly: nothing here waits for a terminal or a disk."""

    def show(self, event: ev.Event) -> None: ...

    def interrupt(self, text: str) -> None:
        """Say that a stop was asked for; called inside a signal handler."""

    def restore(self) -> None:
        """Give the terminal back in the state in which it was found; called before an exit at once."""

    def overhead_ms(self) -> float:
        """CPU time spent outside show() since the last call."""

    def close(self) -> None:
        """End of the view, idempotent."""


# ---- figures ----


def si(value: float, unit: str = "", digits: int = 3) -> str:
    """`1.31 M`, `61.3 GFLOP/s`, `512 B`: a figure with `digits` significant digits and its prefix."""
    if not math.isfinite(value):
        return f"{value} {unit}".rstrip()
    size, prefix = abs(value), ""
    for step in ("k", "M", "G", "T", "P"):
        if size < 999.5:
            break
        size, value, prefix = size / 1000, value / 1000, step
    if not prefix and value == int(value):
        return f"{value:.0f} {unit}".rstrip()
    return f"{significant(value, digits)} {prefix}{unit}".rstrip()


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent: 0.0123, 1.23, 12.3, 123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.{digits}g}")
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, min(places, 6))}f}"


def flops(per_second: float) -> str:
    """FLOP/s, as TFLOPS from one upwards and as GFLOP/s below."""
    return f"{per_second / 1e12:.2f} TFLOPS" if per_second >= 1e12 else f"{per_second / 1e9:.1f} GFLOP/s"


def clock(seconds: float) -> str:
    """`0:38`, `12:05`, `1:02:33`, `3 d 04:00`; `-` where there is no estimate."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02}:{m:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def count(n: float) -> str:
    """`21,300`."""
    return f"{n:,.0f}"


# ---- views ----


class Off:
    """Shows nothing."""

    def show(self, event: ev.Event) -> None:
        pass

    def interrupt(self, text: str) -> None:
        pass

    def restore(self) -> None:
        pass

    def overhead_ms(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


class Json(Off):
    """Each event as one JSON line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def show(self, event: ev.Event) -> None:
        self.stream.write(dumps(event.as_dict()) + "\n")
        self.stream.flush()


class Plain(Off):
    """Lines for a pipe or a file: a step about every second, and whatever happens between."""

    def __init__(self, stream: TextIO, every_s: float = 1.0) -> None:
        self.stream = stream
        self.every_s = every_s
        self._start: ev.RunStarted | None = None
        self._shown_s = -math.inf
        self._progress: dict[str, tuple[float, int]] = {}
        self._story = ""

    def show(self, event: ev.Event) -> None:
        for line in self._lines(event):
            self.stream.write(line + "\n")
        self.stream.flush()

    def interrupt(self, text: str) -> None:
        os.write(2, f"anert: {text}\n".encode())  # a signal handler must not enter the buffered stream a second time

    def _lines(self, event: ev.Event) -> Iterable[str]:
        match event:
            case ev.RunStarted():
                self._start = event
                return started_lines(event)
            case ev.StepDone():
                return self._step(event)
            case ev.Progress():
                return self._waiting(event)
            case ev.Sampled():
                self._story = event.text
                return [f"story at step {count(event.step)} ({event.ms:.0f} ms)", *_indented(event.text)]
            case ev.RunDone():
                return done_lines(event)
            case _:
                return [line] if (line := log_line(event)) else []

    def _step(self, event: ev.StepDone) -> list[str]:
        steps = self._start.steps if self._start else 0
        last = event.step == steps
        if not last and not event.skipped and event.elapsed_s - self._shown_s < self.every_s:
            return []
        self._shown_s = event.elapsed_s
        of = f"{event.step:>{len(str(steps))}}/{steps}" if steps else f"{event.step}"
        rate = event.flops / event.step_ms * 1e3 if event.step_ms else 0.0
        peak = self._start.peak_gflops * 1e9 if self._start else 0.0
        share = f"  {rate / peak:4.0%} of peak" if 0 < rate <= peak else ""  # above: a peak measured beside other work
        skipped = "  skipped: not usable" if event.skipped else ""
        ranks = f"  ranks {rank_text(event)}" if event.rank_ms else ""
        return [
            f"step {of}  loss {event.loss:7.4f}  lr {event.lr:.2e}  norm {event.grad_norm:6.2f}  "
            f"scale {event.loss_scale:<6g}  {event.step_ms:7.1f} ms  {count(event.tokens_per_s):>8} tok/s  "
            f"{flops(rate):>13}{share}  left {clock(event.eta_s):>5}{ranks}{skipped}"
        ]

    def _waiting(self, event: ev.Progress) -> list[str]:
        """A line at the start of a wait, then one each quarter or each five seconds, whichever comes first."""
        now = time.monotonic()
        quarter = int(4 * event.done / event.total) if event.total else 0
        before = self._progress.get(event.task)
        if before is not None and quarter == before[1] and now - before[0] < 5.0:
            return []
        self._progress[event.task] = (now, quarter)
        return [f"{event.task}: {progress_text(event)}"]


def rank_text(event: ev.StepDone) -> str:
    """`12.3 14.0 ms`: what each rank took to its gradients; of more than eight the fastest and the slowest."""
    ms = event.rank_ms if len(event.rank_ms) <= 8 else (min(event.rank_ms), max(event.rank_ms))
    return f"{(' to ' if ms is not event.rank_ms else ' ').join(f'{x:.1f}' for x in ms)} ms"


def progress_text(event: ev.Progress) -> str:
    """`3.10 of 12.0 MB, 25%`, `262 kB of 1.42 MB, 18%`, `64 of 255 merges, 25%`."""
    text = amount(event.done, event.total, event.unit)
    return f"{text}, {event.done / event.total:.0%}" if event.total else text


def amount(done: float, total: float, unit: str) -> str:
    """How much of a wait is over, in its unit; bytes take a prefix."""
    if unit == "B":
        return f"{si(done, unit)} of {si(total, unit)}" if total else si(done, unit)
    return f"{si(done)} of {si(total)} {unit}".rstrip() if total else f"{si(done)} {unit}".rstrip()


def started_lines(event: ev.RunStarted) -> list[str]:
    """What is about to run, in a few aligned lines."""
    budget = f"{event.time_budget_s:g} s" if event.time_budget_s else "none"
    ranks = f"{event.ranks} ranks of " if event.ranks > 1 else ""
    rows = [
        ("model", f"{event.plugin}:{event.preset}, {si(event.n_params)} parameters, {_config(event.config)}"),
        (
            "engine",
            f"{event.backend} {event.precision} {event.isa}, {ranks}{event.threads} threads, {event.layout} layout, "
            f"{event.kernels} kernels compiled in {event.compile_ms:.0f} ms "
            f"({event.compiles} of {event.compile_budget} compiles)",
        ),
        (
            "data",
            f"{event.dataset}: {si(event.train_tokens)} tokens to train on, {si(event.val_tokens)} to validate, "
            f"tokenizer {event.tokenizer}",
        ),
        (
            "run",
            f"{count(event.steps)} steps of {count(event.tokens_per_step)} tokens, time budget {budget}, "
            f"{si(event.memory_bytes, 'B')} of memory, {event.out_dir}",
        ),
    ]
    if event.first_step:
        rows.append(("resume", f"from step {count(event.first_step)}"))
    return [f"{name:<7} {text}" for name, text in rows]


def _config(config: dict[str, Any]) -> str:
    return " ".join(f"{k} {v}" for k, v in config.items())


def log_line(event: ev.Event) -> str:
    """One line for what happens between steps; empty for events that are shown otherwise."""
    match event:
        case ev.Notice():
            return event.text if event.level == "info" else f"{event.level}: {event.text}"
        case ev.Validated():
            best = ", the best so far" if event.best else ""
            return f"validation at step {count(event.step)}: loss {event.loss:.4f} on {si(event.tokens)} tokens{best}"
        case ev.Saved():
            waited = f", training waited {event.stall_ms:.1f} ms" if event.stall_ms >= 1 else ""
            return f"saved {event.path}{' (best)' if event.best else ''} in {event.ms:.0f} ms{waited}"
        case ev.Sampled():
            return f"story at step {count(event.step)} ({event.ms:.0f} ms)"
    return ""


REASONS = {
    "steps": "done: all steps",
    "time": "done: the time budget is spent",
    "budget": "saved: the compiles of this process are spent",
    "interrupted": "interrupted and saved",
    "diverged": "stopped: training diverged; the last good checkpoint is kept",
    "unsaved": "ended, and the last steps are not saved: the disk refused them; the older checkpoints are kept",
}


def done_lines(event: ev.RunDone) -> list[str]:
    """How a run ended, and the figures that matter, in two or three lines."""
    s = event.summary
    figures = []
    if "train_loss" in s:
        figures.append(f"train loss {_number(s['train_loss'], '.4f')}")
    if "val_loss" in s:
        first = f" (from {_number(s['val_loss_first'], '.4f')})" if s.get("val_loss_first") is not None else ""
        figures.append(f"validation {_number(s['val_loss'], '.4f')}{first}")
    for name, form, unit in (("ms_per_step", ".1f", "ms/step"), ("tokens_per_s", ",.0f", "tok/s")):
        if name in s:
            figures.append(f"{_number(s[name], form)} {unit}")
    if "compiles" in s:
        figures.append(f"{s['compiles']} compiles")
    if "rss_mb" in s:
        figures.append(f"{_number(s['rss_mb'], ',.0f')} MB")
    lines = [f"{REASONS.get(event.reason, event.reason)} ({count(s.get('steps', 0))} steps)"]
    if figures:
        lines.append("  ".join(figures))
    if s.get("checkpoint"):
        lines.append(f"checkpoint {s['checkpoint']}")
    return lines


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def _indented(text: str, width: int = 100) -> list[str]:
    lines = [w for line in text.splitlines() for w in (textwrap.wrap(line, width - 2) or [""])]
    return [f"  {line}".rstrip() for line in lines]


# ---- JSON ----


ENCODER = json.JSONEncoder(allow_nan=False, default=str)


def dumps(record: Any) -> str:
    """One line of strict JSON: what JSON has no word for (NaN, inf) becomes null, what it has no type for its text."""
    try:
        return ENCODER.encode(record)
    except ValueError:
        return ENCODER.encode(_finite(record))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


class EventLog:
    """Appends each event to a JSONL file, with the time; without a path, to events.jsonl in the run's directory.

    Steps are written together, every four seconds: just after a step the caches hold its tensors, so that a line by
    itself takes many times as long. Whatever is no step is written at once, behind the steps before it.
    """

    EVERY_S = 4.0

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._held: list[tuple[float, ev.Event]] = []
        self._file: TextIO | None = None

    def write(self, event: ev.Event) -> None:
        """Take an event. Those before RunStarted wait until the directory is known."""
        now = time.time()
        self._held.append((now, event))
        if self._file is None:
            if self.path is None and isinstance(event, ev.RunStarted):
                self.path = Path(event.out_dir) / "events.jsonl"
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        if not isinstance(event, ev.StepDone) or now - self._held[0][0] >= self.EVERY_S:
            self._flush()

    def _flush(self) -> None:
        if self._file is not None and self._held:
            lines = [dumps({"time": round(at, 3), **event.as_dict()}) + "\n" for at, event in self._held]
            self._held.clear()
            self._file.write("".join(lines))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                self._flush()
                self._file.close()


def follow(events: Iterable[ev.Event], ui: UI, log: EventLog, on_lost: Callable[[], None] = lambda: None) -> ev.RunDone:
    """Log and show every event; returns the last one. StepDone.ms["dashboard"] is filled in on the way.

    `on_lost` is called when the reader of the view goes away (a closed pipe), so that the run can save and end. The
    dashboard's figure is what showing and logging took since the step before: wall time here, where the training thread
    waits, and CPU time of a thread that draws. Raises NativeError if the events end without RunDone.
    """
    spent_ms, done = 0.0, None
    for event in events:
        start = time.perf_counter()
        if isinstance(event, ev.StepDone):
            event.ms["dashboard"] = spent_ms + ui.overhead_ms()
            spent_ms = 0.0
        elif isinstance(event, ev.RunDone):
            done = event
        try:
            log.write(event)
        except OSError as error:
            log.close()
            log = EventLog(Path(os.devnull))
            ui.show(ev.Notice("warning", f"the event log is off from here on: {error}"))
        try:
            ui.show(event)
        except BrokenPipeError:
            ui = Off()
            on_lost()
        spent_ms += (time.perf_counter() - start) * 1e3
    if done is None:
        raise NativeError("the trainer ended without a RunDone event: a trainer's last event is RunDone")
    return done
