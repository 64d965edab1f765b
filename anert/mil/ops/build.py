"""What the families share: checks that speak (ShapeError), and small builders that gradient rules are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from anert.errors import ShapeError
from anert.mil.graph import Function, Operand, TensorType, Value
from anert.mil.ops.table import Types, emit, fit

FLOAT = ("fp16", "fp32")
ARITHMETIC = (*FLOAT, "int32")
INDEX = ("int32", "int16", "uint16", "int8", "uint8")
ANY = (*FLOAT, *INDEX, "bool")

Attrs = Mapping[str, Any]
"""Attributes by name, resolved."""

Arrays = Mapping[str, np.ndarray]
"""Operands by name, as the NumPy definitions take them."""

HOST = frozenset({"cpu", "reference"})
"""Backends of ops that only gradients need, or that the engine does not take (ane_facts 3.5)."""

Tensorlike = Value | np.ndarray | np.generic | float | Sequence[Any]
"""What an operand may be given as: a Value, or a constant beside one that names the function and the dtype."""


class UnaryOp(Protocol):
    """A traced op of one operand."""

    def __call__(self, x: Value, *, name: str | None = None) -> Value: ...


class BinaryOp(Protocol):
    """A traced op of two operands that broadcast; one of them may be a scalar or an array."""

    def __call__(self, x: Tensorlike, y: Tensorlike, *, name: str | None = None) -> Value: ...


# Checks


def tensor(kind: str, dtype: str, shape: Iterable[int]) -> TensorType:
    """The type of a result. Raises ShapeError for empty tensors, which MIL does not have, and for absurd sizes."""
    shape = tuple(shape)
    if any(d <= 0 for d in shape):
        raise ShapeError(f"{kind} would give shape {shape}: every dimension must be at least 1")
    return TensorType(dtype, shape)


def one_dtype(kind: str, types: Types, names: Sequence[str], domain: Sequence[str]) -> str:
    """The dtype that those of `names` that are there share. Raises ShapeError if they differ or are not in `domain`."""
    given: dict[str, str] = {n: types[n].dtype for n in names if n in types}
    for name, dtype in given.items():
        if dtype not in domain:
            raise ShapeError(f"{kind}: {name} is {dtype}, expected {' or '.join(domain)}: cast it")
    if len(set(given.values())) > 1:
        pairs = ", ".join(f"{n} {d}" for n, d in given.items())
        raise ShapeError(f"{kind}: operands must have one dtype, got {pairs}: cast one of them")
    return next(iter(given.values()))


def rank_of(kind: str, name: str, t: TensorType, low: int, high: int = 1 << 10) -> int:
    """The rank of `t`. Raises ShapeError unless low <= rank <= high."""
    if not low <= t.rank <= high:
        span = f"{low}" if low == high else f"at least {low}" if high == 1 << 10 else f"{low} to {high}"
        raise ShapeError(f"{kind}: {name} has shape {t.shape}, expected rank {span}")
    return t.rank


def axis_of(kind: str, axis: int, rank: int, name: str = "axis") -> int:
    """`axis` counted from the front. Raises ShapeError if there is no such axis."""
    if not -rank <= axis < rank:
        raise ShapeError(f"{kind}: {name} {axis} is out of range for rank {rank}: expected {-rank} to {rank - 1}")
    return axis % rank


def axes_of(kind: str, axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Axes counted from the front, ascending. Raises ShapeError for one that is out of range or named twice."""
    found = sorted(axis_of(kind, a, rank, "axes:") for a in axes)
    if len(set(found)) != len(found):
        raise ShapeError(f"{kind}: axes {tuple(axes)} name an axis twice")
    return tuple(found)


def length(kind: str, name: str, value: Sequence[Any], expected: int) -> None:
    """Raises ShapeError unless the attribute `value` has `expected` entries."""
    if len(value) != expected:
        raise ShapeError(f"{kind}: {name} has {len(value)} entries, expected {expected}: got {tuple(value)}")


