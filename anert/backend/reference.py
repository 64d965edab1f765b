"""The reference backend: MIL interpreted by the op table's NumPy definitions. The living definition of every op.

precision `exact`: float64 inside, and ports alone round to their dtype. `fp16`: every op's float result rounds to fp16,
and contractions past the engine's limit become inf, so it tells whether a program will survive on the ANE. `float64`:
nothing rounds, not even ports: what finite differences need.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np

from anert.backend.base import Backend, Binding, Port, Program, ProgramStats, written_flops
from anert.capabilities import CPU, Capabilities
from anert.errors import InputError, ShapeError, StateError
from anert.mil.graph import DTYPES, Function, Op, TensorType, Value
from anert.mil.ops import lookup
from anert.surface import Heap, Hold, Surface

PRECISIONS = ("exact", "fp16", "float64")
CONTRACTION_LIMIT = 32752.0
"""Largest result of a contraction that the engine holds in fp16 (ane_facts 3.5)."""

Watch = Callable[[int, Op, tuple[np.ndarray, ...]], None]
"""(index of the op, op, its results) -> None, called after each op."""


class NonFinite(NamedTuple):
    """Where a NaN or infinity first came from: which op, its kind, its output's name, how many elements of it.

    at -1 and kind `input`: it was there when the function was called.
    """

    at: int
    kind: str
    name: str
    elements: int


def _is_float(t: TensorType) -> bool:
    return DTYPES[t.dtype].kind == "f"


def _port(a: np.ndarray, t: TensorType) -> np.ndarray:
    """`a` as a port of type `t` holds it: rounded to nearest even, overflow to inf."""
    with np.errstate(all="ignore"):
        return a.astype(DTYPES[t.dtype])


def _argument(v: Value, given: Any, exact_ports: bool) -> np.ndarray:
    """An input as ops take it: float64 through its port, or its own integer type. Raises ShapeError."""
    a = np.asarray(given)
    if a.shape != v.shape:
        raise ShapeError(f"input {v.name!r} takes shape {v.shape}, got {a.shape}")
    if _is_float(v.type):
        if a.dtype.kind not in "fiu":
            raise ShapeError(f"input {v.name!r} takes {v.dtype}, got {a.dtype}")
        return (a if exact_ports else _port(a, v.type)).astype(np.float64)
    want = DTYPES[v.dtype]
    if (a.dtype.kind == "b") != (want.kind == "b") or not np.array_equal(a, a.astype(want)):
        raise ShapeError(f"input {v.name!r} takes {v.dtype}, got {a.dtype} values that it cannot hold")
    return a.astype(want)


def _to_fp16(op: Op, a: np.ndarray, contraction: bool) -> tuple[np.ndarray, int]:
    """`a` as fp16 holds it, and how many finite elements became infinite."""
    with np.errstate(all="ignore"):
        half = a.astype(np.float16).astype(np.float64)
        if contraction:
            half = np.where(np.abs(half) > CONTRACTION_LIMIT, np.copysign(np.inf, half), half)
    return half, int(np.count_nonzero(np.isinf(half) & np.isfinite(a)))


def evaluate(
    function: Function,
    inputs: Mapping[str, Any],
    precision: str = "exact",
    watch: Watch | None = None,
    overflows: MutableMapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """The outputs of `function` by name, in the dtypes of their ports (float64 in precision `float64`).

    `inputs` maps every formal input to an array of its shape. `overflows` gathers, by the name of an op's output, how
    many finite results became infinite in precision `fp16`. Raises InputError, or ShapeError for what does not fit.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown: expected one of {', '.join(PRECISIONS)}")
    names = [v.name for v in function.inputs]
    if set(names) != set(inputs):
        takes, got = ", ".join(names) or "none", ", ".join(inputs) or "none"
        raise ShapeError(f"{function.name!r} takes inputs {takes}, got {got}")
    loose = precision == "float64"
    values = {v: _argument(v, inputs[v.name], loose) for v in function.inputs}
    last = {v: i for i, op in enumerate(function.ops) for v in op.operands()}
    keep = set(function.outputs)
    for i, op in enumerate(function.ops):
        results = _results(op, values, precision, overflows)
        values.update(zip(op.outputs, results, strict=True))
        if watch is not None:
            watch(i, op, results)
        for v in {*op.operands(), *op.outputs}:
            if last.get(v, i) == i and v not in keep:
                del values[v]
    return {v.name: values[v] if loose else _port(values[v], v.type) for v in function.outputs}


def _results(
    op: Op, values: Mapping[Value, np.ndarray], precision: str, overflows: MutableMapping[str, int] | None
) -> tuple[np.ndarray, ...]:
    """What one op computes from `values`, rounded as `precision` says."""
    row = lookup(op.kind)
    given = {k: tuple(values[x] for x in v) if isinstance(v, tuple) else values[v] for k, v in op.inputs.items()}
    results = row.evaluate(given, op.attrs)
    if precision != "fp16":
        return results
    rounded = []
    for v, a in zip(op.outputs, results, strict=True):
        if _is_float(v.type):
            a, lost = _to_fp16(op, a, row.flops is not None)
            if lost and overflows is not None:
                overflows[v.name] = overflows.get(v.name, 0) + lost
        rounded.append(a)
    return tuple(rounded)


