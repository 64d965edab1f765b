"""Kernel: a Function and its ports in wire form, as MIL text. Port order, padding, packing and orientation live here
only.

`ports`: each tensor its own port, [1, C, 1, W]. `packed`: one input tensor holds them all, and one output the results
stacked along channels. Where element (r, c) of a logical tensor lies in a port is its Slot; Params are written by
slots, activations read by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from anert.capabilities import Capabilities
from anert.errors import ShapeError, Unpackable
from anert.mil import ops, passes
from anert.mil.blob import BlobDirectory
from anert.mil.graph import Function, Value
from anert.mil.legalize import Legalizer, shape4
from anert.mil.text import print_module
from anert.stages import Stage, packing_mode

LARGE_CONST = 64
"""Constants of more elements than this go to the weight file instead of the text."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Element (r, c) of a (rows, cols) tensor is at offset + r * row_stride + c * col_stride of its port (elements).

    A vector (C, 1) is written `broadcast` times side by side.
    """

    port: str
    rows: int
    cols: int
    offset: int
    row_stride: int
    col_stride: int
    broadcast: int = 1

    @property
    def dense(self) -> bool:
        """Whether the tensor lies row by row with no gap, at the port's start."""
        return self.offset == 0 and self.row_stride == self.cols and self.col_stride == 1 and self.broadcast == 1


@dataclass(slots=True)
class Kernel:
    """MIL text with named ports, not compiled. `sizes`: bytes of each port; `weights`: inputs that are parameters."""

    name: str
    text: str
    blobs: dict[str, bytes]
    inputs: dict[str, Slot]
    outputs: dict[str, Slot]
    sizes: dict[str, int] = field(default_factory=dict)
    weights: tuple[str, ...] = ()


def round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


class _Wire:
    """Builds the wire Function of one stage."""

    def __init__(self, stage: Stage, role: dict[str, str], caps: Capabilities, name: str) -> None:
        self.source, self.role, self.caps = _accepted(stage.function, caps), role, caps
        self.turned = {v.name for v in stage.function.inputs if caps.both_orientations and _read_transposed(v)}
        self.fn = Function("main", caps.opset)
        self.inputs: dict[str, Slot] = {}
        self.outputs: dict[str, Slot] = {}
        self.legal = Legalizer(self.fn)
        self.name = name

    def width(self, n: int) -> int:
        return round_up(n, self.caps.width_multiple)

    def adopt(self, value: Value, wire: Value, transposed: bool) -> None:
        """`wire` [1, R, 1, W] holds a logical input (or its transpose): make it the input's rank-four form."""
        rows, cols = _matrix_shape(value)
        if transposed:
            wire = ops.transpose(wire, perm=(0, 3, 2, 1))
        target = shape4(value.shape)
        if wire.shape != target:
            wire = ops.reshape(wire, shape=target)
        self.legal.values[value] = wire
        assert rows * cols == wire.type.size

    def cut(self, port: Value, begin: tuple[int, ...], size: tuple[int, ...]) -> Value:
        if begin == (0, 0, 0, 0) and size == port.shape:
            return port
        return ops.slice_by_size(port, begin=begin, size=size)

    def ports(self) -> None:
        for i, v in enumerate(self.source.inputs):
            rows, cols = _matrix_shape(v)
            kind = self.role.get(v.name, "activation")
            turned = kind == "matrix" and v.name in self.turned
            r, c = (cols, rows) if turned else (rows, cols)
            w = self.width(c)
            port = self.fn.input(f"i{i:02d}_{v.name}", (1, r, 1, w))
            repeat = w if kind == "vector" else 1
            self.inputs[v.name] = Slot(port.name, rows, cols, 0, 1 if turned else w, w if turned else 1, repeat)
            self.adopt(v, self.cut(port, (0, 0, 0, 0), (1, r, 1, c)), turned)

    def packed(self, mode: str) -> None:
        values = self.source.inputs
        if mode == "column":
            channels = self._channels(values)
            at, parts = 0, []
            for v in values:
                rows, cols = _matrix_shape(v)
                turned = self.role.get(v.name) == "matrix" and rows != channels
                c = rows if turned else cols
                parts.append((v, turned, at, c, self.width(c)))
                at += self.width(c)
            if at > self.caps.max_width:
                raise Unpackable(f"kernel {self.name!r}: packed width {at} passes the limit of {self.caps.max_width}")
            port = self.fn.input("i00_packed", (1, channels, 1, at))
            for v, turned, offset, c, wide in parts:
                rows, cols = _matrix_shape(v)
                repeat = wide if self.role.get(v.name) == "vector" else 1
                strides = (1, at) if turned else (at, 1)
                self.inputs[v.name] = Slot(port.name, rows, cols, offset, *strides, repeat)
                self.adopt(v, self.cut(port, (0, 0, 0, offset), (1, channels, 1, c)), turned)
        else:
            width = max(_matrix_shape(v)[1] for v in values)
            w = self.width(width)
            channels = sum(_matrix_shape(v)[0] for v in values)
            port = self.fn.input("i00_packed", (1, channels, 1, w))
            row = 0
            for v in values:
                rows, cols = _matrix_shape(v)
                repeat = w if self.role.get(v.name) == "vector" else 1
                self.inputs[v.name] = Slot(port.name, rows, cols, row * w, w, 1, repeat)
                self.adopt(v, self.cut(port, (0, row, 0, 0), (1, rows, 1, cols)), False)
                row += rows

    def _channels(self, values: list[Value]) -> int:
        for v in values:
            if self.role.get(v.name, "activation") != "matrix":
                return v.shape[0]
        common = set.intersection(*(set(v.shape) for v in values))
        return min(common)

    def results(self, packed: bool) -> None:
        """Ports for the outputs: each its own, or those of one width stacked along channels."""
        groups: dict[int, list[Value]] = {}
        for i, v in enumerate(self.source.outputs):
            groups.setdefault(_matrix_shape(v)[1] if packed else i, []).append(v)
        outs = []
        for i, group in enumerate(groups.values()):
            cols = _matrix_shape(group[0])[1]
            w = self.width(cols)
            name = f"o{i:02d}_{group[0].name if len(group) == 1 else 'packed'}"
            parts, row = [], 0
            for v in group:
                rows = _matrix_shape(v)[0]
                self.outputs[v.name] = Slot(name, rows, cols, row * w, w, 1)
                parts.append(self._padded(self.legal.at(v, (1, rows, 1, cols)), w))
                row += rows
            out = parts[0] if len(parts) == 1 else ops.concat(tuple(parts), axis=1)
            if out.op is None or out in outs:
                out = ops.identity(out)
            self.fn.claim(name, out)
            outs.append(out)
        self.fn.returns(*outs)

    def _padded(self, value: Value, width: int) -> Value:
        """Zero columns up to `width`."""
        _, rows, _, cols = value.shape
        if cols == width:
            return value
        zeros = self.fn.const(np.zeros((1, rows, 1, width - cols)), "fp16", "zeros")
        return ops.concat((value, zeros), axis=3)