def choice(kind: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ShapeError unless `value` is one of `choices`."""
    if value not in choices:
        raise ShapeError(f"{kind}: {name} {value!r} is unknown: expected one of {', '.join(choices)}")


def broadcast(kind: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The NumPy broadcast of shapes. Raises ShapeError naming them."""
    rank = max(len(s) for s in shapes)
    padded = [(1,) * (rank - len(s)) + s for s in shapes]
    out = []
    for dims in zip(*padded, strict=True):
        sizes = {d for d in dims if d != 1} or {1}
        if len(sizes) > 1:
            named = " and ".join(map(str, shapes))
            raise ShapeError(f"{kind}: shapes {named} do not broadcast: dimensions must be equal or 1")
        out.append(sizes.pop())
    return tuple(out)


def size(shape: Iterable[int]) -> int:
    """The product of `shape`, exact for any integers."""
    n = 1
    for d in shape:
        n *= d
    return n


# Builders


def one(kind: str, inputs: Mapping[str, Operand | None], attrs: Mapping[str, Any] | None = None,
        name: str | None = None) -> Value:  # fmt: skip
    """Emit an op that has one output."""
    return emit(kind, inputs, attrs, name)[0]


def constant(function: Function, value: Any, dtype: str) -> Value:
    """A constant of `dtype` in `function`. A scalar that the function already has is used again."""
    a = fit("constant", value, dtype)
    if a.ndim == 0:
        for op in function.ops:
            c = op.attrs.get("val") if op.kind == "const" else None
            if c is not None and c.ndim == 0 and c.dtype == a.dtype and c.tobytes() == a.tobytes():
                return op.out
    return function.const(a, dtype)


def operands(kind: str, dtypes: Mapping[str, str] | None = None, **given: Any) -> dict[str, Operand | None]:
    """Operands by name with scalars, arrays and sequences made constants; None stays None.

    They take the function of the first Value, and its dtype unless `dtypes` names another for the argument.
    """
    of = {k: v for k, v in given.items() if isinstance(v, Value)}
    if not of:
        raise ShapeError(f"{kind} needs at least one operand that is a Value, got {tuple(given.values())!r}")
    function = next(iter(of.values())).function
    dtype = next((v.dtype for k, v in of.items() if k not in (dtypes or {})), "fp16")
    return {
        k: v if v is None or isinstance(v, Value) else constant(function, v, (dtypes or {}).get(k, dtype))
        for k, v in given.items()
    }


def differentiable(v: Operand | None) -> bool:
    """Whether a gradient of this operand can matter: it is there, floating and not a constant."""
    return isinstance(v, Value) and v.dtype in FLOAT and not v.is_const


def zeros(like: Value, shape: tuple[int, ...]) -> Value:
    """Zeros of `like`'s dtype; a big tensor is one padded zero, so that no long constant enters the text."""
    if size(shape) <= 64:
        return like.function.const(np.zeros(shape), like.dtype)
    seed = like.function.const(np.zeros((1,) * len(shape)), like.dtype)
    return one("pad", {"x": seed}, {"pad": tuple(p for d in shape for p in (0, d - 1))})


def broadcast_to(v: Value, shape: tuple[int, ...]) -> Value:
    """`v` (of the rank of `shape`) repeated along its axes of size 1, by adding zeros no larger than those axes."""
    if v.shape == shape:
        return v
    grown = tuple(1 if have == want else want for have, want in zip(v.shape, shape, strict=True))
    return one("add", {"x": v, "y": v.function.const(np.zeros(grown), v.dtype)})


def thin(v: Value) -> Value:
    """`v` before zeros were added to broadcast it, else `v`."""
    if v.op is not None and v.op.kind == "add":
        x, y = v.op.inputs["x"], v.op.inputs["y"]
        if isinstance(x, Value) and isinstance(y, Value) and y.const is not None and not y.const.any():
            return x
    return v


def times(dout: Value, factor: Value | float) -> Value:
    """dout * factor, without the broadcast of dout where the product broadcasts by itself."""
    if isinstance(factor, Value):
        t = thin(dout)
        if broadcast("mul", t.shape, factor.shape) == dout.shape:
            return t * factor
    return dout * factor


def unbroadcast(g: Value, shape: tuple[int, ...]) -> Value:
    """The gradient of an operand of `shape` that was broadcast to `g.shape`: summed over what was repeated."""
    if g.shape == shape:
        return g
    lead = len(g.shape) - len(shape)
    axes = (*range(lead), *(i + lead for i, d in enumerate(shape) if d == 1 and g.shape[i + lead] != 1))
    if axes:
        g = one("reduce_sum", {"x": g}, {"axes": axes, "keep_dims": True})
    return g if g.shape == shape else one("reshape", {"x": g}, {"shape": shape})
