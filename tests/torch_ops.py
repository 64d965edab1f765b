"""Every op of the table as PyTorch has it, from the arguments as a case gives them (nothing resolved): the oracle.

Import it behind `pytest.importorskip("torch")`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = Mapping[str, Any]
Attrs = Mapping[str, Any]
DTYPES = {"fp16": torch.float64, "fp32": torch.float64, "int32": torch.int32, "bool": torch.bool}


def _reduction(f: Callable[..., Tensor]) -> Callable[[Inputs, Attrs], Tensor]:
    def g(i: Inputs, a: Attrs) -> Tensor:
        axes = a.get("axes") or tuple(range(i["x"].ndim))
        return f(i["x"], axes, keepdim=a["keep_dims"])

    return g


def _matmul(i: Inputs, a: Attrs) -> Tensor:
    x = i["x"].mT if a["transpose_x"] else i["x"]
    y = i["y"].mT if a["transpose_y"] else i["y"]
    return torch.matmul(x, y)


def _same(d: int, reach: int, s: int) -> tuple[int, int]:
    """TensorFlow's SAME: the odd element goes behind."""
    total = max((math.ceil(d / s) - 1) * s + reach - d, 0)
    return total // 2, total - total // 2


def _conv(i: Inputs, a: Attrs) -> Tensor:
    x, w = i["x"], i["weight"]
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], a["dilations"], strict=True)]
    pads = [(0, 0)] * len(reach)
    if a["pad_type"] == "custom":
        pads = [(a["pad"][2 * k], a["pad"][2 * k + 1]) for k in range(len(reach))]
    elif a["pad_type"] != "valid":
        pads = [_same(d, r, s) for d, r, s in zip(x.shape[2:], reach, a["strides"], strict=True)]
        pads = [p[::-1] for p in pads] if a["pad_type"] == "same_lower" else pads
    padded = F.pad(x, [p for pair in reversed(pads) for p in pair])
    f = F.conv1d if len(reach) == 1 else F.conv2d
    return f(padded, w, i.get("bias"), a["strides"], 0, a["dilations"], a["groups"])


def _conv_transpose(i: Inputs, a: Attrs) -> Tensor:
    x, w = i["x"], i["weight"]
    f = F.conv_transpose1d if w.ndim == 3 else F.conv_transpose2d
    y = f(x, w, None, a["strides"], 0, 0, a["groups"], a["dilations"])
    for axis in range(2, y.ndim):
        n, s = y.shape[axis], a["strides"][axis - 2]
        start, count = 0, n
        if a["pad_type"] == "same":
            count = x.shape[axis] * s
            start = max(n - count, 0) // 2
        elif a["pad_type"] == "custom":
            start = a["pad"][2 * (axis - 2)]
            count = n - start - a["pad"][2 * (axis - 2) + 1]
        if "output_shape" in a:
            count = a["output_shape"][axis]
        more = [0, 0] * (y.ndim - axis - 1) + [0, max(0, start + count - n)]
        y = F.pad(y, more).narrow(axis, start, count)
    return y + i["bias"].reshape(-1, *[1] * (y.ndim - 2)) if "bias" in i else y


def _attention(i: Inputs, a: Attrs) -> Tensor:
    return F.scaled_dot_product_attention(i["query"], i["key"], i["value"], i.get("attn_mask"))


def _layer_norm(i: Inputs, a: Attrs) -> Tensor:
    x = i["x"]
    axes = sorted(k % x.ndim for k in a.get("axes", range(x.ndim)))
    last = tuple(range(-len(axes), 0))
    moved = x.movedim(axes, last)
    y = F.layer_norm(moved, [x.shape[k] for k in axes], i.get("gamma"), i.get("beta"), a["epsilon"])
    return y.movedim(last, axes)


def _squeeze(i: Inputs, a: Attrs) -> Tensor:
    return i["x"].squeeze(tuple(a["axes"])) if "axes" in a else i["x"].squeeze()


def _expand_dims(i: Inputs, a: Attrs) -> Tensor:
    rank = i["x"].ndim + len(a["axes"])
    x = i["x"]
    for k in sorted(k % rank for k in a["axes"]):
        x = x.unsqueeze(k)
    return x


