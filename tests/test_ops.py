"""The op table: results against PyTorch and NumPy, inferred types, decompositions, operators, and what is refused."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import CASES, Case, feed, op_cases, trace

from anert.backend.reference import evaluate
from anert.errors import ShapeError, UnsupportedError
from anert.mil import ops
from anert.mil.graph import DTYPES, Function, Op, Value
from anert.mil.ops import TABLE
from anert.mil.ops.table import types_of

KINDS = sorted(TABLE)
COMPOSITES = sorted(k for k, row in TABLE.items() if row.category == "composite")


def on_cases(kind: str, test: Callable[[Case], None], examples: int = 30, largest: int = 33) -> None:
    """Run `test` on random cases of `kind`."""
    run = given(op_cases(kind, largest))(test)
    settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(run)()


def floats(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Operands as the NumPy definitions take them: floats in float64."""

    def one(a: Any) -> Any:
        return tuple(map(one, a)) if isinstance(a, tuple) else a.astype(np.float64) if a.dtype.kind == "f" else a

    return {k: one(v) for k, v in inputs.items()}


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * max(1.0, float(np.max(np.abs(b), initial=0.0))))


# The table itself


def test_every_row_has_cases_and_a_traced_function() -> None:
    assert set(CASES) == set(TABLE)
    assert all(callable(getattr(ops, kind)) and getattr(ops, kind).__doc__ for kind in TABLE)
    assert set(TABLE) < set(ops.__all__)


def test_rows_are_complete() -> None:
    for row in TABLE.values():
        assert row.category in {"elementwise", "reduce", "view", "contract", "composite", "const", "other"}
        assert (row.decompose is not None) == (row.category == "composite"), row.kind
        assert row.backends <= {"ane", "cpu", "reference"} and {"cpu", "reference"} <= row.backends
    for kind in ("pad", "erf", "scatter", "scatter_along_axis", "conv_transpose", "tile"):
        assert "ane" not in TABLE[kind].backends


@pytest.mark.parametrize("kind", KINDS)
def test_inferred_types_are_those_of_the_results(kind: str) -> None:
    def test(case: Case) -> None:
        f = trace(kind, case)
        results = TABLE[kind].evaluate(floats(case.inputs), f.ops[-1].attrs)
        assert len(results) == len(f.outputs)
        for a, v in zip(results, f.outputs, strict=True):
            wanted = np.dtype(np.float64) if v.dtype in ("fp16", "fp32") else DTYPES[v.dtype]
            assert (a.shape, a.dtype) == (v.shape, wanted)

    on_cases(kind, test)


@pytest.mark.parametrize("kind", KINDS)
def test_emitting_resolved_attributes_changes_nothing(kind: str) -> None:
    def test(case: Case) -> None:
        f = trace(kind, case)
        again = trace(kind, Case(case.inputs, f.ops[-1].attrs))
        assert f == again

    on_cases(kind, test, 15)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_pytorch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from torch_ops import TORCH, call

    assert set(TORCH) == set(TABLE)

    def tensor(a: Any) -> Any:
        return tuple(map(tensor, a)) if isinstance(a, tuple) else torch.from_numpy(np.array(a))

    def test(case: Case) -> None:
        inputs = floats(case.inputs)
        f = trace(kind, case, "fp32")
        results = TABLE[kind].evaluate(inputs, f.ops[-1].attrs)
        attrs = {k: f.ops[-1].attrs[k] if isinstance(v, float) else v for k, v in case.attrs.items()}  # fp32's epsilon
        expected = call(kind, {k: tensor(v) for k, v in inputs.items()}, attrs)
        assert len(results) == len(expected)
        for a, b in zip(results, expected, strict=True):
            assert a.shape == tuple(b.shape)
            close(a, b.double().numpy())

    on_cases(kind, test)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_decompositions_equal_their_definitions(kind: str) -> None:
    def test(case: Case) -> None:
        f = trace(kind, case, "fp32")
        row = TABLE[kind]
        assert row.decompose is not None
        value = row.decompose(f.ops[-1].inputs, f.ops[-1].attrs)
        assert (value.shape, value.dtype) == (f.outputs[0].shape, f.outputs[0].dtype)
        kept = {v.op.kind for v in (value, f.outputs[0]) if v.op is not None}
        assert len(kept) == 2, "a decomposition must not end in the op itself"
        f.returns(f.outputs[0], value)
        whole, parts = evaluate(f, feed(case), "float64").values()
        np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)  # constants are fp32

    on_cases(kind, test)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_decompositions_end_in_ops_that_the_engine_takes(kind: str) -> None:
    def test(case: Case) -> None:
        f = trace(kind, case)
        row, first = TABLE[kind], len(f.ops)
        assert row.decompose is not None
        row.decompose(f.ops[-1].inputs, f.ops[-1].attrs)
        for op in f.ops[first:]:
            below = TABLE[op.kind]
            exact_gelu = kind == "gelu" and case.attrs["mode"] == "EXACT" and op.kind == "erf"  # native there
            assert "ane" in below.backends or exact_gelu, (kind, op.kind)
            assert below.category != "composite" or "ane" in below.native, (kind, op.kind)

    on_cases(kind, test, 10)


