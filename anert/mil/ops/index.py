"""Ops that read or write where an index says: gather, gather_along_axis, scatter, scatter_along_axis.

A negative index counts from the end. One that is out of range has no meaning in Core ML; here it raises when evaluated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anert.errors import ShapeError, UnsupportedError
from anert.mil.graph import Op, TensorType, Value
from anert.mil.ops.build import (
    ARITHMETIC,
    HOST,
    INDEX,
    Arrays,
    Attrs,
    Tensorlike,
    axis_of,
    choice,
    constant,
    differentiable,
    one,
    one_dtype,
    operands,
    rank_of,
    size,
    tensor,
    zeros,
)
from anert.mil.ops.core import cast, less, select
from anert.mil.ops.table import Arg, OpDef, Types, define
from anert.mil.ops.view import transpose

VALUES = (*ARITHMETIC, "int16", "uint16", "int8", "uint8")
INDICES = {"indices": "int32"}

_VALIDATE = Arg("validate_indices", "attr", "bool", False, since="ios17")
_UFUNCS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}
SCATTER_MODES = ("update", *_UFUNCS)


def _located(kind: str, indices: np.ndarray, d: int) -> np.ndarray:
    """Indices counted from the front. Raises ShapeError for one that is out of range."""
    i = indices.astype(np.int64)
    if np.any((i < -d) | (i >= d)):
        raise ShapeError(f"{kind}: index {i[(i < -d) | (i >= d)].flat[0]} is out of range for an axis of {d}")
    return np.where(i < 0, i + d, i)


def _axis_resolve(kind: str, operand: str) -> Any:
    def resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
        if "mode" in attrs:
            choice(kind, "mode", attrs["mode"], SCATTER_MODES)
        return {"axis": axis_of(kind, attrs["axis"], rank_of(kind, operand, types[operand], 1))}

    return resolve


# gather


def _gather_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    axis = axis_of("gather", attrs["axis"], rank_of("gather", "x", types["x"], 1))
    b, x, indices = attrs["batch_dims"], types["x"].shape, types["indices"].shape
    most = min(axis, len(indices))
    if not 0 <= b <= most:
        raise ShapeError(f"gather: batch_dims {b} must be 0 to {most} for axis {axis} and indices {indices}")
    if x[:b] != indices[:b]:
        raise ShapeError(f"gather: x {x} and indices {indices} differ in their first {b} axes (batch_dims)")
    return {"axis": axis}


def _gather_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype = one_dtype("gather", types, ("x",), VALUES)
    one_dtype("gather", types, ("indices",), INDEX)
    x, indices, axis = types["x"].shape, types["indices"].shape, attrs["axis"]
    return [tensor("gather", dtype, x[:axis] + indices[attrs["batch_dims"] :] + x[axis + 1 :])]


def _gather_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x, axis, b = inputs["x"], attrs["axis"], attrs["batch_dims"]
    indices = _located("gather", inputs["indices"], x.shape[axis])
    if b == 0:
        return np.take(x, indices, axis=axis)
    batch = x.shape[:b]
    pairs = zip(x.reshape(-1, *x.shape[b:]), indices.reshape(-1, *indices.shape[b:]), strict=True)
    rows = [np.take(xs, i, axis=axis - b) for xs, i in pairs]
    return np.stack(rows).reshape(*batch, *rows[0].shape)


def _rows(x_shape: tuple[int, ...], indices: Value, b: int, d: int) -> Value:
    """Indices into x's batch axes and gathered axis flattened together: int32, rank 1."""
    batch = size(x_shape[:b])
    i = indices if indices.dtype == "int32" else cast(indices, "int32")
    flat = i.reshape(batch, size(i.shape[b:]))
    if batch == 1:
        return flat.reshape(-1)
    flat = select(less(flat, 0), flat + d, flat)
    return (flat + constant(i.function, np.arange(batch, dtype=np.int32)[:, None] * d, "int32")).reshape(-1)


