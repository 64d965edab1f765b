"""Typed SSA for MIL: Value, Op, Function, Module.

A Function is a list of ops in execution order. Tensor operands are Values; everything that MIL spells as a constant
argument (axes, perm, modes) is a plain Python attribute of the Op, and the printer writes it as MIL wants it.
Two Functions are equal when names, types, ops, attributes and order are equal: `parse(print(f)) == f`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from anert.errors import ShapeError

DTYPES: dict[str, np.dtype] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int16": np.dtype(np.int16),
    "uint16": np.dtype(np.uint16),
    "int32": np.dtype(np.int32),
    "uint32": np.dtype(np.uint32),
    "int64": np.dtype(np.int64),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
}
"""MIL scalar types that a tensor may hold here, and the NumPy type of the same bytes."""

MAX_ELEMENTS = 1 << 40
"""Largest product of a shape that a type may have: a limit on nonsense, far above any real tensor."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's dtype (a key of DTYPES) and static shape; rank 0 is a scalar."""

    dtype: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ShapeError(f"unknown dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        n = 1
        for d in self.shape:
            if d < 0:
                raise ShapeError(f"shape {self.shape} has a negative dimension")
            n *= d
        if n > MAX_ELEMENTS:
            raise ShapeError(f"shape {self.shape} has {n} elements: more than {MAX_ELEMENTS} is refused")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Value:
    """One SSA value: a Function's input or an op's output. Arithmetic operators are attached by `anert.mil.ops`."""

    __slots__ = ("type", "name", "op", "function")

    def __init__(self, type: TensorType, name: str, op: Op | None, function: Function) -> None:
        self.type, self.name, self.op, self.function = type, name, op, function

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype

    @property
    def is_const(self) -> bool:
        return self.op is not None and self.op.kind == "const"

    @property
    def const(self) -> np.ndarray | None:
        """The array behind a `const` value, else None. Do not write to it."""
        return self.op.attrs["val"] if self.op is not None and self.op.kind == "const" else None

    def __repr__(self) -> str:
        return f"<{self.name}: {self.type}>"

    if TYPE_CHECKING:  # defined by anert.mil.ops.operators, which has the op table below it

        def __add__(self, other: Any) -> Value: ...
        def __radd__(self, other: Any) -> Value: ...
        def __sub__(self, other: Any) -> Value: ...
        def __rsub__(self, other: Any) -> Value: ...
        def __mul__(self, other: Any) -> Value: ...
        def __rmul__(self, other: Any) -> Value: ...
        def __truediv__(self, other: Any) -> Value: ...
        def __rtruediv__(self, other: Any) -> Value: ...
        def __matmul__(self, other: Any) -> Value: ...
        def __rmatmul__(self, other: Any) -> Value: ...
        def __pow__(self, other: Any) -> Value: ...
        def __rpow__(self, other: Any) -> Value: ...
        def __neg__(self) -> Value: ...
        def __getitem__(self, index: Any) -> Value: ...
        def reshape(self, *shape: int) -> Value: ...
        def transpose(self, *perm: int) -> Value: ...


Operand = Value | tuple[Value, ...]


@dataclass(eq=False, slots=True)
class Op:
    """One statement: `outputs = kind(**inputs, **attrs)`. A variadic operand (concat's `values`) is a tuple."""

    kind: str
    inputs: dict[str, Operand]
    attrs: dict[str, Any]
    outputs: list[Value] = field(default_factory=list)
    label: str = ""
    """MIL's `name` attribute where it differs from the first output's name; not part of equality."""

    @property
    def out(self) -> Value:
        return self.outputs[0]

    def operands(self) -> Iterator[Value]:
        """Every tensor operand in argument order, variadic ones flattened."""
        for v in self.inputs.values():
            if isinstance(v, tuple):
                yield from v
            else:
                yield v

    def __repr__(self) -> str:
        return f"<Op {self.kind} -> {', '.join(o.name for o in self.outputs)}>"


Slope = Callable[[Value, Value, tuple[Value, ...]], Sequence[Value | None]]
"""(out, dout, values) -> the gradient of each of `values`, of its type, by ops in their function; None: it has none."""


class Function:
    """A MIL function under construction or finished: `inputs`, `ops` in order, `outputs`, all values named uniquely.

    Names are given by `fresh`: the hint, or the op's kind, with a running number. `opset` is ios16 or ios18.
    """

    def __init__(self, name: str = "main", opset: str = "ios18") -> None:
        self.name, self.opset = name, opset
        self.inputs: list[Value] = []
        self.ops: list[Op] = []
        self.outputs: list[Value] = []
        self.vjps: dict[Value, tuple[tuple[Value, ...], Slope]] = {}
        self._names: set[str] = set()
        self._count = 0

    def fresh(self, hint: str) -> str:
        """A name that no value of this function has: `hint` itself if free, else `hint_<n>`."""
        name = hint
        while name in self._names:
            name = f"{hint}_{self._count}"
            self._count += 1
        self._names.add(name)
        return name

    def input(self, name: str, shape: Sequence[int], dtype: str = "fp16") -> Value:
        """Declare the next formal input. Raises ShapeError if the name is taken."""
        if name in self._names:
            raise ShapeError(f"function {self.name!r} already has a value named {name!r}")
        v = Value(TensorType(dtype, tuple(int(d) for d in shape)), self.fresh(name), None, self)
        self.inputs.append(v)
        return v

    def const(self, value: Any, dtype: str | None = None, name: str = "c") -> Value:
        """A constant tensor or scalar. `dtype` defaults to the array's own MIL type; Python floats become fp16."""
        a = np.asarray(value)
        if dtype is None:
            dtype = "fp16" if a.dtype == np.float64 else mil_dtype(a.dtype)
        a = np.array(a, dtype=DTYPES[dtype], order="C")  # own copy: SSA constants never change
        a.setflags(write=False)
        return self.append("const", {}, {"val": a}, [TensorType(dtype, a.shape)], name)[0]

    def append(
        self, kind: str, inputs: dict[str, Operand], attrs: dict[str, Any], types: Sequence[TensorType],
        name: str | Sequence[str] | None = None,
    ) -> list[Value]:  # fmt: skip
        """Add an op whose output types are already inferred. Callers go through `anert.mil.ops.emit`.
        `name` is a hint for all outputs, or one name for each."""
        op = Op(kind, dict(inputs), dict(attrs))
        for v in op.operands():
            if v.function is not self:
                raise ShapeError(f"{kind}: operand {v.name!r} belongs to another function")
        hints = [name or kind] * len(types) if isinstance(name, str | None) else [*name, *[kind] * len(types)]
        op.outputs = [Value(t, self.fresh(hint), op, self) for t, hint in zip(types, hints, strict=False)]
        self.ops.append(op)
        return op.outputs

    def returns(self, *values: Value) -> Function:
        """Set the outputs, in order; returns self."""
        for v in values:
            if v.function is not self:
                raise ShapeError(f"output {v.name!r} belongs to another function")
        self.outputs = list(values)
        return self

    def custom_vjp(self, out: Value, values: Sequence[Value], slope: Slope) -> Value:
        """Give `out` a gradient rule of its own, for the whole way on which `values` become it: `slope` in place of the
        rules of the ops on that way, where it takes fewer ops or keeps them smaller. Returns `out`.

        `differentiate` reads it. It is no part of equality or of MIL text, and the copy that a pass makes is
        differentiated op by op again. Raises ShapeError unless `out` is the only output of an op of this function and
        `values` are there before it.
        """
        if out.op is None or out.function is not self or len(out.op.outputs) != 1:
            raise ShapeError(f"custom_vjp: {out.name!r} is not the only output of an op of function {self.name!r}")
        before = {*self.inputs, *(v for op in self.ops[: self.ops.index(out.op)] for v in op.outputs)}
        for v in values:
            if v not in before:
                raise ShapeError(f"custom_vjp of {out.name!r}: {v.name!r} is not there before it")
        self.vjps[out] = tuple(values), slope
        return out

    def rename(self, value: Value, name: str) -> None:
        """Give a value another name; ShapeError if some other value has it."""
        if name == value.name:
            return
        if name in self._names:
            raise ShapeError(f"function {self.name!r} already has a value named {name!r}")
        self._names.discard(value.name)
        self._names.add(name)
        value.name = name

    def claim(self, name: str, value: Value) -> None:
        """Give `value` this name; an op's output that has it now gets a fresh one. ShapeError if an input has it."""
        for op in self.ops:
            for v in op.outputs:
                if v.name == name and v is not value:
                    v.name = self.fresh(name)
                    self._names.discard(name)
        self.rename(value, name)

    def users(self) -> dict[Value, list[Op]]:
        """Which ops read each value (values that nobody reads are absent)."""
        users: dict[Value, list[Op]] = {}
        for op in self.ops:
            for v in op.operands():
                users.setdefault(v, []).append(op)
        return users

    def structure(self) -> tuple[Any, ...]:
        """A hashable picture of everything that equality compares."""

        def attr(a: Any) -> Any:
            if isinstance(a, np.ndarray):
                if a.dtype.kind == "f" and np.isnan(a).any():  # MIL text has one NaN: payloads do not count
                    a = np.where(np.isnan(a), np.array(np.nan, a.dtype), a)
                return ("ndarray", a.dtype.str, a.shape, a.tobytes())
            if isinstance(a, tuple):
                return tuple(attr(x) for x in a)
            if isinstance(a, float):
                return ("float", a.hex())  # equal to itself if NaN; -0.0 is not 0.0
            return (type(a).__name__, a) if isinstance(a, (bool, int)) else a

        def operand(v: Operand) -> Any:
            return tuple(x.name for x in v) if isinstance(v, tuple) else v.name

        return (
            self.name,
            self.opset,
            tuple((v.name, v.type) for v in self.inputs),
            tuple(
                (
                    op.kind,
                    tuple(sorted((k, operand(v)) for k, v in op.inputs.items())),
                    tuple(sorted((k, attr(v)) for k, v in op.attrs.items())),
                    tuple((v.name, v.type) for v in op.outputs),
                )
                for op in self.ops
            ),
            tuple(v.name for v in self.outputs),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.structure() == other.structure()

    def __hash__(self) -> int:
        return hash(self.structure())

    def __repr__(self) -> str:
        return f"<Function {self.name}: {len(self.inputs)} inputs, {len(self.ops)} ops, {len(self.outputs)} outputs>"


def copy_op(op: Op, into: Function, mapping: dict[Value, Value]) -> list[Value]:
    """Append a copy of `op` to `into`, operands through `mapping`, which learns the outputs; returns them."""
    inputs: dict[str, Operand] = {
        k: tuple(mapping[x] for x in v) if isinstance(v, tuple) else mapping[v] for k, v in op.inputs.items()
    }
    outputs = into.append(op.kind, inputs, op.attrs, [o.type for o in op.outputs])
    for old, new in zip(op.outputs, outputs, strict=True):
        if old.name not in into._names:
            into.rename(new, old.name)
        mapping[old] = new
    return outputs


@dataclass(eq=True)
class Module:
    """A MIL program: functions by name (usually one, `main`) and the buildInfo that is printed above them."""

    functions: dict[str, Function] = field(default_factory=dict)
    build_info: dict[str, str] = field(default_factory=dict)

    @property
    def main(self) -> Function:
        return self.functions["main"]


def mil_dtype(dtype: np.dtype | type) -> str:
    """The MIL name of a NumPy dtype. Raises ShapeError for types that MIL tensors do not have."""
    d = np.dtype(dtype)
    for name, t in DTYPES.items():
        if t == d:
            return name
    raise ShapeError(f"NumPy dtype {d} has no MIL type: convert it to one of {', '.join(DTYPES)}")
