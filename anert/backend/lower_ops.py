"""Lowerings of elementwise ops, reductions, views and joins. A table from MIL kind to function, filled below."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from anert.backend.lower import Lowering, OpLowering, is_float, storage_of
from anert.backend.nodes import Imm, Ref, Source
from anert.errors import UnsupportedError
from anert.mil.graph import Op, Value

Formula = Callable[..., Ref]
"""(emit, x, y, ...) -> Ref, where emit(op, *sources) makes a node over the result's shape."""

UNARY = {
    "abs": "abs", "sqrt": "sqrt", "exp": "exp", "tanh": "tanh", "sigmoid": "sigmoid", "erf": "erf", "sin": "sin",
    "cos": "cos", "tan": "tan", "asin": "asin", "acos": "acos", "atan": "atan", "sinh": "sinh", "cosh": "cosh",
    "atanh": "atanh", "floor": "floor", "ceil": "ceil", "round": "round", "sign": "sign",
}  # fmt: skip

BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "real_div": "div", "maximum": "max", "minimum": "min", "mod": "mod",
    "pow": "pow",
}  # fmt: skip

COMPARE = {
    "equal": ("eq", False), "not_equal": ("ne", False), "less": ("lt", False), "less_equal": ("le", False),
    "greater": ("lt", True), "greater_equal": ("le", True),
}  # fmt: skip
"""kind -> (lane op, whether its operands are swapped)."""


def _value(op: Op, name: str) -> Value:
    v = op.inputs[name]
    assert isinstance(v, Value)
    return v


def _emit(low: Lowering, op: Op, dtype: str = "f32") -> Formula:
    return lambda kind, *sources: low.ew(kind, op.out.shape, *sources, dtype=dtype)


def _done(low: Lowering, op: Op, x: Ref) -> list[Ref]:
    return [low.rounded(x, op.out.dtype)]


def _sources(low: Lowering, op: Op, *names: str) -> list[Source]:
    """Operands; if all are immediates the first becomes a constant tensor, since a node needs no tensor but a shape."""
    return [low.source(_value(op, n)) for n in names]


# Elementwise


def _unary(kind: str) -> OpLowering:
    def lower(low: Lowering, op: Op) -> list[Ref]:
        x, e = low.source(_value(op, "x")), _emit(low, op)
        if is_float(op.out.dtype):
            return _done(low, op, e(UNARY[kind], x))
        if kind not in ("abs", "sign"):
            raise UnsupportedError(f"op {kind!r} of {op.out.dtype} ({op.out.name}) does not run on backend 'cpu'")
        i = _emit(low, op, "i32")
        if kind == "abs":
            return [i("i32_max", x, i("i32_sub", Imm(0, True), x))]
        return [i("to_i32", e("sub", e("i32_lt", Imm(0, True), x), e("i32_lt", x, Imm(0, True))))]

    return lower


def _binary(kind: str) -> OpLowering:
    def lower(low: Lowering, op: Op) -> list[Ref]:
        x, y = _sources(low, op, "x", "y")
        lane = BINARY[kind]
        if is_float(op.out.dtype):
            if kind == "pow" and isinstance(y, Imm):
                return _done(low, op, _power(low, op, x, y.value))
            return _done(low, op, low.ew(lane, op.out.shape, x, y))
        if lane in ("div", "pow"):
            return [_through_float(low, op, lane, x, y)]
        return [low.ew(f"i32_{lane}", op.out.shape, x, y, dtype="i32")]

    return lower


def _through_float(low: Lowering, op: Op, lane: str, x: Source, y: Source) -> Ref:
    """An integer op by way of fp32, truncated: exact below 2^24."""
    e, i = _emit(low, op), _emit(low, op, "i32")
    floats = [Imm(s.value) if isinstance(s, Imm) else low.ew("to_f32", s.shape, s) for s in (x, y)]
    return i("to_i32", e(lane, *floats))


