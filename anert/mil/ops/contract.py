"""Contractions: matmul, linear, scaled_dot_product_attention. Convolutions are in conv.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from anert.errors import ShapeError
from anert.mil.graph import Op, TensorType, Value
from anert.mil.ops.build import (
    ARITHMETIC,
    FLOAT,
    Arrays,
    Attrs,
    Tensorlike,
    broadcast,
    differentiable,
    one,
    one_dtype,
    operands,
    rank_of,
    size,
    tensor,
    unbroadcast,
)
from anert.mil.ops.core import select
from anert.mil.ops.reduce import softmax, softmax_numpy, softmax_slope
from anert.mil.ops.table import Arg, OpDef, Types, define

# matmul


def _matrices(types: Types, attrs: Attrs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The operands' shapes after promotion of vectors and after transposition: (..., M, K) and (..., K, N)."""
    shapes = []
    for name in ("x", "y"):
        t, flip = types[name], attrs[f"transpose_{name}"]
        if rank_of("matmul", name, t, 1) == 1:
            if flip:
                raise ShapeError(f"matmul: {name} has rank 1 and cannot be transposed: drop transpose_{name}")
            shapes.append((1, *t.shape) if name == "x" else (*t.shape, 1))
        else:
            shapes.append((*t.shape[:-2], t.shape[-1], t.shape[-2]) if flip else t.shape)
    return shapes[0], shapes[1]


def _matmul_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype = one_dtype("matmul", types, ("x", "y"), ARITHMETIC)
    x, y = _matrices(types, attrs)
    if x[-1] != y[-2]:
        raise ShapeError(
            f"matmul: x {types['x'].shape} contracts {x[-1]} and y {types['y'].shape} contracts {y[-2]}: "
            "transpose one or change its shape"
        )
    shape = list(broadcast("matmul", x[:-2], y[:-2]))
    shape += [x[-2]] if types["x"].rank > 1 else []
    shape += [y[-1]] if types["y"].rank > 1 else []
    return [tensor("matmul", dtype, shape)]


def _matmul_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    x, y = inputs["x"], inputs["y"]
    x = np.swapaxes(x, -1, -2) if attrs["transpose_x"] else x
    y = np.swapaxes(y, -1, -2) if attrs["transpose_y"] else y
    return np.asarray(np.matmul(x, y))


def _matmul_flops(types: Types, attrs: Attrs, outs: Sequence[TensorType]) -> int:
    x, y = _matrices(types, attrs)
    return 2 * size(broadcast("matmul", x[:-2], y[:-2])) * x[-2] * x[-1] * y[-1]


def _matmul_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    """dX = dout Y^T and dY = X^T dout, each in the orientation that its operand lies in."""
    x, y, dout = op.inputs["x"], op.inputs["y"], douts[0]
    assert isinstance(x, Value) and isinstance(y, Value) and dout is not None
    tx, ty = op.attrs["transpose_x"], op.attrs["transpose_y"]
    rows, columns = len(x.shape) > 1, len(y.shape) > 1
    xm = x if rows else x.reshape(1, *x.shape)
    ym = y if columns else y.reshape(*y.shape, 1)
    batch = dout.shape[: len(dout.shape) - rows - columns]
    m, n = (dout.shape[len(batch)] if rows else 1), (dout.shape[-1] if columns else 1)
    d = dout if rows and columns else dout.reshape(*batch, m, n)
    dx = dy = None
    if differentiable(x):
        dx = matmul(ym, d, ty, True) if tx else matmul(d, ym, False, not ty)
        dx = unbroadcast(dx, xm.shape)
        dx = dx if rows else dx.reshape(*x.shape)
    if differentiable(y):
        dy = matmul(d, xm, True, tx) if ty else matmul(xm, d, not tx, False)
        dy = unbroadcast(dy, ym.shape)
        dy = dy if columns else dy.reshape(*y.shape)
    return {"x": dx, "y": dy}