class _Search:
    """Watches an evaluation for the first op that makes a NaN, or an infinity that none of its operands had."""

    def __init__(self) -> None:
        self.infinite: set[Value] = set()
        self.found: NonFinite | None = None

    def __call__(self, index: int, op: Op, results: tuple[np.ndarray, ...]) -> None:
        inherited = any(v in self.infinite for v in op.operands())
        for v, a in zip(op.outputs, results, strict=True):
            if a.dtype.kind != "f" or np.isfinite(a).all():
                continue
            self.infinite.add(v)
            if self.found is None and op.kind != "const" and (np.isnan(a).any() or not inherited):
                self.found = NonFinite(index, op.kind, v.name, int(np.count_nonzero(~np.isfinite(a))))


def first_nonfinite(function: Function, inputs: Mapping[str, Any], precision: str = "exact") -> NonFinite | None:
    """The first op whose result holds a NaN, or an infinity that no operand had; None if there is none.

    An infinite constant (a mask) is no fault, nor what an infinite operand passes on without NaN. An output counts as
    its port holds it: rounded to its dtype. A non-finite input is named before any op.
    """
    for v in function.inputs:
        a = np.asarray(inputs.get(v.name, 0.0))
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            return NonFinite(-1, "input", v.name, int(np.count_nonzero(~np.isfinite(a))))
    search = _Search()
    outputs = evaluate(function, inputs, precision, search)
    if search.found is not None:
        return search.found
    index = {v: i for i, op in enumerate(function.ops) for v in op.outputs}
    for v in function.outputs:
        bad = 0 if v in search.infinite or not _is_float(v.type) else np.count_nonzero(~np.isfinite(outputs[v.name]))
        if bad:
            return NonFinite(index.get(v, -1), v.op.kind if v.op else "input", v.name, int(bad))
    return None


class ReferenceBinding(Binding):
    """A reference program with surfaces on its ports."""

    def __init__(self, program: ReferenceProgram, surfaces: Mapping[str, Surface]) -> None:
        self.program, self.surfaces = program, dict(surfaces)
        reads = {p.name: surfaces[p.name] for p in program.inputs}
        self._hold = Hold(reads, {p.name: surfaces[p.name] for p in program.outputs})
        self._busy = threading.Lock()

    def run(self) -> None:
        """Evaluate once, from the input surfaces to the output surfaces."""
        if not self._busy.acquire(blocking=False):
            raise StateError("this Binding is already running: bind the program a second time to run it twice at once")
        try:
            self._hold.take()
            try:
                self._evaluate()
            finally:
                self._hold.release()
        finally:
            self._busy.release()

    def _evaluate(self) -> None:
        program = self.program
        inputs = {p.name: self._array(p).copy() for p in program.inputs}
        outputs = evaluate(program.function, inputs, program.precision, overflows=program.overflows)
        for p in program.outputs:
            self._array(p)[...] = outputs[p.name]

    def _array(self, port: Port) -> np.ndarray:
        return self.surfaces[port.name].array(DTYPES[port.type.dtype], port.type.shape)


class ReferenceProgram(Program):
    """A parsed function; `overflows` counts, by value name, what fp16 could not hold over all runs so far."""

    def __init__(self, function: Function, precision: str) -> None:
        self.function, self.precision = function, precision
        self.inputs = tuple(Port(v.name, v.type) for v in function.inputs)
        self.outputs = tuple(Port(v.name, v.type) for v in function.outputs)
        self.overflows: dict[str, int] = {}
        flops = written_flops(function)
        self.stats = ProgramStats(
            flops_written=flops,
            flops_executed=flops,
            bytes_in=sum(p.nbytes for p in self.inputs),
            bytes_out=sum(p.nbytes for p in self.outputs),
            steps=len(function.ops),
        )

    def _bind(self, surfaces: Mapping[str, Surface]) -> Binding:
        return ReferenceBinding(self, surfaces)


class ReferenceBackend(Backend):
    """Backend `reference`: any MIL of the table, in `exact` or `fp16` precision, as slow as NumPy."""

    name = "reference"

    def __init__(self, heap: Heap | None = None, precision: str = "exact", capabilities: Capabilities = CPU) -> None:
        if precision not in ("exact", "fp16"):
            raise InputError(f"precision {precision!r} is unknown to backend reference: expected exact or fp16")
        super().__init__(capabilities, capabilities.compile_budget)
        self.heap, self.precision = heap, precision

    def _compile(self, text: str, blobs: Mapping[str, bytes]) -> Program:
        from anert.mil.text import parse

        return ReferenceProgram(parse(text, blobs=blobs).main, self.precision)

    def surface(self, nbytes: int) -> Surface:
        self.heap = self.heap or Heap()
        return Surface(self.heap, nbytes)