def _power(low: Lowering, op: Op, x: Source, c: float) -> Ref:
    """x ** c by cheaper ops where c allows them."""
    e = _emit(low, op)
    if c == 1.0:
        return e("mov", x)
    if c == 2.0:
        return e("mul", x, x)
    if c == 3.0:
        return e("mul", e("mul", x, x), x)
    if c == 0.5:
        return e("sqrt", x)
    if c == -0.5:
        return e("rsqrt", x)
    if c == -1.0:
        return e("div", Imm(1.0), x)
    return e("pow", x, Imm(c))


def floor_div(low: Lowering, op: Op) -> list[Ref]:
    x, y = _sources(low, op, "x", "y")
    e = _emit(low, op)
    if is_float(op.out.dtype):
        return _done(low, op, e("floor", e("div", x, y)))
    return [low.ew("i32_div", op.out.shape, x, y, dtype="i32")]


def _compare(kind: str) -> OpLowering:
    lane, swapped = COMPARE[kind]

    def lower(low: Lowering, op: Op) -> list[Ref]:
        x, y = _sources(low, op, "x", "y")
        if swapped:
            x, y = y, x
        e = _emit(low, op, "u8")
        dtype = _value(op, "x").dtype
        if is_float(dtype):
            return [e(lane, x, y)]
        if lane == "ne":
            return [e("sub", Imm(1.0), low.ew("i32_eq", op.out.shape, x, y))]
        return [e(f"i32_{lane}", x, y)]

    return lower


def logical(kind: str) -> OpLowering:
    lane = {"logical_and": "min", "logical_or": "max", "logical_xor": "ne"}[kind]
    return lambda low, op: [low.ew(lane, op.out.shape, *_truths(low, op, "x", "y"), dtype="u8")]


def _truths(low: Lowering, op: Op, *names: str) -> list[Source]:
    return [Imm(s.value) if isinstance(s, Imm) else s for s in _sources(low, op, *names)]


def logical_not(low: Lowering, op: Op) -> list[Ref]:
    return [low.ew("sub", op.out.shape, Imm(1.0), *_truths(low, op, "x"), dtype="u8")]


def select(low: Lowering, op: Op) -> list[Ref]:
    cond = _truths(low, op, "cond")[0]
    a, b = _sources(low, op, "a", "b")
    if isinstance(a, Imm) and isinstance(b, Imm) and a.value != b.value:  # an instruction carries one number
        a = low.constant(np.array(a.value, np.int32 if a.bits else np.float32).reshape((1,) * len(op.out.shape)))
    if isinstance(cond, Imm):
        return _done(low, op, low.ew("mov", op.out.shape, a if cond.value else b, dtype=storage_of(op.out.dtype)))
    return _done(low, op, low.ew("select", op.out.shape, cond, a, b, dtype=storage_of(op.out.dtype)))


def _with_epsilon(low: Lowering, op: Op) -> Source:
    """x + epsilon in fp32, x itself where epsilon is below what fp32 sees."""
    x, epsilon = low.source(_value(op, "x")), float(op.attrs.get("epsilon", 0.0))
    return low.ew("add", op.out.shape, x, epsilon) if np.float32(epsilon) else x


def rsqrt(low: Lowering, op: Op) -> list[Ref]:
    return _done(low, op, low.ew("rsqrt", op.out.shape, _with_epsilon(low, op)))


def inverse(low: Lowering, op: Op) -> list[Ref]:
    return _done(low, op, low.ew("div", op.out.shape, Imm(1.0), _with_epsilon(low, op)))


def log(low: Lowering, op: Op) -> list[Ref]:
    return _done(low, op, low.ew("log", op.out.shape, _with_epsilon(low, op)))


def square(low: Lowering, op: Op) -> list[Ref]:
    x = low.source(_value(op, "x"))
    if not is_float(op.out.dtype):
        return [low.ew("i32_mul", op.out.shape, x, x, dtype="i32")]
    return _done(low, op, low.ew("mul", op.out.shape, x, x))


def exp2(low: Lowering, op: Op) -> list[Ref]:
    x = low.source(_value(op, "x"))
    if not is_float(op.out.dtype):
        return [_through_float(low, op, "pow", Imm(2, True), x)]
    return _done(low, op, low.ew("pow", op.out.shape, Imm(2.0), x))


