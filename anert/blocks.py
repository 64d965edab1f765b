"""From a model to kernels: each block traced, differentiated, cut into stages and given its wire form. Nothing is
compiled or allocated, so lint and estimates see exactly what a run would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anert.capabilities import ANE, Capabilities
from anert.kernel import Kernel, build
from anert.mil.grad import Gradient, differentiate
from anert.mil.graph import Function
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
