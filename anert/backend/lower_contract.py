"""Lowerings of contractions: matmul, linear, attention as it is written, and convolutions by way of GEMM."""

from __future__ import annotations

import math

import numpy as np

from anert.backend.lower import Lowering, OpLowering, is_float
from anert.backend.lower_ops import softmax_of
from anert.backend.nodes import Imm, Ref
from anert.mil.graph import Op, Value


def swapped(x: Ref) -> Ref:
    """x with its last two axes exchanged."""
    n = len(x.shape)
    return x.must("transpose", (*range(n - 2), n - 1, n - 2))


def _float(low: Lowering, x: Ref, dtype: str) -> Ref:
    return x if is_float(dtype) else low.ew("to_f32", x.shape, x)


def _result(low: Lowering, op: Op, y: Ref) -> list[Ref]:
    """y in the op's shape and dtype, rounded where the precision says so."""
    if not is_float(op.out.dtype):
        y = low.ew("to_i32", y.shape, y, dtype="i32")
    y = low.rounded(y, op.out.dtype, contraction=True)
    return [y if y.shape == op.out.shape else low.reshape(y, op.out.shape)]


def product(low: Lowering, x: Ref, y: Ref, alpha: float = 1.0) -> Ref:
    """x (..., m, k) times y (..., k, n), batch dims broadcast."""
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    a = x.broadcast((*batch, *x.shape[-2:]))
    b = y.broadcast((*batch, *y.shape[-2:]))
    return low.gemm(a, b, (*batch, x.shape[-2], y.shape[-1]), alpha)


def matmul(low: Lowering, op: Op) -> list[Ref]:
    dtype = op.out.dtype
    x, y = _float(low, low.ref(op, "x"), dtype), _float(low, low.ref(op, "y"), dtype)
    if len(x.shape) == 1:
        x = x.must("reshape", (1, *x.shape))
    if len(y.shape) == 1:
        y = y.must("reshape", (*y.shape, 1))
    x = swapped(x) if op.attrs["transpose_x"] else x
    y = swapped(y) if op.attrs["transpose_y"] else y
    return _result(low, op, product(low, x, y))


def linear(low: Lowering, op: Op) -> list[Ref]:
    dtype = op.out.dtype
    x, w = _float(low, low.ref(op, "x"), dtype), _float(low, low.ref(op, "weight"), dtype)
    if len(x.shape) == 1:
        x = x.must("reshape", (1, *x.shape))
    y = product(low, x, swapped(w))
    if "bias" in op.inputs:
        y = low.ew("add", y.shape, y, _float(low, low.ref(op, "bias"), dtype))
    return _result(low, op, y)


def attention(low: Lowering, op: Op) -> list[Ref]:
    """softmax(q k^T / sqrt(E) + mask) v; a bool mask takes its false positions to -inf."""
    q, k, v = (low.ref(op, n) for n in ("query", "key", "value"))
    scores = product(low, q, swapped(k))
    scores = low.ew("mul", scores.shape, scores, 1.0 / math.sqrt(q.shape[-1]))
    if "attn_mask" in op.inputs:
        mask = low.ref(op, "attn_mask")
        if mask.dtype == "u8":
            scores = low.ew("select", scores.shape, mask, scores, Imm(-math.inf))
        else:
            scores = low.ew("add", scores.shape, scores, mask)
    return _result(low, op, product(low, softmax_of(low, scores, (len(scores.shape) - 1,)), v))


# Convolutions: (N, C, *D) with one or two spatial axes, seen as (N, C, H, W)


def _plane(x: Ref) -> Ref:
    """(N, C, W) as (N, C, 1, W)."""
    return x if len(x.shape) == 4 else x.must("reshape", (*x.shape[:2], 1, x.shape[2]))


def _pair(values: tuple[int, ...], fill: int) -> tuple[int, int]:
    return (values[0], values[1]) if len(values) == 2 else (fill, values[0])


def _bias(low: Lowering, op: Op, y: Ref) -> Ref:
    if "bias" not in op.inputs:
        return y
    bias = low.ref(op, "bias")
    return low.ew("add", y.shape, y, low.reshape(bias, (1, bias.shape[0], *(1,) * (len(y.shape) - 2))))


