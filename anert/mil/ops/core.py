"""const, identity, cast, select, comparisons and logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anert.errors import ShapeError
from anert.mil.graph import DTYPES, Function, Op, TensorType, Value, mil_dtype
from anert.mil.ops.build import (
    ANY,
    ARITHMETIC,
    FLOAT,
    Arrays,
    Attrs,
    BinaryOp,
    Tensorlike,
    broadcast,
    differentiable,
    one,
    one_dtype,
    operands,
    tensor,
    unbroadcast,
)
from anert.mil.ops.table import Arg, OpDef, Types, define


def _const_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    return [TensorType(mil_dtype(attrs["val"].dtype), attrs["val"].shape)]


def _const_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    val: np.ndarray = attrs["val"]
    return val.astype(np.float64) if val.dtype.kind == "f" else val


define(OpDef("const", (Arg("val", "attr"),), _const_infer, _const_numpy, category="const"))


def const(function: Function, value: Any, dtype: str | None = None, *, name: str = "c") -> Value:
    """A constant tensor or scalar in `function`; Python floats become fp16."""
    return function.const(value, dtype, name)


def _identity_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    return [tensor("identity", types["x"].dtype, types["x"].shape)]


define(
    OpDef(
        "identity",
        (Arg("x"),),
        _identity_infer,
        lambda i, a: i["x"],
        lambda op, douts: {"x": douts[0]},
        category="view",
    )
)


def identity(x: Value, *, name: str | None = None) -> Value:
    """x under another name."""
    return one("identity", {"x": x}, name=name)


def _cast_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    one_dtype("cast", types, ("x",), ANY)
    if attrs["dtype"] not in ANY:
        raise ShapeError(f"cast: dtype {attrs['dtype']!r} is not supported: expected one of {', '.join(ANY)}")
    return [tensor("cast", attrs["dtype"], types["x"].shape)]


def _cast_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    """Floats stay as they are between float dtypes (only ports round); to an integer truncates towards zero."""
    to = np.dtype(np.float64) if attrs["dtype"] in FLOAT else DTYPES[attrs["dtype"]]
    return inputs["x"].astype(to)


def _cast_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, dout = op.inputs["x"], douts[0]
    if dout is None or not differentiable(x) or op.out.dtype not in FLOAT:
        return {"x": None}
    assert isinstance(x, Value)
    return {"x": one("cast", {"x": dout}, {"dtype": x.dtype})}


define(OpDef("cast", (Arg("x"), Arg("dtype", "attr", "string")), _cast_infer, _cast_numpy, _cast_grad))


def cast(x: Value, dtype: str, *, name: str | None = None) -> Value:
    """x as `dtype` (a MIL type name); floats truncate towards zero when they become integers."""
    return one("cast", {"x": x}, {"dtype": dtype}, name)


def _select_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    one_dtype("select", types, ("cond",), ("bool",))
    dtype = one_dtype("select", types, ("a", "b"), ANY)
    return [tensor("select", dtype, broadcast("select", *(types[k].shape for k in ("cond", "a", "b"))))]


def _select_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    cond, a, b, dout = op.inputs["cond"], op.inputs["a"], op.inputs["b"], douts[0]
    assert isinstance(cond, Value) and isinstance(a, Value) and isinstance(b, Value) and dout is not None
    return {
        "a": unbroadcast(select(cond, dout, 0.0), a.shape) if differentiable(a) else None,
        "b": unbroadcast(select(cond, 0.0, dout), b.shape) if differentiable(b) else None,
    }


define(
    OpDef(
        "select",
        (Arg("cond"), Arg("a"), Arg("b")),
        _select_infer,
        lambda i, a: np.where(i["cond"], i["a"], i["b"]),
        _select_grad,
    )
)


def select(cond: Tensorlike, a: Tensorlike, b: Tensorlike, *, name: str | None = None) -> Value:
    """a where cond, else b; all three broadcast."""
    return one("select", operands("select", {"cond": "bool"}, cond=cond, a=a, b=b), name=name)


def _predicate(kind: str, numpy: Callable[..., np.ndarray], domain: tuple[str, ...], doc: str) -> BinaryOp:
    """Define a broadcasting op of two operands whose result is bool."""

    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        one_dtype(kind, types, ("x", "y"), domain)
        return [tensor(kind, "bool", broadcast(kind, types["x"].shape, types["y"].shape))]

    def traced(x: Tensorlike, y: Tensorlike, *, name: str | None = None) -> Value:
        return one(kind, operands(kind, x=x, y=y), name=name)

    define(OpDef(kind, (Arg("x"), Arg("y")), infer, lambda i, a: numpy(i["x"], i["y"])))
    traced.__name__, traced.__doc__ = kind, doc
    return traced


equal = _predicate("equal", np.equal, ARITHMETIC, "x == y, as bool.")
not_equal = _predicate("not_equal", np.not_equal, ARITHMETIC, "x != y, as bool.")
less = _predicate("less", np.less, ARITHMETIC, "x < y, as bool.")
less_equal = _predicate("less_equal", np.less_equal, ARITHMETIC, "x <= y, as bool.")
greater = _predicate("greater", np.greater, ARITHMETIC, "x > y, as bool.")
greater_equal = _predicate("greater_equal", np.greater_equal, ARITHMETIC, "x >= y, as bool.")
logical_and = _predicate("logical_and", np.logical_and, ("bool",), "x and y, of bools.")
logical_or = _predicate("logical_or", np.logical_or, ("bool",), "x or y, of bools.")


def _not_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    one_dtype("logical_not", types, ("x",), ("bool",))
    return [tensor("logical_not", "bool", types["x"].shape)]


define(OpDef("logical_not", (Arg("x"),), _not_infer, lambda i, a: np.logical_not(i["x"])))


def logical_not(x: Value, *, name: str | None = None) -> Value:
    """not x, of bools."""
    return one("logical_not", {"x": x}, name=name)