def _accepted(function: Function, caps: Capabilities) -> Function:
    """The function in ops and sizes that the engine takes; the CPU engine takes it as it is."""
    if caps.decomposed:
        function = passes.decompose(function, "ane")
    if caps.fp16_interior:
        function = passes.fold_constants(function, exact=False)
    if caps.contraction_multiple > 1:
        function = passes.pad_contractions(function, caps.contraction_multiple)
    return function


def _matrix_shape(value: Value) -> tuple[int, int]:
    """(rows, cols) under which a value of any rank lies on the wire."""
    s = value.shape
    if not s:
        raise ShapeError(f"{value.name!r} is a scalar: a port needs at least one axis")
    rows = 1
    for d in s[:-1]:
        rows *= d
    return rows, s[-1]


def _read_transposed(value: Value) -> bool:
    """Whether every matmul that reads this matrix reads it transposed."""
    users = [op for op in value.function.users().get(value, []) if op.kind == "matmul"]
    return bool(users) and all(
        op.attrs["transpose_x"] if op.inputs["x"] is value else op.attrs["transpose_y"] for op in users
    )


def build(stage: Stage, role: dict[str, str], layout: str, caps: Capabilities, name: str) -> Kernel:
    """The wire form of a stage. `role`: see `stages.roles`; names that it lacks are activations.

    Raises Unpackable when layout `packed` is asked of a stage that only separate ports can carry.
    """
    wire = _Wire(stage, role, caps, name)
    if layout == "packed":
        mode = packing_mode(stage.function.inputs, role, caps)
        if not mode:
            shapes = ", ".join(f"{v.name} {v.shape}" for v in stage.function.inputs)
            raise Unpackable(
                f"kernel {name!r}: its inputs share neither channels nor width ({shapes}): use layout ports"
            )
        wire.packed(mode)
    elif layout == "ports":
        wire.ports()
    else:
        raise ShapeError(f"unknown layout {layout!r}: expected ports or packed")
    for op in wire.source.ops:
        wire.legal.copy(op)
    wire.results(layout == "packed")
    main = passes.rename(wire.fn)
    blobs = BlobDirectory()  # one file a constant: M1 refuses several in one (ane_facts 1.7)
    text = print_module(main, blobs=blobs, blob_threshold=LARGE_CONST)
    sizes = {v.name: v.type.nbytes for v in (*main.inputs, *main.outputs)}
    weights = tuple(n for n in wire.inputs if role.get(n, "activation") != "activation")
    return Kernel(name, text, blobs.files(), wire.inputs, wire.outputs, sizes, weights)
