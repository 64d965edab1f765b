"""Many steps of a small model through the whole training loop, saves and validation included: what must not grow does
not."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anert.bench.measure import Result
from anert.bench.options import BenchOptions
from anert.errors import AnertError, InputError
from anert.events import Event, Notice, Progress, RunDone, StepDone

ROUNDS = 1
STEPS = 20_000
WARMUP = 0.2
"""Share of the steps before anything is compared."""
LEAST = 100
"""Steps without which nothing can be said."""
RSS_GROWTH, TIME_GROWTH = 0.01, 0.10


@dataclass(slots=True)
class Samples:
    """One number a step of each; memory for all of them is touched before the first."""

    rss: np.ndarray
    files: np.ndarray
    ms: np.ndarray
    compiles: np.ndarray
    n: int = 0

    @classmethod
    def room(cls, steps: int) -> Samples:
        rss, files, ms, compiles = (np.full(steps, np.nan) for _ in range(4))
        return cls(rss, files, ms, compiles)

    def add(self, rss: float, files: float, ms: float, compiles: float) -> None:
        i = self.n
        self.rss[i], self.files[i], self.ms[i], self.compiles[i] = rss, files, ms, compiles
        self.n += 1


@dataclass(frozen=True, slots=True)
class Finding:
    """How something went from the first tenth of the steps after warm-up to the last tenth; `fault`: what is wrong."""

    name: str
    unit: str
    first: float
    last: float
    fault: str = ""


def judge(s: Samples) -> list[Finding]:
    """Memory, open files, time and compiles over the steps. Raises AnertError if there are too few."""
    if s.n < LEAST:
        raise AnertError(f"bench soak: {s.n} steps were made, it takes {LEAST} to say anything: give it more --seconds")
    begin = int(s.n * WARMUP)
    tenth = max(10, (s.n - begin) // 10)
    first, last = slice(begin, begin + tenth), slice(s.n - tenth, s.n)

    def both(values: np.ndarray, q: float) -> tuple[float, float]:
        return float(np.percentile(values[first], q)), float(np.percentile(values[last], q))

    rss, files = both(s.rss / 2**20, 50), both(s.files, 0)  # a save under way has files open for a moment
    ms, compiles = both(s.ms, 10), both(s.compiles, 100)  # the quick tenth: other processes only slow steps down
    growth, slower = rss[1] / rss[0] - 1, ms[1] / ms[0] - 1
    grew = f"grew by {growth:.1%}, {RSS_GROWTH:.0%} is allowed" if growth >= RSS_GROWTH else ""
    slowed = f"slower by {slower:.0%}, {TIME_GROWTH:.0%} is allowed" if slower > TIME_GROWTH else ""
    opened = f"{files[1] - files[0]:.0f} more" if files[1] > files[0] else ""
    compiled = f"{compiles[1] - compiles[0]:.0f} after the start" if compiles[1] != compiles[0] else ""
    return [
        Finding("resident memory", "MiB", *rss, grew),
        Finding("open files", "files", *files, opened),
        Finding("step", "ms", *ms, slowed),
        Finding("compiles", "programs", *compiles, compiled),
    ]


def results(options: BenchOptions, rounds: int) -> Iterator[Event | Result]:
    """A Result for each thing that must stay; then AnertError if one of them did not."""
    samples = Samples.room(options.steps or STEPS)
    yield from run(options, samples)
    found = judge(samples)
    for f in found:
        change = (f.last / f.first - 1) if f.first else 0.0
        said = f.fault or f"from {f.first:.4g} to {f.last:.4g}: {change:+.2%} over {samples.n:,} steps"
        notes = {"said": said, "first": f.first, "last": f.last, "steps": samples.n, "fault": f.fault}
        yield Result(
            f"soak: {f.name}", f.unit, f.last, min(f.first, f.last), max(f.first, f.last), samples.n, notes=notes
        )
    if faults := [f"{f.name}: {f.fault}" for f in found if f.fault]:
        raise AnertError(f"bench soak, {samples.n} steps: {'; '.join(faults)}")


def run(options: BenchOptions, samples: Samples) -> Iterator[Event]:
    """Train, and sample after each step."""
    from anert.plugin import load, split_name
    from anert.runtime import rss_bytes
    from anert.train import TrainOptions, train

    if options.peers:
        raise InputError(f"bench soak has no peer {options.peers[0][0]!r}")
    _, config = options.model()
    name, preset = split_name(options.plugin)
    plugin = load(name)
    steps, told, end = options.steps or STEPS, 0.0, time.monotonic() + (options.seconds or float("inf"))
    with tempfile.TemporaryDirectory(prefix="anert-soak-") as folder:
        chosen = TrainOptions(
            steps=steps, batch=options.batch, lr=1e-3, warmup=20, data=options.data, out=str(Path(folder) / "run"),
            backend=options.backend, precision=options.precision, layout=options.layout, threads=options.threads,
            eval_every=200, eval_tokens=2048, sample_every=0, save_every=200, keep=2,
        )  # fmt: skip
        name = preset or plugin.preset("").name
        for event in train(plugin, name, config, chosen, lambda: time.monotonic() > end):
            if isinstance(event, StepDone):
                samples.add(rss_bytes(), open_files(), event.step_ms, event.compiles)
                if time.monotonic() - told > 1:
                    told = time.monotonic()
                    yield Progress("soak", event.step, steps, "steps")
            elif isinstance(event, Notice) and event.level != "info":
                yield event
            elif isinstance(event, RunDone) and event.reason not in ("steps", "interrupted"):
                raise AnertError(f"bench soak: training ended after {samples.n} steps: {event.reason}")


def open_files() -> int:
    """File descriptors of this process."""
    folder: Any = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    return len(os.listdir(folder)) - 1  # the listing's own