def relu(low: Lowering, op: Op) -> list[Ref]:
    return _done(low, op, low.ew("max", op.out.shape, low.source(_value(op, "x")), 0.0))


def silu(low: Lowering, op: Op) -> list[Ref]:
    e, x = _emit(low, op), low.source(_value(op, "x"))
    return _done(low, op, e("mul", x, e("sigmoid", x)))


def softplus(low: Lowering, op: Op) -> list[Ref]:
    """max(x, 0) + log(1 + exp(-|x|))."""
    e, x = _emit(low, op), low.source(_value(op, "x"))
    tail = e("log", e("add", e("exp", e("mul", e("abs", x), -1.0)), 1.0))
    return _done(low, op, e("add", e("max", x, 0.0), tail))


def leaky_relu(low: Lowering, op: Op) -> list[Ref]:
    e, x = _emit(low, op), low.source(_value(op, "x"))
    return _done(low, op, e("select", e("le", Imm(0.0), x), x, e("mul", x, float(op.attrs["alpha"]))))


def clip(low: Lowering, op: Op) -> list[Ref]:
    e, x = _emit(low, op), low.source(_value(op, "x"))
    return _done(low, op, e("min", e("max", x, float(op.attrs["alpha"])), float(op.attrs["beta"])))


def gelu(low: Lowering, op: Op) -> list[Ref]:
    e, x, mode = _emit(low, op), low.source(_value(op, "x")), op.attrs["mode"]
    if mode == "EXACT":
        half = e("mul", x, 0.5)
        return _done(low, op, e("add", half, e("mul", half, e("erf", e("mul", x, math.sqrt(0.5))))))
    if mode == "TANH_APPROXIMATION":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        inner = e("add", x, e("mul", e("mul", e("mul", x, x), x), 0.044715))
        return _done(low, op, e("mul", x, e("sigmoid", e("mul", inner, 2.0 * math.sqrt(2.0 / math.pi)))))
    return _done(low, op, e("mul", x, e("sigmoid", e("mul", x, 1.702))))


def cast(low: Lowering, op: Op) -> list[Ref]:
    x, source, target = low.ref(op, "x"), _value(op, "x").dtype, op.out.dtype
    if is_float(source) and is_float(target):
        return [low.rounded(x, target)]
    if is_float(target):
        return _done(low, op, low.ew("mov" if source == "bool" else "to_f32", x.shape, x))
    if target == "bool":
        x = x if is_float(source) or source == "bool" else low.ew("to_f32", x.shape, x)
        return [low.ew("ne", x.shape, x, 0.0, dtype="u8")]
    if is_float(source) or source == "bool":
        return [low.ew("to_i32", x.shape, x, dtype="i32")]
    return [x]


# Reductions

FOLDS = {"reduce_sum": "sum", "reduce_max": "rmax", "reduce_min": "rmin"}


def _keep(low: Lowering, op: Op, x: Ref) -> Ref:
    return x if x.shape == op.out.shape else low.reshape(x, op.out.shape)


def _fold(kind: str) -> OpLowering:
    def lower(low: Lowering, op: Op) -> list[Ref]:
        x = low.ref(op, "x")
        if not is_float(op.out.dtype):
            total = low.reduce(FOLDS[kind], low.ew("to_f32", x.shape, x), op.attrs["axes"])
            return [_keep(low, op, low.ew("to_i32", total.shape, total, dtype="i32"))]
        return [_keep(low, op, low.rounded(low.reduce(FOLDS[kind], x, op.attrs["axes"]), op.out.dtype))]

    return lower


def _count(x: Ref, axes: tuple[int, ...]) -> float:
    return float(math.prod(x.shape[a] for a in axes))


