"""Convolutions: conv and conv_transpose over one or two spatial axes, grouped, strided, dilated and padded.

Layout: x (N, C_in, *D); conv's weight (C_out, C_in/groups, *K), conv_transpose's (C_in, C_out/groups, *K).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from anert.errors import ShapeError
from anert.mil.graph import Op, TensorType, Value
from anert.mil.ops.build import (
    FLOAT,
    HOST,
    Arrays,
    Attrs,
    Tensorlike,
    choice,
    differentiable,
    length,
    one,
    one_dtype,
    operands,
    rank_of,
    size,
    tensor,
)
from anert.mil.ops.reduce import reduce_sum
from anert.mil.ops.table import Arg, OpDef, Types, define
from anert.mil.ops.view import slice_by_size, transpose

Pads = list[tuple[int, int]]


def _resolved(kind: str, pad_types: tuple[str, ...], types: Types, attrs: Attrs) -> dict[str, Any]:
    """Strides, pads and dilations in full, checked."""
    spatial = rank_of(kind, "x", types["x"], 3, 4) - 2
    rank_of(kind, "weight", types["weight"], spatial + 2, spatial + 2)
    choice(kind, "pad_type", attrs["pad_type"], pad_types)
    full = {
        "strides": attrs["strides"] or (1,) * spatial,
        "dilations": attrs["dilations"] or (1,) * spatial,
        "pad": attrs["pad"] if attrs["pad"] and attrs["pad_type"] == "custom" else (0,) * (2 * spatial),
    }
    for name, n, least in (("strides", spatial, 1), ("dilations", spatial, 1), ("pad", 2 * spatial, 0)):
        length(kind, name, full[name], n)
        if min(full[name]) < least:
            raise ShapeError(f"{kind}: {name} {full[name]} must be at least {least}")
    if attrs["groups"] < 1:
        raise ShapeError(f"{kind}: groups {attrs['groups']} must be at least 1")
    return full


def _reach(weight: tuple[int, ...], attrs: Attrs) -> list[int]:
    """How far a dilated kernel reaches along each spatial axis."""
    return [(k - 1) * d + 1 for k, d in zip(weight[2:], attrs["dilations"], strict=True)]


def _bias_of(kind: str, types: Types, channels: int) -> None:
    if "bias" in types and types["bias"].shape != (channels,):
        raise ShapeError(f"{kind}: bias has shape {types['bias'].shape}, expected ({channels},)")


def _biased(y: np.ndarray, inputs: Arrays) -> np.ndarray:
    return y + inputs["bias"].reshape(-1, *(1,) * (y.ndim - 2)) if "bias" in inputs else y


def _taps(weight: tuple[int, ...], attrs: Attrs) -> list[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Every kernel position, as an index of the weight's last axes, and its offset in x."""
    places = product(*(range(k) for k in weight[2:]))
    return [((..., *k), tuple(i * d for i, d in zip(k, attrs["dilations"], strict=True))) for k in places]


def _window(offset: tuple[int, ...], out: Sequence[int], attrs: Attrs) -> tuple[Any, ...]:
    """What one kernel position sees of the padded x (N, groups, C, *D) for an output of spatial shape `out`."""
    steps = zip(offset, out, attrs["strides"], strict=True)
    return (..., *(slice(o, o + (n - 1) * s + 1, s) for o, n, s in steps))


# conv

CONV_PADS = ("valid", "same", "same_lower", "custom")


