"""Ops that move elements and compute nothing: reshape, transpose, expand_dims, squeeze and slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anert.errors import ShapeError
from anert.mil.graph import Op, TensorType, Value
from anert.mil.ops.build import (
    ANY,
    Arrays,
    Attrs,
    axes_of,
    axis_of,
    differentiable,
    length,
    one,
    one_dtype,
    rank_of,
    size,
    tensor,
    zeros,
)
from anert.mil.ops.table import Arg, OpDef, Types, define


def _back(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """The gradient of an op that only changes the shape: the cotangent in the shape of x."""
    x, dout = op.inputs["x"], douts[0]
    assert isinstance(x, Value) and dout is not None
    return {"x": dout.reshape(*x.shape) if differentiable(x) else None}


# reshape


def _reshape_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    """-1 takes what is left; 0 takes the dimension of x at the same place (ranks must be equal then)."""
    x, asked = types["x"].shape, attrs["shape"]
    if 0 in asked and len(asked) != len(x):
        raise ShapeError(f"reshape: 0 in {asked} copies a dimension of x, but x {x} has another rank")
    shape = [x[i] if d == 0 else d for i, d in enumerate(asked)]
    if shape.count(-1) > 1 or any(d < -1 for d in shape):
        raise ShapeError(f"reshape: shape {asked} may have one -1 and no other negative dimension")
    if -1 in shape:
        known = size(d for d in shape if d != -1)
        shape[shape.index(-1)] = size(x) // known if known else 0
    if size(shape) != size(x):
        raise ShapeError(f"reshape: x {x} has {size(x)} elements, shape {asked} does not")
    return {"shape": tuple(shape)}


def _reshape_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    return [tensor("reshape", one_dtype("reshape", types, ("x",), ANY), attrs["shape"])]


define(
    OpDef(
        "reshape",
        (Arg("x"), Arg("shape", "attr", "int32[]")),
        _reshape_infer,
        lambda i, a: i["x"].reshape(a["shape"]),
        _back,
        category="view",
        resolve=_reshape_resolve,
    )
)


def reshape(x: Value, shape: Sequence[int], *, name: str | None = None) -> Value:
    """The same elements in another shape; one dimension may be -1, and 0 copies the dimension at its place."""
    return one("reshape", {"x": x}, {"shape": tuple(shape)}, name)


# transpose


def _transpose_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    rank = rank_of("transpose", "x", types["x"], 1)
    length("transpose", "perm", attrs["perm"], rank)
    perm = tuple(axis_of("transpose", p, rank, "perm:") for p in attrs["perm"])
    if len(set(perm)) != rank:
        raise ShapeError(f"transpose: perm {attrs['perm']} must name each of {rank} axes once")
    return {"perm": perm}


def _transpose_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    x = types["x"]
    return [tensor("transpose", one_dtype("transpose", types, ("x",), ANY), (x.shape[p] for p in attrs["perm"]))]


def _transpose_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    assert douts[0] is not None
    inverse = sorted(range(len(op.attrs["perm"])), key=op.attrs["perm"].__getitem__)
    return {"x": transpose(douts[0], inverse) if differentiable(op.inputs["x"]) else None}


define(
    OpDef(
        "transpose",
        (Arg("x"), Arg("perm", "attr", "int32[]")),
        _transpose_infer,
        lambda i, a: i["x"].transpose(a["perm"]),
        _transpose_grad,
        category="view",
        resolve=_transpose_resolve,
    )
)


def transpose(x: Value, perm: Sequence[int], *, name: str | None = None) -> Value:
    """Axis i of the result is axis perm[i] of x."""
    return one("transpose", {"x": x}, {"perm": tuple(perm)}, name)


# expand_dims, squeeze


def _expand_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    return {"axes": axes_of("expand_dims", attrs["axes"], types["x"].rank + len(attrs["axes"]))}


def _expand_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    shape = list(types["x"].shape)
    for a in attrs["axes"]:
        shape.insert(a, 1)
    return [tensor("expand_dims", one_dtype("expand_dims", types, ("x",), ANY), shape)]


define(
    OpDef(
        "expand_dims",
        (Arg("x"), Arg("axes", "attr", "int32[]")),
        _expand_infer,
        lambda i, a: np.expand_dims(i["x"], a["axes"]),
        _back,
        category="view",
        resolve=_expand_resolve,
    )
)


def expand_dims(x: Value, axes: int | Sequence[int], *, name: str | None = None) -> Value:
    """x with axes of size 1 where the result shall have them."""
    return one("expand_dims", {"x": x}, {"axes": axes}, name)


def _squeeze_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    """Axes that are not 1 are left alone, as in Core ML; without axes all that are 1 go."""
    shape = types["x"].shape
    rank_of("squeeze", "x", types["x"], 1)
    axes = range(len(shape)) if attrs["axes"] is None else axes_of("squeeze", attrs["axes"], len(shape))
    return {"axes": tuple(a for a in axes if attrs["axes"] is not None or shape[a] == 1)}


def _squeezed(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for i, d in enumerate(shape) if not (i in axes and d == 1))


def _squeeze_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype = one_dtype("squeeze", types, ("x",), ANY)
    return [tensor("squeeze", dtype, _squeezed(types["x"].shape, attrs["axes"]))]


define(
    OpDef(
        "squeeze",
        (Arg("x"), Arg("axes", "attr", "int32[]", None)),
        _squeeze_infer,
        lambda i, a: i["x"].reshape(_squeezed(i["x"].shape, a["axes"])),
        _back,
        category="view",
        resolve=_squeeze_resolve,
    )
)


def squeeze(x: Value, axes: int | Sequence[int] | None = None, *, name: str | None = None) -> Value:
    """x without those of `axes` (default: all) whose size is 1; others stay, as in Core ML."""
    return one("squeeze", {"x": x}, {"axes": axes}, name)


# slice_by_index

_MASKS = ("begin_mask", "end_mask", "squeeze_mask")


def _slice_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    kind, rank = "slice_by_index", rank_of("slice_by_index", "x", types["x"], 1)
    resolved: dict[str, Any] = {"stride": (1,) * rank if attrs["stride"] is None else attrs["stride"]}
    for name in _MASKS:
        resolved[name] = (False,) * rank if attrs[name] is None else attrs[name]
    for name in ("begin", "end", "stride", *_MASKS):
        length(kind, name, resolved[name] if name in resolved else attrs[name], rank)
    if 0 in resolved["stride"]:
        raise ShapeError(f"{kind}: stride {resolved['stride']} must not be 0")
    for i, d in enumerate(types["x"].shape):
        if resolved["squeeze_mask"][i]:
            axis_of(kind, attrs["begin"][i], d, f"begin[{i}]:")
    return resolved


def slice_ranges(shape: tuple[int, ...], attrs: Attrs) -> list[range]:
    """slice_by_index's indices along each axis; a squeezed axis has one."""
    found = []
    for i, d in enumerate(shape):
        begin, end, stride = attrs["begin"][i], attrs["end"][i], attrs["stride"][i]
        if attrs["squeeze_mask"][i]:
            found.append(range(begin % d, begin % d + 1))
        else:
            cut = slice(None if attrs["begin_mask"][i] else begin, None if attrs["end_mask"][i] else end, stride)
            found.append(range(*cut.indices(d)))
    return found


