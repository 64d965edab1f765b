"""What lies between a MIL Function and a plan: Roots (storage), Refs (views of it) and Nodes (work on Refs)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anert.backend.views import Layout, Transform
from anert.ffi import load

STORAGE: dict[str, tuple[str, int]] = {
    "f32": ("ANERT_F32", 4),
    "f16": ("ANERT_F16", 2),
    "bf16": ("ANERT_BF16", 2),
    "i32": ("ANERT_I32", 4),
    "u8": ("ANERT_U8", 1),
    "i8": ("ANERT_I8", 1),
    "q8": ("ANERT_Q8", 1),
}
"""Storage type -> its name in anert.h and its bytes. bool is u8 that holds 0 or 1; bf16 is what only
contractions read; q8 is a matrix encoded by anert_q8_encode."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) of a port [1, rows, 1, cols]."""
    return math.prod(shape[:-1]), shape[-1]


def q8_bytes(rows: int, cols: int) -> int:
    """Bytes of an int8-encoded matrix; 0 if its columns are no groups of 32."""
    return int(load().lib.anert_q8_bytes(rows, cols))


@dataclass(eq=False, slots=True)
class Root:
    """Storage of one tensor, row-major. place: `arena`, `const` (then `data`), `input` or `output` (then `name`, a
    port).
    """

    shape: tuple[int, ...]
    dtype: str = "f32"
    place: str = "arena"
    name: str = ""
    data: np.ndarray | None = None
    writers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        if self.dtype == "q8":
            return q8_bytes(*matrix_shape(self.shape))
        return self.size * STORAGE[self.dtype][1]


@dataclass(frozen=True, slots=True, eq=False)
class Ref:
    """A view of a Root; `chain` says how it came about, so that it can be replayed on another Root."""

    root: Root
    layout: Layout
    chain: tuple[Transform, ...] = ()

    @classmethod
    def of(cls, root: Root) -> Ref:
        return cls(root, Layout.of(root.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> str:
        return self.root.dtype

    def view(self, name: str, arg: Any) -> Ref | None:
        """This view after a transform; None if strides cannot express it."""
        layout = self.layout.apply((name, arg))
        return None if layout is None else Ref(self.root, layout, (*self.chain, (name, arg)))

    def must(self, name: str, arg: Any) -> Ref:
        ref = self.view(name, arg)
        assert ref is not None, (name, arg, self.layout)
        return ref

    def broadcast(self, shape: tuple[int, ...]) -> Ref:
        return self if self.shape == shape else self.must("broadcast", shape)

    def replay(self, base: Ref) -> Ref | None:
        """What this view is when its root turns out to be `base`; None if strides cannot express it there."""
        ref: Ref | None = base
        for name, arg in self.chain:
            ref = ref.view(name, arg) if ref is not None else None
        return ref

    def is_whole(self) -> bool:
        """Whether this is all of the root in memory order (its shape may differ)."""
        return self.layout.is_flat() and self.layout.size == self.root.size


@dataclass(frozen=True, slots=True)
class Imm:
    """A number that an instruction carries; `bits` reads it as int32."""

    value: float
    bits: bool = False


Source = Ref | Imm


@dataclass(eq=False, slots=True)
class Node:
    """One piece of work. kind `ew`: `op` over `shape`, sources broadcast to it, into `out`. kind `reduce`: `op` (sum,
    rmax, rmin) of the one source over `axes` of `shape`; out has those axes at 1. kind `gemm`: sources a (..., m, k)
    and b (..., k, n) into out (..., m, n). Others: a step of anert.h with `args`."""

    kind: str
    op: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    out: Ref
    axes: tuple[int, ...] = ()
    args: dict[str, Any] = field(default_factory=dict)
    outs: tuple[Ref, ...] = ()
    """Further outputs."""
    label: str = ""
    """The MIL value that this belongs to."""

    def refs(self) -> list[Ref]:
        return [s for s in self.sources if isinstance(s, Ref)]

    def written(self) -> tuple[Ref, ...]:
        return (self.out, *self.outs)


class Graph:
    """Nodes in an order that works, and who reads and writes every Root."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inputs: dict[str, Root] = {}
        self.outputs: dict[str, Root] = {}
        self.counters: list[str] = []

    def add(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def link(self) -> None:
        """Recompute readers and writers of every root."""
        for node in self.nodes:
            for ref in (*node.refs(), *node.written()):
                ref.root.readers = []
                ref.root.writers = []
        for node in self.nodes:
            for ref in node.refs():
                if node not in ref.root.readers:
                    ref.root.readers.append(node)
            for ref in node.written():
                if node not in ref.root.writers:
                    ref.root.writers.append(node)
