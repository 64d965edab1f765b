"""Arithmetic on elements: two operands that broadcast, or one. Activations are in activation.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from anert.mil.graph import Op, TensorType, Value
from anert.mil.ops.build import (
    ARITHMETIC,
    FLOAT,
    HOST,
    Attrs,
    BinaryOp,
    Tensorlike,
    UnaryOp,
    broadcast,
    differentiable,
    one,
    one_dtype,
    operands,
    tensor,
    times,
    unbroadcast,
)
from anert.mil.ops.core import greater, greater_equal, less_equal, logical_and, select
from anert.mil.ops.table import Arg, OpDef, Types, define

Slopes = Callable[[Value, Value, Value, Value], tuple[Value | None, Value | None]]
"""(x, y, out, dout) -> the gradients of x and y before their broadcasts are undone."""


# Two operands


def _truncated(f: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`f` whose integer operands give an integer result, by float64 and truncation."""

    def g(*args: np.ndarray) -> np.ndarray:
        if args[0].dtype.kind == "f":
            return f(*args)
        with np.errstate(all="ignore"):
            return f(*(a.astype(np.float64) for a in args)).astype(args[0].dtype)

    return g


def _binary(
    kind: str,
    numpy: Callable[..., np.ndarray],
    slopes: Slopes | None,
    doc: str,
    domain: tuple[str, ...] = ARITHMETIC,
) -> BinaryOp:
    """Define a broadcasting op of two operands of one dtype."""

    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        dtype = one_dtype(kind, types, ("x", "y"), domain)
        return [tensor(kind, dtype, broadcast(kind, types["x"].shape, types["y"].shape))]

    def grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
        x, y, dout = op.inputs["x"], op.inputs["y"], douts[0]
        assert slopes is not None and dout is not None and isinstance(x, Value) and isinstance(y, Value)
        if not (differentiable(x) or differentiable(y)):
            return {"x": None, "y": None}
        dx, dy = slopes(x, y, op.out, dout)
        return {
            k: unbroadcast(g, v.shape) if g is not None and differentiable(v) else None
            for k, v, g in (("x", x, dx), ("y", y, dy))
        }

    def traced(x: Tensorlike, y: Tensorlike, *, name: str | None = None) -> Value:
        return one(kind, operands(kind, x=x, y=y), name=name)

    define(OpDef(kind, (Arg("x"), Arg("y")), infer, lambda i, a: numpy(i["x"], i["y"]), grad if slopes else None))
    traced.__name__, traced.__doc__ = kind, doc
    return traced


def _larger(x: Value, y: Value, out: Value, dout: Value) -> tuple[Value, Value]:
    """Gradients of maximum; a tie goes to x."""
    cond = greater_equal(x, y)
    return select(cond, dout, 0.0), select(cond, 0.0, dout)


def _smaller(x: Value, y: Value, out: Value, dout: Value) -> tuple[Value, Value]:
    """Gradients of minimum; a tie goes to x."""
    cond = less_equal(x, y)
    return select(cond, dout, 0.0), select(cond, 0.0, dout)


def _quotients(x: Value, y: Value, out: Value, dout: Value) -> tuple[Value, Value]:
    return dout / y, -(dout * out) / y


def _rsqrt_dx(out: Value, dout: Value) -> Value:
    """dout * -out^3 / 2, one factor after the other.

    out^3 alone passes fp16's 65504 from out = 40 on, as for the rms of a fresh embedding."""
    return times(times(times(dout, out), out), out) * -0.5


def _power_slope(x: Value, c: float, out: Value) -> Value | float:
    """d(x**c)/dx without log or pole: from the output where that is cheaper than another power."""
    if c == 1.0:
        return 1.0
    if c == 2.0:
        return x * 2.0
    if c == 0.5:
        return 0.5 / out
    if c == -1.0:
        return -(out * out)
    return pow(x, c - 1.0) * c


def _powers(x: Value, y: Value, out: Value, dout: Value) -> tuple[Value | None, Value | None]:
    if y.const is not None and y.const.size == 1:
        c = float(y.const.reshape(()))
        if c == -0.5:
            return _rsqrt_dx(out, dout), None
        return (times(dout, _power_slope(x, c, out)) if c else None), None
    dx = times(dout, y * pow(x, y - 1.0)) if differentiable(x) else None
    if not differentiable(y):
        return dx, None
    return dx, times(dout, select(greater(x, 0.0), out * log(x), 0.0))  # 0 ** y is flat in y


add = _binary("add", np.add, lambda x, y, out, dout: (dout, dout), "x + y.")
sub = _binary("sub", np.subtract, lambda x, y, out, dout: (dout, -dout if differentiable(y) else None), "x - y.")
mul = _binary(
    "mul",
    np.multiply,
    lambda x, y, out, dout: (
        times(dout, y) if differentiable(x) else None,
        times(dout, x) if differentiable(y) else None,
    ),
    "x * y.",
)
real_div = _binary("real_div", np.true_divide, _quotients, "x / y, of floats.", FLOAT)
maximum = _binary("maximum", np.maximum, _larger, "The larger of x and y.")
minimum = _binary("minimum", np.minimum, _smaller, "The smaller of x and y.")
pow = _binary("pow", _truncated(np.power), _powers, "x to the power y; a negative x needs an integral y.")
floor_div = _binary("floor_div", np.floor_divide, None, "x / y rounded down.")
mod = _binary("mod", np.mod, lambda x, y, out, dout: (dout, -dout * floor_div(x, y)), "x - y * floor(x / y).")


# One operand


