"""The operators of Value: arithmetic, @, slices, reshape and transpose. Comparisons stay Python's own (identity)."""

from __future__ import annotations

from types import EllipsisType
from typing import Any

from anert.errors import ShapeError
from anert.mil.graph import Value
from anert.mil.ops.contract import matmul
from anert.mil.ops.elementwise import add, mul, pow, real_div, sub
from anert.mil.ops.view import reshape, slice_by_index, transpose


def _negative(x: Value) -> Value:
    return mul(x, -1)


def _item(x: Value, index: Any) -> Value:
    """x[index] with integers, slices and one `...`, as slice_by_index. Raises ShapeError."""
    items = list(index) if isinstance(index, tuple) else [index]
    rank = len(x.shape)
    if sum(i is ... for i in items) > 1:
        raise ShapeError(f"{x.name}[...]: one ellipsis at most")
    spare = rank - sum(i is not ... for i in items)
    if spare < 0:
        raise ShapeError(f"{x.name} has rank {rank}, {len(items)} indices are too many")
    dots = next((n for n, i in enumerate(items) if isinstance(i, EllipsisType)), len(items))
    items[dots : dots + 1] = [slice(None)] * spare
    columns = [_bounds(x, i) for i in items]
    begin, end, stride, begin_mask, end_mask, squeeze_mask = zip(*columns, strict=True)
    return slice_by_index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def _bounds(x: Value, i: Any) -> tuple[int, int, int, bool, bool, bool]:
    """One index as slice_by_index's begin, end, stride, begin_mask, end_mask, squeeze_mask."""
    if isinstance(i, slice):
        return i.start or 0, i.stop or 0, 1 if i.step is None else i.step, i.start is None, i.stop is None, False
    if isinstance(i, bool) or not hasattr(i, "__index__"):
        raise ShapeError(f"{x.name}[{i!r}]: an index is an integer, a slice or ...; new axes come from expand_dims")
    n = i.__index__()
    return n, n + 1, 1, False, False, True


def _dims(given: tuple[Any, ...]) -> tuple[int, ...]:
    """x.reshape(2, 3) and x.reshape((2, 3)) alike."""
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def attach() -> None:
    """Give Value its operators; `anert.mil.ops` calls it once, on import."""
    methods: dict[str, Any] = {
        "__add__": lambda x, y: add(x, y),
        "__radd__": lambda y, x: add(x, y),
        "__sub__": lambda x, y: sub(x, y),
        "__rsub__": lambda y, x: sub(x, y),
        "__mul__": lambda x, y: mul(x, y),
        "__rmul__": lambda y, x: mul(x, y),
        "__truediv__": lambda x, y: real_div(x, y),
        "__rtruediv__": lambda y, x: real_div(x, y),
        "__matmul__": lambda x, y: matmul(x, y),
        "__rmatmul__": lambda y, x: matmul(x, y),
        "__pow__": lambda x, y: pow(x, y),
        "__rpow__": lambda y, x: pow(x, y),
        "__neg__": _negative,
        "__getitem__": _item,
        "__iter__": None,  # __getitem__ alone would make Python walk x[0], x[1], ... without end
        "__array_ufunc__": None,  # array * value comes here instead of to NumPy
        "reshape": lambda x, *shape: reshape(x, _dims(shape)),
        "transpose": lambda x, *perm: transpose(x, _dims(perm)),
    }
    for name, method in methods.items():
        setattr(Value, name, method)