def _slice_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    ranges = slice_ranges(types["x"].shape, attrs)
    shape = tuple(len(r) for r, gone in zip(ranges, attrs["squeeze_mask"], strict=True) if not gone)
    return [tensor("slice_by_index", one_dtype("slice_by_index", types, ("x",), ANY), shape)]


def _slice_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x = inputs["x"]
    for axis, r in enumerate(slice_ranges(x.shape, attrs)):
        stop = r.stop if r.stop >= 0 else None
        x = x[(slice(None),) * axis + (slice(r.start, stop, r.step),)]
    return x.reshape(tuple(d for d, gone in zip(x.shape, attrs["squeeze_mask"], strict=True) if not gone))


def _slice_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """Zeros around the cotangent (pad), and between its rows where a stride skipped some (scatter)."""
    x, dout = op.inputs["x"], douts[0]
    assert isinstance(x, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    ranges = slice_ranges(x.shape, op.attrs)
    g = dout.reshape(*(len(r) for r in ranges)) if any(op.attrs["squeeze_mask"]) else dout
    pad = []
    for axis, (r, d) in enumerate(zip(ranges, x.shape, strict=True)):
        contiguous = len(r) == 1 or r.step == 1
        pad += [r[0], d - 1 - r[-1]] if contiguous else [0, 0]
        if not contiguous:
            base = zeros(g, (*g.shape[:axis], d, *g.shape[axis + 1 :]))
            where = g.function.const(np.array(r, np.int32))
            g = one("scatter", {"data": base, "indices": where, "updates": g}, {"axis": axis, "mode": "add"})
    return {"x": one("pad", {"x": g}, {"pad": pad}) if any(pad) else g}


define(
    OpDef(
        "slice_by_index",
        (
            Arg("x"),
            Arg("begin", "attr", "int32[]"),
            Arg("end", "attr", "int32[]"),
            Arg("stride", "attr", "int32[]", None),
            *(Arg(mask, "attr", "bool[]", None) for mask in _MASKS),
        ),
        _slice_infer,
        _slice_numpy,
        _slice_grad,
        category="view",
        resolve=_slice_resolve,
    )
)


def slice_by_index(
    x: Value,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
    *,
    name: str | None = None,
) -> Value:
    """x[begin:end:stride] on every axis; a mask leaves begin or end open, or takes the one index and drops the axis."""
    attrs = {"begin": tuple(begin), "end": tuple(end), "stride": stride}
    attrs |= {"begin_mask": begin_mask, "end_mask": end_mask, "squeeze_mask": squeeze_mask}
    return one("slice_by_index", {"x": x}, attrs, name)


# slice_by_size


def _size_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    """Negative begins count from the end; size -1 takes what is left."""
    kind, shape = "slice_by_size", types["x"].shape
    rank = rank_of(kind, "x", types["x"], 1)
    length(kind, "begin", attrs["begin"], rank)
    length(kind, "size", attrs["size"], rank)
    begin = tuple(axis_of(kind, attrs["begin"][i], d, f"begin[{i}]:") for i, d in enumerate(shape))
    sizes = tuple(d - b if s == -1 else s for s, b, d in zip(attrs["size"], begin, shape, strict=True))
    for i, (b, s, d) in enumerate(zip(begin, sizes, shape, strict=True)):
        if s < 1 or b + s > d:
            raise ShapeError(f"{kind}: axis {i} has {d} elements, begin {b} with size {s} does not lie in it")
    return {"begin": begin, "size": sizes}


def _size_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    return [tensor("slice_by_size", one_dtype("slice_by_size", types, ("x",), ANY), attrs["size"])]


def _size_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    return inputs["x"][tuple(slice(b, b + s) for b, s in zip(attrs["begin"], attrs["size"], strict=True))]


def _size_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, dout = op.inputs["x"], douts[0]
    assert isinstance(x, Value) and dout is not None
    if not differentiable(x):
        return {"x": None}
    spans = zip(op.attrs["begin"], op.attrs["size"], x.shape, strict=True)
    pad = tuple(p for b, s, d in spans for p in (b, d - b - s))
    return {"x": one("pad", {"x": dout}, {"pad": pad}) if any(pad) else dout}


define(
    OpDef(
        "slice_by_size",
        (Arg("x"), Arg("begin", "attr", "int32[]"), Arg("size", "attr", "int32[]")),
        _size_infer,
        _size_numpy,
        _size_grad,
        category="view",
        resolve=_size_resolve,
    )
)


def slice_by_size(x: Value, begin: Sequence[int], size: Sequence[int], *, name: str | None = None) -> Value:
    """`size` elements from `begin` on every axis; size -1 takes what is left."""
    return one("slice_by_size", {"x": x}, {"begin": tuple(begin), "size": tuple(size)}, name)
