"""From a model to kernels: each block traced, differentiated, cut into stages and given its wire form. Nothing is
compiled or allocated, so lint and estimates see exactly what a run would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anert.capabilities import ANE, Capabilities
from anert.kernel import Kernel, build
from anert.mil.grad import Gradient, differentiate
from anert.mil.graph import Function, Value
from anert.mil.ops.table import lookup
from anert.model import Decoder
from anert.stages import roles, split


@dataclass(slots=True)
class BlockKernels:
    """A block's kernels, one of a kind for all layers; `gradient` and `backward` only for training."""

    name: str
    source: Function
    params: list[str]
    gradient: Gradient | None
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)

    @property
    def kernels(self) -> list[Kernel]:
        return [*self.forward, *self.backward]


def build_blocks(
    model: Decoder, seq_len: int, batch: int, train: bool, layout: str, caps: Capabilities, limits: Capabilities = ANE
) -> list[BlockKernels]:
    """The kernels of every block of `model` for `batch` sequences of `seq_len`. limits: what cuts a block into stages;
    the same everywhere by default, so that all layouts and backends compute the same numbers.

    Raises Unpackable for a stage that layout `packed` cannot carry.
    """
    return [_build(model, block, seq_len, batch, train, layout, caps, limits) for block in model.blocks]


def build_cached_blocks(model: Decoder, seq_len: int, cached: int, caps: Capabilities) -> list[BlockKernels]:
    """The kernels of every block for `seq_len` positions behind a key-value cache of `cached` (Decoder.trace_cached).

    Cache, rotation and mask have channels of their own, so each tensor is a port, and only the engine's limit of inputs
    cuts a block.
    """
    found = []
    for block in model.blocks:
        fn = model.trace_cached(block, seq_len, cached)
        specs = model.layer_params(model.config)
        params = [v.name for v in fn.inputs if v.name in specs]
        role = roles(fn, params)
        result = BlockKernels(fn.name, fn, params, None)
        for i, stage in enumerate(split(fn, role, caps, packable=False)):
            result.forward.append(build(stage, role, "ports", caps, f"{fn.name}_decode{seq_len}_{i}"))
        found.append(result)
    return found


def mixing_block(model: Decoder) -> str:
    """Name of a block in which one position's value depends on another's by other ways than attention (a convolution or
    a sum over positions), so that no key-value cache can stand for the past; empty where none does.

    Most blocks show it by their ops; else it is found out by a NaN at one position of three, which must not reach the
    others.
    """
    for block in model.blocks:
        if columnwise(model.trace_alone(block, 7)):
            continue
        from anert.backend.reference import evaluate

        fn = model.trace_alone(block, 3)
        inputs = {v.name: np.broadcast_to(np.float64(0.01), v.shape) for v in fn.inputs}
        inputs["x"] = np.where(np.arange(3) == 1, np.nan, inputs["x"])
        with np.errstate(all="ignore"):
            y = evaluate(fn, inputs, "float64")["y"]
        if not np.isfinite(y[:, ::2]).all():
            return fn.name
    return ""


def columnwise(fn: Function) -> bool:
    """Whether every op keeps positions, the last axis of x and of all that comes of it, apart. False: not by these few
    rules."""
    t, given = fn.inputs[0].shape[-1], set(fn.inputs[1:])
    if any(v.shape[-1] == t for v in given):
        return False
    for op in fn.ops:
        row, x = lookup(op.kind), op.inputs.get("x")
        if op.kind == "const" or row.category == "elementwise":
            continue
        if not isinstance(x, Value) or op.out.shape[-1:] != (t,):
            return False
        if op.kind == "matmul":
            y = op.inputs["y"]
            weighs = x in given and isinstance(y, Value) and y.shape[-1] == t and not op.attrs["transpose_y"]
        elif op.kind == "conv":
            weight = op.inputs["weight"]
            plain = isinstance(weight, Value) and set(weight.shape[2:]) == {1} and set(op.attrs["strides"]) == {1}
            weighs = plain and x.shape[-1] == t and not any(op.attrs["pad"])
        elif row.category == "reduce":
            weighs = x.shape[-1] == t and x.type.rank - 1 not in op.attrs["axes"]
        else:
            weighs = op.kind == "reshape" and x.shape[-1] == t
        if not weighs:
            return False
    return True


def _build(
    model: Decoder, block: Any, seq_len: int, batch: int, train: bool, layout: str, caps: Capabilities,
    limits: Capabilities,
) -> BlockKernels:  # fmt: skip
    fn = model.trace(block, seq_len, batch)
    params = [v.name for v in fn.inputs if v.name != "x"]
    gradient = differentiate(fn, ["x"], params) if train else None

    def kernels(part: Function, name: str) -> list[Kernel]:
        role = roles(part, params)
        return [build(stage, role, layout, caps, f"{name}_{i}") for i, stage in enumerate(split(part, role, limits))]

    result = BlockKernels(fn.name, fn, params, gradient)
    result.forward = kernels(gradient.forward if gradient else fn, f"{fn.name}_forward")
    if gradient:
        result.backward = kernels(gradient.backward, f"{fn.name}_backward")
    return result
