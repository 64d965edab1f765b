"""MIL ops to trace with: `ops.matmul(w, x)`, `ops.softmax(s, axis=-1)`, and the operators of Value.

One function an op, with Core ML's argument names and defaults; scalars and arrays beside a Value become constants of
its dtype. Importing this module fills the op table (table.py) and gives Value its operators.
"""

from anert.mil.ops.activation import gelu, leaky_relu, relu, sigmoid, silu, softplus, tanh
from anert.mil.ops.contract import linear, matmul, scaled_dot_product_attention
from anert.mil.ops.conv import conv, conv_transpose
from anert.mil.ops.core import (
    cast,
    const,
    equal,
    greater,
    greater_equal,
    identity,
    less,
    less_equal,
    logical_and,
    logical_not,
    logical_or,
    not_equal,
    select,
)
from anert.mil.ops.elementwise import (
    abs,
    add,
    ceil,
    clip,
    cos,
    erf,
    exp,
    exp2,
    floor,
    floor_div,
    inverse,
    log,
    maximum,
    minimum,
    mod,
    mul,
    pow,
    real_div,
    round,
    rsqrt,
    sign,
    sin,
    sqrt,
    square,
    sub,
)
from anert.mil.ops.index import gather, gather_along_axis, scatter, scatter_along_axis
from anert.mil.ops.join import concat, pad, split, stack, tile
from anert.mil.ops.operators import attach
from anert.mil.ops.reduce import (
    layer_norm,
    reduce_argmax,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_sum,
    reduce_sum_square,
    softmax,
)
from anert.mil.ops.table import TABLE, OpDef, emit, lookup
from anert.mil.ops.view import expand_dims, reshape, slice_by_index, slice_by_size, squeeze, transpose

attach()

__all__ = [
    "OpDef", "TABLE", "abs", "add", "cast", "ceil", "clip", "concat", "const", "conv", "conv_transpose", "cos",
    "emit", "equal", "erf", "exp", "exp2", "expand_dims", "floor", "floor_div", "gather", "gather_along_axis",
    "gelu", "greater", "greater_equal", "identity", "inverse", "layer_norm", "leaky_relu", "less", "less_equal",
    "linear", "log", "logical_and", "logical_not", "logical_or", "lookup", "matmul", "maximum", "minimum", "mod",
    "mul", "not_equal", "pad", "pow", "real_div", "reduce_argmax", "reduce_max", "reduce_mean", "reduce_min",
    "reduce_sum", "reduce_sum_square", "relu", "reshape", "round", "rsqrt", "scaled_dot_product_attention",
    "scatter", "scatter_along_axis", "select", "sigmoid", "sign", "silu", "sin", "slice_by_index", "slice_by_size",
    "softmax", "softplus", "split", "sqrt", "square", "squeeze", "stack", "sub", "tanh", "tile", "transpose",
]  # fmt: skip
