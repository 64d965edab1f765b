"""Rank four: every tensor of a Function as the Neural Engine likes it, [1, C, 1, T], with attributes to match.

(C, T) becomes [1, C, 1, T]; (A, B, C) becomes [1, A, B, C]; (C,) becomes [1, C, 1, 1]; scalars and rank 4 and 5 stay.
Elementwise ops, reductions, softmax, concat and transposes are carried over axis by axis; whatever else meets reshapes
on both sides, so that the meaning of an op never depends on this table.
"""

from __future__ import annotations

from typing import Any

from anert.mil import ops
from anert.mil.graph import Function, Op, TensorType, Value
from anert.mil.ops.table import emit, lookup

AXES = {0: (), 1: (1,), 2: (1, 3), 3: (1, 2, 3), 4: (0, 1, 2, 3)}
"""Logical axis -> axis in rank four, by logical rank."""


def shape4(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The rank-four form of a logical shape; rank 0 and ranks past 4 stay."""
    if not shape or len(shape) > 4:
        return shape
    out = [1, 1, 1, 1]
    for axis, d in zip(AXES[len(shape)], shape, strict=True):
        out[axis] = d
    return tuple(out)


class Legalizer:
    """Copies logical ops into `into`; `values` maps logical values to their rank-four forms."""

    def __init__(self, into: Function) -> None:
        self.into = into
        self.values: dict[Value, Value] = {}
        self._consts: dict[tuple[Value, tuple[int, ...]], Value] = {}

    def at(self, value: Value, shape: tuple[int, ...]) -> Value:
        """The form of a logical value with exactly this shape (same elements in the same order)."""
        if value.const is not None:
            key = (value, shape)
            if key not in self._consts:
                self._consts[key] = self.into.const(value.const.reshape(shape), value.dtype, value.name)
            return self._consts[key]
        have = self.values[value]
        return have if have.shape == shape else ops.reshape(have, shape=shape)

    def copy(self, op: Op) -> None:
        if op.kind == "const":
            return
        row = lookup(op.kind)
        if op.kind == "reshape":
            source = op.inputs["x"]
            assert isinstance(source, Value)
            self.values[op.out] = self.at(source, shape4(op.out.shape))
            return
        if row.category == "elementwise":
            self._elementwise(op)
        elif len(op.outputs) == 1 and (row.category == "reduce" or op.kind in ("softmax", "concat", "transpose")):
            self._axes(op)
        elif op.kind == "matmul" and all(2 <= v.type.rank <= 4 for v in op.operands()):
            self._raw(op, lambda s: (1,) * (4 - len(s)) + s)
        else:
            self._raw(op, lambda s: s)

    def _elementwise(self, op: Op) -> None:
        rank = op.out.type.rank
        inputs: dict[str, Any] = {}
        for k, v in op.inputs.items():
            assert isinstance(v, Value)
            s = v.shape
            inputs[k] = self.at(v, shape4((1,) * (rank - len(s)) + s) if s else ())
        self.values[op.out] = emit(op.kind, inputs, op.attrs, function=self.into)[0]

    def _axes(self, op: Op) -> None:
        first = next(op.operands())
        rank = first.type.rank
        if rank == 0 or rank > 4 or any(v.type.rank != rank for v in op.operands()):
            self._raw(op, lambda s: s)
            return
        axes = AXES[rank]
        attrs = dict(op.attrs)
        if "axes" in attrs:
            attrs["axes"] = tuple(axes[a % rank] for a in (attrs["axes"] if attrs["axes"] is not None else range(rank)))
        if "axis" in attrs:
            attrs["axis"] = axes[attrs["axis"] % rank]
        if "keep_dims" in attrs:
            attrs["keep_dims"] = True
        if "perm" in attrs:
            perm = list(range(4))
            for to, source in enumerate(attrs["perm"]):
                perm[axes[to]] = axes[source % rank]
            attrs["perm"] = tuple(perm)
        inputs: dict[str, Any] = {
            k: tuple(self.at(x, shape4(x.shape)) for x in v) if isinstance(v, tuple) else self.at(v, shape4(v.shape))
            for k, v in op.inputs.items()
        }
        out = emit(op.kind, inputs, attrs, function=self.into)[0]
        target = shape4(op.out.shape)
        self.values[op.out] = out if out.shape == target else ops.reshape(out, shape=target)

    def _raw(self, op: Op, form: Any) -> None:
        inputs: dict[str, Any] = {
            k: tuple(self.at(x, form(x.shape)) for x in v) if isinstance(v, tuple) else self.at(v, form(v.shape))
            for k, v in op.inputs.items()
        }
        for old, new in zip(op.outputs, emit(op.kind, inputs, op.attrs, function=self.into), strict=True):
            target = shape4(old.shape)
            self.values[old] = new if new.shape == target else ops.reshape(new, shape=target)


def type4(type: TensorType) -> TensorType:
    """A logical type in rank four."""
    return TensorType(type.dtype, shape4(type.shape))
