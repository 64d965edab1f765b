"""The op table: one row per MIL op, and `emit`, the only way by which ops enter a Function.

A row says what the op takes, what comes out, what it means (NumPy), how it differentiates, what it costs, and which
backends run it. Rows live in the family files beside this one; importing `anert.mil.ops` fills the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anert.errors import ShapeError, UnsupportedError
from anert.mil.graph import Function, Op, Operand, TensorType, Value

REQUIRED: Any = object()
"""Default of an argument that must be given."""

Types = Mapping[str, Any]
"""Argument name -> TensorType, or a tuple of them for a variadic operand."""


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument of a MIL op.

    kind `tensor`: a Value (`optional` if default is None). kind `tensors`: a tuple of Values (MIL's `values=(a, b)`).
    kind `attr`: a compile-time constant, kept as a Python value; `type` is its MIL type as printed: `int32`, `bool`,
    `string`, `fp`  (the dtype of the op's first tensor operand), or with `[]` behind it for a rank-1 tensor: `int32[]`.
    """

    name: str
    kind: str = "tensor"
    type: str = ""
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True)
class OpDef:
    """A row of the table.

    infer(types, attrs) -> output types; raises ShapeError with what was expected and what came.
    numpy(inputs, attrs) -> array, or a tuple for several outputs. `inputs` maps argument names to arrays (tuples of arrays
        for variadic ones); float inputs arrive as float64 and float results are float64: the definition of the op.
    grad(op, douts) -> {input name: gradient Value | tuple | None}: builds MIL ops in `op`'s function. `douts` are the
        cotangents of the outputs, None where an output does not matter. None as a whole where no gradient exists.
    flops(types, attrs, outs) -> multiply-adds counted as 2, elementwise as 0 (ane_facts 6.3.2).
    category: what the CPU engine does with it: `elementwise`, `reduce`, `view` (no arithmetic: strides or a copy),
        `contract` (matmul-like), `const`, or `composite` (rewritten into others before lowering).
    backends: of `ane`, `cpu`, `reference`: who runs it.
    """

    kind: str
    args: tuple[Arg, ...]
    infer: Callable[[Types, Mapping[str, Any]], Sequence[TensorType]]
    numpy: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    grad: Callable[[Op, tuple[Value | None, ...]], dict[str, Any]] | None = None
    flops: Callable[[Types, Mapping[str, Any], Sequence[TensorType]], int] | None = None
    category: str = "elementwise"
    backends: frozenset[str] = frozenset({"ane", "cpu", "reference"})

    def arg(self, name: str) -> Arg:
        for a in self.args:
            if a.name == name:
                return a
        known = ", ".join(a.name for a in self.args)
        raise ShapeError(f"{self.kind} has no argument {name!r}: it takes {known}")


TABLE: dict[str, OpDef] = {}
"""kind -> row. Filled while `anert.mil.ops` is imported, never after."""


def define(row: OpDef) -> OpDef:
    """Enter a row into the table; a kind is defined once."""
    assert row.kind not in TABLE, row.kind
    TABLE[row.kind] = row
    return row


def lookup(kind: str) -> OpDef:
    """The row of `kind`. Raises UnsupportedError naming the op if there is none."""
    row = TABLE.get(kind)
    if row is None:
        raise UnsupportedError(f"op {kind!r} is not in anert's op table ({len(TABLE)} ops): see anert/mil/ops/")
    return row


def types_of(inputs: Mapping[str, Operand]) -> dict[str, Any]:
    """Operands -> their types, variadic ones as tuples."""
    return {k: tuple(x.type for x in v) if isinstance(v, tuple) else v.type for k, v in inputs.items()}


def normalise(value: Any) -> Any:
    """An attribute as the graph keeps it: NumPy scalars and arrays become Python scalars and tuples."""
    if isinstance(value, np.ndarray):
        return value.item() if value.ndim == 0 else tuple(normalise(v) for v in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(normalise(v) for v in value)
    return value


def emit(kind: str, inputs: Mapping[str, Operand | None], attrs: Mapping[str, Any] | None = None,
         name: str | None = None, function: Function | None = None) -> list[Value]:  # fmt: skip
    """Check the arguments of an op against its row, infer its types, append it; returns its outputs.

    Absent optional operands are dropped; absent attributes take their default, so that an op's attrs are always complete.
    Raises ShapeError or UnsupportedError.
    """
    row = lookup(kind)
    given = {k: v for k, v in inputs.items() if v is not None}
    attributes = {k: normalise(v) for k, v in (attrs or {}).items()}
    for k in given:
        if row.arg(k).kind == "attr":
            raise ShapeError(f"{kind}: argument {k!r} must be a compile-time constant")
    for k in attributes:
        if row.arg(k).kind != "attr":
            raise ShapeError(f"{kind}: argument {k!r} must be a tensor")
    for a in row.args:
        if a.kind == "attr":
            if a.name not in attributes:
                if a.default is REQUIRED:
                    raise ShapeError(f"{kind} needs the argument {a.name!r}")
                attributes[a.name] = a.default
        elif a.name not in given and a.default is REQUIRED:
            raise ShapeError(f"{kind} needs the operand {a.name!r}")
    fn = function
    for v in given.values():
        fn = fn or (v[0].function if isinstance(v, tuple) else v.function)
    if fn is None:
        raise ShapeError(f"{kind} has no operand: pass function=")
    ordered = {a.name: given[a.name] for a in row.args if a.name in given}
    attributes = {a.name: attributes[a.name] for a in row.args if a.kind == "attr"}
    types = row.infer(types_of(ordered), attributes)
    return fn.append(kind, ordered, attributes, types, name)