@pytest.mark.parametrize("kind", ["matmul", "linear", "conv", "conv_transpose", "scaled_dot_product_attention"])
def test_flops_count_multiply_adds(kind: str) -> None:
    """Of ones, a contraction's results add up to its products; attention costs what its matmuls cost."""

    def test(case: Case) -> None:
        f = trace(kind, case)
        row, op = TABLE[kind], f.ops[-1]
        found = flops(op)
        if row.decompose is not None:
            first = len(f.ops)
            row.decompose(op.inputs, op.attrs)
            assert found == sum(flops(o) for o in f.ops[first:])
        elif case.attrs.get("pad_type", "valid") == "valid":  # padding and cropping count products that are not there
            ones = {k: np.ones_like(v, np.float64) for k, v in case.inputs.items() if k != "bias"}
            assert found == 2 * int(row.evaluate(ones, op.attrs)[0].sum())

    on_cases(kind, test, 40)


def flops(op: Op) -> int:
    row = TABLE[op.kind]
    return row.flops(types_of(op.inputs), op.attrs, [v.type for v in op.outputs]) if row.flops is not None else 0


# Tracing


def source(shape: tuple[int, ...] = (2, 3), dtype: str = "fp16") -> Value:
    return Function().input("x", shape, dtype)


def result(v: Value, **inputs: Any) -> np.ndarray:
    return evaluate(v.function.returns(v), inputs, "float64")[v.name]


def test_operators_are_arithmetic() -> None:
    x = source()
    y = -((2.0 - (x + 1) * 3 / 2) ** 2) + 1.0 / (x * x + 0.5)
    a = np.arange(6.0).reshape(2, 3)
    close(result(y, x=a), -((2.0 - (a + 1) * 3 / 2) ** 2) + 1.0 / (a * a + 0.5))


def test_arrays_stand_on_either_side() -> None:
    x, w = source(), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    y = (x @ w + w[0]).transpose(1, 0)
    z = w @ x - w[:, :1] * np.ones((1, 3))
    a = np.arange(6.0).reshape(2, 3)
    close(result(y, x=a), (a @ w + w[0]).T)
    close(result(z, x=a), w @ a - w[:, :1])


def test_comparison_stays_identity() -> None:
    x, y = source(), source()
    assert (x == x) is True and (x == y) is False and len({x, y}) == 2
    with pytest.raises(TypeError):
        iter(x)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_indexing_is_numpy_s(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * data.draw(st.integers(1, 3))))
    a = np.arange(float(np.prod(shape))).reshape(shape)
    items: list[Any] = []
    for d in shape[: data.draw(st.integers(0, len(shape)))]:
        start, stop = sorted((data.draw(st.integers(0, d - 1)), data.draw(st.integers(0, d - 1))))
        slices = [slice(start, stop + 1), slice(None), slice(None, None, -1), slice(start, None, 2)]
        items.append(data.draw(st.sampled_from([start, start - d, *slices])))
    if len(items) < len(shape) and data.draw(st.booleans()):
        items.append(...)
    index = tuple(items) if len(items) != 1 else items[0]
    close(result(source(shape)[index], x=a), a[index])


