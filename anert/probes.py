"""Small programs that ask a Neural Engine what it does (ane_facts section 8): each has a numeric check, runs in a
throw-away child process with a time limit, and answers with what the capability record needs.

    outcome = in_child("binding-order")          # {"ok": True, "value": "sorted", "record": {"binding": "sorted"}}

A probe is a function of a Backend, so that the same ones run on a Mac, against a fake of its framework, and on the
reference backend. Not asked: what anert never does (reload changed weight files, the real-time path, performance
counters, int8 constants in the text), and what crashes (weights that are nil).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from anert.capabilities import ANE, Capabilities, load_record
from anert.errors import AnertError, CompileError, InputError
from anert.kernel import round_up
from anert.mil import ops
from anert.mil.graph import Function, Value
from anert.mil.text import print_module

if TYPE_CHECKING:
    from anert.backend.base import Backend, Program
    from anert.surface import Surface

TIME_LIMIT_S = 60.0
FLOOR_US = 50.0
"""An evaluate faster than this did not reach the engine (ane_facts fact 2)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """ok: what the safe defaults assume holds here (None: the probe could not tell). record: fields of Capabilities.
    rules: lint rule -> whether this engine has that limit."""

    ok: bool | None
    value: str
    record: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probe:
    """question: what it settles, for the report."""

    name: str
    question: str
    run: Callable[[Backend], Outcome]
    optional: bool = False
    """Asked for by name only: it costs the process, or much time."""


PROBES: dict[str, Probe] = {}
"""By name, in the order in which doctor runs them. Filled below, never after."""


def probe(name: str, question: str, optional: bool = False) -> Callable[[Callable[[Backend], Outcome]], Any]:
    def add(run: Callable[[Backend], Outcome]) -> Callable[[Backend], Outcome]:
        PROBES[name] = Probe(name, question, run, optional)
        return run

    return add


# ---- running a program


def surfaces_of(engine: Backend, program: Program, exact: bool = False) -> dict[str, Surface]:
    """A surface for every port: of the safe size, or of the port's `exact` bytes."""
    caps = engine.capabilities

    def size(nbytes: int) -> int:
        return nbytes if exact else max(caps.min_surface, round_up(nbytes, caps.surface_multiple))

    return {p.name: engine.surface(size(p.nbytes)) for p in (*program.inputs, *program.outputs)}


def evaluate(engine: Backend, fn: Function, feeds: Mapping[str, np.ndarray], exact: bool = False) -> list[np.ndarray]:
    """The outputs (float32) of `fn` on `feeds`."""
    program = engine.compile(print_module(fn))
    surfaces = surfaces_of(engine, program, exact)
    for port in program.inputs:
        kind = np.float32 if port.type.dtype == "fp32" else np.float16
        with surfaces[port.name].lock():
            surfaces[port.name].array(kind, port.type.shape)[...] = feeds[port.name]
    program.bind(surfaces).run()
    results = []
    for port in program.outputs:
        kind = np.float32 if port.type.dtype == "fp32" else np.float16
        with surfaces[port.name].lock(read_only=True):
            results.append(surfaces[port.name].array(kind, port.type.shape).astype(np.float32))
    return results


def data(*shape: int, seed: int = 7, scale: float = 1.0) -> np.ndarray:
    """Random values without symmetry, exact in fp16."""
    return (np.random.default_rng(seed).uniform(-1, 1, shape) * scale).astype(np.float16).astype(np.float32)


def close(got: np.ndarray, expected: np.ndarray, bound: float = 2e-2) -> bool:
    """Within `bound` of the largest expected magnitude, everywhere."""
    return bool(np.all(np.isfinite(got)) and np.max(np.abs(got - expected)) <= bound * np.max(np.abs(expected)))


def function(engine: Backend, *inputs: tuple[str, tuple[int, ...]]) -> tuple[Function, list[Value]]:
    fn = Function("main", engine.capabilities.opset)
    return fn, [fn.input(name, shape) for name, shape in inputs]


def result(fn: Function, *values: Value) -> Function:
    """`fn` with its outputs named in order."""
    for i, v in enumerate(values):
        fn.claim(f"o{i:02d}_r", v)
    return fn.returns(*values)


