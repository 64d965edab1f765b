"""Fused plans against plans where every op is a step of its own: the same numbers, whatever was fused, on one thread or
two."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
from cpu_run import run_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mil_graphs import evaluate, widen

from anert import nn
from anert.backend import planner
from anert.backend.cpu import PRECISIONS, CpuBackend
from anert.ffi import Pool
from anert.mil import ops
from anert.mil.graph import Function, Value
from anert.mil.ops.table import lookup

CHANNELS = (1, 3, 8, 32, 48, 70)
POSITIONS = (1, 5, 32, 33, 64, 100, 130)
UNARY = (
    ops.tanh, ops.sigmoid, nn.silu, nn.gelu, ops.relu, ops.erf, ops.abs, lambda x: x * 0.5 + 0.25,
    lambda x: ops.exp(ops.minimum(x, 1.0)), lambda x: ops.sqrt(ops.square(x) + 1.0), lambda x: ops.clip(x, -1.5, 1.5),
)  # fmt: skip
MOST = 6
"""Layers of a graph."""
BINARY = (ops.add, ops.sub, ops.mul, ops.maximum, ops.minimum, lambda a, b: ops.real_div(a, ops.abs(b) + 1.0))


class Graph:
    """A function that grows by drawn layers over values (channels, positions) of moderate size."""

    def __init__(self, draw: Any, dtype: str) -> None:
        self.draw, self.dtype = draw, dtype
        self.function = Function("main")
        self.arrays: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(draw(st.integers(0, 2**31)))
        self.values = [self.input("x", (draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(POSITIONS))))]

    def input(self, name: str, shape: tuple[int, ...], scale: float = 1.0) -> Value:
        name = f"i{len(self.function.inputs):02}_{name}"
        array = scale * self.rng.standard_normal(shape)
        self.arrays[name] = array.astype(np.float16 if self.dtype == "fp16" else np.float32)
        return self.function.input(name, shape, self.dtype)

    def pick(self) -> Value:
        """A value made so far, a recent one rather."""
        return self.values[-1 - min(len(self.values) - 1, self.draw(st.integers(0, 3)))]

    def like(self, x: Value) -> Value:
        """Something to combine with x: a value of its shape or a new input of it, or one that broadcasts to it."""
        c, n = x.shape
        same = [v for v in self.values if v.shape == x.shape]
        kind = self.draw(st.sampled_from(("value", "value", "input", "gain", "row")))
        if kind == "value":
            return self.draw(st.sampled_from(same))
        return self.input(kind, {"input": (c, n), "gain": (c, 1), "row": (1, n)}[kind])

    # ---- layers: Value (c, n) -> Value (c', n')

    def unary(self, x: Value) -> Value:
        return self.draw(st.sampled_from(UNARY))(x)

    def binary(self, x: Value) -> Value:
        return self.draw(st.sampled_from(BINARY))(x, self.like(x))

    def reduction(self, x: Value) -> Value:
        """Folded over one axis and put back beside x."""
        axis = self.draw(st.integers(0, 1))
        fold = self.draw(st.sampled_from((ops.reduce_sum, ops.reduce_max, ops.reduce_mean, ops.reduce_min)))
        folded = fold(x, axes=(axis,), keep_dims=True)
        return ops.sub(x, ops.tanh(folded)) if self.draw(st.booleans()) else x * ops.sigmoid(folded)

    def softmax(self, x: Value) -> Value:
        return ops.softmax(x, axis=self.draw(st.sampled_from((0, 1, -1))))

    def norm(self, x: Value) -> Value:
        gain = self.input("gain", (x.shape[0], 1))
        if self.draw(st.booleans()):
            return nn.rmsnorm(x, gain)
        return nn.layernorm(x, gain, self.input("bias", (x.shape[0], 1)))

    def matmul(self, x: Value) -> Value:
        """w x, with what its result may be fused with: bias, activation, residual."""
        rows = self.draw(st.sampled_from((x.shape[0], *CHANNELS)))
        out = ops.matmul(self.input("w", (rows, x.shape[0]), x.shape[0] ** -0.5), x)
        if self.draw(st.booleans()):
            out = out + self.input("bias", (rows, 1))
        if self.draw(st.booleans()):
            out = self.unary(out)
        return out + x if rows == x.shape[0] and self.draw(st.booleans()) else out

    def attention(self, x: Value) -> Value:
        c, n = x.shape
        h = next(h for h in (4, 3, 2, 1) if c % h == 0)
        q, k, v = (nn.heads(self.like(x) * x if i else x, h) for i in range(3))
        scores = ops.matmul(q, k, transpose_x=True) * (c // h) ** -0.5
        if self.draw(st.booleans()):
            scores = scores + self.function.const(np.triu(np.full((n, n), nn.MASKED), 1), self.dtype, "mask")
        return nn.merge(ops.matmul(v, ops.softmax(scores, axis=-1), transpose_y=True))

    def view(self, x: Value) -> Value:
        c, n = x.shape
        kind = self.draw(st.sampled_from(("transpose", "reshape", "slice", "concat", "split")))
        if kind == "transpose":
            return ops.transpose(x, perm=(1, 0))
        if kind == "reshape":
            h = next(h for h in (4, 3, 2, 1) if c % h == 0)
            return ops.reshape(ops.transpose(nn.heads(x, h), perm=(1, 0, 2)), shape=(c, n))
        if kind == "slice":
            return x[c // 2 :, n // 3 :]
        if kind == "concat":
            return ops.concat((x, self.like(x) + x), axis=self.draw(st.integers(0, 1)))
        first, second = ops.split(ops.concat((x, x), axis=0), num_splits=2, axis=0)
        return first * second

    def extreme(self, x: Value) -> Value:
        fold = self.draw(st.sampled_from((ops.reduce_max, ops.reduce_min)))
        return ops.sub(x, fold(x, axes=(self.draw(st.integers(0, 1)),), keep_dims=True))

    EXACT = (unary, unary, binary, binary, extreme, matmul, matmul, view)
    SUMMED = (reduction, softmax, norm, attention)

    def grow(self, layers: int, kinds: tuple[Any, ...]) -> Function:
        for i in range(layers):
            layer = kinds[-1] if i == 0 and self.draw(st.booleans()) else self.draw(st.sampled_from(kinds))
            self.values.append(layer(self, self.pick()))
        made = [v for v in self.values if v.op is not None]
        more = self.draw(st.lists(st.sampled_from(made), max_size=2, unique=True))
        return self.function.returns(*dict.fromkeys((made[-1], *more)))


@st.composite
def graphs(draw: Any, kinds: tuple[Any, ...]) -> tuple[Function, dict[str, np.ndarray]]:
    graph = Graph(draw, draw(st.sampled_from(("fp16", "fp32"))))
    return graph.grow(draw(st.integers(1, MOST)), kinds), graph.arrays


class Compared:
    """A backend for each of fused or not, one thread or two."""

    def __init__(self, precision: str) -> None:
        self.backends = {
            (fuse, threads): CpuBackend(Pool(threads), precision, fuse=fuse)
            for fuse in (True, False)
            for threads in (1, 2)
        }
        self.steps = {True: 0, False: 0}
        self.patterns: Counter[str] = Counter()

    def run(self, function: Function, arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], ...]:
        """(outputs fused, outputs not fused), after a look at whether two threads have the bits of one."""
        found = {}
        for (fuse, threads), backend in self.backends.items():
            program = backend.compile_function(function)
            self.steps[fuse] += program.stats.steps
            self.patterns.update(program.stats.patterns if fuse else {})
            found[fuse, threads] = run_program(backend, program, arrays)
        for fuse in (True, False):
            for name, one in found[fuse, 1].items():
                assert one.tobytes() == found[fuse, 2][name].tobytes(), f"{name}: 1 and 2 threads, fuse={fuse}"
        return found[True, 1], found[False, 1]

    def close(self) -> None:
        assert self.steps[True] < 0.7 * self.steps[False], "hardly anything was fused: hardly anything was compared"


def largest(function: Function, arrays: dict[str, np.ndarray]) -> float:
    """The largest magnitude on the way, by the ops' definitions; masks and masked scores apart."""
    known = {v: widen(arrays[v.name]) for v in function.inputs}
    for op in function.ops:
        given = {k: tuple(known[x] for x in v) if isinstance(v, tuple) else known[v] for k, v in op.inputs.items()}
        known.update(zip(op.outputs, lookup(op.kind).evaluate(given, op.attrs), strict=True))
    return max(float(np.abs(a).max(where=a > nn.MASKED / 2, initial=1.0)) for a in known.values())


EXAMPLES = int(os.environ.get("ANERT_TEST_GRAPHS", "60"))
QUIETLY = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_where_nothing_is_summed_fusion_changes_no_bit(precision: str) -> None:
    """Interiors are fp32 in a register as in memory, and a product's sums have the order of its shape alone."""
    compared = Compared(precision)

    @settings(max_examples=EXAMPLES, **QUIETLY)
    @given(graphs(Graph.EXACT))
    def check(case: tuple[Function, dict[str, np.ndarray]]) -> None:
        fused, apart = compared.run(*case)
        for name, a in fused.items():
            assert a.tobytes() == apart[name].tobytes(), f"{name}: {np.abs(a - apart[name]).max()}"

    check()
    compared.close()


UNITS = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""Half a unit in the last place of what is rounded: in bf16 the operands of products."""
FEW = 16


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sums_differ_by_their_order_alone(precision: str) -> None:
    """Sums over an axis are added in the order that the tile's layout asks for, which fusion may change."""
    compared = Compared(precision)

    @settings(max_examples=EXAMPLES, **QUIETLY)
    @given(graphs(Graph.EXACT + 2 * Graph.SUMMED))
    def check(case: tuple[Function, dict[str, np.ndarray]]) -> None:
        function, arrays = case
        fused, apart = compared.run(function, arrays)
        for v in function.outputs:
            a, b = (found[v.name].astype(np.float64) for found in (fused, apart))
            unit = max(UNITS[precision], 2.0**-11 if v.dtype == "fp16" else 0.0)
            off = np.abs(a - b).max() / (unit * largest(function, arrays))
            assert np.isfinite(b).all() and off <= FEW, f"{v.name}: {off:.1f} units"

    check()
    compared.close()
    assert compared.patterns["attention"] >= EXAMPLES // 4


