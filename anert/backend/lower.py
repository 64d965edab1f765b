"""MIL Function -> Graph: view ops become strided Refs, everything else becomes Nodes over fp32 (or int32, truth)
storage.

The op functions live in lower_ops.py and lower_contract.py; each takes the Lowering and the op and returns a Ref per
output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anert.backend.nodes import Graph, Imm, Node, Ref, Root, Source
from anert.backend.views import Transform
from anert.errors import UnsupportedError
from anert.mil.graph import Function, Op, Value
from anert.mil.ops.table import lookup

PORT_STORAGE = {"fp16": "f16", "fp32": "f32", "int32": "i32", "bool": "u8", "int8": "i8", "uint8": "u8"}
"""How a port of a MIL dtype lies in its surface."""

CONTRACTION_LIMIT = 32752.0
PULLED = frozenset({"add", "sub", "mul"})
"""Ops that are written twice rather than kept in memory between two views."""

OpLowering = Callable[["Lowering", Op], list[Ref]]


def is_float(dtype: str) -> bool:
    return dtype.startswith("fp")


def storage_of(dtype: str) -> str:
    """How an interior value of a MIL dtype is stored: floats as fp32, integers as int32, truth as bytes."""
    if is_float(dtype):
        return "f32"
    return "u8" if dtype == "bool" else "i32"


def _float64(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) if a.dtype.kind == "f" else a


class Lowering:
    """State of one lowering: the Graph so far, and the Ref of every Value."""

    def __init__(self, function: Function, precision: str, encodings: Mapping[str, str] | None = None) -> None:
        self.function, self.precision = function, precision
        self.encodings = dict(encodings or {})
        """Ports that hold an encoded weight: `int8`."""
        self.graph = Graph()
        self.refs: dict[Value, Ref] = {}
        self.label = ""
        self.makers: dict[Root, Node] = {}
        """The elementwise node behind a root that has no other writer."""
        self.known: dict[Value, np.ndarray] = {}
        """Values of constants and of what is computed of constants alone, floats in float64."""

    def run(self, table: dict[str, OpLowering]) -> Graph:
        """Lower everything. Raises UnsupportedError naming the op that has no lowering."""
        for v in self.function.inputs:
            self.refs[v] = self._input(v)
        for op in self.function.ops:
            self.label = op.out.name
            lower = table.get(op.kind)
            if lower is None:
                raise UnsupportedError(f"op {op.kind!r} ({op.out.name}) does not run on backend 'cpu'")
            if any(0 in v.shape for v in (*op.operands(), *op.outputs)):
                raise UnsupportedError(f"op {op.kind!r} ({op.out.name}) has an empty tensor: 'cpu' runs none")
            outs = self._folded(op) or lower(self, op)
            for v, ref in zip(op.outputs, outs, strict=True):
                self.refs[v] = ref
        for name, v in self._output_names():
            self._output(name, v)
        self.graph.link()
        self._check_encoded()
        return self.graph

    def _check_encoded(self) -> None:
        """An encoded weight is the left operand of a product, as it lies."""
        for n in self.graph.nodes:
            for i, ref in enumerate(n.refs()):
                plain = n.kind == "gemm" and i == 0 and ref.is_whole() and ref.layout.strides[-2:] == (ref.shape[-1], 1)
                if ref.root.dtype == "q8" and not plain:
                    raise UnsupportedError(
                        f"port {ref.root.name!r} is int8: {n.label} ({n.kind}) reads it otherwise than as the left "
                        "operand of a product; use fp16 weights"
                    )

    def _folded(self, op: Op) -> list[Ref] | None:
        """An elementwise op of constants alone, as a constant of the interior's precision; None for any other op."""
        if op.kind == "const":
            self.known[op.out] = op.attrs["val"]
        row = lookup(op.kind)
        if (
            row.category != "elementwise"
            or not all(v in self.known for v in op.operands())
            or not is_float(op.out.dtype)
        ):
            return None
        floats = {k: _float64(self.known[v]) for k, v in op.inputs.items() if isinstance(v, Value)}
        with np.errstate(all="ignore"):
            array = np.asarray(row.evaluate(floats, op.attrs)[0])
            half = self.precision == "fp16" and op.out.dtype == "fp16"
            array = self.known[op.out] = array.astype(np.float16 if half else np.float32)
        return [self.constant(array)]

    # Ports

    def _port(self, v: Value, name: str, place: str) -> Root:
        storage = PORT_STORAGE.get(v.dtype)
        if storage is None:
            raise UnsupportedError(f"port {name!r} is {v.dtype}: backend 'cpu' has ports of {', '.join(PORT_STORAGE)}")
        if 0 in v.shape:
            raise UnsupportedError(f"port {name!r} is empty: shape {v.shape}")
        return Root(v.shape, storage, place, name)

    def _input(self, v: Value) -> Ref:
        root = self._port(v, v.name, "input")
        if v.name in self.encodings:
            root.dtype = "q8"
        self.graph.inputs[v.name] = root
        ref = Ref.of(root)
        if v.dtype in ("int8", "uint8"):  # loads of bytes give fp32 lanes
            return self.ew("to_i32", v.shape, ref, dtype="i32")
        return ref

    def _output_names(self) -> list[tuple[str, Value]]:
        return [(v.name, v) for v in self.function.outputs]

    def _output(self, name: str, v: Value) -> None:
        root = self._port(v, name, "output")
        self.graph.outputs[name] = root
        self.label = name
        op = "to_f32" if v.dtype in ("int8", "uint8") else "mov"
        self.graph.add(Node("ew", op, v.shape, (self.refs[v],), Ref.of(root), label=name))

    # Operands

    def ref(self, op: Op, name: str) -> Ref:
        """The Ref of a tensor operand."""
        v = op.inputs[name]
        assert isinstance(v, Value)
        return self.refs[v]

    def source(self, v: Value) -> Source:
        """An operand of an elementwise node: a splat constant becomes an immediate."""
        val = v.const
        if val is not None and val.size > 0:
            first = val.reshape(-1)[0]
            if val.size == 1 or np.all(val == first):
                return Imm(float(first), bits=val.dtype.kind in "iu")
        return self.refs[v]

    def constant(self, array: np.ndarray) -> Ref:
        """A constant tensor as an engine type."""
        kind = array.dtype
        if kind == np.bool_:
            root = Root(array.shape, "u8", "const", data=np.ascontiguousarray(array).view(np.uint8))
        elif kind == np.float16:
            root = Root(array.shape, "f16", "const", data=np.ascontiguousarray(array))
        elif kind.kind == "f":
            root = Root(array.shape, "f32", "const", data=np.ascontiguousarray(array, np.float32))
        else:
            if array.size and (array.max() > 2**31 - 1 or array.min() < -(2**31)):
                raise UnsupportedError(f"{self.label}: an integer constant does not fit int32")
            root = Root(array.shape, "i32", "const", data=np.ascontiguousarray(array, np.int32))
        return Ref.of(root)

    # Making nodes

    def new(self, shape: Sequence[int], dtype: str = "f32") -> Root:
        return Root(tuple(shape), dtype)

    def ew(self, op: str, shape: Sequence[int], *sources: Source | float, dtype: str = "f32", **args: Any) -> Ref:
        """An elementwise node over `shape`; sources broadcast; plain numbers are fp32 immediates."""
        shape = tuple(shape)
        ins: list[Source] = []
        for s in sources:
            if isinstance(s, Ref):
                ins.append(s.broadcast(shape))
            else:
                ins.append(s if isinstance(s, Imm) else Imm(float(s)))
        out = Ref.of(self.new(shape, dtype))
        node = Node("ew", op, shape, tuple(ins), out, args=args, label=self.label)
        self.makers[out.root] = self.graph.add(node)
        return out

    def write(self, out: Ref, source: Source) -> None:
        """Copy (or fill) into part of a root."""
        self.graph.add(Node("ew", "mov", out.shape, (source,), out, label=self.label))

    def reduce(self, op: str, x: Ref, axes: Sequence[int]) -> Ref:
        """Fold `op` over axes, kept at 1. Axes that are no neighbours are folded one run after another, last first."""
        runs: list[list[int]] = []
        for a in sorted(axes):
            if runs and all(x.shape[d] == 1 for d in range(runs[-1][-1] + 1, a)):
                runs[-1].append(a)
            else:
                runs.append([a])
        for run in reversed(runs):
            if math.prod(x.shape[a] for a in run) == 1:
                continue
            kept = tuple(1 if d in run else n for d, n in enumerate(x.shape))
            out = Ref.of(self.new(kept, x.dtype if x.dtype == "i32" else "f32"))
            self.graph.add(Node("reduce", op, x.shape, (x,), out, axes=tuple(run), label=self.label))
            x = out
        return x

    def reshape(self, x: Ref, shape: Sequence[int]) -> Ref:
        """x in another shape: a view, or a copy where strides cannot express it."""
        shape = tuple(shape)
        view = x.view("reshape", shape)
        return view if view is not None else self.copy(x).must("reshape", shape)

    def copy(self, x: Ref) -> Ref:
        """x, row-major in storage of its own."""
        dtype = "f32" if x.dtype == "f16" else x.dtype
        out = Ref.of(self.new(x.shape, dtype))
        self.write(out, x)
        return out

    def pulled(self, x: Ref, transform: Transform) -> Ref:
        """x after a transform that always has a view. If x was just computed elementwise by a cheap op, that op is
        written again on transformed operands, so that its reader can be fused with it."""
        view = x.must(*transform)
        maker = self.makers.get(x.root)
        if maker is None or maker.op not in PULLED or not x.is_whole():
            return view
        sources: list[Source] = []
        for s in maker.sources:
            if isinstance(s, Ref):
                shaped = s.view("reshape", x.shape)
                if shaped is None:
                    return view
                s = shaped.must(*transform)
            sources.append(s)
        return self.ew(maker.op, view.shape, *sources)

    def gemm(self, a: Ref, b: Ref, shape: Sequence[int], alpha: float = 1.0, dtype: str = "f32") -> Ref:
        """a (..., m, k) times b (..., k, n), batch dims equal, into (..., m, n)."""
        out = Ref.of(self.new(shape, dtype))
        self.graph.add(Node("gemm", "", tuple(shape), (a, b), out, args={"alpha": alpha}, label=self.label))
        return out

    def step(self, kind: str, shape: Sequence[int], sources: Sequence[Ref], out: Ref, **args: Any) -> Ref:
        self.graph.add(Node(kind, "", tuple(shape), tuple(sources), out, args=args, label=self.label))
        return out

    def rounded(self, x: Ref, dtype: str, contraction: bool = False) -> Ref:
        """In precision fp16, x rounded to fp16 and its overflows counted under this op's name; else x.

        A contraction's result past 32752 is inf, as on the ANE (ane_facts section 5).
        """
        if self.precision != "fp16" or dtype != "fp16":
            return x
        self.graph.counters.append(self.label)
        limit = CONTRACTION_LIMIT if contraction else 65504.0
        return self.ew("half", x.shape, x, counter=len(self.graph.counters) - 1, limit=limit)