def works(engine: Backend, fn: Function, feeds: Mapping[str, np.ndarray], *expected: np.ndarray,
          exact: bool = False) -> str:  # fmt: skip
    """Empty if the program compiles, runs and gives `expected`; else what went wrong."""
    try:
        got = evaluate(engine, fn, feeds, exact)
    except CompileError as error:
        return f"refused: {error}"
    except AnertError as error:
        return f"failed: {error}"
    return "" if all(close(g, e) for g, e in zip(got, expected, strict=True)) else "wrong numbers"


# ---- ports


@probe("dialect", "which MIL dialect compiles")
def dialect(engine: Backend) -> Outcome:
    a = data(1, 32, 1, 32)
    found = {}
    for opset in ("ios18", "ios16"):
        fn = Function("main", opset)
        result(fn, ops.mul(fn.input("i00_a", a.shape), 2.0))
        found[opset] = works(engine, fn, {"i00_a": a}, 2 * a)
    good = [opset for opset, fault in found.items() if not fault]
    if not good:
        return Outcome(None, "neither: " + "; ".join(f"{k}: {v}" for k, v in found.items()))
    return Outcome("ios18" in good, " and ".join(good), {"opset": good[0]}, {"ANE121": "ios18" not in good})


@probe("binding-order", "whether inputs bind by the byte order of their names or as declared")
def binding_order(engine: Backend) -> Outcome:
    a, b = data(1, 32, 1, 32, seed=1), data(1, 32, 1, 32, seed=2)
    fn, (second, first) = function(engine, ("i01_b", (1, 32, 1, 32)), ("i00_a", (1, 32, 1, 32)))
    result(fn, ops.sub(first, ops.mul(second, 2.0)))
    (got,) = evaluate(engine, fn, {"i00_a": a, "i01_b": b})
    if close(got, a - 2 * b):
        return Outcome(True, "sorted", {"binding": "sorted"}, {"ANE101": True})
    if close(got, b - 2 * a):
        return Outcome(False, "declared", {"binding": "declared"}, {"ANE101": False})
    return Outcome(None, "neither order explains the numbers")


@probe("output-order", "whether outputs bind by the byte order of their names or as declared")
def output_order(engine: Backend) -> Outcome:
    a = data(1, 32, 1, 32)
    fn, (x,) = function(engine, ("i00_a", (1, 32, 1, 32)))
    late, early = ops.mul(x, 3.0), ops.mul(x, 2.0)
    fn.claim("o01_z", late)
    fn.claim("o00_a", early)
    fn.returns(late, early)
    program = engine.compile(print_module(fn))
    names = [p.name for p in program.outputs]
    got = dict(zip(names, evaluate(engine, fn, {"i00_a": a}), strict=True))
    if close(got["o00_a"], 2 * a) and close(got["o01_z"], 3 * a):
        return Outcome(True, "sorted", {"output_binding": "sorted"}, {"ANE102": True})
    if close(got["o00_a"], 3 * a) and close(got["o01_z"], 2 * a):
        return Outcome(False, "declared", {"output_binding": "declared"}, {"ANE102": False})
    return Outcome(None, "neither order explains the numbers")


@probe("unequal-sizes", "whether inputs and outputs of different sizes work together")
def unequal_sizes(engine: Backend) -> Outcome:
    a, b = data(1, 512, 1, 64, seed=1), data(1, 512, 1, 512, seed=2)
    fn, (x, y) = function(engine, ("i00_a", a.shape), ("i01_b", b.shape))
    result(fn, ops.mul(x, 2.0), ops.mul(y, 0.5))
    fault = works(engine, fn, {"i00_a": a, "i01_b": b}, 2 * a, b / 2, exact=True)
    return Outcome(not fault, fault or "work", {"equal_sizes": bool(fault)}, {"ANE110": bool(fault)})