def test_scalar_constants_are_shared_and_arrays_are_not() -> None:
    x = source()
    y = x * 2.0 + 2.0
    assert sum(op.kind == "const" for op in y.function.ops) == 1
    assert -0.0 * x + 0.0 is not None and sum(op.kind == "const" for op in y.function.ops) == 3


def test_multiple_outputs_are_a_tuple() -> None:
    parts = ops.split(source((6, 2)), 3)
    assert [p.shape for p in parts] == [(2, 2)] * 3


def test_attributes_hold_what_the_dtype_holds() -> None:
    half, single = ops.rsqrt(source(), 1e-5), ops.rsqrt(source(dtype="fp32"), 1e-5)
    assert half.op is not None and half.op.attrs["epsilon"] == float(np.float16(1e-5))
    assert single.op is not None and single.op.attrs["epsilon"] == float(np.float32(1e-5))


def test_gradients_broadcast_without_long_constants() -> None:
    x = source((64, 32), "fp32")
    y = ops.reduce_sum(x * x, 0, keep_dims=True)
    f = y.function.returns(y)
    dout = f.input("dout", y.shape, "fp32")
    for op in reversed([o for o in f.ops if o.kind != "const"]):
        rule = TABLE[op.kind].grad
        assert rule is not None
        dout = rule(op, (dout,))["x"]
    live, stack = set(), [dout]
    while stack:
        v = stack.pop()
        if v.op is not None and v not in live:
            live.add(v)
            stack.extend(v.op.operands())
    assert all(v.type.size < 2048 or not v.is_const for v in live)
    assert not any(v.is_const and v.type.size > 1 for v in live), "the product broadcasts by itself"


# What is refused

