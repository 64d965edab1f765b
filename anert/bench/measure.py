"""Interleaved timing: every case once a round, rounds that other processes disturbed repeated, median and p10/p90."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anert import __version__
from anert.errors import AnertError
from anert.events import Event, Progress
from anert.ffi import open_blas

MAX_OTHER = 0.15
"""Cores that other processes may use during a timed run before it counts as disturbed."""
MAX_SPREAD = 0.6
"""(p90 - p10) / median beyond which a figure is noise."""
TIMES = {"ms": 1e3, "us": 1e6}
SETTLE_S = 0.02
"""A run shorter than this is repeated within one timing, so that the clock and the scheduler do not matter."""


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How OpenMP's threads wait. `passive`, set in a shell, made llama.cpp 4 to 7 times as slow at two threads."""


def let_peers_wait() -> None:
    """Have peers that start from now on wait as they were built to, whatever this process' environment says."""
    for name in WAITING:
        os.environ.pop(name, None)


@dataclass(slots=True)
class Case:
    """One thing to time. `run()` does it once; its result is checked by `verify` before and after the timing. A run
    that times itself (a peer's program) returns its seconds.

    unit: `ms` and `us` are a run's time; any other is a rate, of which one run is `amount` (tok/s: tokens). flops,
    nbytes: executed by one run, from the program that runs. peak: measures the peak in GFLOP/s; asked after the
    timing. baseline: the case that `ratio` is taken against. floor_us: a run faster than this did not happen.
    """

    name: str
    run: Callable[[], object]
    unit: str = "ms"
    amount: float = 1.0
    flops: float = 0.0
    nbytes: float = 0.0
    peak: Callable[[], float] | None = None
    baseline: str = ""
    verify: Callable[[], None] | None = None
    floor_us: float = 0.0
    keep: object = None
    """What must live as long as the case: files that a run reads."""
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """A row of `anert bench --json` (design: results). median, p10, p90 in `unit`; p10 is the lower number."""

    name: str
    unit: str
    median: float
    p10: float
    p90: float
    n: int
    flops: float = 0.0
    bytes: float = 0.0
    tflops: float = 0.0
    gbps: float = 0.0
    peak_fraction: float | None = None
    baseline: str = ""
    ratio: float | None = None
    disturbed: int = 0
    """Timings that other processes took part of and that are among the n, because quiet ones did not come."""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class NoisyError(AnertError):
    """The spread of a measurement says nothing about what was measured."""


def measure(
    cases: Sequence[Case], rounds: int = 7, warmup: int = 2, quiet: bool = True, max_spread: float = MAX_SPREAD
) -> Iterator[Event | Result]:
    """Time the cases side by side; yields Progress, then a Result each. Raises NoisyError where the spread says noise,
    what `verify` raises, and ImplausibleError for a figure that cannot be.

    quiet: repeat timings that other processes disturbed, at most `rounds` more of them in all.
    """
    from anert.bench.roofline import refuse_implausible

    for case in cases:
        for _ in range(warmup):
            case.run()
        if case.verify:
            case.verify()
    # Before and after the timing: what else runs can only lower a peak.
    peaks = {case.peak: case.peak() for case in cases if case.peak is not None}
    repeats = [_repeats(case) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    disturbed = [0] * len(cases)
    spare = rounds * len(cases) if quiet else 0
    for turn in range(rounds):
        yield Progress("measure", turn, rounds, "rounds")
        for i in range(len(cases)):
            i = (i + turn) % len(cases)
            while True:
                seconds, other = timed(cases[i].run, repeats[i])
                if other <= MAX_OTHER or spare == 0:
                    break
                spare -= 1
            times[i].append(seconds)
            disturbed[i] += other > MAX_OTHER
    yield Progress("measure", rounds, rounds, "rounds")
    for case in cases:
        if case.verify:
            case.verify()
    for peak in peaks:
        peaks[peak] = peak()
    results = [
        _result(c, t, d, peaks[c.peak] if c.peak else 0.0) for c, t, d in zip(cases, times, disturbed, strict=True)
    ]
    medians = {r.name: r for r in results}
    for case, result in zip(cases, results, strict=True):
        refuse_implausible(case, result, peaks[case.peak] if case.peak else 0.0)
        spread = (result.p90 - result.p10) / result.median if result.median else 0.0
        if spread > max_spread:
            raise NoisyError(
                f"bench {case.name}: p10 {result.p10:.4g}, p90 {result.p90:.4g} {result.unit} differ by "
                f"{spread:.0%} of the median: noise, not a figure; end what else runs, or raise --rounds"
            )
        yield _against(result, medians.get(case.baseline))


def _repeats(case: Case) -> int:
    """How many runs a timing takes to last SETTLE_S."""
    start = time.perf_counter()
    if isinstance(case.run(), float):
        return 1
    once = time.perf_counter() - start
    return max(1, int(SETTLE_S / max(once, 1e-7)))


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(seconds of one run, cores that other processes used meanwhile; 0 where the system does not say)."""
    busy, own = busy_seconds(), own_seconds()
    start = time.perf_counter()
    for _ in range(repeats):
        told = run()
    wall = time.perf_counter() - start
    other = (busy_seconds() - busy) - (own_seconds() - own)
    # The counters tick every 10 ms: over a short timing they say nothing.
    return told if isinstance(told, float) else wall / repeats, other / wall if wall > 0.1 else 0.0


def own_seconds() -> float:
    """Processor seconds of this process and of the children that it has waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def busy_seconds() -> float:
    """Processor seconds of all processes since boot (Linux' /proc/stat); 0 elsewhere."""
    try:
        with open("/proc/stat") as f:
            v = [int(x) for x in f.readline().split()[1:]]
    except OSError:
        return 0.0
    return (sum(v[:8]) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


def _result(case: Case, seconds: Sequence[float], disturbed: int, peak_gflops: float) -> Result:
    s = np.sort(seconds)
    per = s * TIMES[case.unit] if case.unit in TIMES else case.amount / s[::-1]
    median = float(np.median(s))
    tflops, gbps = case.flops / median / 1e12, case.nbytes / median / 1e9
    fraction = tflops * 1e3 / peak_gflops if peak_gflops and case.flops else None
    p10, mid, p90 = (float(np.percentile(per, q)) for q in (10, 50, 90))
    return Result(case.name, case.unit, mid, p10, p90, len(s), case.flops, case.nbytes, tflops, gbps, fraction,
                  disturbed=disturbed, notes=dict(case.notes))  # fmt: skip


def _against(result: Result, baseline: Result | None) -> Result:
    """`result` with its ratio: how many times as fast as the baseline it is."""
    if baseline is None or baseline.unit != result.unit:
        return result
    faster = baseline.median / result.median if result.unit in TIMES else result.median / baseline.median
    fields = {name: getattr(result, name) for name in result.__dataclass_fields__}
    return Result(**{**fields, "baseline": baseline.name, "ratio": faster})


def fingerprint(threads: int = 0, isa: str = "") -> dict[str, Any]:
    """Where and with what a figure was measured."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    try:
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        governor = "unknown"
    return {
        "cpu": cpu, "isa": isa, "blas": open_blas() if isa == "blas" else "", "threads": threads,
        "processors": os.cpu_count(), "governor": governor,
        "system": platform.platform(), "python": platform.python_version(), "numpy": np.__version__,
        "anert": __version__, "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip
