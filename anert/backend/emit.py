"""Units -> the C plan: steps, views and instructions as anert.h has them, and the arena with its lifetimes coloured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anert.backend.attention import Product, Region
from anert.backend.fuse import Unit
from anert.backend.nodes import STORAGE, Graph, Node, Ref, Root
from anert.backend.plan import Buffer
from anert.backend.tiles import DIMS, TileBuilder, TileProgram
from anert.errors import UnsupportedError
from anert.ffi import load

ALIGN = 64


@dataclass(slots=True)
class Emitted:
    """A C plan's tables and what they need: `buffers[i]` is behind buffer i (None for 0, the arena). skipped: FLOPs of
    causal tiles that are not computed."""

    tables: dict[str, bytes]
    buffers: list[Buffer | None]
    arena_bytes: int
    steps: int
    skipped: int
    patterns: dict[str, int] = field(default_factory=dict)


def outside_roots(units: Sequence[Unit]) -> set[Root]:
    """Roots that must be in memory: ports, constants, what another unit than its writer reads, what is no register."""
    unit_of = {n: u for u in units for n in u.nodes}
    found: set[Root] = set()
    for unit in units:
        for n in unit.nodes:
            scratch = unit.region.scratch if unit.region is not None else ()
            plain = unit.space is None and (unit.region is None or n.kind == "gemm")
            for ref in (*n.refs(), *n.written()):
                root = ref.root
                elsewhere = any(unit_of[w] is not unit for w in (*root.writers, *root.readers))
                if root.place != "arena" or elsewhere or plain or root in scratch:
                    found.add(root)
    return found


def color(units: Sequence[Unit], outside: set[Root]) -> tuple[dict[Root, int], int]:
    """Byte offsets of arena roots, first fit over lifetimes by step, and the arena's size."""
    life: dict[Root, list[int]] = {}
    for at, unit in enumerate(units):
        for n in unit.nodes:
            for ref in (*n.refs(), *n.written()):
                scratch = unit.region is not None and ref.root in unit.region.scratch
                if ref.root.place == "arena" and ref.root in outside and not scratch:
                    span = life.setdefault(ref.root, [at, at])
                    span[1] = at
    offsets: dict[Root, int] = {}
    total = 0
    placed: list[Root] = []
    for root in sorted(life, key=lambda r: (-r.nbytes, life[r][0])):
        first, last = life[root]
        size = -(-root.nbytes // ALIGN) * ALIGN
        busy = sorted(
            (offsets[o], -(-o.nbytes // ALIGN) * ALIGN)
            for o in placed
            if life[o][0] <= last and first <= life[o][1]
        )  # fmt: skip
        at = 0
        for start, length in busy:
            if at + size <= start:
                break
            at = max(at, start + length)
        offsets[root] = at
        placed.append(root)
        total = max(total, at + size)
    return offsets, total


class Emitter:
    """Collects the arrays of an anert_plan_def."""

    def __init__(self, graph: Graph, units: Sequence[Unit], precision: str) -> None:
        native = load()
        self.ffi, self.lib = native.ffi, native.lib
        self.graph, self.units = graph, units
        self.gemm_precision = self.lib.ANERT_BF16 if precision == "bf16" else self.lib.ANERT_F32
        self.outside = outside_roots(units)
        self.offsets, self.arena = color(units, self.outside)
        self.buffers: list[Root | None] = [None]
        self.numbers: dict[Root, int] = {}
        self.views: list[dict[str, Any]] = []
        self.instrs: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.patterns: dict[str, int] = {}
        self.scratch: dict[Root, int] = {}
        """Offsets in the scratch of the region being emitted."""
        self.skipped = 0
        """FLOPs that causal regions leave out."""
        for root in (*graph.inputs.values(), *graph.outputs.values()):
            self._buffer(root)

    # Parts

    def _buffer(self, root: Root) -> int:
        if root.place == "arena":
            return 0
        if root not in self.numbers:
            self.numbers[root] = len(self.buffers)
            self.buffers.append(root)
        return self.numbers[root]

    def _view(
        self, root: Root | None, dtype: str, offset: int, strides: Sequence[int], loops: Sequence[int] = ()
    ) -> None:
        """Append a view. loops: strides of a region's batch dims, then of its query rows."""
        name, size = STORAGE[dtype]
        full = [*strides, *(0,) * (DIMS - len(strides))]
        loops = [*(0,) * (4 - len(loops)), *loops] if loops else [0] * 4
        if root is None:
            number = -1
        elif root in self.scratch:
            number, loops = -2, [0] * 4
            offset += self.scratch[root] // size
        else:
            number = self._buffer(root)
            offset += self.offsets[root] // size if root.place == "arena" else 0
        self.views.append({"buffer": number, "dtype": getattr(self.lib, name), "offset": offset, "strides": full,
                           "loops": loops})  # fmt: skip

    def _step(self, kind: str, dims: Sequence[int], first_view: int, **more: Any) -> None:
        first_instr = more.pop("first_instr", len(self.instrs))
        self.steps.append(
            {
                "kind": getattr(self.lib, f"ANERT_STEP_{kind.upper()}"),
                "dims": [*dims, *(1,) * (DIMS - len(dims))],
                "first_view": first_view,
                "n_views": len(self.views) - first_view,
                "first_instr": first_instr,
                "n_instrs": len(self.instrs) - first_instr,
                **more,
            }
        )

    # Steps

    def tile(self, program: TileProgram) -> None:
        first_view, first_instr = len(self.views), len(self.instrs)
        for v in program.views:
            self._view(v.root, v.dtype, v.offset, v.strides, v.loops)
        for i in program.instrs:
            self.instrs.append(
                {
                    "op": getattr(self.lib, f"ANERT_TILE_{i.op.upper()}"),
                    "kind": i.kind, "pass": i.phase, "dst": i.dst, "a": i.a, "b": i.b, "c": i.c,
                    "view": first_view + i.view if i.view >= 0 else -1, "counter": i.counter, "imm": i.imm_value(),
                }
            )  # fmt: skip
        args = [program.passes, program.registers, program.rows, program.lanes, program.spill * 4]
        self._step("tile", program.dims, first_view, first_instr=first_instr, reduced=program.reduced, args=args)

    def gemm(self, n: Node) -> None:
        """One step, or one for each place of the batch dims that do not merge into two."""
        a, b = n.refs()
        m, k, cols = n.shape[-2], a.shape[-1], n.shape[-1]
        layouts = [a.layout, b.layout, n.out.layout]
        batch = _merged(n.shape[:-2], [x.strides[:-2] for x in layouts])
        extents = [e for e, _ in batch]
        for place in np.ndindex(*extents[:-2]):
            first = len(self.views)
            for ref, x, at in zip((a, b, n.out), layouts, range(3), strict=True):
                offset = x.offset + sum(i * s[at] for i, (_, s) in zip(place, batch, strict=False))
                inner = [s[at] for _, s in batch[-2:]]
                strides = [*(0,) * (2 - len(inner)), *inner, *x.strides[-2:]]
                self._view(ref.root, ref.dtype, offset, strides)
            dims = [*(1,) * (2 - len(extents[-2:])), *extents[-2:], m, cols, k]
            self._step("gemm", dims, first, alpha=n.args["alpha"], beta=0.0, precision=self.gemm_precision)

    def region(self, region: Region) -> None:
        """The region's own step, then its parts: dims without the batch, which the region's loops walk."""
        at = 0
        for root in region.scratch:
            self.scratch[root] = at
            at += -(-region.block * region.keys * STORAGE[root.dtype][1] // ALIGN) * ALIGN
        batch = [*(1,) * (3 - len(region.batch)), *region.batch]
        args = [region.block, len(region.steps), int(region.causal), 0, at, int(region.independent)]
        self._step("region", [*batch, region.queries, region.keys], len(self.views), args=args)
        for unit in region.steps:
            if unit is region.softmax:
                self.tile(TileBuilder(unit, self.outside, len(region.batch)).build())
            else:
                self._product(region, region.product_of(unit.nodes[0]))
        self.scratch = {}
        pairs = math.prod(region.batch) * region.queries * region.keys
        for p in region.products:
            inner = p.node.refs()[0].shape[-1] if p.query != 2 and p.key != 2 else 0
            width = inner or p.node.shape[-1 if 0 in (p.query, p.key) else -2]
            self.skipped += int(2 * pairs * width * (1.0 - region.executed()))
        name = "attention_backward" if region.backward else "attention"
        self.patterns[name] = self.patterns.get(name, 0) + 1

    def _product(self, region: Region, p: Product) -> None:
        """A GEMM of a region, for one place of its batch."""
        first, n = len(self.views), p.node
        a, b = n.refs()
        places = ((0, 2), (2, 1), (0, 1))  # which of m, n, k the last two axes of a, b, c are
        for ref, axes in zip((a, b, n.out), places, strict=True):
            strides = ref.layout.strides
            loops = [s for d, s in zip(n.shape[:-2], strides[:-2], strict=True) if d != 1]
            query = strides[-2:][axes.index(p.query)] if p.query in axes else 0
            self._view(ref.root, ref.dtype, ref.layout.offset, [0, 0, *strides[-2:]], [*loops, query])
        dims = [1, 1, n.shape[-2], n.shape[-1], a.shape[-1]]
        self._step("gemm", dims, first, alpha=n.args["alpha"], beta=0.0, precision=self.gemm_precision,
                   args=[p.query, p.key, int(p.adds_up)])  # fmt: skip

    def move(self, n: Node) -> None:
        """gather, scatter, arg, im2col, col2im: the views of the box, and the kernel's own numbers."""
        first = len(self.views)
        refs = [n.out, *n.refs()] if n.kind != "col2im" else [*n.refs(), n.out]
        shape, strides = n.shape, [list(r.layout.strides) for r in refs]
        if n.kind in ("im2col", "col2im"):
            x = strides[1]
            strides[1] = [x[0], x[1], 0, 0, x[2], x[3]]
            args = list(n.args["args"])
        elif n.kind == "arg":
            args = [n.args["largest"]]
        else:
            args = [n.args["extent"], n.args["stride"], n.args.get("mode", 0)]
        if n.kind in ("gather", "scatter", "arg"):
            shape, strides = self._fitted(n, refs, keep_last=n.kind == "arg")
        for ref, s in zip(refs, strides, strict=True):
            self._view(ref.root, ref.dtype, ref.layout.offset, s)
        self._step(n.kind, shape, first, args=args)

    def _fitted(self, n: Node, refs: Sequence[Ref], keep_last: bool) -> tuple[tuple[int, ...], list[list[int]]]:
        """The box in exactly six dims, the last one as it is if it is the axis of an arg."""
        inner = len(n.shape) - 1 if keep_last else len(n.shape)
        groups = _merged(n.shape[:inner], [r.layout.strides[:inner] for r in refs])
        if keep_last:
            groups.append((n.shape[-1], [r.layout.strides[-1] for r in refs]))
        if len(groups) > DIMS:
            raise UnsupportedError(f"{n.label}: {n.kind} over {len(groups)} unmergeable dims: 'cpu' runs up to {DIMS}")
        groups = [(1, [0] * len(refs))] * (DIMS - len(groups)) + groups
        return tuple(e for e, _ in groups), [[s[i] for _, s in groups] for i in range(len(refs))]

    # All

    def run(self) -> Emitted:
        for unit in self.units:
            n = unit.nodes[0]
            if unit.region is not None:
                self.region(unit.region)
                continue
            kind = "tile" if unit.space is not None else n.kind
            self.patterns[kind] = self.patterns.get(kind, 0) + 1
            if unit.space is not None:
                self.tile(TileBuilder(unit, self.outside).build())
            elif kind == "gemm":
                self.gemm(n)
            else:
                self.move(n)
        return self._make()

    def _make(self) -> Emitted:
        ffi = self.ffi
        sizes = [{"nbytes": self.arena, "writable": 1}]
        for root in self.buffers[1:]:
            assert root is not None
            sizes.append({"nbytes": root.nbytes, "writable": int(root.place == "output")})
        arrays = {
            "buffers": ffi.new("anert_buffer[]", sizes),
            "views": ffi.new("anert_view[]", self.views),
            "instrs": ffi.new("anert_instr[]", self.instrs),
            "steps": ffi.new("anert_step[]", self.steps),
        }
        tables = {name: bytes(ffi.buffer(array)) for name, array in arrays.items()}
        buffers = [None, *(Buffer(r.place, r.name, r.nbytes, r.data) for r in self.buffers[1:] if r is not None)]
        return Emitted(tables, buffers, self.arena, len(self.steps), self.skipped, self.patterns)


def _merged(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Dims of 1 dropped and neighbours merged that all views step through as one: (extent, stride of each view)."""
    groups: list[tuple[int, list[int]]] = []
    for d, extent in enumerate(shape):
        if extent == 1:
            continue
        here = [s[d] for s in strides]
        if groups and all(before == own * extent for before, own in zip(groups[-1][1], here, strict=True)):
            groups[-1] = (groups[-1][0] * extent, here)
        else:
            groups.append((extent, here))
    return groups