f16, f32, i32, b8 = "fp16", "fp32", "int32", "bool"
Shape = tuple[int, ...]

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    # kind, operands as (shape, dtype), attributes, words of the message
    ("add", {"x": ((2, 3), f16), "y": ((4,), f16)}, {}, "do not broadcast"),
    ("add", {"x": ((2,), f16), "y": ((2,), f32)}, {}, "one dtype"),
    ("add", {"x": ((2,), b8), "y": ((2,), b8)}, {}, "expected fp16"),
    ("add", {"x": ((0, 2), f16), "y": ((2,), f16)}, {}, "at least 1"),
    ("add", {"x": ((1 << 30, 1), f16), "y": ((1, 1 << 30), f16)}, {}, "refused"),
    ("add", {"x": ((2,), f16)}, {}, "needs the operand 'y'"),
    ("add", {"x": ((2,), f16), "y": ((2,), f16), "z": ((2,), f16)}, {}, "no argument 'z'"),
    ("real_div", {"x": ((2,), i32), "y": ((2,), i32)}, {}, "expected fp16 or fp32"),
    ("sqrt", {"x": ((2,), i32)}, {}, "cast it"),
    ("cast", {"x": ((2,), f16)}, {"dtype": "complex"}, "not supported"),
    ("cast", {"x": ((2,), f16)}, {"dtype": 3}, "must be string"),
    ("clip", {"x": ((2,), f16)}, {"alpha": 0.0}, "needs the argument 'beta'"),
    ("clip", {"x": ((2,), f16)}, {"alpha": 0.0, "beta": 1e6}, "does not fit fp16"),
    ("clip", {"x": ((2,), f16)}, {"alpha": "low", "beta": 1.0}, "must be fp"),
    ("gelu", {"x": ((2,), f16)}, {"mode": "FAST"}, "expected one of EXACT"),
    ("less", {"x": ((2,), f16), "y": ((3,), f16)}, {}, "do not broadcast"),
    ("logical_and", {"x": ((2,), f16), "y": ((2,), f16)}, {}, "expected bool"),
    ("logical_not", {"x": ((2,), f16)}, {}, "expected bool"),
    ("select", {"cond": ((2,), f16), "a": ((2,), f16), "b": ((2,), f16)}, {}, "expected bool"),
    ("select", {"cond": ((3,), b8), "a": ((2,), f16), "b": ((2,), f16)}, {}, "do not broadcast"),
    ("softmax", {"x": ((2, 3), f16)}, {"axis": 2}, "out of range for rank 2"),
    ("softmax", {"x": ((), f16)}, {"axis": 0}, "rank at least 1"),
    ("softmax", {"x": ((2, 3), f16)}, {"axis": True}, "must be int32"),
    ("softmax", {"x": ((2, 3), f16)}, {"axis": 1 << 31}, "fit int32"),
    ("reduce_sum", {"x": ((2, 3), f16)}, {"axes": (0, -2)}, "twice"),
    ("reduce_sum", {"x": ((2, 3), f16)}, {"axes": ()}, "empty"),
    ("reduce_sum", {"x": ((2, 0), f16)}, {"axes": 1}, "at least 1"),
    ("reduce_argmax", {"x": ((2, 3), f16)}, {"axis": -3}, "out of range"),
    ("reduce_argmax", {"x": ((2, 3), f16)}, {"output_dtype": "int8"}, "output_dtype"),
    ("layer_norm", {"x": ((2, 3), f16), "gamma": ((2,), f16)}, {"axes": 1}, "x.shape[axes] = (3,)"),
    ("layer_norm", {"x": ((2, 3), f16)}, {"axes": 5}, "out of range"),
    ("matmul", {"x": ((2, 3), f16), "y": ((2, 3), f16)}, {}, "contracts 3"),
    ("matmul", {"x": ((3,), f16), "y": ((3, 2), f16)}, {"transpose_x": True}, "cannot be transposed"),
    ("matmul", {"x": ((), f16), "y": ((3, 2), f16)}, {}, "rank at least 1"),
    ("matmul", {"x": ((4, 2, 3), f16), "y": ((5, 3, 2), f16)}, {}, "do not broadcast"),
    ("matmul", {"x": ((2, 3), f16), "y": ((3, 2), f16)}, {"transpose_x": 1}, "must be bool"),
    ("linear", {"x": ((2, 3), f16), "weight": ((4, 5), f16)}, {}, "takes 5"),
    ("linear", {"x": ((2, 3), f16), "weight": ((4, 3), f16), "bias": ((3,), f16)}, {}, "expected (4,)"),
    ("linear", {"x": ((2, 3), f16), "weight": ((3,), f16)}, {}, "expected rank 2"),
    ("conv", {"x": ((1, 4, 8), f16), "weight": ((4, 3, 1), f16)}, {}, "weight"),
    ("conv", {"x": ((1, 4), f16), "weight": ((4, 4), f16)}, {}, "rank 3 to 4"),
    ("conv", {"x": ((1, 4, 2), f16), "weight": ((4, 4, 3), f16)}, {}, "at least 1"),
    ("conv", {"x": ((1, 4, 8), f16), "weight": ((4, 4, 3), f16)}, {"strides": (0,)}, "strides"),
    ("conv", {"x": ((1, 4, 8), f16), "weight": ((4, 4, 3), f16)}, {"strides": (1, 1)}, "2 entries, expected 1"),
    ("conv", {"x": ((1, 4, 8), f16), "weight": ((4, 4, 3), f16)}, {"pad_type": "full"}, "expected one of valid"),
    ("conv", {"x": ((1, 4, 8), f16), "weight": ((4, 4, 3), f16)}, {"pad_type": "custom", "pad": (1, -1)}, "at least 0"),
    ("conv", {"x": ((1, 4, 8), f16), "weight": ((4, 4, 3), f16)}, {"groups": 0}, "groups"),
    ("conv", {"x": ((1, 4, 8), f16), "weight": ((4, 4, 3), f16), "bias": ((3,), f16)}, {}, "expected (4,)"),
    ("conv_transpose", {"x": ((1, 4, 8), f16), "weight": ((3, 4, 1), f16)}, {}, "needs weight (4"),
    (
        "conv_transpose",
        {"x": ((1, 4, 8), f16), "weight": ((4, 3, 1), f16)},
        {"output_shape": (1, 9, 8)},
        "must start with",
    ),
    (
        "scaled_dot_product_attention",
        {"query": ((1, 2, 4), f16), "key": ((1, 3, 5), f16), "value": ((1, 3, 4), f16)},
        {},
        "last axis",
    ),
    (
        "scaled_dot_product_attention",
        {"query": ((1, 2, 4), f16), "key": ((1, 3, 4), f16), "value": ((1, 2, 4), f16)},
        {},
        "differ in length",
    ),
    (
        "scaled_dot_product_attention",
        {"query": ((1, 2, 4), f16), "key": ((1, 3, 4), f16), "value": ((1, 3, 4), f16), "attn_mask": ((3, 3), f16)},
        {},
        "do not broadcast",
    ),
    ("reshape", {"x": ((2, 3), f16)}, {"shape": (4, 2)}, "6 elements"),
    ("reshape", {"x": ((2, 3), f16)}, {"shape": (-1, -1)}, "one -1"),
    ("reshape", {"x": ((2, 3), f16)}, {"shape": (0, 3, 1)}, "another rank"),
    ("reshape", {"x": ((2, 3), f16)}, {"shape": (-2, 3)}, "negative"),
    ("reshape", {"x": ((2, 3), f16)}, {"shape": (4, -1)}, "6 elements"),
    ("reshape", {"x": ((2, 3), f16)}, {"shape": (2.0, 3.0)}, "must be int32"),
    ("transpose", {"x": ((2, 3), f16)}, {"perm": (0, 0)}, "once"),
    ("transpose", {"x": ((2, 3), f16)}, {"perm": (0,)}, "1 entries, expected 2"),
    ("transpose", {"x": ((2, 3), f16)}, {"perm": (0, 2)}, "out of range"),
    ("expand_dims", {"x": ((2, 3), f16)}, {"axes": (4,)}, "out of range for rank 3"),
    ("expand_dims", {"x": ((2, 3), f16)}, {"axes": (0, 0)}, "twice"),
    ("squeeze", {"x": ((2, 1), f16)}, {"axes": (2,)}, "out of range"),
    ("slice_by_index", {"x": ((4,), f16)}, {"begin": (2,), "end": (2,)}, "at least 1"),
    ("slice_by_index", {"x": ((4,), f16)}, {"begin": (0,), "end": (4,), "stride": (0,)}, "must not be 0"),
    ("slice_by_index", {"x": ((4,), f16)}, {"begin": (0, 0), "end": (4,)}, "2 entries"),
    ("slice_by_index", {"x": ((4,), f16)}, {"begin": (4,), "end": (5,), "squeeze_mask": (True,)}, "out of range"),
    ("slice_by_size", {"x": ((4,), f16)}, {"begin": (2,), "size": (3,)}, "does not lie in it"),
    ("slice_by_size", {"x": ((4,), f16)}, {"begin": (5,), "size": (1,)}, "out of range"),
    ("slice_by_size", {"x": ((4,), f16)}, {"begin": (1,), "size": (0,)}, "does not lie in it"),
    ("concat", {"values": [((2, 3), f16), ((2, 4), f16)]}, {"axis": 0}, "must agree"),
    ("concat", {"values": [((2, 3), f16), ((3,), f16)]}, {"axis": 0}, "ranks must be equal"),
    ("concat", {"values": [((2, 3), f16), ((2, 3), f32)]}, {"axis": 0}, "one dtype"),
    ("concat", {"values": [((2, 3), f16), ((4, 3), f16)]}, {"axis": 0, "interleave": True}, "everywhere"),
    ("concat", {"values": [((2, 3), f16)]}, {"axis": 2}, "out of range"),
    ("concat", {"values": []}, {"axis": 0}, "tuple of tensors"),
    ("concat", {"values": ((2,), f16)}, {"axis": 0}, "tuple of tensors"),
    ("split", {"x": ((5,), f16)}, {"num_splits": 2, "axis": 0}, "does not divide"),
    ("split", {"x": ((5,), f16)}, {"num_splits": 0, "axis": 0}, "does not divide"),
    ("split", {"x": ((5,), f16)}, {"split_sizes": (2, 2), "axis": 0}, "add up to 5"),
    ("split", {"x": ((5,), f16)}, {"split_sizes": (5, 0), "axis": 0}, "positive"),
    ("split", {"x": ((5,), f16)}, {"axis": 0}, "needs num_splits or split_sizes"),
    ("stack", {"values": [((2,), f16), ((3,), f16)]}, {"axis": 0}, "must be equal"),
    ("stack", {"values": [((2,), f16)]}, {"axis": 3}, "out of range"),
    ("tile", {"x": ((2,), f16)}, {"reps": (0,)}, "at least 1"),
    ("tile", {"x": ((2,), f16)}, {"reps": (1, 2)}, "2 entries"),
    ("tile", {"x": ((1 << 20, 1 << 19), f16)}, {"reps": (4, 1)}, "refused"),
    ("pad", {"x": ((3,), f16)}, {"pad": (1,)}, "pairs"),
    ("pad", {"x": ((3,), f16)}, {"pad": (-1, 0)}, "not negative"),
    ("pad", {"x": ((3,), f16)}, {"pad": (3, 0), "mode": "reflect"}, "at most"),
    ("pad", {"x": ((3,), f16)}, {"pad": (1, 0), "mode": "wrap"}, "expected one of constant"),
    ("gather", {"x": ((3, 4), f16), "indices": ((2,), f16)}, {}, "expected int32"),
    ("gather", {"x": ((3, 4), f16), "indices": ((2,), i32)}, {"axis": 2}, "out of range"),
    ("gather", {"x": ((3, 4), f16), "indices": ((2,), i32)}, {"axis": 1, "batch_dims": 1}, "first 1 axes"),
    ("gather", {"x": ((3, 4), f16), "indices": ((3,), i32)}, {"axis": 0, "batch_dims": 1}, "batch_dims"),
    ("gather_along_axis", {"x": ((3, 4), f16), "indices": ((2, 3), i32)}, {"axis": 0}, "except on axis 0"),
    ("gather_along_axis", {"x": ((3, 4), f16), "indices": ((4,), i32)}, {"axis": 0}, "except on axis 0"),
    (
        "scatter",
        {"data": ((3, 4), f16), "indices": ((2,), i32), "updates": ((3, 4), f16)},
        {"axis": 0},
        "expected (2, 4)",
    ),
    (
        "scatter",
        {"data": ((3,), f16), "indices": ((2,), i32), "updates": ((2,), f16)},
        {"mode": "xor"},
        "expected one of update",
    ),
    ("scatter", {"data": ((3,), f16), "indices": ((1, 2), i32), "updates": ((1, 2), f16)}, {}, "expected rank 1"),
    (
        "scatter_along_axis",
        {"data": ((3,), f16), "indices": ((2,), i32), "updates": ((3,), f16)},
        {},
        "must be equal",
    ),
]


