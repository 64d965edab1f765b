"""Reductions over axes, and the two normalisations that are built from them: softmax and layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from anert.errors import ShapeError
from anert.mil.graph import DTYPES, Op, TensorType, Value
from anert.mil.ops.build import (
    ARITHMETIC,
    FLOAT,
    Arrays,
    Attrs,
    Tensorlike,
    axes_of,
    axis_of,
    broadcast_to,
    choice,
    constant,
    differentiable,
    one,
    one_dtype,
    operands,
    rank_of,
    size,
    tensor,
    times,
    unbroadcast,
)
from anert.mil.ops.core import equal, select
from anert.mil.ops.elementwise import exp, maximum
from anert.mil.ops.elementwise import pow as power
from anert.mil.ops.table import Arg, OpDef, Types, define

Axes = int | tuple[int, ...] | None


class Reduction(Protocol):
    """A traced reduction over `axes` (default: all)."""

    def __call__(self, x: Value, axes: Axes = None, keep_dims: bool = False, *, name: str | None = None) -> Value: ...


def _kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with its reduced axes at 1."""
    return tuple(1 if i in axes else d for i, d in enumerate(shape))


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...], keep_dims: bool) -> tuple[int, ...]:
    return _kept(shape, axes) if keep_dims else tuple(d for i, d in enumerate(shape) if i not in axes)


def _spread(dout: Value, op: Op) -> Value:
    """The cotangent of a reduction's result, repeated to the shape of what was reduced."""
    x = op.inputs["x"]
    assert isinstance(x, Value)
    return broadcast_to(_lifted(dout, op), x.shape)


def _lifted(v: Value, op: Op) -> Value:
    """A reduction's result, or its cotangent, with the reduced axes there at size 1."""
    x = op.inputs["x"]
    assert isinstance(x, Value)
    shape = _kept(x.shape, op.attrs["axes"])
    return v if v.shape == shape else v.reshape(*shape)


def _divided(x: Value, n: int) -> Value:
    """x / n, by whichever of n and 1/n the dtype holds better."""
    t = DTYPES[x.dtype].type
    with np.errstate(all="ignore"):
        off_n, off_inverse = abs(float(t(n)) / n - 1.0), abs(float(t(1.0 / n)) * n - 1.0)
    return x * (1.0 / n) if off_inverse <= off_n else x / float(n)


def _reduction(
    kind: str,
    numpy: Callable[..., np.ndarray],
    slope: Callable[[Op, Value], Value],
    doc: str,
    decompose: Callable[[Value, tuple[int, ...], bool], Value] | None = None,
) -> Reduction:
    """Define a reduction over `axes` (default: all). `slope(op, dout)` is the gradient of x."""

    def resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
        rank = rank_of(kind, "x", types["x"], 1)
        axes = range(rank) if attrs["axes"] is None else attrs["axes"]
        if not axes:
            raise ShapeError(f"{kind}: axes is empty: name the axes to reduce or leave it out for all")
        return {"axes": axes_of(kind, axes, rank)}

    def infer(types: Types, attrs: Attrs) -> list[TensorType]:
        whole = tensor(kind, one_dtype(kind, types, ("x",), ARITHMETIC), types["x"].shape)
        return [tensor(kind, whole.dtype, _reduced(whole.shape, attrs["axes"], attrs["keep_dims"]))]

    def evaluate(inputs: Attrs, attrs: Attrs) -> np.ndarray:
        x = inputs["x"]
        return np.asarray(numpy(x, axis=attrs["axes"], keepdims=attrs["keep_dims"])).astype(x.dtype)

    def grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
        dout = douts[0]
        assert dout is not None
        return {"x": slope(op, dout) if differentiable(op.inputs["x"]) else None}

    def simpler(inputs: Attrs, attrs: Attrs) -> Value:
        assert decompose is not None
        return decompose(inputs["x"], attrs["axes"], attrs["keep_dims"])

    args = (Arg("x"), Arg("axes", "attr", "int32[]", None), Arg("keep_dims", "attr", "bool", False))
    define(
        OpDef(
            kind,
            args,
            infer,
            evaluate,
            grad,
            category="composite" if decompose else "reduce",
            resolve=resolve,
            decompose=simpler if decompose else None,
        )
    )

    def traced(x: Value, axes: Axes = None, keep_dims: bool = False, *, name: str | None = None) -> Value:
        return one(kind, {"x": x}, {"axes": axes, "keep_dims": keep_dims}, name)

    traced.__name__, traced.__doc__ = kind, doc
    return traced