@probe("max-inputs", "how many inputs keep their order")
def max_inputs(engine: Backend) -> Outcome:
    best, fault = 0, ""
    for n in (2, 8, 9, 12, 16, 32):
        names = [(f"i{i:02d}_x", (1, 32, 1, 32)) for i in range(n)]
        fn, xs = function(engine, *names)
        total: Value = ops.mul(xs[0], 1.0)
        for i, x in enumerate(xs[1:], 2):
            total = ops.add(total, ops.mul(x, float(i)))
        feeds = {name: data(1, 32, 1, 32, seed=i) for i, (name, _) in enumerate(names)}
        expected = sum((i + 1) * x for i, x in enumerate(feeds.values()))
        fault = works(engine, result(fn, total), feeds, np.asarray(expected))
        if fault:
            break
        best = n
    return Outcome(best >= 8, f"{best}" + (f" ({fault} beyond)" if fault else ""), {"max_inputs": best},
                   {"ANE103": best <= 8})  # fmt: skip


@probe("width-multiple", "what the trailing axis must be a multiple of")
def width_multiple(engine: Backend) -> Outcome:
    good = []
    for width in (1, 8, 15, 16, 17, 31, 32, 48, 96):
        a = data(1, 64, 1, width, seed=width)
        fn, (x,) = function(engine, ("i00_a", a.shape))
        if not works(engine, result(fn, ops.mul(x, 2.0)), {"i00_a": a}, 2 * a):
            good.append(width)
    if 32 not in good:
        return Outcome(None, f"not even 32 works; these do: {good}")
    multiple = next(m for m in (1, 8, 16, 32) if all(w in good for w in (8, 16, 32, 48, 96) if w % m == 0)
                    and (m > 1 or {1, 15, 17, 31} <= set(good)))  # fmt: skip
    return Outcome(multiple <= 32, str(multiple), {"width_multiple": max(multiple, 16)})


@probe("max-width", "the widest trailing axis")
def max_width(engine: Backend) -> Outcome:
    best, fault = 0, ""
    for width in (8192, 16384, 16416, 32768, 65536):
        a = data(1, 8, 1, width, seed=width)
        fn, (x,) = function(engine, ("i00_a", a.shape))
        y = ops.slice_by_size(x, begin=(0, 0, 0, 0), size=(1, 8, 1, 32))
        fault = works(engine, result(fn, ops.mul(y, 2.0)), {"i00_a": a}, 2 * a[..., :32])
        if fault:
            break
        best = width
    return Outcome(best >= 16384, f"{best}" + (f" ({fault} beyond)" if fault else ""), {"max_width": best})


@probe("surface-size", "whether surfaces of exactly a port's bytes work")
def surface_size(engine: Backend) -> Outcome:
    sizes = {}
    for rows, cols in ((32, 32), (100, 96), (256, 64), (768, 96)):
        a = data(1, rows, 1, cols)
        fn, (x,) = function(engine, ("i00_a", a.shape))
        sizes[2 * rows * cols] = works(engine, result(fn, ops.mul(x, 2.0)), {"i00_a": a}, 2 * a, exact=True)
    bad = [n for n, fault in sizes.items() if fault]
    if not bad:
        return Outcome(True, "exact bytes work", {"surface_multiple": 64, "min_surface": 64})
    return Outcome(True, f"too small: {', '.join(map(str, bad))} bytes; rounding up to 16 KiB and 48 KiB is kept")


@probe("fp32-ports", "whether fp32 ports with a cast work")
def fp32_ports(engine: Backend) -> Outcome:
    a = data(1, 32, 1, 32)
    fn = Function("main", engine.capabilities.opset)
    x = fn.input("i00_a", a.shape, "fp32")
    y = ops.cast(ops.mul(ops.cast(x, dtype="fp16"), 2.0), dtype="fp32")
    fault = works(engine, result(fn, y), {"i00_a": a}, 2 * a)
    return Outcome(True, fault or "work", {"fp32_ports": not fault}, {"ANE104": bool(fault)})


# ---- arithmetic


