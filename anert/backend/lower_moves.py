"""Lowerings of ops that move elements: slices, joins, pads, gathers and scatters."""

from __future__ import annotations

from anert.backend.lower import Lowering, OpLowering, is_float, storage_of
from anert.backend.nodes import Imm, Ref
from anert.mil.graph import Op

SCATTER = {"update": 0, "add": 1, "sub": 2, "mul": 3, "div": 4, "max": 5, "min": 6}
"""MIL's scatter modes as anert.h numbers them."""


def whole(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(begin, size, step) of every axis, taking all."""
    return [(0, n, 1) for n in shape]


def part(x: Ref, axis: int, begin: int, size: int, step: int = 1) -> Ref:
    cut = whole(x.shape)
    cut[axis] = (begin, size, step)
    return x.must("slice", tuple(cut))


def slice_by_index(low: Lowering, op: Op) -> list[Ref]:
    from anert.mil.ops.view import slice_ranges

    x = low.ref(op, "x")
    ranges = slice_ranges(x.shape, op.attrs)
    cut = x.must("slice", tuple((r.start, len(r), r.step) for r in ranges))
    return [low.reshape(cut, op.out.shape)]


def slice_by_size(low: Lowering, op: Op) -> list[Ref]:
    cut = tuple((b, s, 1) for b, s in zip(op.attrs["begin"], op.attrs["size"], strict=True))
    return [low.ref(op, "x").must("slice", cut)]


def split(low: Lowering, op: Op) -> list[Ref]:
    x, axis, outs, begin = low.ref(op, "x"), op.attrs["axis"], [], 0
    for size in op.attrs["split_sizes"]:
        outs.append(part(x, axis, begin, size))
        begin += size
    return outs


def _values(low: Lowering, op: Op) -> list[Ref]:
    values = op.inputs["values"]
    assert isinstance(values, tuple)
    return [low.refs[v] for v in values]


def concat(low: Lowering, op: Op) -> list[Ref]:
    """Every part is written into its place; where its producer can, it writes there at once (fuse.retarget)."""
    values, axis, begin = _values(low, op), op.attrs["axis"], 0
    out = Ref.of(low.new(op.out.shape, storage_of(op.out.dtype)))
    for i, x in enumerate(values):
        if op.attrs["interleave"]:
            low.write(part(out, axis, i, x.shape[axis], len(values)), x)
        else:
            low.write(part(out, axis, begin, x.shape[axis]), x)
        begin += x.shape[axis]
    return [out]


def stack(low: Lowering, op: Op) -> list[Ref]:
    out, axis = Ref.of(low.new(op.out.shape, storage_of(op.out.dtype))), op.attrs["axis"]
    for i, x in enumerate(_values(low, op)):
        low.write(part(out, axis, i, 1).must("reshape", x.shape), x)
    return [out]


def tile(low: Lowering, op: Op) -> list[Ref]:
    x, reps = low.ref(op, "x"), op.attrs["reps"]
    pairs = tuple(p for r, d in zip(reps, x.shape, strict=True) for p in (r, d))
    out = Ref.of(low.new(op.out.shape, storage_of(op.out.dtype)))
    lifted = low.reshape(x, tuple(p for d in x.shape for p in (1, d)))
    low.write(out.must("reshape", pairs), lifted.broadcast(pairs))
    return [out]


def pad(low: Lowering, op: Op) -> list[Ref]:
    """Axis by axis: the middle, then what lies before and after it: a number, the edge, or the mirror."""
    x, pads, mode = low.ref(op, "x"), op.attrs["pad"], op.attrs["mode"]
    for axis in range(len(x.shape)):
        before, after = pads[2 * axis : 2 * axis + 2]
        if before or after:
            x = _padded(low, op, x, axis, before, after, mode)
    return [x if x is not low.ref(op, "x") else low.copy(x)]


def _padded(low: Lowering, op: Op, x: Ref, axis: int, before: int, after: int, mode: str) -> Ref:
    n = x.shape[axis]
    shape = (*x.shape[:axis], before + n + after, *x.shape[axis + 1 :])
    out = Ref.of(low.new(shape, storage_of(op.out.dtype)))
    low.write(part(out, axis, before, n), x)
    for at, count, mirror, edge in ((0, before, before, 0), (before + n, after, n - 2, n - 1)):
        if not count:
            continue
        target = part(out, axis, at, count)
        if mode == "constant":
            low.write(target, Imm(float(op.attrs["constant_val"]), bits=not is_float(op.out.dtype)))
        elif mode == "reflect":
            low.write(target, part(x, axis, mirror, count, -1))
        else:
            low.write(target, part(x, axis, edge, 1).broadcast(target.shape))
    return out


# Indices


def _indices(low: Lowering, op: Op) -> Ref:
    """The op's indices as int32 storage."""
    return low.ref(op, "indices")


def _still(x: Ref, axis: int, lead: int, count: int) -> Ref:
    """x with `axis` held at its first element and `count` axes of stride 0 inserted at `lead`."""
    held = part(x, axis, 0, 1)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    flat = held.must("reshape", shape)
    lifted = flat.must("reshape", (*shape[:lead], *(1,) * count, *shape[lead:]))
    return lifted


def gather(low: Lowering, op: Op) -> list[Ref]:
    x, indices = low.ref(op, "x"), _indices(low, op)
    axis, b = op.attrs["axis"], op.attrs["batch_dims"]
    out = Ref.of(low.new(op.out.shape, x.dtype))
    picked = len(indices.shape) - b
    source = _still(x, axis, axis, picked).broadcast(op.out.shape)
    lifted = (*indices.shape[:b], *(1,) * (axis - b), *indices.shape[b:], *(1,) * (len(x.shape) - axis - 1))
    where = low.reshape(indices, lifted).broadcast(op.out.shape)
    extent, stride = x.shape[axis], x.layout.strides[axis]
    return [low.step("gather", op.out.shape, (source, where), out, extent=extent, stride=stride)]


def gather_along_axis(low: Lowering, op: Op) -> list[Ref]:
    x, indices, axis = low.ref(op, "x"), _indices(low, op), op.attrs["axis"]
    out = Ref.of(low.new(op.out.shape, x.dtype))
    source = part(x, axis, 0, 1).broadcast(op.out.shape)
    extent, stride = x.shape[axis], x.layout.strides[axis]
    return [low.step("gather", op.out.shape, (source, indices), out, extent=extent, stride=stride)]


def _scatter(
    low: Lowering, op: Op, updates: Ref, indices: Ref, target: Ref, box: tuple[int, ...], data: Ref
) -> list[Ref]:
    axis = op.attrs["axis"]
    extent, stride = data.shape[axis], data.layout.strides[axis]
    args = {"extent": extent, "stride": stride, "mode": SCATTER[op.attrs["mode"]]}
    low.step("scatter", box, (updates, indices), target.broadcast(box), **args)
    return [low.rounded(data, op.out.dtype)]


def scatter(low: Lowering, op: Op) -> list[Ref]:
    axis = op.attrs["axis"]
    data, updates, indices = low.copy(low.ref(op, "data")), low.ref(op, "updates"), _indices(low, op)
    where = low.reshape(indices, (*(1,) * axis, indices.shape[0], *(1,) * (len(data.shape) - axis - 1)))
    return _scatter(low, op, updates, where.broadcast(updates.shape), _still(data, axis, axis, 1), updates.shape, data)


def scatter_along_axis(low: Lowering, op: Op) -> list[Ref]:
    axis = op.attrs["axis"]
    data, updates, indices = low.copy(low.ref(op, "data")), low.ref(op, "updates"), _indices(low, op)
    return _scatter(low, op, updates, indices, part(data, axis, 0, 1), updates.shape, data)


def reduce_arg(largest: bool) -> OpLowering:
    def lower(low: Lowering, op: Op) -> list[Ref]:
        x, axis = low.ref(op, "x"), op.attrs["axis"]
        others = [d for d in range(len(x.shape)) if d != axis]
        turned = x.must("transpose", (*others, axis))
        out = Ref.of(low.new(turned.shape[:-1], "i32"))
        target = out.must("reshape", (*out.shape, 1)).broadcast(turned.shape)
        low.step("arg", turned.shape, (turned,), target, largest=int(largest))
        return [low.reshape(out, op.out.shape)]

    return lower


TABLE: dict[str, OpLowering] = {
    "slice_by_index": slice_by_index, "slice_by_size": slice_by_size, "split": split, "concat": concat, "stack": stack,
    "tile": tile, "pad": pad, "gather": gather, "gather_along_axis": gather_along_axis, "scatter": scatter,
    "scatter_along_axis": scatter_along_axis, "reduce_argmax": reduce_arg(True), "reduce_argmin": reduce_arg(False),
}  # fmt: skip