def conv_pads(x: tuple[int, ...], weight: tuple[int, ...], attrs: Attrs) -> Pads:
    """(before, after) along each spatial axis. `same` puts an odd element after, `same_lower` before."""
    if attrs["pad_type"] in ("valid", "custom"):
        return list(zip(attrs["pad"][::2], attrs["pad"][1::2], strict=True))
    pads = []
    for d, reach, s in zip(x[2:], _reach(weight, attrs), attrs["strides"], strict=True):
        total = max(0, (-(-d // s) - 1) * s + reach - d)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if attrs["pad_type"] == "same" else (more, less))
    return pads


def _conv_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype = one_dtype("conv", types, ("x", "weight", "bias"), FLOAT)
    x, w, groups = types["x"].shape, types["weight"].shape, attrs["groups"]
    if x[1] != w[1] * groups or w[0] % groups:
        raise ShapeError(f"conv: x {x} in {groups} groups needs weight (k * {groups}, {x[1]} / {groups}, ...), got {w}")
    _bias_of("conv", types, w[0])
    spans = zip(x[2:], _reach(w, attrs), conv_pads(x, w, attrs), attrs["strides"], strict=True)
    out = [(d + before + after - reach) // s + 1 for d, reach, (before, after), s in spans]
    return [tensor("conv", dtype, (x[0], w[0], *out))]


def _conv_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x, w, g = inputs["x"], inputs["weight"], attrs["groups"]
    pads = conv_pads(x.shape, w.shape, attrs)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    spans = zip(padded.shape[2:], _reach(w.shape, attrs), attrs["strides"], strict=True)
    out = [(d - reach) // s + 1 for d, reach, s in spans]
    xg = padded.reshape(x.shape[0], g, x.shape[1] // g, *padded.shape[2:])
    wg = w.reshape(g, w.shape[0] // g, *w.shape[1:])
    y = np.zeros((x.shape[0], g, w.shape[0] // g, *out))
    for k, offset in _taps(w.shape, attrs):
        y += np.einsum("ngc...,goc->ngo...", xg[_window(offset, out, attrs)], wg[k])
    return _biased(y.reshape(x.shape[0], w.shape[0], *out), inputs)


def _weight_grad(x: Value, dout: Value, w: tuple[int, ...], attrs: Attrs, pads: Pads) -> Value:
    """dw[o, c, k] = sum over n, t of dout[n, o, t] x[n, c, t * stride + k * dilation - before].

    That is a convolution of x by dout, with batch and channels exchanged, stride and dilation exchanged, and the
    groups' batches side by side as channels.
    """
    n, channels, groups = x.shape[0], x.shape[1], attrs["groups"]
    each, rank = channels // groups, len(x.shape)
    grouped = x.reshape(n, groups, each, *x.shape[2:])
    swapped = transpose(grouped, (2, 1, 0, *range(3, rank + 1))).reshape(each, groups * n, *x.shape[2:])
    kernel = transpose(dout, (1, 0, *range(2, rank)))  # (C_out, N, *D_out)
    options: dict[str, Any] = {"strides": attrs["dilations"], "dilations": attrs["strides"], "groups": groups}
    flat = tuple(p for pair in pads for p in pair)
    full = conv(swapped, kernel, pad_type="custom", pad=flat, **options)  # (C_in / groups, C_out, at least *K)
    return transpose(slice_by_size(full, (0,) * rank, (each, w[0], *w[2:])), (1, 0, *range(2, rank)))


def _turned(w: Value, groups: int) -> np.ndarray:
    """A constant weight (g * o, c, *K) with the channels of each group exchanged: (g * c, o, *K)."""
    assert w.const is not None
    o, c, *k = w.const.reshape(groups, -1, *w.shape[1:]).shape[1:]
    return w.const.reshape(groups, o, c, *k).swapaxes(1, 2).reshape(groups * c, o, *k)


def _conv_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, w, b, dout = op.inputs["x"], op.inputs["weight"], op.inputs.get("bias"), douts[0]
    assert isinstance(x, Value) and isinstance(w, Value) and dout is not None
    pads = conv_pads(x.shape, w.shape, op.attrs)
    flat = tuple(p for pair in pads for p in pair)
    options = {k: op.attrs[k] for k in ("strides", "dilations", "groups")}
    grads: dict[str, Any] = {"x": None, "weight": None}
    if differentiable(x):
        pointwise = w.const is not None and set(w.shape[2:]) == set(options["strides"]) == {1} and not any(flat)
        if pointwise:
            grads["x"] = conv(dout, _turned(w, options["groups"]), groups=options["groups"])
        else:
            grads["x"] = conv_transpose(dout, w, pad_type="custom", pad=flat, output_shape=x.shape, **options)
    if differentiable(w):
        grads["weight"] = _weight_grad(x, dout, w.shape, op.attrs, pads)
    if isinstance(b, Value):
        grads["bias"] = reduce_sum(dout, (0, *range(2, len(dout.shape)))) if differentiable(b) else None
    return grads


_STRIDES = Arg("strides", "attr", "int32[]", None)
_PAD_TYPE = Arg("pad_type", "attr", "string", "valid")
_PAD = Arg("pad", "attr", "int32[]", None)
_DILATIONS = Arg("dilations", "attr", "int32[]", None)
_GROUPS = Arg("groups", "attr", "int32", 1)

define(
    OpDef(
        "conv",
        (Arg("x"), Arg("weight"), Arg("bias", default=None), _STRIDES, _PAD_TYPE, _PAD, _DILATIONS, _GROUPS),
        _conv_infer,
        _conv_numpy,
        _conv_grad,
        lambda types, attrs, outs: 2 * outs[0].size * size(types["weight"].shape[1:]),
        category="contract",
        resolve=lambda types, attrs: _resolved("conv", CONV_PADS, types, attrs),
    )
)


def conv(
    x: Value,
    weight: Tensorlike,
    bias: Tensorlike | None = None,
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
    *,
    name: str | None = None,
) -> Value:
    """The convolution (correlation) of x with weight; pad_type is valid, same, same_lower or custom (with `pad`)."""
    attrs = {"strides": strides, "pad_type": pad_type, "pad": pad, "dilations": dilations, "groups": groups}
    return one("conv", operands("conv", x=x, weight=weight, bias=bias), attrs, name)


# conv_transpose


def _full(x: Sequence[int], weight: tuple[int, ...], attrs: Attrs) -> list[int]:
    """Spatial shape before anything is cut off."""
    return [(d - 1) * s + r for d, s, r in zip(x[2:], attrs["strides"], _reach(weight, attrs), strict=True)]


def _transpose_resolve(types: Types, attrs: Attrs) -> dict[str, Any]:
    kind, x, w = "conv_transpose", types["x"].shape, types["weight"].shape
    resolved = _resolved(kind, ("valid", "same", "custom"), types, attrs)
    if attrs["output_shape"] is not None:
        asked, outer = attrs["output_shape"], (x[0], w[1] * attrs["groups"])
        length(kind, "output_shape", asked, len(x))
        if asked[:2] != outer:
            raise ShapeError(f"{kind}: output_shape {asked} must start with (N, C_out) = {outer}")
    return resolved


def transpose_crop(x: tuple[int, ...], weight: tuple[int, ...], attrs: Attrs) -> list[tuple[int, int]]:
    """(start, count) along each spatial axis: which part of the full result is the output; past its end are zeros."""
    full, asked = _full(x, weight, attrs), attrs["output_shape"]
    found = []
    for i, (n, d, s) in enumerate(zip(full, x[2:], attrs["strides"], strict=True)):
        before, after = attrs["pad"][2 * i], attrs["pad"][2 * i + 1]
        count = asked[2 + i] if asked is not None else d * s if attrs["pad_type"] == "same" else n - before - after
        found.append((max(0, n - count) // 2 if attrs["pad_type"] == "same" else before, count))
    return found


def _transpose_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    kind, groups = "conv_transpose", attrs["groups"]
    dtype = one_dtype(kind, types, ("x", "weight", "bias"), FLOAT)
    x, w = types["x"].shape, types["weight"].shape
    if x[1] != w[0] or x[1] % groups:
        raise ShapeError(f"{kind}: x {x} in {groups} groups needs weight ({x[1]}, C_out / {groups}, ...), got {w}")
    _bias_of(kind, types, w[1] * groups)
    return [tensor(kind, dtype, (x[0], w[1] * groups, *(n for _, n in transpose_crop(x, w, attrs))))]


def _transpose_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x, w, g = inputs["x"], inputs["weight"], attrs["groups"]
    crop = transpose_crop(x.shape, w.shape, attrs)
    room = [max(n, start + count) for n, (start, count) in zip(_full(x.shape, w.shape, attrs), crop, strict=True)]
    xg = x.reshape(x.shape[0], g, x.shape[1] // g, *x.shape[2:])
    wg = w.reshape(g, w.shape[0] // g, *w.shape[1:])
    y = np.zeros((x.shape[0], g, w.shape[1], *room))
    for k, offset in _taps(w.shape, attrs):
        y[_window(offset, x.shape[2:], attrs)] += np.einsum("ngc...,gco->ngo...", xg, wg[k])
    kept: tuple[Any, ...] = (..., *(slice(start, start + count) for start, count in crop))
    y = y[kept]
    return _biased(y.reshape(x.shape[0], g * w.shape[1], *y.shape[3:]), inputs)


def _transpose_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """A convolution with the same weight; what it looks at past the output's end are zeros."""
    x, w, b, dout = op.inputs["x"], op.inputs["weight"], op.inputs.get("bias"), douts[0]
    assert isinstance(x, Value) and isinstance(w, Value) and dout is not None
    full, crop = _full(x.shape, w.shape, op.attrs), transpose_crop(x.shape, w.shape, op.attrs)
    ends = [start + count for start, count in crop]
    pads = [(start, max(0, n - end)) for n, (start, _), end in zip(full, crop, ends, strict=True)]
    inner = tuple(min(count, n - start) for n, (start, count) in zip(full, crop, strict=True))
    if inner != dout.shape[2:]:  # output past the full result does not depend on x
        dout = slice_by_size(dout, (0,) * len(dout.shape), (*dout.shape[:2], *inner))
    options = {k: op.attrs[k] for k in ("strides", "dilations", "groups")}
    grads: dict[str, Any] = {"x": None, "weight": None}
    if differentiable(x):
        grads["x"] = conv(dout, w, pad_type="custom", pad=tuple(p for pair in pads for p in pair), **options)
    if differentiable(w):
        grads["weight"] = _weight_grad(dout, x, w.shape, op.attrs, pads)
    if isinstance(b, Value):
        whole = douts[0]
        assert whole is not None
        grads["bias"] = reduce_sum(whole, (0, *range(2, len(whole.shape)))) if differentiable(b) else None
    return grads


define(
    OpDef(
        "conv_transpose",
        (
            Arg("x"),
            Arg("weight"),
            Arg("bias", default=None),
            _PAD,
            Arg("output_shape", "attr", "int32[]", None),
            _PAD_TYPE,
            _STRIDES,
            _DILATIONS,
            _GROUPS,
        ),
        _transpose_infer,
        _transpose_numpy,
        _transpose_grad,
        lambda types, attrs, outs: 2 * types["x"].size * size(types["weight"].shape[1:]),
        category="contract",
        backends=HOST,
        resolve=_transpose_resolve,
    )
)


def conv_transpose(
    x: Value,
    weight: Tensorlike,
    bias: Tensorlike | None = None,
    pad: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pad_type: str = "valid",
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
    *,
    name: str | None = None,
) -> Value:
    """The transpose of conv, which is the gradient of its x; `output_shape` settles what strides leave open."""
    attrs: dict[str, Any] = {"pad": pad, "output_shape": output_shape, "pad_type": pad_type, "strides": strides}
    attrs |= {"dilations": dilations, "groups": groups}
    return one("conv_transpose", operands("conv_transpose", x=x, weight=weight, bias=bias), attrs, name)