define(
    OpDef(
        "matmul",
        (
            Arg("x"),
            Arg("y"),
            Arg("transpose_x", "attr", "bool", False),
            Arg("transpose_y", "attr", "bool", False),
        ),
        _matmul_infer,
        _matmul_numpy,
        _matmul_grad,
        _matmul_flops,
        category="contract",
    )
)


def matmul(
    x: Tensorlike, y: Tensorlike, transpose_x: bool = False, transpose_y: bool = False, *, name: str | None = None
) -> Value:
    """The matrix product over the last two axes; leading axes broadcast, vectors are a row (x) or a column (y)."""
    return one("matmul", operands("matmul", x=x, y=y), {"transpose_x": transpose_x, "transpose_y": transpose_y}, name)


# linear


def _linear_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    dtype = one_dtype("linear", types, ("x", "weight", "bias"), ARITHMETIC)
    x, w = types["x"], types["weight"]
    rank_of("linear", "x", x, 1)
    rank_of("linear", "weight", w, 2, 2)
    if x.shape[-1] != w.shape[1]:
        raise ShapeError(f"linear: x {x.shape} ends in {x.shape[-1]}, weight {w.shape} takes {w.shape[1]}")
    if "bias" in types and types["bias"].shape != w.shape[:1]:
        raise ShapeError(f"linear: bias has shape {types['bias'].shape}, expected {w.shape[:1]}")
    return [tensor("linear", dtype, (*x.shape[:-1], w.shape[0]))]


def _linear_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    y: np.ndarray = np.matmul(inputs["x"], inputs["weight"].T)
    return y + inputs["bias"] if "bias" in inputs else y


def _linear_simpler(inputs: Attrs, attrs: Attrs) -> Value:
    y = matmul(inputs["x"], inputs["weight"], transpose_y=True)
    return y + inputs["bias"] if "bias" in inputs else y


def _linear_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    x, w, b, dout = op.inputs["x"], op.inputs["weight"], op.inputs.get("bias"), douts[0]
    assert isinstance(x, Value) and isinstance(w, Value) and dout is not None
    rows = size(x.shape[:-1])
    flat, d = x.reshape(rows, x.shape[-1]), dout.reshape(rows, dout.shape[-1])
    grads: dict[str, Any] = {
        "x": matmul(dout, w) if differentiable(x) else None,
        "weight": matmul(d, flat, transpose_x=True) if differentiable(w) else None,
    }
    if isinstance(b, Value):
        grads["bias"] = unbroadcast(d, b.shape) if differentiable(b) else None
    return grads


define(
    OpDef(
        "linear",
        (Arg("x"), Arg("weight"), Arg("bias", default=None)),
        _linear_infer,
        _linear_numpy,
        _linear_grad,
        lambda types, attrs, outs: 2 * outs[0].size * types["weight"].shape[1],
        category="composite",
        decompose=_linear_simpler,
        native=frozenset({"ane"}),
    )
)


def linear(x: Value, weight: Tensorlike, bias: Tensorlike | None = None, *, name: str | None = None) -> Value:
    """x @ weight.T + bias, with weight (out, in); Core ML wants weight and bias constant."""
    return one("linear", operands("linear", x=x, weight=weight, bias=bias), name=name)


# scaled_dot_product_attention

MASKED = -65504.0
"""Score of a masked position where a bool mask is made explicit (ane_facts 4): the least finite fp16."""