@pytest.mark.parametrize(("kind", "operands", "attrs", "words"), REFUSED)
def test_bad_arguments_are_shape_errors(kind: str, operands: dict[str, Any], attrs: dict[str, Any], words: str) -> None:
    f = Function()
    n = iter(range(100))

    def value(t: tuple[Shape, str]) -> Value:
        return f.input(f"i{next(n)}", *t)

    inputs = {k: tuple(map(value, v)) if isinstance(v, list) else value(v) for k, v in operands.items()}
    before = len(f.ops)
    with pytest.raises(ShapeError) as caught:
        ops.emit(kind, inputs, attrs)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(f.ops) == before, "a refused op leaves no trace"


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.sampled_from([1 << 31, -(1 << 40), 1e400, -1e5, float("nan"), "add", "same", "", object]),
    st.lists(st.integers(-4, 5), max_size=5),
    st.lists(st.one_of(st.booleans(), st.floats(), st.none()), max_size=4),
    st.just(((1, 2), (3, 4))),
)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_arguments_work_or_are_refused_in_words(kind: str) -> None:
    """One attribute or one operand's shape or dtype changed at random: never another exception than anert's own."""

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(op_cases(kind, 5), st.data())
    def test(case: Case, data: st.DataObject) -> None:
        inputs, attrs = dict(case.inputs), dict(case.attrs)
        names = [a.name for a in TABLE[kind].args if a.kind == "attr"] if kind != "const" else []
        if names and data.draw(st.booleans()):
            attrs[data.draw(st.sampled_from(names))] = data.draw(ODD)
        elif inputs:
            name = data.draw(st.sampled_from(sorted(inputs)))
            shape = data.draw(st.lists(st.integers(0, 4), max_size=5))
            odd = np.zeros(shape, data.draw(st.sampled_from([np.float16, np.float32, np.int32, np.int8, np.bool_])))
            inputs[name] = (*inputs[name][1:], odd) if isinstance(inputs[name], tuple) else odd
        try:
            f = trace(kind, Case(inputs, attrs))
        except (ShapeError, UnsupportedError) as refused:
            assert len(str(refused)) > 10 and "\n" not in str(refused)
            return
        if sum(v.type.size for v in f.outputs) > 1 << 16:
            return
        try:
            results = TABLE[kind].evaluate(floats(inputs), f.ops[-1].attrs)
        except ShapeError as refused:  # an index that the mutated axis has no place for: known only at run time
            assert "indices" in inputs and re.fullmatch(
                r"\w+: index -?\d+ is out of range for an axis of \d+", str(refused)
            )
            return
        for a, v in zip(results, f.outputs, strict=True):
            assert a.shape == v.shape

    test()