@probe("runtime-matmul", "whether matmul takes two inputs, and at which contractions")
def runtime_matmul(engine: Backend) -> Outcome:
    good, faults = [], []
    for k in (8, 16, 32, 48, 64, 172):
        w, x = data(1, 1, 64, k, seed=1, scale=0.5), data(1, 1, k, 64, seed=2)
        fn, (a, b) = function(engine, ("i00_w", (1, 64, 1, round_up(k, 32))), ("i01_x", (1, k, 1, 64)))
        weight = ops.reshape(ops.slice_by_size(a, begin=(0, 0, 0, 0), size=(1, 64, 1, k)), shape=(1, 1, 64, k))
        y = ops.matmul(weight, ops.reshape(b, shape=(1, 1, k, 64)))
        padded = np.zeros((1, 64, 1, round_up(k, 32)), np.float32)
        padded[..., :k] = w.transpose(0, 2, 1, 3)
        feeds = {"i00_w": padded, "i01_x": x.transpose(0, 2, 1, 3)}
        fault = works(engine, result(fn, ops.reshape(y, shape=(1, 64, 1, 64))), feeds,
                      (w @ x).reshape(1, 64, 1, 64))  # fmt: skip
        faults += [f"{k}: {fault}"] if fault else []
        good += [] if fault else [k]
    if not {32, 64} <= set(good):
        return Outcome(None, "; ".join(faults))
    multiple = 1 if len(good) == 6 else 16 if {16, 48} <= set(good) else 32
    return Outcome(True, f"contractions {', '.join(map(str, good))} work", {"contraction_multiple": multiple},
                   {"ANE210": multiple == 32})  # fmt: skip


@probe("matmul-limit", "the largest result of a matmul")
def matmul_limit(engine: Backend) -> Outcome:
    limit = 0.0
    for total in (30000.0, 40000.0, 60000.0):
        fn, (a, b) = function(engine, ("i00_a", (1, 64, 1, 64)), ("i01_b", (1, 64, 1, 64)))
        x, y = (ops.reshape(v, shape=(1, 1, 64, 64)) for v in (a, b))
        full = np.full((1, 64, 1, 64), np.sqrt(total / 64), np.float16).astype(np.float32)
        expected = np.full((1, 64, 1, 64), float(full.flat[0]) ** 2 * 64)
        product = ops.reshape(ops.matmul(x, y), shape=(1, 64, 1, 64))
        if works(engine, result(fn, product), {"i00_a": full, "i01_b": full}, expected):
            break
        limit = total
    value = {0.0: 0.0, 30000.0: 32752.0, 40000.0: 40000.0, 60000.0: 65504.0}[limit]
    return Outcome(limit >= 30000, f"{value:g}", {"matmul_limit": value})


@probe("slice-limit", "whether large values survive a slice from a column offset")
def slice_limit(engine: Backend) -> Outcome:
    a = data(1, 32, 1, 96)
    a[..., 40] = 5000.0
    fn, (x,) = function(engine, ("i00_a", a.shape))
    y = ops.slice_by_size(x, begin=(0, 0, 0, 32), size=(1, 32, 1, 32))
    (got,) = evaluate(engine, result(fn, y), {"i00_a": a})
    clamps = not close(got, a[..., 32:64])
    return Outcome(True, "values beyond 4,094 become inf" if clamps else "no limit",
                   {"slice_limit": 4094.0 if clamps else 65504.0}, {"ANE214": clamps})  # fmt: skip


@probe("slice-concat", "whether several column slices can be concatenated")
def slice_concat(engine: Backend) -> Outcome:
    a = data(1, 32, 1, 160)
    fn, (x,) = function(engine, ("i00_a", a.shape))
    parts = tuple(ops.slice_by_size(x, begin=(0, 0, 0, at), size=(1, 32, 1, 32)) for at in (0, 64, 128))
    expected = np.concatenate([a[..., at : at + 32] for at in (0, 64, 128)], -1)
    fault = works(engine, result(fn, ops.concat(parts, axis=3)), {"i00_a": a}, expected)
    return Outcome(not fault, fault or "exact", {"slice_concat": not fault}, {"ANE215": bool(fault)})


