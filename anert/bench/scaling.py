"""A training step along one axis: ms beside executed FLOPs and bytes, the line through them, and what leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from anert.bench.measure import Case, Result, measure
from anert.bench.model import train_on
from anert.bench.options import BenchOptions
from anert.errors import InputError
from anert.events import Event

ROUNDS = 5
AXES = {
    "seq_len": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8),
    "n_layers": (2, 4, 8, 12, 24),
    "vocab_size": (512, 2048, 8192, 32000),
    "threads": (1, 2),
}
"""axis -> the points of a table."""
LEAVES = 0.10
"""Share of the fitted time by which a point is off the line before it is said to leave it."""


def results(options: BenchOptions, rounds: int) -> Iterator[Event | Result]:
    """A Result a point, the points timed in turns. Raises InputError for an unknown axis, DoesNotFit for points that do
    not fit into memory beside each other."""
    axis = options.axis
    if axis not in AXES:
        raise InputError(f"bench scaling takes --axis {', '.join(AXES)}, got {axis!r}")
    values = options.values or AXES[axis]
    if len(set(values)) != len(values) or len(values) < 2:
        raise InputError(f"bench scaling needs two or more different points on {axis}, got {values}")
    cases = [_case(options, axis, value) for value in values]
    found: list[Result] = []
    for item in measure(cases, rounds, warmup=1, quiet=False, max_spread=float("inf")):
        if isinstance(item, Result):
            found.append(item)
        else:
            yield item
    yield from on_a_line(axis, values, found)


def _case(options: BenchOptions, axis: str, value: int) -> Case:
    """A training step at one point."""
    if axis in ("batch", "threads", "seq_len"):
        changed: dict[str, Any] = {axis: value}
        point = replace(options, **changed)
    else:
        point = replace(options, overrides=(*options.overrides, (axis, value)))
    case, bench = train_on(point)
    # AdamW reads and writes master and both moments, and reads the gradient: 28 bytes a parameter
    nbytes = bench.net.port_bytes + 28.0 * bench.store.n_params
    notes = {**case.notes, "axis": axis, "value": value}
    return replace(case, name=f"{axis} {value}", unit="ms", amount=1.0, nbytes=nbytes, notes=notes)


def on_a_line(axis: str, values: Sequence[int], found: Sequence[Result]) -> Iterator[Result]:
    """The results, each with the line's time, how far it is off, and whether that is far.

    The line is ms = fixed + slope * FLOPs (1 / threads on that axis), fitted so that relative distances count; through
    two points it says nothing of either, and the fixed part is then what tells.
    """
    x = np.array([1.0 / v if axis == "threads" else r.flops / 1e9 for v, r in zip(values, found, strict=True)])
    ms = np.array([r.median for r in found])
    fixed, slope = fit(x, ms)
    for r, at, measured in zip(found, x, ms, strict=True):
        line = fixed + slope * float(at)
        off = float(measured) / line - 1 if line > 0 else float("inf")
        leaves = abs(off) > LEAVES
        notes: dict[str, Any] = {**r.notes, "fixed_ms": fixed, "slope": slope, "line_ms": line, "residual": off,
                                 "leaves_line": leaves}  # fmt: skip
        said = f"{r.flops / 1e9:.3g} GFLOP {r.bytes / 1e6:.3g} MB  line {line:.4g} ms, off by {off:+.0%}"
        notes["said"] = said + (" <- leaves the line" if leaves else "")
        yield Result(**{**{f.name: getattr(r, f.name) for f in fields(r)}, "notes": notes})


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(intercept, slope) of y over x, least squares of relative distances."""
    rows = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(rows, np.ones_like(y), rcond=None)
    return float(intercept), float(slope)