@pytest.mark.parametrize("positions", [1, 33, 65, 2049])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_chunk_of_one_lane_keeps_its_columns(positions: int, dtype: str) -> None:
    """The last chunk of a row is one wide: a gain's rows are then as far apart as those of what it multiplies."""
    graph = Function("main")
    shapes = {"i00_x": (5, positions), "i01_gain": (5, 1), "i02_bias": (5, 1)}
    x, gain, bias = (graph.input(name, shape, dtype) for name, shape in shapes.items())
    graph.returns(x * gain + bias, nn.layernorm(x, gain, bias))
    rng = np.random.default_rng(positions)
    arrays = {n: rng.standard_normal(s).astype("f2" if dtype == "fp16" else "f4") for n, s in shapes.items()}
    backend = CpuBackend(Pool(1))
    found = run_program(backend, backend.compile_function(graph), arrays)
    for v, wanted in zip(graph.outputs, evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(found[v.name], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fuse", [True, False])
def test_values_kept_in_bf16_change_no_bit(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What contractions alone read is rounded once, whether where it is written or where it is read."""
    backend, saved = CpuBackend(Pool(2), "bf16", fuse=fuse), []

    @settings(max_examples=EXAMPLES, **QUIETLY)
    @given(graphs(Graph.EXACT + Graph.SUMMED))
    def check(case: tuple[Function, dict[str, np.ndarray]]) -> None:
        function, arrays = case
        narrow = backend.compile_function(function)
        with monkeypatch.context() as patch:
            patch.setattr(planner, "narrow", lambda units: None)
            wide = backend.compile_function(function)
        saved.append(wide.stats.arena_bytes - narrow.stats.arena_bytes)
        a, b = (run_program(backend, program, arrays) for program in (narrow, wide))
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), f"{name}: {np.abs(a[name] - b[name]).max()}"

    check()
    assert any(s > 0 for s in saved) and min(saved) >= 0, saved


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_returned_is_read_as_it_is_returned(precision: str) -> None:
    """In bf16 and fp16: a contraction's result by everybody, an elementwise one by contractions. In fp32 interiors stay
    as exact as they are."""
    rng, backend = np.random.default_rng(3), CpuBackend(Pool(2), precision)
    arrays = {"i00_x": rng.standard_normal((48, 33)), "i01_w": rng.standard_normal((40, 48))}
    arrays = {name: a.astype(np.float16) for name, a in arrays.items()}

    def inputs(function: Function, *names: str) -> list[Value]:
        return [function.input(name, arrays[name].shape, "fp16") for name in names]

    def run(function: Function) -> list[np.ndarray]:
        found = run_program(backend, backend.compile_function(function), arrays)
        return [found[v.name] for v in function.outputs]

    graph = Function("main")
    x, w = inputs(graph, "i00_x", "i01_w")
    bent, h = ops.tanh(x), ops.matmul(w, x)
    bent_seen, h_seen, product, scaled = run(graph.returns(bent, h, ops.matmul(w, bent), h * 1.7))
    arrays |= {"i02_bent": bent_seen, "i03_h": h_seen}
    graph = Function("main")
    w, bent, h = inputs(graph, "i01_w", "i02_bent", "i03_h")
    for got, wanted in zip((product, scaled), run(graph.returns(ops.matmul(w, bent), h * 1.7)), strict=True):
        assert (got.tobytes() == wanted.tobytes()) == (precision != "fp32"), np.abs(got - wanted).max()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_of_queries_add_up_in_fp32(precision: str) -> None:
    """dv = dout P sums over all queries, a block of them at a time, though it is returned in fp16 or read by a product
    alone."""
    graph, rng, (h, d, n) = Function("main"), np.random.default_rng(4), (2, 16, 256)
    names = ("i00_q", "i01_k", "i02_v", "i03_dout", "i04_u")
    arrays = {name: rng.standard_normal((h, d, n)).astype(np.float16) for name in names}
    q, k, v, dout, u = (graph.input(name, (h, d, n), "fp16") for name in names)
    p = ops.softmax(ops.matmul(q, k, transpose_x=True) * d**-0.5, axis=-1)
    du = ops.matmul(ops.matmul(u, p), v, transpose_y=True)
    graph.returns(ops.matmul(v, p, transpose_y=True), ops.matmul(dout, p), du)
    fused, apart = (CpuBackend(Pool(2), precision, fuse=fuse) for fuse in (True, False))
    program = fused.compile_function(graph)
    assert program.stats.patterns["attention_backward"] == 1
    found, wanted = run_program(fused, program, arrays), run_program(apart, apart.compile_function(graph), arrays)
    for out, least in zip(graph.outputs[1:], (0.98, 0.6), strict=True):
        same = np.mean(found[out.name] == wanted[out.name])
        assert same > least, f"{out.name}: {same}"