def reduce_mean(low: Lowering, op: Op) -> list[Ref]:
    x, axes = low.ref(op, "x"), op.attrs["axes"]
    if not is_float(op.out.dtype):
        x = low.ew("to_f32", x.shape, x)
    total = low.reduce("sum", x, axes)
    mean = low.ew("div", total.shape, total, _count(x, axes))
    if not is_float(op.out.dtype):
        return [_keep(low, op, low.ew("to_i32", mean.shape, mean, dtype="i32"))]
    return [_keep(low, op, low.rounded(mean, op.out.dtype))]


def reduce_sum_square(low: Lowering, op: Op) -> list[Ref]:
    x = low.ref(op, "x")
    if not is_float(op.out.dtype):
        x = low.ew("to_f32", x.shape, x)
    total = low.reduce("sum", low.ew("mul", x.shape, x, x), op.attrs["axes"])
    if not is_float(op.out.dtype):
        return [_keep(low, op, low.ew("to_i32", total.shape, total, dtype="i32"))]
    return [_keep(low, op, low.rounded(total, op.out.dtype))]


def softmax(low: Lowering, op: Op) -> list[Ref]:
    x, axis = low.ref(op, "x"), (op.attrs["axis"],)
    return _done(low, op, softmax_of(low, x, axis))


def softmax_of(low: Lowering, x: Ref, axis: tuple[int, ...]) -> Ref:
    top = low.reduce("rmax", x, axis)
    e = low.ew("exp", x.shape, low.ew("sub", x.shape, x, top))
    total = low.reduce("sum", e, axis)
    return low.ew("mul", x.shape, e, low.ew("div", total.shape, Imm(1.0), total))


def layer_norm(low: Lowering, op: Op) -> list[Ref]:
    x, axes = low.ref(op, "x"), tuple(op.attrs["axes"])
    n = _count(x, axes)
    total = low.reduce("sum", x, axes)
    centred = low.ew("sub", x.shape, x, low.ew("div", total.shape, total, n))
    squares = low.reduce("sum", low.ew("mul", x.shape, centred, centred), axes)
    variance = low.ew("add", squares.shape, low.ew("div", squares.shape, squares, n), float(op.attrs["epsilon"]))
    y = low.ew("mul", x.shape, centred, low.ew("rsqrt", variance.shape, variance))
    kept = tuple(d if i in axes else 1 for i, d in enumerate(x.shape))
    for name, lane in (("gamma", "mul"), ("beta", "add")):
        if name in op.inputs:
            y = low.ew(lane, x.shape, y, low.reshape(low.ref(op, name), kept))
    return _done(low, op, y)


# Views


def const(low: Lowering, op: Op) -> list[Ref]:
    return [low.constant(op.attrs["val"])]


def identity(low: Lowering, op: Op) -> list[Ref]:
    return [low.ref(op, "x")]


def shaped(low: Lowering, op: Op) -> list[Ref]:
    """reshape, expand_dims, squeeze: inference has worked the new shape out."""
    return [low.reshape(low.ref(op, "x"), op.out.shape)]


def transpose(low: Lowering, op: Op) -> list[Ref]:
    return [low.ref(op, "x").must("transpose", tuple(op.attrs["perm"]))]


TABLE: dict[str, OpLowering] = {
    **{k: _unary(k) for k in UNARY},
    **{k: _binary(k) for k in BINARY},
    **{k: _compare(k) for k in COMPARE},
    **{k: logical(k) for k in ("logical_and", "logical_or", "logical_xor")},
    **{k: _fold(k) for k in FOLDS},
    **dict.fromkeys(("reshape", "expand_dims", "squeeze", "flatten2d"), shaped),
    "floor_div": floor_div, "logical_not": logical_not, "select": select, "rsqrt": rsqrt, "inverse": inverse,
    "log": log, "square": square, "exp2": exp2, "relu": relu, "silu": silu, "softplus": softplus, "leaky_relu":
    leaky_relu, "clip": clip, "gelu": gelu, "cast": cast, "reduce_mean": reduce_mean, "reduce_sum_square":
    reduce_sum_square, "softmax": softmax, "layer_norm": layer_norm, "const": const, "identity": identity,
    "transpose": transpose, }  # fmt: skip
