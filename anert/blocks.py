"""From a model to kernels: each block traced, differentiated, cut into stages and given its wire form. Nothing is
compiled or allocated, so lint and estimates see exactly what a run would."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anert.capabilities import Capabilities
from anert.errors import InputError
from anert.kernel import Kernel, build
from anert.mil.grad import Gradient, differentiate
from anert.mil.graph import Function, Value
from anert.mil.ops.table import lookup
from anert.model import Decoder
from anert.stages import Boundaries, roles, split


@dataclass(slots=True)
class BlockKernels:
    """A block's kernels, one of a kind for all layers; `gradient` and `backward` only for training."""

    name: str
    source: Function
    params: list[str]
    gradient: Gradient | None
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    group: int = 0
    """Layers that the block is made of, their parameters `l<i>_<name>`; 0: a block of one layer."""

    def stored(self, run: int, name: str) -> str:
        """The model's name of parameter `name` of the block, where it runs for the `run`-th time."""
        if not self.group:
            return f"layers.{run}.{name}"
        layer, _, own = name.removeprefix("l").partition("_")
        return f"layers.{run * self.group + int(layer)}.{own}"

    @property
    def kernels(self) -> list[Kernel]:
        return [*self.forward, *self.backward]


def build_blocks(
    model: Decoder, seq_len: int, batch: int, train: bool, layout: str | Boundaries, caps: Capabilities
) -> list[BlockKernels]:
    """The kernels of every block of `model` for `batch` sequences of `seq_len`. layout: a layout's name, for blocks
    apart that are cut alike everywhere, or Boundaries; those of groups have one block, of several layers.

    Raises Unpackable for a stage that layout `packed` cannot carry, InputError for a group that does not divide.
    """
    bounds = layout if isinstance(layout, Boundaries) else Boundaries(layout)
    if bounds.group:
        model = grouped(model, bounds.group)
    return [_build(model, block, seq_len, batch, train, bounds, caps) for block in model.blocks]


class _Part:
    """The weights of one layer of a group."""

    def __init__(self, weights: Any, layer: int) -> None:
        self._weights, self._layer = weights, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, f"l{self._layer}_{name}")


def grouped(model: Decoder, n: int) -> Decoder:
    """`model` with n layers as its one block. Raises InputError where its layers do not come in groups of n."""
    if model.config.n_layers % n:
        raise InputError(f"{model.config.n_layers} layers do not come in groups of {n}")

    def layers(cfg: Any, x: Any, w: Any, pos: Any) -> Any:
        for i in range(n):
            for block in model.blocks:
                x = block(cfg, x, _Part(w, i), pos)
        return x

    one = model.layer_params(model.config)
    names = {f"l{i}_{name}": spec for i in range(n) for name, spec in one.items()}
    kind: Any = type(
        type(model).__name__, (type(model),), {"blocks": (layers,), "layer_params": lambda self, cfg: names}
    )
    found: Decoder = kind(replace(model.config, n_layers=model.config.n_layers // n))
    return found


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
    model: Decoder, block: Any, seq_len: int, batch: int, train: bool, bounds: Boundaries, caps: Capabilities
) -> BlockKernels:
    fn = model.trace(block, seq_len, batch)
    params = [v.name for v in fn.inputs if v.name != "x"]
    gradient = differentiate(fn, ["x"], params) if train else None

    def kernels(part: Function, name: str) -> list[Kernel]:
        role = roles(part, params)
        stages = split(part, role, bounds.limits, bounds.packable)
        return [build(stage, role, bounds.layout, caps, f"{name}_{i}") for i, stage in enumerate(stages)]

    result = BlockKernels(fn.name, fn, params, gradient, group=bounds.group)
    result.forward = kernels(gradient.forward if gradient else fn, f"{fn.name}_forward")
    if gradient:
        result.backward = kernels(gradient.backward, f"{fn.name}_backward")
    return result
