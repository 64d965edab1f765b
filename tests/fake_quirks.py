"""Profiles of the stand-in engine: what published projects found their chips to do with programs that are within the
contract. A quirk is a rewrite of the graph before the CPU engine compiles it, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anert.mil import ops
from anert.mil.graph import Function, Op, Value
from anert.mil.passes import clone_ops


@dataclass(frozen=True, slots=True)
class Quirks:
    """None or False: the engine does as the program says."""

    opsets: tuple[str, ...] = ("ios16", "ios18")
    float32_ports: bool = True
    max_width: int = 65536
    """Of the trailing axis of any tensor; wider is a compilation failure."""
    mask_ignored: bool = False
    """scaled_dot_product_attention leaves out attn_mask."""
    runtime_conv_ignored: bool = False
    """A convolution whose weight is no constant sees zeros."""
    tile_poisons: bool = False
    """After a program with `tile` has run, every evaluate of the process fails."""
    slice_limit: float | None = None
    """Values past it become inf in a slice that begins at a column other than 0."""
    matmul_limit: float | None = None
    """Results of matmul past it become inf."""


PROFILES = {
    "plain": Quirks(),
    # maderix/ANE #6 (dialect, fp32 ports), its main branch and Orion (mask), the skyfallsin field guide (convolution,
    # tile), ANEForge (slices, width before the A16, matmul)
    "m1": Quirks(("ios16",), False, 16384, True, True, True, 4094.0, 32752.0),
    "m4": Quirks(mask_ignored=True, runtime_conv_ignored=True, tile_poisons=True, matmul_limit=32752.0),
}


class Refused(Exception):
    """The compiler's words; invalid: it is the text that it refuses, not what it makes of it."""

    def __init__(self, message: str, invalid: bool = False) -> None:
        super().__init__(message)
        self.invalid = invalid


def check(function: Function, quirks: Quirks) -> None:
    """Raises Refused for what no engine takes, or this one does not."""
    if function.opset not in quirks.opsets:
        raise Refused(f"opset {function.opset}", invalid=True)
    used = {v for op in function.ops for v in op.operands()} | set(function.outputs)
    ports = ("fp16", "fp32") if quirks.float32_ports else ("fp16",)
    for value in (*function.inputs, *function.outputs):
        if value.dtype not in ports:
            raise Refused(f"port {value.name} is {value.dtype}", invalid=True)
        if value not in used:
            raise Refused(f"parameter {value.name} is never read", invalid=True)
    for value in (*function.inputs, *(v for op in function.ops for v in op.outputs)):
        if value.shape and value.shape[-1] > quirks.max_width:
            raise Refused(f"{value.name} is {value.shape[-1]} wide, more than {quirks.max_width}")


def poisons(function: Function, quirks: Quirks) -> bool:
    return quirks.tile_poisons and any(op.kind == "tile" for op in function.ops)


def _overflow(value: Value, limit: float) -> Value:
    """`value`, but infinite past the limit."""
    return ops.select(ops.greater(ops.abs(value), limit), value * np.inf, value)


def _from_column(op: Op) -> bool:
    return op.kind in ("slice_by_size", "slice_by_index") and int(np.ravel(op.attrs["begin"])[-1]) != 0


def apply(function: Function, quirks: Quirks) -> Function:
    """The function that the engine of this profile runs: the same ports, by name and order."""
    into = Function(function.name, function.opset)
    mapping: dict[Value, Value] = {v: into.input(v.name, v.shape, v.dtype) for v in function.inputs}
    for op in function.ops:
        weight = op.inputs.get("weight")
        if op.kind == "conv" and quirks.runtime_conv_ignored and isinstance(weight, Value) and not weight.is_const:
            blind = {**mapping, weight: into.const(np.zeros(weight.shape, np.float16), weight.dtype)}
            clone_ops([op], blind, into)
            mapping[op.out] = blind[op.out]
        else:
            clone_ops([op], mapping, into)
        new = into.ops[-1]
        if op.kind == "scaled_dot_product_attention" and quirks.mask_ignored:
            new.inputs.pop("attn_mask", None)
        if op.kind == "matmul" and quirks.matmul_limit is not None:
            mapping[op.out] = _overflow(new.out, quirks.matmul_limit)
        if _from_column(op) and quirks.slice_limit is not None:
            mapping[op.out] = _overflow(new.out, quirks.slice_limit)
    results = [mapping[v] for v in function.outputs]
    for result, old in zip(results, function.outputs, strict=True):
        into.claim(old.name, result)
    return into.returns(*results)