def _extreme_slope(op: Op, dout: Value) -> Value:
    """The cotangent goes to the elements that equal the extreme, in equal parts (as torch.amax shares it)."""
    x = op.inputs["x"]
    assert isinstance(x, Value)
    hit = select(equal(x, _lifted(op.out, op)), constant(x.function, 1.0, x.dtype), 0.0)
    hits = maximum(reduce_sum(hit, op.attrs["axes"], keep_dims=True), 1.0)
    return hit * (_lifted(dout, op) / hits)


def _mean_slope(op: Op, dout: Value) -> Value:
    x = op.inputs["x"]
    assert isinstance(x, Value)
    return _spread(_divided(dout, size(x.shape) // size(op.out.shape)), op)


def _mean_of(x: Value, axes: tuple[int, ...], keep_dims: bool) -> Value:
    return _divided(reduce_sum(x, axes, keep_dims), size(x.shape[i] for i in axes))


def _square_slope(op: Op, dout: Value) -> Value:
    x = op.inputs["x"]
    assert isinstance(x, Value)
    return (x * 2.0) * _lifted(dout, op)


def _mean(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    """The mean; of integers truncated towards zero."""
    mean = np.asarray(np.mean(x, axis=axis, keepdims=keepdims))
    return np.trunc(mean) if x.dtype.kind == "i" else mean


reduce_sum = _reduction("reduce_sum", np.sum, lambda op, dout: _spread(dout, op), "The sum over axes.")
reduce_mean = _reduction("reduce_mean", _mean, _mean_slope, "The mean over axes.", _mean_of)
reduce_max = _reduction("reduce_max", np.max, _extreme_slope, "The largest over axes.")
reduce_min = _reduction("reduce_min", np.min, _extreme_slope, "The smallest over axes.")
reduce_sum_square = _reduction(
    "reduce_sum_square",
    lambda x, axis, keepdims: np.sum(x * x, axis=axis, keepdims=keepdims),
    _square_slope,
    "The sum of squares over axes.",
    lambda x, axes, keep_dims: reduce_sum(x * x, axes, keep_dims),
)


def _argmax_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    choice("reduce_argmax", "output_dtype", attrs["output_dtype"], ("int32", "uint16"))
    return {"axis": axis_of("reduce_argmax", attrs["axis"], rank_of("reduce_argmax", "x", types["x"], 1))}


def _argmax_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    one_dtype("reduce_argmax", types, ("x",), ARITHMETIC)
    if types["x"].shape[attrs["axis"]] == 0:
        raise ShapeError(f"reduce_argmax: axis {attrs['axis']} of {types['x'].shape} is empty: it has no largest")
    shape = _reduced(types["x"].shape, (attrs["axis"],), attrs["keep_dims"])
    return [tensor("reduce_argmax", attrs["output_dtype"], shape)]


def _argmax_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    found = np.argmax(inputs["x"], attrs["axis"], keepdims=attrs["keep_dims"])
    return np.asarray(found).astype(DTYPES[attrs["output_dtype"]])


define(
    OpDef(
        "reduce_argmax",
        (
            Arg("x"),
            Arg("axis", "attr", "int32", -1),
            Arg("keep_dims", "attr", "bool", False),
            Arg("output_dtype", "attr", "string", "int32", since="ios17"),
        ),
        _argmax_infer,
        _argmax_numpy,
        category="reduce",
        resolve=_argmax_resolve,
    )
)


def reduce_argmax(
    x: Value, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32", *, name: str | None = None
) -> Value:
    """Where along `axis` the largest element is; the first of equals."""
    return one("reduce_argmax", {"x": x}, {"axis": axis, "keep_dims": keep_dims, "output_dtype": output_dtype}, name)


# softmax


def _softmax_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    return {"axis": axis_of("softmax", attrs["axis"], rank_of("softmax", "x", types["x"], 1))}


def _softmax_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    return [tensor("softmax", one_dtype("softmax", types, ("x",), FLOAT), types["x"].shape)]


def softmax_numpy(x: np.ndarray, axis: int) -> np.ndarray:
    """exp(x) over its sum, from x minus its largest."""
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return np.asarray(e / np.sum(e, axis=axis, keepdims=True))


def softmax_slope(y: Value, dout: Value, axis: int) -> Value:
    """(dout - sum(dout * y)) * y."""
    return (dout - reduce_sum(dout * y, axis, keep_dims=True)) * y


def _softmax_simpler(inputs: Attrs, attrs: Attrs) -> Value:
    x, axis = inputs["x"], attrs["axis"]
    e = exp(x - reduce_max(x, axis, keep_dims=True))
    return e / reduce_sum(e, axis, keep_dims=True)


def _softmax_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    dout = douts[0]
    assert dout is not None
    return {"x": softmax_slope(op.out, dout, op.attrs["axis"]) if differentiable(op.inputs["x"]) else None}


define(
    OpDef(
        "softmax",
        (Arg("x"), Arg("axis", "attr", "int32", -1)),
        _softmax_infer,
        lambda i, a: softmax_numpy(i["x"], a["axis"]),
        _softmax_grad,
        category="composite",
        resolve=_softmax_resolve,
        decompose=_softmax_simpler,
        native=frozenset({"ane"}),
    )
)


def softmax(x: Value, axis: int = -1, *, name: str | None = None) -> Value:
    """exp(x) divided by its sum along `axis`."""
    return one("softmax", {"x": x}, {"axis": axis}, name)


# layer_norm (arXiv:1607.06450)


def _norm_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    rank = rank_of("layer_norm", "x", types["x"], 1)
    axes = range(rank) if attrs["axes"] is None else attrs["axes"]
    if not axes:
        raise ShapeError("layer_norm: axes is empty: name the axes to normalise or leave it out for all")
    return {"axes": axes_of("layer_norm", axes, rank)}


def _norm_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    x = types["x"]
    dtype = one_dtype("layer_norm", types, ("x", "gamma", "beta"), FLOAT)
    expected = tuple(x.shape[i] for i in attrs["axes"])
    for name in ("gamma", "beta"):
        if name in types and types[name].shape != expected:
            raise ShapeError(f"layer_norm: {name} has shape {types[name].shape}, expected x.shape[axes] = {expected}")
    return [tensor("layer_norm", dtype, x.shape)]


def _norm_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x, axes = inputs["x"], attrs["axes"]
    kept = tuple(d if i in axes else 1 for i, d in enumerate(x.shape))
    c: np.ndarray = x - np.mean(x, axis=axes, keepdims=True)
    y: np.ndarray = c / np.sqrt(np.mean(c * c, axis=axes, keepdims=True) + attrs["epsilon"])
    if "gamma" in inputs:
        y = y * inputs["gamma"].reshape(kept)
    return y + inputs["beta"].reshape(kept) if "beta" in inputs else y


def _normalised(x: Value, attrs: Attrs) -> tuple[Value, Value]:
    """(x - mean) / deviation, and 1 / deviation with the reduced axes at 1."""
    axes = attrs["axes"]
    c = x - _mean_of(x, axes, True)
    r = power(_mean_of(c * c, axes, True) + attrs["epsilon"], -0.5)
    return c * r, r


def _gain(v: Value, x: Value, axes: tuple[int, ...]) -> Value:
    """gamma or beta in the rank of x."""
    return v.reshape(*(d if i in axes else 1 for i, d in enumerate(x.shape)))


def _norm_simpler(inputs: Attrs, attrs: Attrs) -> Value:
    x, axes = inputs["x"], attrs["axes"]
    y, _ = _normalised(x, attrs)
    if "gamma" in inputs:
        y = y * _gain(inputs["gamma"], x, axes)
    return y + _gain(inputs["beta"], x, axes) if "beta" in inputs else y


def _norm_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """dx = r (dy - mean(dy) - n mean(dy n)) with n the normalised x and dy = dout * gamma."""
    x, gamma, beta, dout = op.inputs["x"], op.inputs.get("gamma"), op.inputs.get("beta"), douts[0]
    assert isinstance(x, Value) and dout is not None
    axes = op.attrs["axes"]
    n, r = _normalised(x, op.attrs)
    grads: dict[str, Any] = {"x": None}
    if differentiable(x):
        dy = times(dout, _gain(gamma, x, axes)) if isinstance(gamma, Value) else dout
        grads["x"] = (dy - _mean_of(dy, axes, True) - n * _mean_of(dy * n, axes, True)) * r
    for name, v, g in (("gamma", gamma, dout * n), ("beta", beta, dout)):
        if isinstance(v, Value):
            kept = tuple(d if i in axes else 1 for i, d in enumerate(x.shape))
            summed = unbroadcast(g, kept)
            grads[name] = summed.reshape(*v.shape) if differentiable(v) else None
    return grads


define(
    OpDef(
        "layer_norm",
        (
            Arg("x"),
            Arg("axes", "attr", "int32[]", None),
            Arg("gamma", default=None),
            Arg("beta", default=None),
            Arg("epsilon", "attr", "fp", 1e-5),
        ),
        _norm_infer,
        _norm_numpy,
        _norm_grad,
        category="composite",
        resolve=_norm_resolve,
        decompose=_norm_simpler,
    )
)


def layer_norm(
    x: Value,
    axes: Axes = None,
    gamma: Tensorlike | None = None,
    beta: Tensorlike | None = None,
    epsilon: float = 1e-5,
    *,
    name: str | None = None,
) -> Value:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta over `axes` (default: all); gamma, beta: x.shape[axes]."""
    inputs = operands("layer_norm", x=x, gamma=gamma, beta=beta)
    return one("layer_norm", inputs, {"axes": axes, "epsilon": epsilon}, name)
