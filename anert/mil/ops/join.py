"""Ops that put tensors together or take them apart along an axis: concat, split, stack, tile, pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anert.errors import ShapeError
from anert.mil.graph import Op, TensorType, Value
from anert.mil.ops.build import (
    ANY,
    FLOAT,
    HOST,
    Arrays,
    Attrs,
    axis_of,
    choice,
    differentiable,
    length,
    one,
    one_dtype,
    rank_of,
    tensor,
    zeros,
)
from anert.mil.ops.reduce import reduce_sum
from anert.mil.ops.table import Arg, OpDef, Types, define, emit
from anert.mil.ops.view import slice_by_index, slice_by_size


def _alike(kind: str, types: Types) -> tuple[str, Sequence[TensorType]]:
    """The common dtype of `values` and their types. Raises ShapeError if dtypes or ranks differ."""
    values = types["values"]
    named = {f"values[{i}]": t for i, t in enumerate(values)}
    dtype = one_dtype(kind, named, tuple(named), ANY)
    if len({t.rank for t in values}) > 1:
        raise ShapeError(f"{kind}: values have shapes {', '.join(str(t.shape) for t in values)}: ranks must be equal")
    return dtype, values


def _part(v: Value, axis: int, start: int, count: int) -> Value:
    """`count` elements of v from `start` along `axis`."""
    begin = tuple(start if i == axis else 0 for i in range(len(v.shape)))
    return slice_by_size(v, begin, tuple(count if i == axis else d for i, d in enumerate(v.shape)))


# concat


def _concat_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    return {"axis": axis_of("concat", attrs["axis"], rank_of("concat", "values[0]", types["values"][0], 1))}


def _concat_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype, values = _alike("concat", types)
    axis, shape = attrs["axis"], list(values[0].shape)
    free = () if attrs["interleave"] else (axis,)
    for i, t in enumerate(values):
        if any(a != b for k, (a, b) in enumerate(zip(shape, t.shape, strict=True)) if k not in free):
            where = f"except on axis {axis}" if free else "everywhere when interleaved"
            shapes = f"values[0] has shape {tuple(shape)}, values[{i}] {t.shape}"
            raise ShapeError(f"concat: {shapes}: they must agree {where}")
    shape[axis] = sum(t.shape[axis] for t in values)
    return [tensor("concat", dtype, shape)]


def _concat_numpy(inputs: Attrs, attrs: Attrs) -> np.ndarray:
    values, axis = inputs["values"], attrs["axis"]
    if not attrs["interleave"]:
        return np.concatenate(values, axis=axis)
    shape = values[0].shape
    return np.stack(values, axis=axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _concat_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    values, axis, dout = op.inputs["values"], op.attrs["axis"], douts[0]
    assert isinstance(values, tuple) and dout is not None
    grads: list[Value | None] = []
    start, rank = 0, len(dout.shape)
    for i, v in enumerate(values):
        if not differentiable(v):
            grads.append(None)
        elif op.attrs["interleave"]:
            begin = tuple(i if k == axis else 0 for k in range(rank))
            stride = tuple(len(values) if k == axis else 1 for k in range(rank))
            grads.append(slice_by_index(dout, begin, dout.shape, stride))
        else:
            grads.append(_part(dout, axis, start, v.shape[axis]))
        start += v.shape[axis]
    return {"values": tuple(grads)}


define(
    OpDef(
        "concat",
        (Arg("values", "tensors"), Arg("axis", "attr", "int32"), Arg("interleave", "attr", "bool", False)),
        _concat_infer,
        _concat_numpy,
        _concat_grad,
        category="view",
        resolve=_concat_resolve,
    )
)


def concat(values: Sequence[Value], axis: int, interleave: bool = False, *, name: str | None = None) -> Value:
    """The values one after another along `axis`, or element by element in turn when interleaved."""
    return one("concat", {"values": tuple(values)}, {"axis": axis, "interleave": interleave}, name)


# split


def _split_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    """split_sizes is always there after this."""
    shape = types["x"].shape
    axis = axis_of("split", attrs["axis"], rank_of("split", "x", types["x"], 1))
    n, sizes = attrs["num_splits"], attrs["split_sizes"]
    if n is None and sizes is None:
        raise ShapeError("split needs num_splits or split_sizes")
    if sizes is None:
        if n < 1 or shape[axis] % n:
            raise ShapeError(f"split: axis {axis} of x {shape} does not divide into {n} equal parts: give split_sizes")
        sizes = (shape[axis] // n,) * n
    if (n is not None and n != len(sizes)) or sum(sizes) != shape[axis] or min(sizes, default=0) < 1:
        count = n or len(sizes)
        raise ShapeError(f"split: split_sizes {sizes} must be {count} positive sizes that add up to {shape[axis]}")
    return {"axis": axis, "num_splits": len(sizes), "split_sizes": sizes}


def _split_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    x, axis = types["x"], attrs["axis"]
    dtype = one_dtype("split", types, ("x",), ANY)
    return [tensor("split", dtype, (*x.shape[:axis], s, *x.shape[axis + 1 :])) for s in attrs["split_sizes"]]


def _split_numpy(inputs: Arrays, attrs: Attrs) -> tuple[np.ndarray, ...]:
    return tuple(np.split(inputs["x"], np.cumsum(attrs["split_sizes"])[:-1], axis=attrs["axis"]))


def _split_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x = op.inputs["x"]
    if not differentiable(x):
        return {"x": None}
    some = next(d for d in douts if d is not None)
    parts = tuple(zeros(some, o.shape) if d is None else d for d, o in zip(douts, op.outputs, strict=True))
    return {"x": concat(parts, op.attrs["axis"])}


define(
    OpDef(
        "split",
        (
            Arg("x"),
            Arg("num_splits", "attr", "int32", None),
            Arg("split_sizes", "attr", "int32[]", None),
            Arg("axis", "attr", "int32"),
        ),
        _split_infer,
        _split_numpy,
        _split_grad,
        category="view",
        resolve=_split_resolve,
    )
)


def split(
    x: Value,
    num_splits: int | None = None,
    axis: int = 0,
    split_sizes: Sequence[int] | None = None,
    *,
    name: str | None = None,
) -> tuple[Value, ...]:
    """x in parts along `axis`: `num_splits` equal ones, or of `split_sizes`."""
    return tuple(emit("split", {"x": x}, {"num_splits": num_splits, "split_sizes": split_sizes, "axis": axis}, name))


# stack


def _stack_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    return {"axis": axis_of("stack", attrs["axis"], types["values"][0].rank + 1)}


def _stack_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype, values = _alike("stack", types)
    shape, axis = values[0].shape, attrs["axis"]
    for i, t in enumerate(values):
        if t.shape != shape:
            raise ShapeError(f"stack: values[{i}] has shape {t.shape}, values[0] {shape}: they must be equal")
    return [tensor("stack", dtype, (*shape[:axis], len(values), *shape[axis:]))]


def _stack_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    values, axis, dout = op.inputs["values"], op.attrs["axis"], douts[0]
    assert isinstance(values, tuple) and dout is not None
    parts = (_part(dout, axis, i, 1).reshape(*v.shape) if differentiable(v) else None for i, v in enumerate(values))
    return {"values": tuple(parts)}


define(
    OpDef(
        "stack",
        (Arg("values", "tensors"), Arg("axis", "attr", "int32")),
        _stack_infer,
        lambda i, a: np.stack(i["values"], axis=a["axis"]),
        _stack_grad,
        category="view",
        resolve=_stack_resolve,
    )
)


def stack(values: Sequence[Value], axis: int, *, name: str | None = None) -> Value:
    """The values, of one shape, along a new axis."""
    return one("stack", {"values": tuple(values)}, {"axis": axis}, name)


# tile


def _tile_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    length("tile", "reps", attrs["reps"], rank_of("tile", "x", types["x"], 1))
    if min(attrs["reps"]) < 1:
        raise ShapeError(f"tile: reps {attrs['reps']} must all be at least 1")
    return {}


def _tile_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    x = types["x"]
    dtype = one_dtype("tile", types, ("x",), ANY)
    return [tensor("tile", dtype, (d * r for d, r in zip(x.shape, attrs["reps"], strict=True)))]


def _tile_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, dout = op.inputs["x"], douts[0]
    assert isinstance(x, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    pairs = [p for r, d in zip(op.attrs["reps"], x.shape, strict=True) for p in (r, d)]
    return {"x": reduce_sum(dout.reshape(*pairs), tuple(range(0, len(pairs), 2)))}


define(
    OpDef(
        "tile",
        (Arg("x"), Arg("reps", "attr", "int32[]")),
        _tile_infer,
        lambda i, a: np.tile(i["x"], a["reps"]),
        _tile_grad,
        category="view",
        backends=HOST,  # stops the engine for the whole process (ane_facts 4)
        resolve=_tile_resolve,
    )
)


def tile(x: Value, reps: Sequence[int], *, name: str | None = None) -> Value:
    """x repeated reps[i] times along axis i."""
    return one("tile", {"x": x}, {"reps": tuple(reps)}, name)


# pad

PAD_MODES: dict[str, Any] = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
"""MIL's modes and NumPy's names for them."""


def _pad_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    """pad holds (before, after) for every axis of x after this."""
    shape, pad, mode = types["x"].shape, attrs["pad"], attrs["mode"]
    rank_of("pad", "x", types["x"], 1)
    choice("pad", "mode", mode, tuple(PAD_MODES))
    if len(pad) % 2 or len(pad) > 2 * len(shape) or min(pad, default=0) < 0:
        raise ShapeError(f"pad: pad {pad} must be pairs (before, after), not negative, for at most {len(shape)} axes")
    pad = (0,) * (2 * len(shape) - len(pad)) + pad
    limits = [d - 1 if mode == "reflect" else d for d in shape for _ in range(2)]
    if mode != "constant" and any(p > most for p, most in zip(pad, limits, strict=True)):
        raise ShapeError(f"pad: {mode} can pad x {shape} by at most {limits} (before, after), got {pad}")
    return {"pad": pad}


def _pad_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    x, pad = types["x"], attrs["pad"]
    dtype = one_dtype("pad", types, ("x",), FLOAT)
    return [tensor("pad", dtype, (d + pad[2 * i] + pad[2 * i + 1] for i, d in enumerate(x.shape)))]


def _pad_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    pairs = list(zip(attrs["pad"][::2], attrs["pad"][1::2], strict=True))
    if attrs["mode"] == "constant":
        return np.pad(inputs["x"], pairs, constant_values=attrs["constant_val"])
    return np.pad(inputs["x"], pairs, PAD_MODES[attrs["mode"]])


def _pad_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """The middle of the cotangent; the other modes add to each element what its copies received."""
    x, dout, pad = op.inputs["x"], douts[0], op.attrs["pad"]
    assert isinstance(x, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    if op.attrs["mode"] == "constant":
        return {"x": slice_by_size(dout, pad[::2], x.shape)}
    g = dout
    for axis, d in enumerate(x.shape):
        if any(pad[2 * axis : 2 * axis + 2]):
            source = np.pad(np.arange(d, dtype=np.int32), pad[2 * axis : 2 * axis + 2], PAD_MODES[op.attrs["mode"]])
            base = zeros(g, (*g.shape[:axis], d, *g.shape[axis + 1 :]))
            inputs = {"data": base, "indices": g.function.const(source), "updates": g}
            g = one("scatter", inputs, {"axis": axis, "mode": "add"})
    return {"x": g}


define(
    OpDef(
        "pad",
        (
            Arg("x"),
            Arg("pad", "attr", "int32[]"),
            Arg("mode", "attr", "string", "constant"),
            Arg("constant_val", "attr", "fp", 0.0),
        ),
        _pad_infer,
        _pad_numpy,
        _pad_grad,
        category="other",
        backends=HOST,
        resolve=_pad_resolve,
    )
)


def pad(
    x: Value, pad: Sequence[int], mode: str = "constant", constant_val: float = 0.0, *, name: str | None = None
) -> Value:
    """x with (before, after) more elements on its last axes; mode is constant, reflect or replicate."""
    return one("pad", {"x": x}, {"pad": tuple(pad), "mode": mode, "constant_val": constant_val}, name)