def _exchange(weight: np.ndarray | None, groups: int, turned: bool) -> tuple[int, np.ndarray] | None:
    """(block, factors) if a constant 1x1 weight does nothing but exchange neighbouring blocks of channels and scale
    them, as rotary embeddings write it; `turned` for conv_transpose. Channel c of the result is factors[c] times
    channel c of the other half of its pair of blocks."""
    if weight is None or weight.shape[0] % groups or any(d != 1 for d in weight.shape[2:]):
        return None
    n = weight.shape[1]
    w = weight.reshape(groups, -1, n).astype(np.float32)
    if w.shape[1] != n:
        return None
    w = w.transpose(0, 2, 1) if turned else w
    if np.any(np.count_nonzero(w, axis=2) != 1):
        return None
    source = np.argmax(w != 0, axis=2)  # (groups, n)
    block = abs(int(source[0, 0]))
    channel = np.arange(n)
    if block == 0 or n % (2 * block) or np.any(source != (channel // block ^ 1) * block + channel % block):
        return None
    return block, np.take_along_axis(w, source[:, :, None], 2).reshape(-1)


def _exchanged(low: Lowering, op: Op, x: Ref, turned: bool) -> Ref | None:
    """x (N, C, *D) with channel blocks exchanged and scaled, without a GEMM; None if the weight does something else."""
    w = op.inputs["weight"]
    assert isinstance(w, Value)
    plain = all(s == 1 for s in op.attrs["strides"]) and not any(op.attrs["pad"]) and op.out.shape == x.shape
    found = _exchange(w.const, op.attrs["groups"], turned) if plain else None
    if found is None:
        return None
    block, factors = found
    n, groups = x.shape[0], op.attrs["groups"]
    paired = (n, groups, x.shape[1] // groups // (2 * block), 2, block, math.prod(x.shape[2:]))
    cut = tuple((1, 2, -1) if axis == 3 else (0, extent, 1) for axis, extent in enumerate(paired))
    scale = low.constant(factors.reshape(1, *paired[1:5], 1))
    y = low.ew("mul", paired, low.pulled(low.reshape(x, paired), ("slice", cut)), scale)
    return low.reshape(y, op.out.shape)


def conv(low: Lowering, op: Op) -> list[Ref]:
    from anert.mil.ops.conv import conv_pads

    exchanged = _exchanged(low, op, low.ref(op, "x"), turned=False)
    if exchanged is not None:
        return _result(low, op, _bias(low, op, exchanged))

    x, w, groups = low.ref(op, "x"), low.ref(op, "weight"), op.attrs["groups"]
    pads = conv_pads(x.shape, w.shape, op.attrs)
    x, w = _plane(x), _plane(w)
    n, c_out, g_in = x.shape[0], w.shape[0], w.shape[1]
    rank = len(op.out.shape)
    (top, left), strides = _pair(tuple(p[0] for p in pads), 0), _pair(op.attrs["strides"], 1)
    out_h, out_w = (op.out.shape[2], op.out.shape[3]) if rank == 4 else (1, op.out.shape[2])
    weights = low.reshape(w, (1, groups, c_out // groups, g_in * w.shape[2] * w.shape[3]))
    if w.shape[2:] == (1, 1) and strides == (1, 1) and not any(p for pair in pads for p in pair):
        columns = low.reshape(x, (n, groups, g_in, out_h * out_w))
    else:
        columns = Ref.of(low.new((n, groups * g_in, *w.shape[2:], out_h, out_w), x.dtype))
        dilations = _pair(op.attrs["dilations"], 1)
        _im2col(low, "im2col", columns, x, strides, dilations, (top, left))
        columns = columns.must("reshape", (n, groups, g_in * w.shape[2] * w.shape[3], out_h * out_w))
    y = product(low, weights, columns)
    return _result(low, op, _bias(low, op, low.reshape(y, op.out.shape)))


def _im2col(low: Lowering, kind: str, columns: Ref, image: Ref, strides: tuple[int, int], dilations: tuple[int, int],
            pad: tuple[int, int]) -> None:  # fmt: skip
    """A step between columns (N, C, kh, kw, oh, ow) and an image (N, C, H, W)."""
    args = (*strides, *dilations, *pad, image.shape[2], image.shape[3])
    if kind == "im2col":
        low.step(kind, columns.shape, (image,), columns, args=args)
    else:
        low.step(kind, columns.shape, (columns,), image, args=args)


def conv_transpose(low: Lowering, op: Op) -> list[Ref]:
    """Columns = W^T x, added up where they overlap: the adjoint of conv's im2col."""
    from anert.mil.ops.conv import transpose_crop

    exchanged = _exchanged(low, op, low.ref(op, "x"), turned=True)
    if exchanged is not None:
        return _result(low, op, _bias(low, op, exchanged))
    x, w, groups = low.ref(op, "x"), low.ref(op, "weight"), op.attrs["groups"]
    crop = transpose_crop(x.shape, w.shape, op.attrs)
    x, w = _plane(x), _plane(w)
    n, g_in, g_out = x.shape[0], x.shape[1] // groups, w.shape[1]
    taps = g_out * w.shape[2] * w.shape[3]
    weights = swapped(low.reshape(w, (1, groups, g_in, taps)))
    spots = low.reshape(x, (n, groups, g_in, x.shape[2] * x.shape[3]))
    columns = product(low, weights, spots).must(
        "reshape", (n, groups * g_out, w.shape[2], w.shape[3], x.shape[2], x.shape[3])
    )
    out_h, out_w = (op.out.shape[2], op.out.shape[3]) if len(op.out.shape) == 4 else (1, op.out.shape[2])
    strides, shape = _pair(op.attrs["strides"], 1), (n, groups * g_out, out_h, out_w)
    if columns.shape[2:] == (1, 1, out_h, out_w) and strides == (1, 1) and not any(start for start, _ in crop):
        return _result(low, op, _bias(low, op, columns.must("reshape", op.out.shape)))
    image = Ref.of(low.new(shape))
    pad = _pair(tuple(start for start, _ in crop), 0)
    _im2col(low, "col2im", columns, image, strides, _pair(op.attrs["dilations"], 1), pad)
    return _result(low, op, _bias(low, op, image.must("reshape", op.out.shape)))


TABLE: dict[str, OpLowering] = {
    "matmul": matmul, "linear": linear, "scaled_dot_product_attention": attention, "conv": conv,
    "conv_transpose": conv_transpose,
}  # fmt: skip