def _reshape(i: Inputs, a: Attrs) -> Tensor:
    return i["x"].reshape([i["x"].shape[k] if d == 0 else d for k, d in enumerate(a["shape"])])


def _slice_by_index(i: Inputs, a: Attrs) -> Tensor:
    """Python's own slice of a list of positions, axis by axis (torch slices forwards only)."""
    x, rank = i["x"], i["x"].ndim
    none = [False] * rank
    for k in range(rank):
        positions = list(range(x.shape[k]))
        if a.get("squeeze_mask", none)[k]:
            positions = [positions[a["begin"][k]]]
        else:
            begin = None if a.get("begin_mask", none)[k] else a["begin"][k]
            end = None if a.get("end_mask", none)[k] else a["end"][k]
            positions = positions[begin : end : a.get("stride", [1] * rank)[k]]
        x = x.index_select(k, torch.tensor(positions))
    return x.reshape([d for d, gone in zip(x.shape, a.get("squeeze_mask", none), strict=True) if not gone])


def _slice_by_size(i: Inputs, a: Attrs) -> Tensor:
    x = i["x"]
    for k, (b, n) in enumerate(zip(a["begin"], a["size"], strict=True)):
        b = b % x.shape[k]
        x = x.narrow(k, b, x.shape[k] - b if n == -1 else n)
    return x


def _concat(i: Inputs, a: Attrs) -> Tensor:
    values, axis = i["values"], a["axis"] % i["values"][0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1) if a["interleave"] else torch.cat(values, axis)


def _split(i: Inputs, a: Attrs) -> tuple[Tensor, ...]:
    x, axis = i["x"], a["axis"]
    return torch.split(x, list(a["split_sizes"]) if "split_sizes" in a else x.shape[axis] // a["num_splits"], axis)


def _pad(i: Inputs, a: Attrs) -> Tensor:
    x, pad = i["x"], a["pad"]
    for k, axis in enumerate(range(x.ndim - len(pad) // 2, x.ndim)):
        before, after, n = pad[2 * k], pad[2 * k + 1], x.shape[axis]
        if a["mode"] == "constant":
            x = F.pad(x, [0, 0] * (x.ndim - axis - 1) + [before, after], value=a.get("constant_val", 0.0))
        else:
            at = torch.arange(-before, n + after)
            at = at.clamp(0, n - 1) if a["mode"] == "replicate" else (n - 1 - (n - 1 - at.abs()).abs())
            x = x.index_select(axis, at)
    return x


def _gather(i: Inputs, a: Attrs) -> Tensor:
    def pick(x: Tensor, indices: Tensor, axis: int, b: int) -> Tensor:
        if b:
            return torch.stack([pick(xs, js, axis - 1, b - 1) for xs, js in zip(x, indices, strict=True)])
        at = indices.long() % x.shape[axis]
        return x.index_select(axis, at.flatten()).reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])

    return pick(i["x"], i["indices"], a["axis"] % i["x"].ndim, a["batch_dims"])


def _gather_along(i: Inputs, a: Attrs) -> Tensor:
    return torch.gather(i["x"], a["axis"], i["indices"].long() % i["x"].shape[a["axis"]])


_REDUCE = {"mul": "prod", "max": "amax", "min": "amin"}


def _scatter(i: Inputs, a: Attrs) -> Tensor:
    data, updates, axis, mode = i["data"], i["updates"], a["axis"], a["mode"]
    at = i["indices"].long() % data.shape[axis]
    if mode == "update":
        return data.index_copy(axis, at, updates)
    if mode in ("add", "sub"):
        return data.index_add(axis, at, updates, alpha=1 if mode == "add" else -1)
    with warnings.catch_warnings():  # "index_reduce() is in beta"
        warnings.simplefilter("ignore")
        return data.index_reduce(axis, at, updates, _REDUCE[mode])


def _scatter_along(i: Inputs, a: Attrs) -> Tensor:
    data, updates, axis, mode = i["data"], i["updates"], a["axis"], a["mode"]
    at = i["indices"].long() % data.shape[axis]
    if mode == "update":
        return data.scatter(axis, at, updates)
    if mode in ("add", "sub"):
        return data.scatter_add(axis, at, updates if mode == "add" else -updates)
    return data.scatter_reduce(axis, at, updates, _REDUCE[mode])


def _gelu(i: Inputs, a: Attrs) -> Tensor:
    if a["mode"] == "SIGMOID_APPROXIMATION":
        return i["x"] * torch.sigmoid(1.702 * i["x"])
    return F.gelu(i["x"], approximate="none" if a["mode"] == "EXACT" else "tanh")


def _x(f: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Attrs], Tensor]:
    return lambda i, a: f(i["x"])