def _attention_infer(types: Types, attrs: Attrs) -> list[TensorType]:
    kind = "scaled_dot_product_attention"
    q, k, v = types["query"], types["key"], types["value"]
    dtype = one_dtype(kind, types, ("query", "key", "value"), FLOAT)
    for name in ("query", "key", "value"):
        rank_of(kind, name, types[name], 3)
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ShapeError(f"{kind}: query {q.shape}, key {k.shape} and value {v.shape} differ in their leading axes")
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"{kind}: query {q.shape} and key {k.shape} differ in their last axis")
    if k.shape[-2] != v.shape[-2]:
        raise ShapeError(f"{kind}: key {k.shape} and value {v.shape} differ in length (axis -2)")
    scores = (*q.shape[:-1], k.shape[-2])
    if "attn_mask" in types:
        mask = types["attn_mask"]
        one_dtype(kind, types, ("attn_mask",), ("bool", dtype))
        if broadcast(kind, mask.shape, scores) != scores or mask.rank == 0 or mask.shape[-1] != scores[-1]:
            raise ShapeError(f"{kind}: attn_mask {mask.shape} does not broadcast to the scores {scores}")
    return [tensor(kind, dtype, (*q.shape[:-1], v.shape[-1]))]


def _attention_numpy(inputs: Arrays, attrs: Attrs) -> np.ndarray:
    q, k, v, mask = inputs["query"], inputs["key"], inputs["value"], inputs.get("attn_mask")
    scores: np.ndarray = np.matmul(q, np.swapaxes(k, -1, -2)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + (np.where(mask, 0.0, -np.inf) if mask.dtype.kind == "b" else mask)
    return np.asarray(np.matmul(softmax_numpy(scores, -1), v))


def _probabilities(q: Value, k: Value, mask: Value | None) -> Value:
    """softmax(q k^T / sqrt(E) + mask), (..., L, S)."""
    scores = matmul(q, k, transpose_y=True) * (1.0 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = select(mask, scores, MASKED) if mask.dtype == "bool" else scores + mask
    return softmax(scores)


def _attention_grad(op: Op, douts: tuple[Value | None, ...]) -> dict[str, Any]:
    q, k, v, mask, dout = *(op.inputs[n] for n in ("query", "key", "value")), op.inputs.get("attn_mask"), douts[0]
    assert isinstance(q, Value) and isinstance(k, Value) and isinstance(v, Value) and dout is not None
    assert mask is None or isinstance(mask, Value)
    p = _probabilities(q, k, mask)
    ds = softmax_slope(p, matmul(dout, v, transpose_y=True), -1)
    scaled = ds * (1.0 / math.sqrt(q.shape[-1]))
    grads: dict[str, Any] = {
        "query": matmul(scaled, k) if differentiable(q) else None,
        "key": matmul(scaled, q, transpose_x=True) if differentiable(k) else None,
        "value": matmul(p, dout, transpose_x=True) if differentiable(v) else None,
    }
    if mask is not None:
        grads["attn_mask"] = unbroadcast(ds, mask.shape) if differentiable(mask) else None
    return grads


def _attention_flops(types: Types, attrs: Attrs, outs: Sequence[TensorType]) -> int:
    q, v = types["query"].shape, types["value"].shape
    return 2 * size((*q[:-1], v[-2], q[-1] + v[-1]))


define(
    OpDef(
        "scaled_dot_product_attention",
        (Arg("query"), Arg("key"), Arg("value"), Arg("attn_mask", default=None)),
        _attention_infer,
        _attention_numpy,
        _attention_grad,
        _attention_flops,
        category="composite",
        decompose=lambda i, a: matmul(_probabilities(i["query"], i["key"], i.get("attn_mask")), i["value"]),
    )
)


def scaled_dot_product_attention(
    query: Value, key: Value, value: Value, attn_mask: Tensorlike | None = None, *, name: str | None = None
) -> Value:
    """softmax(query key^T / sqrt(E) + attn_mask) value over the last two axes; a bool mask says what takes part."""
    kind = "scaled_dot_product_attention"
    is_bool = not isinstance(attn_mask, Value) and attn_mask is not None and np.asarray(attn_mask).dtype == np.bool_
    dtypes = {"attn_mask": "bool"} if is_bool else None
    return one(kind, operands(kind, dtypes, query=query, key=key, value=value, attn_mask=attn_mask), name=name)