@probe("conv-weights", "whether conv takes its weights as an input")
def conv_weights(engine: Backend) -> Outcome:
    a, faults = data(1, 64, 1, 64), []
    for factor in (2.0, 3.0):
        fn, (x, w) = function(engine, ("i00_x", a.shape), ("i01_w", (1, 64, 1, 64)))
        y = ops.conv(x, ops.reshape(w, shape=(64, 64, 1, 1)))
        weight = (np.eye(64) * factor).reshape(1, 64, 1, 64)
        faults.append(works(engine, result(fn, y), {"i00_x": a, "i01_w": weight}, factor * a))
    fault = next(filter(None, faults), "")
    return Outcome(True, fault or "taken", {"conv_runtime_weights": not fault}, {"ANE208": bool(fault)})


@probe("attention-mask", "whether scaled_dot_product_attention heeds its mask")
def attention_mask(engine: Backend) -> Outcome:
    q, k, v = (data(1, 2, 32, 32, seed=s) for s in (1, 2, 3))
    mask = np.triu(np.full((32, 32), -1e4), 1).reshape(1, 1, 32, 32)
    fn, (a, b, c, m) = function(engine, *((f"i{i:02d}_q", s) for i, s in enumerate((*[q.shape] * 3, mask.shape))))
    y = ops.scaled_dot_product_attention(a, b, c, attn_mask=m)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(32)

    def attend(s: np.ndarray) -> np.ndarray:
        e = np.exp(s - s.max(-1, keepdims=True))
        return np.asarray(e / e.sum(-1, keepdims=True) @ v)

    try:
        (got,) = evaluate(engine, result(fn, y), dict(zip((i.name for i in fn.inputs), (q, k, v, mask), strict=True)))
    except AnertError as error:
        return Outcome(True, f"refused: {error}", {"attention_mask": False})
    heeded, ignored = close(got, attend(scores + mask)), close(got, attend(scores))
    value = "heeded" if heeded else "ignored" if ignored else "wrong numbers"
    return Outcome(True, value, {"attention_mask": heeded}, {"ANE207": not heeded})


@probe("softmax-width", "which widths softmax takes")
def softmax_width(engine: Backend) -> Outcome:
    good = []
    for width in (256, 257, 272):
        wide = round_up(width, 32)
        a = data(1, 32, 1, wide, seed=width)
        fn, (x,) = function(engine, ("i00_a", a.shape))
        y = ops.softmax(ops.slice_by_size(x, begin=(0, 0, 0, 0), size=(1, 32, 1, width)), axis=-1)
        e = np.exp(a[..., :width])
        back = ops.concat((y, fn.const(np.zeros((1, 32, 1, wide - width)), "fp16")), axis=3) if wide > width else y
        expected = np.zeros_like(a)
        expected[..., :width] = e / e.sum(-1, keepdims=True)
        if not works(engine, result(fn, back), {"i00_a": a}, expected):
            good.append(width)
    return Outcome(256 in good, ", ".join(map(str, good)) or "none", {"softmax_any_width": len(good) == 3},
                   {"ANE213": 272 not in good})  # fmt: skip


# ---- ops, one child each: some are said to poison the process that ran them


def _op(
    kind: str, build: Callable[[Value], Value], expected: Callable[[np.ndarray], np.ndarray], rule: str = ""
) -> None:
    @probe(f"op-{kind}", f"whether {kind} works, and whether the engine goes on after it")
    def run(engine: Backend) -> Outcome:
        a = np.abs(data(1, 32, 1, 32)) + 0.5
        fn, (x,) = function(engine, ("i00_a", a.shape))
        fault = works(engine, result(fn, build(x)), {"i00_a": a}, expected(a))
        again, (x,) = function(engine, ("i00_a", a.shape))
        poisoned = works(engine, result(again, ops.mul(x, 4.0)), {"i00_a": a}, 4 * a)
        value = fault or "works"
        if poisoned:
            value += f"; the engine is useless after it ({poisoned})"
        usable = not fault and not poisoned
        return Outcome(not poisoned, value, {"ops": {kind: usable}}, {rule: not usable} if rule else {})


def _gelu(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.asarray(x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2))))


def _normal(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3))


_op("reduce_mean", lambda x: ops.add(x, ops.reduce_mean(x, axes=(1,), keep_dims=True)),
    lambda a: a + a.mean(1, keepdims=True), "ANE204")  # fmt: skip