def unary(
    kind: str,
    numpy: Callable[..., np.ndarray],
    slope: Callable[[Value, Value, Value], Value] | None,
    doc: str,
    *,
    domain: tuple[str, ...] = FLOAT,
    backends: frozenset[str] | None = None,
    decompose: Callable[[Value], Value] | None = None,
    epsilon: float | None = None,
) -> UnaryOp:
    """Define an op of one operand. `slope(x, out, dout)` is its gradient; `epsilon` is that attribute's default."""
    args = (Arg("x"),) if epsilon is None else (Arg("x"), Arg("epsilon", "attr", "fp", epsilon))

    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        return [tensor(kind, one_dtype(kind, types, ("x",), domain), types["x"].shape)]

    def evaluate(inputs: Attrs, attrs: Attrs) -> np.ndarray:
        return numpy(inputs["x"] if epsilon is None else inputs["x"] + attrs["epsilon"])

    def grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
        x, dout = op.inputs["x"], douts[0]
        assert slope is not None and dout is not None and isinstance(x, Value)
        return {"x": slope(_shifted(x, op.attrs), op.out, dout) if differentiable(x) else None}

    def simpler(inputs: Attrs, attrs: Attrs) -> Value:
        assert decompose is not None
        return decompose(_shifted(inputs["x"], attrs))

    def traced(x: Value, *, name: str | None = None) -> Value:
        return one(kind, {"x": x}, name=name)

    define(
        OpDef(
            kind,
            args,
            infer,
            evaluate,
            grad if slope else None,
            category="composite" if decompose else "elementwise",
            backends=backends or frozenset({"ane", "cpu", "reference"}),
            decompose=simpler if decompose else None,
        )
    )
    traced.__name__, traced.__doc__ = kind, doc
    return traced


def _shifted(x: Value, attrs: Attrs) -> Value:
    """x + epsilon where the op has one that is not zero."""
    epsilon = attrs.get("epsilon", 0.0)
    return x + epsilon if epsilon else x


def _clip_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    return [tensor("clip", one_dtype("clip", types, ("x",), FLOAT), types["x"].shape)]


def _clip_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, dout = op.inputs["x"], douts[0]
    assert isinstance(x, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    inside = logical_and(greater_equal(x, op.attrs["alpha"]), less_equal(x, op.attrs["beta"]))
    return {"x": select(inside, dout, 0.0)}


define(
    OpDef(
        "clip",
        (Arg("x"), Arg("alpha", "attr", "fp"), Arg("beta", "attr", "fp")),
        _clip_infer,
        lambda i, a: np.minimum(np.maximum(i["x"], a["alpha"]), a["beta"]),
        _clip_grad,
    )
)


def clip(x: Value, alpha: float, beta: float, *, name: str | None = None) -> Value:
    """x held between alpha and beta."""
    return one("clip", {"x": x}, {"alpha": alpha, "beta": beta}, name)


_erf = np.vectorize(math.erf, otypes=[np.float64])
_TWO_OVER_SQRT_PI = 2.0 / math.sqrt(math.pi)

sqrt = unary("sqrt", np.sqrt, lambda x, y, dout: times(dout, 0.5 / y), "The square root.")
exp = unary("exp", np.exp, lambda x, y, dout: times(dout, y), "e to the power x.")
exp2 = unary(
    "exp2",
    _truncated(np.exp2),
    lambda x, y, dout: times(dout, y * math.log(2.0)),
    "2 to the power x.",
    domain=ARITHMETIC,
)
sign = unary("sign", np.sign, None, "-1, 0 or 1.", domain=ARITHMETIC)
abs = unary("abs", np.abs, lambda x, y, dout: times(dout, sign(x)), "The magnitude.", domain=ARITHMETIC)
square = unary(
    "square",
    np.square,
    lambda x, y, dout: times(dout, x * 2.0),
    "x * x.",
    domain=ARITHMETIC,
    decompose=lambda x: mul(x, x),
)
floor = unary("floor", np.floor, None, "Rounded down.")
ceil = unary("ceil", np.ceil, None, "Rounded up.")
round = unary("round", np.round, None, "Rounded to the nearest integer, halves to even.")
sin: UnaryOp = unary("sin", np.sin, lambda x, y, dout: times(dout, cos(x)), "The sine of radians.")
cos: UnaryOp = unary("cos", np.cos, lambda x, y, dout: times(dout, -sin(x)), "The cosine of radians.")
erf = unary(
    "erf",
    _erf,
    lambda x, y, dout: times(dout, exp(-(x * x)) * _TWO_OVER_SQRT_PI),
    "The error function.",
    backends=HOST,
)

unary(
    "rsqrt",
    lambda x: 1.0 / np.sqrt(x),
    lambda x, y, dout: _rsqrt_dx(y, dout),
    "",
    decompose=lambda x: pow(x, -0.5),
    epsilon=1e-12,
)
unary(
    "inverse",
    lambda x: 1.0 / x,
    lambda x, y, dout: times(dout, -(y * y)),
    "",
    decompose=lambda x: 1.0 / x,
    epsilon=1e-4,
)
unary("log", np.log, lambda x, y, dout: times(dout, 1.0 / x), "", epsilon=1e-45)


def rsqrt(x: Value, epsilon: float = 1e-12, *, name: str | None = None) -> Value:
    """1 / sqrt(x + epsilon); the default epsilon is 0 in fp16."""
    return one("rsqrt", {"x": x}, {"epsilon": epsilon}, name)


def inverse(x: Value, epsilon: float = 1e-4, *, name: str | None = None) -> Value:
    """1 / (x + epsilon)."""
    return one("inverse", {"x": x}, {"epsilon": epsilon}, name)


def log(x: Value, epsilon: float = 1e-45, *, name: str | None = None) -> Value:
    """The natural logarithm of x + epsilon; the default epsilon is 0 in fp16."""
    return one("log", {"x": x}, {"epsilon": epsilon}, name)
