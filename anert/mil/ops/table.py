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
from anert.mil.graph import DTYPES, Function, Op, Operand, TensorType, Value

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
    since: str = "ios15"
    """First opset that has the argument: a function of an older one prints without it, and must leave its default."""


@dataclass(frozen=True, slots=True)
class OpDef:
    """A row of the table.

    resolve(types, attrs) -> attributes in the one spelling that the graph keeps (axes not negative, defaults that hang
        on the rank filled in, reshape's -1 and 0 worked out); raises ShapeError. All that follows sees these.
    infer(types, attrs) -> output types; raises ShapeError with what was expected and what came.
    numpy(inputs, attrs) -> array (or NumPy scalar), or a tuple for several outputs; `evaluate` evens that out. `inputs`
        maps argument names to arrays (tuples of arrays for variadic ones); float inputs arrive as float64 and float
        results are float64: the definition of the op.
    grad(op, douts) -> {input name: gradient Value | tuple | None}: builds MIL ops in `op`'s function. `douts` are the
        cotangents of the outputs, None where an output does not matter. None as a whole where no gradient exists.
    flops(types, attrs, outs) -> multiply-adds counted as 2, elementwise as 0 (ane_facts 6.3.2).
    category: what the CPU engine does with it: `elementwise`, `reduce`, `view` (no arithmetic: strides or a copy),
        `contract` (matmul-like), `const`, or `composite` (rewritten into others before lowering).
    backends: of `ane`, `cpu`, `reference`: who runs it.
    decompose(inputs, attrs) -> Value: the same result from simpler ops, in the forms known to work on the ANE, appended
        to the function that the operands belong to. Every `composite` row has one.
    native: backends on which a composite is best left as it is.
    """

    kind: str
    args: tuple[Arg, ...]
    infer: Callable[[Types, Mapping[str, Any]], Sequence[TensorType]]
    numpy: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    grad: Callable[[Op, tuple[Value | None, ...]], dict[str, Any]] | None = None
    flops: Callable[[Types, Mapping[str, Any], Sequence[TensorType]], int] | None = None
    category: str = "elementwise"
    backends: frozenset[str] = frozenset({"ane", "cpu", "reference"})
    resolve: Callable[[Types, Mapping[str, Any]], dict[str, Any]] | None = None
    decompose: Callable[[Mapping[str, Any], Mapping[str, Any]], Value] | None = None
    native: frozenset[str] = frozenset()

    def evaluate(self, inputs: Mapping[str, Any], attrs: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """The op's outputs by its definition, as arrays, without floating-point warnings: inf and NaN are results."""
        with np.errstate(all="ignore"):
            result = self.numpy(inputs, attrs)
        return tuple(np.asarray(a) for a in (result if isinstance(result, tuple) else (result,)))

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


def fit(what: str, value: Any, dtype: str) -> np.ndarray:
    """`value` as an array of `dtype`. Raises ShapeError if it is no number or does not fit (finite stays finite)."""
    a = np.asarray(value)
    if a.dtype.kind not in "biuf":
        raise ShapeError(f"{what} must be a number for {dtype}, got {value!r}")
    with np.errstate(all="ignore"):
        fitted = a.astype(DTYPES[dtype])
    lost = np.asarray(np.isfinite(a) & ~np.isfinite(fitted) if dtype.startswith("fp") else fitted != a)
    if lost.any():
        raise ShapeError(f"{what}: {a[lost].flat[0]} does not fit {dtype}: cast the operand or change the value")
    return fitted


def _scalar(what: str, kind: str, value: Any, dtype: str) -> Any:
    """One attribute value checked against its MIL type; `fp` takes the value that `dtype` can hold."""
    if kind == "fp" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(fit(what, value, dtype if dtype in ("fp16", "fp32") else "fp32"))
    if type(value) is not {"int32": int, "bool": bool, "string": str}.get(kind):
        raise ShapeError(f"{what} must be {kind}, got {value!r}")
    if isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
        raise ShapeError(f"{what} must fit int32, got {value}")
    return value


def attribute(kind: str, arg: Arg, value: Any, dtype: str) -> Any:
    """An attribute in the form that the graph keeps: Python scalars and tuples of the MIL type of `arg`."""
    what, value = f"{kind}: argument {arg.name!r}", normalise(value)
    if value is None and arg.default is None:
        return None
    if arg.type.endswith("[]"):
        items = value if isinstance(value, tuple) else (value,)
        return tuple(_scalar(what, arg.type[:-2], v, dtype) for v in items)
    return _scalar(what, arg.type, value, dtype)


def _attributes(row: OpDef, given: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Every attribute of `row`: given or default, checked."""
    attributes = {}
    for a in row.args:
        if a.kind == "attr":
            if a.name not in given and a.default is REQUIRED:
                raise ShapeError(f"{row.kind} needs the argument {a.name!r}")
            attributes[a.name] = attribute(row.kind, a, given.get(a.name, a.default), dtype)
    return attributes


def _operands(row: OpDef, given: Mapping[str, Operand]) -> dict[str, Operand]:
    """The tensor operands in argument order."""
    for k, v in given.items():
        kind = row.arg(k).kind
        if kind == "attr":
            raise ShapeError(f"{row.kind}: argument {k!r} must be a compile-time constant")
        if (kind == "tensors") != isinstance(v, tuple) or v == ():
            takes = "a tuple of tensors" if kind == "tensors" else "one tensor"
            raise ShapeError(f"{row.kind}: argument {k!r} takes {takes}")
    for a in row.args:
        if a.kind != "attr" and a.name not in given and a.default is REQUIRED:
            raise ShapeError(f"{row.kind} needs the operand {a.name!r}")
    return {a.name: given[a.name] for a in row.args if a.name in given}


def emit(kind: str, inputs: Mapping[str, Operand | None], attrs: Mapping[str, Any] | None = None,
         name: str | Sequence[str] | None = None, function: Function | None = None) -> list[Value]:  # fmt: skip
    """Check the arguments of an op against its row, infer its types, append it; returns its outputs.
    `name` is a hint for all outputs, or one name for each.

    Absent optional operands are dropped; absent attributes take their default, and all are resolved, so that an op's
    attrs are always complete. `const` needs `function`. Raises ShapeError or UnsupportedError.
    """
    row = lookup(kind)
    for k in attrs or {}:
        if row.arg(k).kind != "attr":
            raise ShapeError(f"{kind}: argument {k!r} must be a tensor")
    operands = _operands(row, {k: v for k, v in inputs.items() if v is not None})
    first = next((v[0] if isinstance(v, tuple) else v for v in operands.values()), None)
    fn = first.function if first is not None else function
    if fn is None:
        raise ShapeError(f"{kind} has no operand: pass function=")
    if kind == "const":
        return [fn.const((attrs or {})["val"], name=name if isinstance(name, str) else "c")]
    attributes = _attributes(row, attrs or {}, first.dtype if first is not None else "fp16")
    types = types_of(operands)
    if row.resolve is not None:
        attributes.update(row.resolve(types, attributes))
    return fn.append(kind, operands, attributes, row.infer(types, attributes), name)