_op("reduce_sum", lambda x: ops.add(x, ops.reduce_sum(x, axes=(1,), keep_dims=True)),
    lambda a: a + a.sum(1, keepdims=True))  # fmt: skip
_op("reduce_max", lambda x: ops.sub(x, ops.reduce_max(x, axes=(1,), keep_dims=True)),
    lambda a: a - a.max(1, keepdims=True))  # fmt: skip
_op("rsqrt", ops.rsqrt, lambda a: 1 / np.sqrt(a), "ANE205")
_op("pow", lambda x: ops.pow(x, -0.5), lambda a: a**-0.5)
_op("sqrt", ops.sqrt, np.sqrt)
_op("silu", ops.silu, lambda a: a / (1 + np.exp(-a)))
_op("sigmoid", ops.sigmoid, lambda a: 1 / (1 + np.exp(-a)))
_op("gelu", lambda x: ops.gelu(x, mode="EXACT"), _gelu)
_op("layer_norm", lambda x: ops.layer_norm(x, axes=(-1,), epsilon=1e-3), _normal)
_op("concat", lambda x: ops.slice_by_size(ops.concat((x, x), axis=1), begin=(0, 16, 0, 0), size=(1, 32, 1, 32)),
    lambda a: np.concatenate((a, a), 1)[:, 16:48])  # fmt: skip
_op("transpose", lambda x: ops.transpose(x, perm=(0, 3, 2, 1)), lambda a: a.transpose(0, 3, 2, 1))
_op("reshape", lambda x: ops.reshape(x, shape=(1, 16, 1, 64)), lambda a: a.reshape(1, 16, 1, 64))
_op("tile", lambda x: ops.slice_by_size(ops.tile(x, reps=(1, 2, 1, 1)), begin=(0, 32, 0, 0), size=(1, 32, 1, 32)),
    lambda a: a, "ANE202")  # fmt: skip


# ---- time, and what a process may do


@probe("dispatch-floor", "the time of the smallest evaluate")
def dispatch_floor(engine: Backend) -> Outcome:
    a = data(1, 32, 1, 32)
    fn, (x,) = function(engine, ("i00_a", a.shape))
    program = engine.compile(print_module(result(fn, ops.mul(x, 2.0))))
    binding = program.bind(surfaces_of(engine, program))
    times = []
    for _ in range(200):
        start = time.perf_counter()
        binding.run()
        times.append((time.perf_counter() - start) * 1e6)
    median = float(np.median(times))
    return Outcome(median >= FLOOR_US, f"{median:.1f} us", {"dispatch_us": round(median, 1)})


@probe("refusal-time", "how soon an evaluate that fails answers: what is as fast as this did not run")
def refusal_time(engine: Backend) -> Outcome:
    fn, (x,) = function(engine, ("i00_a", (1, 32, 1, 1)))  # one column: reported as refused everywhere
    try:
        program = engine.compile(print_module(result(fn, ops.mul(x, 2.0))))
        binding = program.bind(surfaces_of(engine, program))
    except AnertError as error:
        return Outcome(True, f"one column is refused before an evaluate: {error}")
    times, answers = [], 0
    for _ in range(20):
        start = time.perf_counter()
        try:
            binding.run()
            answers += 1
        except AnertError:
            times.append((time.perf_counter() - start) * 1e6)
    if answers:
        return Outcome(True, "one column works here, so nothing was refused")
    median = float(np.median(times))
    return Outcome(True, f"{median:.1f} us", {"refusal_us": round(median, 1)})


@probe("bandwidth", "how time grows with the bytes of a program that only passes them on")
def bandwidth(engine: Backend) -> Outcome:
    rates = []
    for rows in (256, 1024, 4096):
        fn, (x,) = function(engine, ("i00_a", (1, rows, 1, 1024)))
        program = engine.compile(print_module(result(fn, ops.mul(x, 1.0))))
        binding = program.bind(surfaces_of(engine, program))
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            binding.run()
            seconds.append(time.perf_counter() - start)
        rates.append((4 * rows * 1024, float(np.median(seconds))))
    said = ", ".join(f"{n / 2**20:.0f} MiB in {s * 1e3:.2f} ms ({n / s / 1e9:.1f} GB/s)" for n, s in rates)
    (small, first), (large, last) = rates[0], rates[-1]
    return Outcome(last > first, said, {"stream_gbps": round((large - small) / max(last - first, 1e-9) / 1e9, 2)})


