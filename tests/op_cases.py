"""Random but valid arguments for every op of the table: hypothesis strategies that any backend's tests can draw from.

    @given(op_cases("matmul"))
    def test(case): f = trace("matmul", case); ...

Float operands are fp16 arrays (so that a port's rounding changes nothing), indices int32, conditions bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from anert.mil import ops
from anert.mil.graph import Function, Value, mil_dtype


class Case(NamedTuple):
    """Arguments of one op: arrays by operand name (a tuple for variadic ones; optional ones may lack), attributes."""

    inputs: dict[str, Any]
    attrs: dict[str, Any]


def trace(kind: str, case: Case, dtype: str | None = None, constants: tuple[str, ...] = ()) -> Function:
    """A function of this one op: `i00_<operand>`, ... in the case's order -> its outputs; `feed` gives its inputs.

    `dtype` replaces fp16; operands named in `constants` become consts.
    """
    f = Function("main")
    inputs: dict[str, Any] = {}

    def value(name: str, a: np.ndarray) -> Value:
        t = dtype if dtype is not None and a.dtype == np.float16 else mil_dtype(a.dtype)
        if name in constants:
            return f.const(a, t)
        return f.input(f"i{len(f.inputs):02}_{name}", a.shape, t)

    for name, a in case.inputs.items():
        inputs[name] = tuple(value(name, x) for x in a) if isinstance(a, tuple) else value(name, a)
    return f.returns(*ops.emit(kind, inputs, case.attrs, function=f))


def feed(case: Case, constants: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays of `case` under the input names that `trace` gives them."""
    flat = [
        (name, x)
        for name, a in case.inputs.items()
        if name not in constants
        for x in (a if isinstance(a, tuple) else (a,))
    ]
    return {f"i{n:02}_{name}": x for n, (name, x) in enumerate(flat)}