def _gather_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """Each row of the cotangent added to the row that it came from, with axes in the order batch, gathered, rest."""
    x, indices, dout = op.inputs["x"], op.inputs["indices"], douts[0]
    assert isinstance(x, Value) and isinstance(indices, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    axis, b = op.attrs["axis"], op.attrs["batch_dims"]
    picked, rank = len(indices.shape) - b, len(dout.shape)
    to_front = (*range(b), *range(axis, axis + picked), *range(b, axis), *range(axis + picked, rank))
    d = x.shape[axis]
    rest = x.shape[b:axis] + x.shape[axis + 1 :]
    g = transpose(dout, to_front) if axis > b else dout
    where = _rows(x.shape, indices, b, d)
    base = zeros(dout, (size(x.shape[:b]) * d, size(rest)))
    updates = g.reshape(where.shape[0], size(rest))
    g = one("scatter", {"data": base, "indices": where, "updates": updates}, {"axis": 0, "mode": "add"})
    g = g.reshape(*x.shape[:b], d, *rest)
    if axis > b:
        g = transpose(g, (*range(b), *range(b + 1, axis + 1), b, *range(axis + 1, len(x.shape))))
    return {"x": g}


define(
    OpDef(
        "gather",
        (
            Arg("x"),
            Arg("indices"),
            Arg("axis", "attr", "int32", 0),
            Arg("batch_dims", "attr", "int32", 0, since="ios16"),
            _VALIDATE,
        ),
        _gather_infer,
        _gather_numpy,
        _gather_grad,
        category="other",
        resolve=_gather_resolve,
    )
)


def gather(
    x: Value,
    indices: Tensorlike,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
    *,
    name: str | None = None,
) -> Value:
    """Slices of x along `axis` at `indices`, whose axes take its place; the first `batch_dims` axes are shared."""
    attrs = {"axis": axis, "batch_dims": batch_dims, "validate_indices": validate_indices}
    return one("gather", operands("gather", INDICES, x=x, indices=indices), attrs, name)


# gather_along_axis


def _aligned(kind: str, name: str, x: tuple[int, ...], indices: tuple[int, ...], axis: int) -> None:
    """Raises ShapeError unless `indices` has x's shape except along `axis`."""
    if len(x) != len(indices) or any(a != b for k, (a, b) in enumerate(zip(x, indices, strict=True)) if k != axis):
        raise ShapeError(f"{kind}: indices {indices} must have the shape of {name} {x} except on axis {axis}")


def _along_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype = one_dtype("gather_along_axis", types, ("x",), VALUES)
    one_dtype("gather_along_axis", types, ("indices",), INDEX)
    _aligned("gather_along_axis", "x", types["x"].shape, types["indices"].shape, attrs["axis"])
    return [tensor("gather_along_axis", dtype, types["indices"].shape)]


def _along_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x, axis = inputs["x"], attrs["axis"]
    return np.take_along_axis(x, _located("gather_along_axis", inputs["indices"], x.shape[axis]), axis)


def _along_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, indices, dout = op.inputs["x"], op.inputs["indices"], douts[0]
    assert isinstance(x, Value) and isinstance(indices, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    i = indices if indices.dtype == "int32" else cast(indices, "int32")
    return {"x": scatter_along_axis(zeros(dout, x.shape), i, dout, op.attrs["axis"])}


define(
    OpDef(
        "gather_along_axis",
        (Arg("x"), Arg("indices"), Arg("axis", "attr", "int32", 0), _VALIDATE),
        _along_infer,
        _along_numpy,
        _along_grad,
        category="other",
        resolve=_axis_resolve("gather_along_axis", "x"),
    )
)


def gather_along_axis(
    x: Value, indices: Tensorlike, axis: int = 0, validate_indices: bool = False, *, name: str | None = None
) -> Value:
    """Along `axis`, the element of x that `indices` names at the same place; other axes agree."""
    attrs = {"axis": axis, "validate_indices": validate_indices}
    return one("gather_along_axis", operands("gather_along_axis", INDICES, x=x, indices=indices), attrs, name)


# scatter, scatter_along_axis


def _scatter_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype = one_dtype("scatter", types, ("data", "updates"), ARITHMETIC)
    one_dtype("scatter", types, ("indices",), ("int32",))
    data, indices, axis = types["data"].shape, types["indices"], attrs["axis"]
    rank_of("scatter", "indices", indices, 1, 1)
    expected = data[:axis] + indices.shape + data[axis + 1 :]
    if types["updates"].shape != expected:
        raise ShapeError(f"scatter: updates {types['updates'].shape}, expected {expected} for data {data}, axis {axis}")
    return [tensor("scatter", dtype, data)]


def _written(data: np.ndarray, where: Any, updates: np.ndarray, mode: str) -> np.ndarray:
    """data with updates written at the index expression `where`; repeated indices all count, the last update wins."""
    out = data.copy()
    if mode == "update":
        out[where] = updates
    elif mode == "div" and out.dtype.kind == "i":
        np.floor_divide.at(out, where, updates)
    else:
        _UFUNCS[mode].at(out, where, updates)
    return out


def _scatter_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    data, axis = inputs["data"], attrs["axis"]
    where = (slice(None),) * axis + (_located("scatter", inputs["indices"], data.shape[axis]),)
    return _written(data, where, inputs["updates"], attrs["mode"])


def _scatter_along_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    kind = "scatter_along_axis"
    dtype = one_dtype(kind, types, ("data", "updates"), ARITHMETIC)
    one_dtype(kind, types, ("indices",), ("int32",))
    _aligned(kind, "data", types["data"].shape, types["indices"].shape, attrs["axis"])
    if types["updates"].shape != types["indices"].shape:
        raise ShapeError(f"{kind}: updates {types['updates'].shape} and indices {types['indices'].shape} must be equal")
    return [tensor(kind, dtype, types["data"].shape)]


def _scatter_along_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    data, axis = inputs["data"], attrs["axis"]
    where = list(np.ogrid[tuple(slice(d) for d in inputs["indices"].shape)])
    where[axis] = _located("scatter_along_axis", inputs["indices"], data.shape[axis])
    return _written(data, tuple(where), inputs["updates"], attrs["mode"])


def _scatter_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """Modes add, sub and update; with update the indices are taken to differ from each other."""
    data, indices, updates, dout = *(op.inputs[n] for n in ("data", "indices", "updates")), douts[0]
    assert isinstance(data, Value) and isinstance(indices, Value) and isinstance(updates, Value) and dout is not None
    mode, axis = op.attrs["mode"], op.attrs["axis"]
    if mode not in ("add", "sub", "update"):
        raise UnsupportedError(f"{op.kind}: mode {mode!r} has no gradient: use add, sub or update")
    d_data = d_updates = None
    if differentiable(data):
        inputs = {"data": dout, "indices": indices, "updates": zeros(dout, updates.shape)}
        d_data = one(op.kind, inputs, {"axis": axis, "mode": "update"}) if mode == "update" else dout
    if differentiable(updates):
        read = gather if op.kind == "scatter" else gather_along_axis
        d_updates = read(dout, indices, axis)
        d_updates = -d_updates if mode == "sub" else d_updates
    return {"data": d_data, "updates": d_updates}


_SCATTER_ARGS = (
    Arg("data"),
    Arg("indices"),
    Arg("updates"),
    Arg("axis", "attr", "int32", 0),
    Arg("mode", "attr", "string", "add"),
    _VALIDATE,
)
define(
    OpDef(
        "scatter",
        _SCATTER_ARGS,
        _scatter_infer,
        _scatter_numpy,
        _scatter_grad,
        category="other",
        backends=HOST,
        resolve=_axis_resolve("scatter", "data"),
    )
)
define(
    OpDef(
        "scatter_along_axis",
        _SCATTER_ARGS,
        _scatter_along_infer,
        _scatter_along_numpy,
        _scatter_grad,
        category="other",
        backends=HOST,
        resolve=_axis_resolve("scatter_along_axis", "data"),
    )
)


def scatter(
    data: Value, indices: Tensorlike, updates: Tensorlike, axis: int = 0, mode: str = "add", *, name: str | None = None
) -> Value:
    """data with the slices of updates written (or added, ...) along `axis` at the rank-1 indices."""
    inputs = operands("scatter", INDICES, data=data, indices=indices, updates=updates)
    return one("scatter", inputs, {"axis": axis, "mode": mode}, name)


def scatter_along_axis(
    data: Value, indices: Tensorlike, updates: Tensorlike, axis: int = 0, mode: str = "add", *, name: str | None = None
) -> Value:
    """data with each element of updates written (or added, ...) where `indices` says along `axis`."""
    inputs = operands("scatter_along_axis", INDICES, data=data, indices=indices, updates=updates)
    return one("scatter_along_axis", inputs, {"axis": axis, "mode": mode}, name)