@probe("compile-limit", "how many programs a process can compile", optional=True)
def compile_limit(engine: Backend) -> Outcome:
    engine.budget = 10_000
    done = 0
    for n in range(400):
        fn, (x,) = function(engine, ("i00_a", (1, 32, 1, 32)))
        try:
            engine.compile(print_module(result(fn, ops.mul(x, 1 + n / 1024))))
        except AnertError as error:
            return Outcome(done >= 100, f"{done} ({error})", {"compile_budget": min(100, done * 5 // 6)})
        done += 1
    return Outcome(True, f"at least {done}", {})


BASIC = "basic"


@probe(BASIC, "whether the engine compiles, runs and computes at all, and sees new weights without a compile")
def basic(engine: Backend) -> Outcome:
    w, x = data(64, 64, seed=1, scale=0.2), data(1, 64, 1, 64, seed=2)
    fn, (a, b) = function(engine, ("i00_w", (1, 64, 1, 64)), ("i01_x", (1, 64, 1, 64)))
    y = ops.matmul(ops.reshape(a, shape=(1, 1, 64, 64)), ops.reshape(b, shape=(1, 1, 64, 64)))
    result(fn, ops.reshape(y, shape=(1, 64, 1, 64)))
    for weights in (w, -3 * w):
        fault = works(engine, fn, {"i00_w": weights.reshape(1, 64, 1, 64), "i01_x": x},
                      (weights @ x.reshape(64, 64)).reshape(1, 64, 1, 64))  # fmt: skip
        if fault:
            return Outcome(False, fault)
    return Outcome(True, f"computes; {engine.compiles} compile for two sets of weights")


# ---- the child


def in_child(name: str, backend: str = "ane", opset: str = "ios18", limit_s: float = TIME_LIMIT_S) -> dict[str, Any]:
    """The Outcome of one probe as a dictionary, run in a process of its own on `backend` in the dialect of `opset`; a
    crash or a hang is an outcome too."""
    command = [sys.executable, "-c", "from anert.probes import child; child()", name, backend, opset]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return asdict(Outcome(None, f"no answer within {limit_s:.0f} s"))
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return asdict(Outcome(None, f"the probe's process ended with {how}: {last}"))


def basic_probe() -> tuple[Capabilities | None, str]:
    """(what this machine's Neural Engine takes, ""), or (None, why it cannot be relied on).

    Doctor's record says so, or else a child process compiles, runs and checks a small program now: then the safe
    capabilities, in the first dialect that passes.
    """
    record = load_record()
    if record is not None:
        return record, ""
    faults = []
    for opset in ("ios18", "ios16"):
        outcome = in_child(BASIC, opset=opset)
        if outcome["ok"]:
            return replace(ANE, opset=opset), ""
        faults.append(str(outcome["value"]))
    return None, faults[0]


def child(argv: Sequence[str] | None = None) -> None:
    """What `in_child` runs: one JSON line on stdout."""
    name, backend, opset = argv if argv is not None else sys.argv[1:4]
    if name not in PROBES:
        raise InputError(f"no probe is called {name!r}: {', '.join(PROBES)}")
    try:
        outcome = PROBES[name].run(open_engine(backend, opset))
    except AnertError as error:
        outcome = Outcome(None, f"{type(error).__name__}: {error}")
    sys.stdout.write(json.dumps(asdict(outcome)) + "\n")


def open_engine(backend: str, opset: str) -> Backend:
    """A backend to probe: `ane`, or `reference`, which shows what an engine without limits answers."""
    if backend == "ane":
        from anert.backend.ane import AneBackend

        return AneBackend(replace(ANE, opset=opset), fallback=False)
    from anert.backend.reference import ReferenceBackend
    from anert.surface import Heap

    engine = ReferenceBackend(Heap(), "fp16")
    engine.capabilities = replace(engine.capabilities, opset=opset)
    return engine