# Draws

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Source:
    """What a case is drawn from: shapes no larger than `largest` a side, and arrays."""

    def __init__(self, draw: Draw, largest: int) -> None:
        self.draw, self.largest = draw, largest
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def dim(self) -> int:
        return self.draw(st.sampled_from([d for d in (1, 2, 3, 4, 5, 7, 8, 16, 17, 33) if d <= self.largest]))

    def shape(self, low: int = 0, high: int = 4) -> tuple[int, ...]:
        rank, shape = self.integer(low, high), []
        for _ in range(rank):
            d = self.dim()
            shape.append(d if d * int(np.prod(shape, dtype=int)) <= 4096 else 1)
        return tuple(shape)

    def broadcastable(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`."""
        cut = self.integer(0, len(shape))
        return tuple(d if self.flag() else 1 for d in shape[cut:])

    def axis(self, rank: int) -> int:
        return self.integer(-rank, rank - 1)

    def axes(self, rank: int) -> tuple[int, ...]:
        chosen = self.draw(st.sets(st.integers(0, rank - 1), min_size=1))
        return tuple(a - rank if self.flag() else a for a in sorted(chosen))

    def floats(self, shape: tuple[int, ...], low: float | None = None, high: float = 4.0) -> np.ndarray:
        """Normal numbers, or uniform ones in [low, high], as fp16 (rank 0 too is an array)."""
        a = self.rng.normal(size=shape) if low is None else self.rng.uniform(low, high, shape)
        return np.asarray(a).astype(np.float16)

    def ints(self, shape: tuple[int, ...], low: int = -20, high: int = 20) -> np.ndarray:
        return np.asarray(self.rng.integers(low, high, shape, endpoint=True)).astype(np.int32)

    def bools(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self.rng.integers(0, 2, shape)).astype(np.bool_)


def _unary(low: float | None = None, high: float = 4.0) -> Callable[[Source], Case]:
    return lambda s: Case({"x": s.floats(s.shape(), low, high)}, {})


def _pair(s: Source) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = s.shape()
    x, y = shape, s.broadcastable(shape)
    return (x, y) if s.flag() else (y, x)


def _binary(low: float | None = None, high: float = 4.0) -> Callable[[Source], Case]:
    def case(s: Source) -> Case:
        x, y = _pair(s)
        return Case({"x": s.floats(x, low, high), "y": s.floats(y, low, high)}, {})

    return case


def _division(s: Source) -> Case:
    x, y = _pair(s)
    signs = np.where(s.bools(y), 1, -1).astype(np.float16)
    return Case({"x": s.floats(x), "y": s.floats(y, 0.25) * signs}, {})


def _integer_or_float(s: Source) -> Case:
    x, y = _pair(s)
    if s.flag():
        return Case({"x": s.ints(x), "y": s.ints(y, 1, 9)}, {})
    return _division(s)


def _power(s: Source) -> Case:
    x, y = _pair(s)
    if s.flag():
        return Case({"x": s.floats(x, 0.25), "y": s.floats(y, -2.0, 3.0)}, {})
    return Case({"x": s.floats(x, 0.25), "y": np.array(s.one_of(-1.0, -0.5, 0.5, 1.0, 2.0, 3.0), np.float16)}, {})


def _comparison(s: Source) -> Case:
    x, y = _pair(s)
    return Case({"x": s.ints(x, -2, 2).astype(np.float16), "y": s.ints(y, -2, 2).astype(np.float16)}, {})


def _logic(s: Source) -> Case:
    x, y = _pair(s)
    return Case({"x": s.bools(x), "y": s.bools(y)}, {})


def _reduction(s: Source) -> Case:
    x = s.floats(s.shape(1))
    attrs: dict[str, Any] = {"keep_dims": s.flag()}
    if s.flag():
        attrs["axes"] = s.axes(x.ndim)
    return Case({"x": x}, attrs)


def _on_axis(s: Source) -> Case:
    x = s.floats(s.shape(1))
    return Case({"x": x}, {"axis": s.axis(x.ndim)})


def _argmax(s: Source) -> Case:
    shape = s.shape(1)
    x = s.rng.permutation(int(np.prod(shape))).reshape(shape).astype(np.int32)  # distinct: Core ML leaves ties open
    x = (x - x.size // 2).astype(np.float16) if x.size < 2048 else x
    return Case({"x": x}, {"axis": s.axis(x.ndim), "keep_dims": s.flag()})


def _cast(s: Source) -> Case:
    make = s.one_of(s.floats, s.ints, s.bools)
    return Case({"x": make(s.shape())}, {"dtype": s.one_of("fp16", "fp32", "int32", "bool")})


def _select(s: Source) -> Case:
    shape = s.shape()
    a, b, c = (s.broadcastable(shape) for _ in range(3))
    make = s.one_of(s.floats, s.ints)
    return Case({"cond": s.bools(c), "a": make(shape if s.flag() else a), "b": make(b)}, {})


def _matmul(s: Source) -> Case:
    m, k, n = s.dim(), s.dim(), s.dim()
    batch = s.shape(0, 2)
    if int(np.prod(batch)) * max(m * k, k * n) > 8192:
        batch = ()
    tx, ty = s.flag(), s.flag()
    x = (*batch, *((k, m) if tx else (m, k)))
    y = (*s.broadcastable(batch), *((n, k) if ty else (k, n)))
    vectors = s.one_of("no", "no", "no", "x", "y", "xy")
    if "x" in vectors:
        x, tx = (k,), False
    if "y" in vectors:
        y, ty = (k,), False
    return Case({"x": s.floats(x), "y": s.floats(y)}, {"transpose_x": tx, "transpose_y": ty})


def _linear(s: Source) -> Case:
    k, n = s.dim(), s.dim()
    inputs = {"x": s.floats((*s.shape(0, 2), k)), "weight": s.floats((n, k))}
    if s.flag():
        inputs["bias"] = s.floats((n,))
    return Case(inputs, {})


def _attention(s: Source) -> Case:
    batch, rows, columns, e, ev = s.shape(1, 2), s.dim(), s.dim(), s.dim(), s.dim()
    if int(np.prod(batch)) > 16:
        batch = (2,)
    inputs = {
        "query": s.floats((*batch, rows, e)),
        "key": s.floats((*batch, columns, e)),
        "value": s.floats((*batch, columns, ev)),
    }
    mask = s.one_of("none", "bool", "float", "batched")
    if mask == "bool":
        inputs["attn_mask"] = s.bools((rows, columns))
        inputs["attn_mask"][:, 0] = True  # a row that sees nothing is NaN
    elif mask != "none":
        inputs["attn_mask"] = s.floats((rows, columns) if mask == "float" else (*batch[:-1], 1, 1, columns))
    return Case(inputs, {})


def _spatial(s: Source) -> tuple[int, list[int], dict[str, Any]]:
    """Spatial rank, kernel and the attributes that both convolutions share."""
    rank = s.integer(1, 2)
    attrs = {
        "strides": [s.integer(1, 3) for _ in range(rank)],
        "dilations": [s.integer(1, 2) for _ in range(rank)],
        "groups": s.integer(1, 2),
    }
    return rank, [s.integer(1, 3) for _ in range(rank)], attrs


def _conv(s: Source) -> Case:
    rank, kernel, attrs = _spatial(s)
    groups = attrs["groups"]
    attrs["pad_type"] = s.one_of("valid", "same", "same_lower", "custom")
    if attrs["pad_type"] == "custom":
        attrs["pad"] = [s.integer(0, 2) for _ in range(2 * rank)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, attrs["dilations"], strict=True)]
    x = (s.integer(1, 2), groups * s.integer(1, 3), *(r + s.integer(0, 5) for r in reach))
    weight = (groups * s.integer(1, 3), x[1] // groups, *kernel)
    inputs = {"x": s.floats(x), "weight": s.floats(weight)}
    if s.flag():
        inputs["bias"] = s.floats(weight[:1])
    return Case(inputs, attrs)


def _conv_transpose(s: Source) -> Case:
    rank, kernel, attrs = _spatial(s)
    groups = attrs["groups"]
    x = (s.integer(1, 2), groups * s.integer(1, 3), *(s.integer(2, 5) for _ in range(rank)))
    weight = (x[1], s.integer(1, 3), *kernel)
    spans = zip(x[2:], attrs["strides"], kernel, attrs["dilations"], strict=True)
    full = [(d - 1) * t + (k - 1) * e + 1 for d, t, k, e in spans]
    attrs["pad_type"] = s.one_of("valid", "same", "custom")
    if attrs["pad_type"] == "custom":
        pads = [(s.integer(0, min(1, n // 3)), s.integer(0, min(1, n // 3))) for n in full]
        attrs["pad"] = [p for pair in pads for p in pair]
        if s.flag():  # as the gradient of a strided conv asks: up to stride - 1 more than the pads leave
            more = [n - sum(p) + s.integer(0, t - 1) for n, p, t in zip(full, pads, attrs["strides"], strict=True)]
            attrs["output_shape"] = (x[0], weight[1] * groups, *more)
    inputs = {"x": s.floats(x), "weight": s.floats(weight)}
    if s.flag():
        inputs["bias"] = s.floats((weight[1] * groups,))
    return Case(inputs, attrs)


def _reshape(s: Source) -> Case:
    x = s.floats(s.shape(1))
    target = list(s.draw(st.permutations(x.shape)))
    if len(target) > 1 and s.flag():
        i = s.integer(0, len(target) - 2)
        target[i : i + 2] = [target[i] * target[i + 1]]
    if s.flag():
        target[s.integer(0, len(target) - 1)] = -1
    elif len(target) == x.ndim and target[0] == x.shape[0]:
        target[0] = 0
    return Case({"x": x}, {"shape": tuple(target)})


def _transpose(s: Source) -> Case:
    x = s.floats(s.shape(1))
    perm = s.draw(st.permutations(range(x.ndim)))
    return Case({"x": x}, {"perm": tuple(p - x.ndim if s.flag() else p for p in perm)})


def _expand_dims(s: Source) -> Case:
    x = s.floats(s.shape(0, 3))
    rank = x.ndim + s.integer(1, 2)
    axes = s.draw(st.sets(st.integers(0, rank - 1), min_size=rank - x.ndim, max_size=rank - x.ndim))
    return Case({"x": x}, {"axes": tuple(a - rank if s.flag() else a for a in axes)})


def _squeeze(s: Source) -> Case:
    shape = tuple(1 if s.flag() else s.dim() for _ in range(s.integer(1, 4)))
    return Case({"x": s.floats(shape)}, {"axes": s.axes(len(shape))} if s.flag() else {})


def _slice_by_index(s: Source) -> Case:
    x = s.floats(s.shape(1))
    attrs: dict[str, list[Any]] = {k: [] for k in ("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask")}
    for d in x.shape:
        a, b, step = s.integer(0, d - 1), s.integer(0, d - 1), s.integer(1, 3)
        low, high = min(a, b), max(a, b) + 1
        backwards = s.integer(0, 4) == 0
        row = (high - 1, low - 1, -step) if backwards else (low, high, step)
        open_begin, open_end = s.integer(0, 3) == 0, s.integer(0, 3) == 0 or (backwards and low == 0)
        if s.flag() and not (backwards and low == 0):  # the same places, counted from the end
            row = (row[0] - d, row[1] - d if row[1] < d else row[1], row[2])
        for k, v in zip(attrs, (*row, open_begin, open_end, s.integer(0, 3) == 0), strict=True):
            attrs[k].append(v)
    return Case({"x": x}, {k: v for k, v in attrs.items() if k in ("begin", "end") or any(v)})


def _slice_by_size(s: Source) -> Case:
    x = s.floats(s.shape(1))
    begin = [s.integer(0, d - 1) for d in x.shape]
    size = [s.integer(1, d - b) if s.flag() else -1 for b, d in zip(begin, x.shape, strict=True)]
    begin = [b - d if s.flag() else b for b, d in zip(begin, x.shape, strict=True)]
    return Case({"x": x}, {"begin": begin, "size": size})


def _concat(s: Source) -> Case:
    shape, n = s.shape(1, 3), s.integer(1, 4)
    axis, interleave = s.axis(len(shape)), s.flag()
    shapes = [list(shape) for _ in range(n)]
    for t in shapes:
        t[axis] = shape[axis] if interleave else s.dim()
    return Case({"values": tuple(s.floats(tuple(t)) for t in shapes)}, {"axis": axis, "interleave": interleave})


def _split(s: Source) -> Case:
    shape, n = list(s.shape(1, 3)), s.integer(1, 4)
    axis = s.axis(len(shape))
    sizes = [s.integer(1, 4) for _ in range(n)]
    if s.flag():
        shape[axis] = sizes[0] * n
        return Case({"x": s.floats(tuple(shape))}, {"num_splits": n, "axis": axis})
    shape[axis] = sum(sizes)
    return Case({"x": s.floats(tuple(shape))}, {"split_sizes": sizes, "axis": axis})


def _stack(s: Source) -> Case:
    shape = s.shape(0, 3)
    return Case({"values": tuple(s.floats(shape) for _ in range(s.integer(1, 3)))}, {"axis": s.axis(len(shape) + 1)})


def _tile(s: Source) -> Case:
    x = s.floats(s.shape(1, 3))
    return Case({"x": x}, {"reps": [s.integer(1, 3) for _ in x.shape]})


def _pad(s: Source) -> Case:
    x = s.floats(s.shape(1, 3))
    mode = s.one_of("constant", "reflect", "replicate")
    n = s.integer(1, x.ndim)
    most = [d - 1 if mode == "reflect" else d for d in x.shape[-n:] for _ in range(2)]
    attrs: dict[str, Any] = {"pad": [s.integer(0, min(m, 3)) for m in most], "mode": mode}
    if mode == "constant" and s.flag():
        attrs["constant_val"] = -1.5
    return Case({"x": x}, attrs)


def _gather(s: Source) -> Case:
    x = s.floats(s.shape(1, 4))
    axis = s.integer(0, x.ndim - 1)
    b = s.integer(0, min(axis, 2))
    d = x.shape[axis]
    indices = s.ints(x.shape[:b] + s.shape(0, 2), -d, d - 1)
    return Case({"x": x, "indices": indices}, {"axis": axis - x.ndim if s.flag() else axis, "batch_dims": b})


def _along(s: Source) -> tuple[np.ndarray, int, np.ndarray]:
    x = s.floats(s.shape(1, 3))
    axis = s.integer(0, x.ndim - 1)
    d = x.shape[axis]
    return x, axis, s.ints((*x.shape[:axis], s.dim(), *x.shape[axis + 1 :]), -d, d - 1)


def _gather_along(s: Source) -> Case:
    x, axis, indices = _along(s)
    return Case({"x": x, "indices": indices}, {"axis": axis})


def _scatter(s: Source) -> Case:
    data = s.floats(s.shape(1, 3))
    axis, mode = s.axis(data.ndim), s.one_of("add", "update", "sub", "mul", "max", "min")
    d = data.shape[axis]
    n = s.integer(1, d) if mode == "update" else s.dim()
    indices = s.rng.permutation(d)[:n].astype(np.int32) if mode == "update" else s.ints((n,), -d, d - 1)
    front = axis % data.ndim
    updates = s.floats((*data.shape[:front], n, *data.shape[front + 1 :]))
    return Case({"data": data, "indices": indices, "updates": updates}, {"axis": axis, "mode": mode})


def _scatter_along(s: Source) -> Case:
    data, axis, indices = _along(s)
    mode = s.one_of("add", "update", "sub", "mul", "max", "min")
    if mode == "update":  # distinct along the axis: the order of repeated updates is open
        indices = np.argsort(s.rng.random(data.shape), axis=axis).astype(np.int32)
    return Case({"data": data, "indices": indices, "updates": s.floats(indices.shape)}, {"axis": axis, "mode": mode})


def _layer_norm(s: Source) -> Case:
    x = s.floats((*s.shape(0, 2), s.integer(2, 8)))
    axes = s.axes(x.ndim)
    inputs = {"x": x}
    for name in ("gamma", "beta"):
        if s.flag():
            inputs[name] = s.floats(tuple(x.shape[a] for a in axes))
    attrs = {"epsilon": 0.0078125}
    return Case(inputs, attrs if len(axes) == x.ndim and s.flag() else {**attrs, "axes": axes})


def _with(make: Callable[[Source], Case], **attrs: tuple[Any, ...]) -> Callable[[Source], Case]:
    """`make` with attributes chosen among the given values."""

    def case(s: Source) -> Case:
        inputs, found = make(s)
        return Case(inputs, {**found, **{k: s.one_of(*v) for k, v in attrs.items()}})

    return case


CASES: dict[str, Callable[[Source], Case]] = {
    "const": lambda s: Case({}, {"val": s.one_of(s.floats, s.ints, s.bools)(s.shape())}),
    "identity": _unary(),
    "cast": _cast,
    "add": _binary(),
    "sub": _binary(),
    "mul": _binary(),
    "real_div": _division,
    "maximum": _binary(),
    "minimum": _binary(),
    "pow": _power,
    "mod": _integer_or_float,
    "floor_div": _integer_or_float,
    "sqrt": _unary(0.25),
    "rsqrt": _with(_unary(0.25), epsilon=(0.0, 0.0009765625, 1e-5)),
    "inverse": _with(_unary(0.25), epsilon=(0.0, 0.0009765625)),
    "exp": _unary(-6.0),
    "exp2": _unary(-6.0),
    "log": _with(_unary(0.25), epsilon=(0.0, 0.0009765625)),
    "abs": _unary(),
    "square": _unary(),
    "sign": _unary(),
    "floor": _unary(),
    "ceil": _unary(),
    "round": _unary(),
    "clip": _with(_unary(), alpha=(-1.0, -0.25), beta=(0.5, 2.0)),
    "sin": _unary(-7.0, 7.0),
    "cos": _unary(-7.0, 7.0),
    "erf": _unary(),
    "sigmoid": _unary(-12.0, 12.0),
    "silu": _unary(-12.0, 12.0),
    "tanh": _unary(),
    "relu": _unary(),
    "leaky_relu": _with(_unary(), alpha=(0.125, 0.01)),
    "softplus": _unary(-12.0, 12.0),
    "gelu": _with(_unary(), mode=("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    "softmax": _on_axis,
    "reduce_sum": _reduction,
    "reduce_mean": _reduction,
    "reduce_max": _reduction,
    "reduce_min": _reduction,
    "reduce_sum_square": _reduction,
    "reduce_argmax": _argmax,
    "matmul": _matmul,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "reshape": _reshape,
    "transpose": _transpose,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "concat": _concat,
    "split": _split,
    "stack": _stack,
    "tile": _tile,
    "pad": _pad,
    "gather": _gather,
    "gather_along_axis": _gather_along,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along,
    "layer_norm": _layer_norm,
    "select": _select,
    "equal": _comparison,
    "not_equal": _comparison,
    "less": _comparison,
    "less_equal": _comparison,
    "greater": _comparison,
    "greater_equal": _comparison,
    "logical_and": _logic,
    "logical_or": _logic,
    "logical_not": lambda s: Case({"x": s.bools(s.shape())}, {}),
}


def op_cases(kind: str, largest: int = 33) -> st.SearchStrategy[Case]:
    """Valid arguments of the op `kind`, with no dimension above `largest`."""

    @st.composite
    def case(draw: Draw) -> Case:
        return CASES[kind](Source(draw, largest))

    return case()