def test_every_family_refuses_something() -> None:
    assert len({kind for kind, *_ in REFUSED}) >= 30


@pytest.mark.parametrize(
    ("trace_it", "words"),
    [
        (lambda x: x * 1e6, "does not fit fp16"),
        (lambda x: ops.add(1.0, 2.0), "at least one operand that is a Value"),
        (lambda x: x @ "weights", "must be a number"),
        (lambda x: x[None], "expand_dims"),
        (lambda x: x[0, 0, 0], "too many"),
        (lambda x: x[5], "out of range"),
        (lambda x: x[..., ...], "one ellipsis"),
        (lambda x: ops.gather(x, [0.5]), "does not fit int32"),
        (lambda x: ops.add(x, source()), "another function"),
        (lambda x: ops.emit("softmax", {"x": x, "axis": x}), "compile-time constant"),
        (lambda x: ops.emit("softmax", {}, {"x": 1}), "must be a tensor"),
        (lambda x: ops.emit("const", {}, {"val": 1.0}), "pass function="),
    ],
)
def test_bad_tracing_is_a_shape_error(trace_it: Callable[[Value], Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        trace_it(source())


def test_unknown_op_is_named() -> None:
    with pytest.raises(UnsupportedError, match="einsum"):
        ops.emit("einsum", {"x": source()})


@pytest.mark.parametrize("kind", ["gather", "gather_along_axis", "scatter", "scatter_along_axis"])
def test_an_index_out_of_range_is_named(kind: str) -> None:
    f = Function()
    x, i = f.input("x", (3,)), f.input("i", (2,), "int32")
    y = getattr(ops, kind)(x, i) if kind.startswith("gather") else getattr(ops, kind)(x, i, np.ones(2))
    with pytest.raises(ShapeError, match="index 3 is out of range"):
        evaluate(f.returns(y), {"x": np.zeros(3), "i": np.array([0, 3])})


def test_scatter_gradient_of_other_modes_is_refused() -> None:
    x = source((3,))
    y = ops.scatter(x, [0], np.ones(1), mode="mul")
    rule = TABLE["scatter"].grad
    assert rule is not None and y.op is not None
    with pytest.raises(UnsupportedError, match="use add, sub or update"):
        rule(y.op, (x,))