def _xy(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs, Attrs], Tensor]:
    return lambda i, a: f(i["x"], i["y"])


TORCH: dict[str, Callable[[Inputs, Attrs], Any]] = {
    "const": lambda i, a: torch.as_tensor(a["val"]),
    "identity": _x(lambda x: x),
    "cast": lambda i, a: i["x"].to(DTYPES[a["dtype"]]),
    "add": _xy(torch.add),
    "sub": _xy(torch.sub),
    "mul": _xy(torch.mul),
    "real_div": _xy(torch.div),
    "maximum": _xy(torch.maximum),
    "minimum": _xy(torch.minimum),
    "pow": _xy(torch.pow),
    "mod": _xy(torch.remainder),
    "floor_div": _xy(torch.floor_divide),
    "sqrt": _x(torch.sqrt),
    "rsqrt": lambda i, a: torch.rsqrt(i["x"] + a["epsilon"]),
    "inverse": lambda i, a: torch.reciprocal(i["x"] + a["epsilon"]),
    "exp": _x(torch.exp),
    "exp2": _x(torch.exp2),
    "log": lambda i, a: torch.log(i["x"] + a["epsilon"]),
    "abs": _x(torch.abs),
    "square": _x(torch.square),
    "sign": _x(torch.sign),
    "floor": _x(torch.floor),
    "ceil": _x(torch.ceil),
    "round": _x(torch.round),
    "clip": lambda i, a: torch.clamp(i["x"], a["alpha"], a["beta"]),
    "sin": _x(torch.sin),
    "cos": _x(torch.cos),
    "erf": _x(torch.erf),
    "sigmoid": _x(torch.sigmoid),
    "silu": _x(F.silu),
    "tanh": _x(torch.tanh),
    "relu": _x(torch.relu),
    "leaky_relu": lambda i, a: F.leaky_relu(i["x"], a["alpha"]),
    "softplus": _x(lambda x: F.softplus(x, threshold=1000.0)),
    "gelu": _gelu,
    "softmax": lambda i, a: torch.softmax(i["x"], a["axis"]),
    "reduce_sum": _reduction(torch.sum),
    "reduce_mean": _reduction(torch.mean),
    "reduce_max": _reduction(torch.amax),
    "reduce_min": _reduction(torch.amin),
    "reduce_sum_square": _reduction(lambda x, axes, keepdim: torch.sum(x * x, axes, keepdim=keepdim)),
    "reduce_argmax": lambda i, a: torch.argmax(i["x"], a["axis"], keepdim=a["keep_dims"]),
    "matmul": _matmul,
    "linear": lambda i, a: F.linear(i["x"], i["weight"], i.get("bias")),
    "scaled_dot_product_attention": _attention,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "reshape": _reshape,
    "transpose": lambda i, a: i["x"].permute(a["perm"]),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "concat": _concat,
    "split": _split,
    "stack": lambda i, a: torch.stack(i["values"], a["axis"]),
    "tile": lambda i, a: torch.tile(i["x"], tuple(a["reps"])),
    "pad": _pad,
    "gather": _gather,
    "gather_along_axis": _gather_along,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along,
    "layer_norm": _layer_norm,
    "select": lambda i, a: torch.where(i["cond"], i["a"], i["b"]),
    "equal": _xy(torch.eq),
    "not_equal": _xy(torch.ne),
    "less": _xy(torch.lt),
    "less_equal": _xy(torch.le),
    "greater": _xy(torch.gt),
    "greater_equal": _xy(torch.ge),
    "logical_and": _xy(torch.logical_and),
    "logical_or": _xy(torch.logical_or),
    "logical_not": _x(torch.logical_not),
}


def call(kind: str, inputs: Mapping[str, Any], attrs: Attrs) -> tuple[Tensor, ...]:
    """PyTorch's results for tensors by operand name, always a tuple."""
    result = TORCH[kind](inputs, attrs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
