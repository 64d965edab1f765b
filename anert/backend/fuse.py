"""Graph -> units: elementwise nodes and reductions that share an iteration space become one unit, others stand alone.

A unit's space is a list of dims that every member's shape is a merge of. Members are `full` (they vary over all dims)
or `reduced` (over those that the unit's reductions leave). A value passes from member to member in a register if its
reader sees it in index order; everything else goes through memory, and then producer and reader are different units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anert.backend.nodes import Graph, Node, Ref, Root
from anert.backend.views import contiguous, refine, same_strides

if TYPE_CHECKING:
    from anert.backend.attention import Region

MAX_MEMBERS = 64
"""Nodes in a unit: beyond it registers would run out."""
FUSABLE = ("ew", "reduce")


@dataclass(slots=True)
class Space:
    """dims of a unit without dims of 1, which of them are reduced, and the dims that stay."""

    dims: tuple[int, ...]
    flags: tuple[bool, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(d for d, f in zip(self.dims, self.flags, strict=True) if not f)

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    def is_full(self, node: Node) -> bool:
        return math.prod(node.shape) == self.size

    def strides(self, ref: Ref, full: bool) -> tuple[int, ...] | None:
        """Strides of a ref (shaped like its node) over dims; 0 over the reduced ones if not full."""
        if full:
            return ref.layout.split(self.dims)
        kept = ref.layout.split(self.kept)
        if kept is None:
            return None
        rest = iter(kept)
        return tuple(0 if f else next(rest) for f in self.flags)

    def register_strides(self, full: bool) -> tuple[int, ...]:
        """Strides over dims of a value that a member just computed, in index order."""
        if full:
            return contiguous(self.dims)
        rest = iter(contiguous(self.kept))
        return tuple(0 if f else next(rest) for f in self.flags)


@dataclass(eq=False, slots=True)
class Unit:
    """Nodes that run as one step; `space` if they are a tile program."""

    nodes: list[Node]
    space: Space | None = None
    deps: set[Unit] = field(default_factory=set)
    region: Region | None = None
    """Set if the nodes run head by head (attention.py)."""


def _split_dims(space: Space, kept: tuple[int, ...]) -> Space:
    """The space with its kept dims split as `kept`, a refinement of them."""
    dims: list[int] = []
    flags: list[bool] = []
    rest = list(kept)
    for d, f in zip(space.dims, space.flags, strict=True):
        if f:
            dims.append(d)
            flags.append(True)
            continue
        left = d
        while left > 1:
            dims.append(rest.pop(0))
            flags.append(False)
            left //= dims[-1]
    return Space(tuple(dims), tuple(flags))


def _flags(dims: Sequence[int], node: Node) -> tuple[bool, ...]:
    """Which dims the axes of a reduce node cover."""
    flags: list[bool] = []
    at = 0
    for axis, extent in enumerate(node.shape):
        left = extent
        while left > 1:
            left //= dims[at]
            flags.append(axis in node.axes)
            at += 1
    return tuple(flags)


def space_of(nodes: Sequence[Node]) -> Space | None:
    """The common space of nodes, or None if they have none or a value would have to leave its register."""
    size = max(math.prod(n.shape) for n in nodes)
    dims: tuple[int, ...] | None = ()
    first = True
    for n in nodes:
        if math.prod(n.shape) == size:
            dims = refine(n.shape, n.shape if first else dims or ())
            first = False
            if dims is None:
                return None
    assert dims is not None
    folds = [n for n in nodes if n.kind == "reduce"]
    if any(math.prod(n.shape) != size for n in folds):
        return None
    flags = {_flags(dims, n) for n in folds}
    if len(flags) > 1:
        return None
    space = Space(dims, flags.pop() if flags else (False,) * len(dims))
    kept_size = math.prod(space.kept)
    for n in nodes:
        if space.is_full(n):
            continue
        if math.prod(n.shape) != kept_size:
            return None
        finer = refine(n.shape, space.kept)
        if finer is None:
            return None
        space = _split_dims(space, finer)
    return space if _passes(nodes, space) else None


def _passes(nodes: Sequence[Node], space: Space) -> bool:
    """Whether every value that a member reads from another member is where its register has it."""
    producers = {n.out.root: n for n in nodes}
    for n in nodes:
        full = space.is_full(n)
        for ref in n.refs():
            producer = producers.get(ref.root)
            if producer is None:
                continue
            if len(ref.root.writers) != 1 or not producer.out.is_whole() or ref.layout.offset:
                return False
            wide = producer.kind == "ew" and space.is_full(producer)
            if wide and not full:
                return False
            strides = space.strides(ref, full)
            if strides is None or not same_strides(space.dims, strides, space.register_strides(wide)):
                return False
    return True


def read_outputs(graph: Graph) -> None:
    """Values that the program returns in fp16 are read as they are returned, wherever they pass through memory: by
    contractions, and by all if a contraction made them. One copy serves both, half as large as an interior one, and
    the backward pass finds what the forward pass has used."""
    graph.link()
    for copy in [n for n in graph.nodes if n.kind == "ew" and n.op == "mov" and n.out.root.place == "output"]:
        source = copy.sources[0]
        if not isinstance(source, Ref) or (source.dtype, copy.out.dtype) != ("f32", "f16"):
            continue
        root = source.root
        whole = root.place == "arena" and source.is_whole() and copy.out.is_whole()
        target = copy.out.view("reshape", root.shape) if whole else None
        if target is None:
            continue
        made = all(w.kind == "gemm" for w in root.writers)
        for n in [n for n in root.readers if n is not copy and n.kind in (("gemm", *FUSABLE) if made else ("gemm",))]:
            moved = [s.replay(target) if isinstance(s, Ref) and s.root is root else s for s in n.sources]
            if None not in moved:
                n.sources = tuple(s for s in moved if s is not None)
        graph.nodes.remove(copy)
        graph.nodes.insert(max(graph.nodes.index(w) for w in root.writers) + 1, copy)
        graph.link()


def sums_of(units: Sequence[Unit]) -> dict[Node, Unit]:
    """Products of regions whose blocks of queries add up in memory, and their regions."""
    regions = [(u, u.region) for u in units if u.region is not None]
    return {p.node: u for u, region in regions for p in region.products if p.adds_up}


def widen_sums(units: Sequence[Unit]) -> list[Unit]:
    """Blocks of queries add up in fp32: a sum that would grow in an fp16 output does so beside it, and is copied."""
    out = list(units)
    for n, unit in sums_of(units).items():
        root = n.out.root
        wide = Root(root.shape)
        moved = n.out.replay(Ref.of(wide)) if root.dtype != "f32" else None
        if moved is None:
            continue
        copy = Node("ew", "mov", root.shape, (Ref.of(wide),), Ref.of(root), label=n.label)
        n.out, wide.writers, wide.readers = moved, [n], [copy]
        root.writers = [copy if w is n else w for w in root.writers]
        copied = Unit([copy], space_of([copy]), {unit})
        for other in units:
            if unit in other.deps:
                other.deps.add(copied)
        out.insert(out.index(unit) + 1, copied)
    return out


def narrow(units: Sequence[Unit]) -> None:
    """Interior values that contractions in bf16 alone read are kept in bf16, which they would be rounded to anyway:
    not a bit of a result changes. Not those that blocks of queries add up in."""
    sums = sums_of(units)
    for root in {ref.root for u in units for n in u.nodes for ref in n.written()}:
        plain = root.place == "arena" and root.dtype == "f32" and bool(root.readers)
        written = all(w.kind in ("gemm", *FUSABLE) and w not in sums for w in root.writers)
        if plain and written and all(n.kind == "gemm" and n.refs()[0].dtype != "q8" for n in root.readers):
            root.dtype = "bf16"


def retarget(graph: Graph) -> None:
    """Drop copies of values that nobody else reads: their producers write where the copy would have."""
    graph.link()
    for copy in [n for n in graph.nodes if n.kind == "ew" and n.op == "mov"]:
        source = copy.sources[0]
        if not isinstance(source, Ref):
            continue
        root = source.root
        if root.place != "arena" or root.readers != [copy] or not source.is_whole():
            continue
        target = copy.out.view("reshape", root.shape)
        if target is None:
            continue
        moves = any(w.kind not in ("ew", "reduce", "gemm") for w in root.writers)
        if (moves or "i32" in (root.dtype, target.dtype)) and root.dtype != target.dtype:
            continue
        outs = {w: w.out.replay(target) for w in root.writers if w.out.root is root}
        if len(outs) != len(root.writers) or any(o is None for o in outs.values()):
            continue
        for writer, out in outs.items():
            assert out is not None
            writer.out = out
            target.root.writers = [w for w in target.root.writers if w is not copy] + [writer]
        graph.nodes.remove(copy)
    graph.link()


def prune(graph: Graph) -> None:
    """Drop nodes whose results nobody reads."""
    graph.link()
    live: set[Node] = set()
    stack = [n for n in graph.nodes if any(r.root.place == "output" for r in n.written())]
    while stack:
        n = stack.pop()
        if n not in live:
            live.add(n)
            stack.extend(w for ref in (*n.refs(), *n.written()) for w in ref.root.writers)
    graph.nodes = [n for n in graph.nodes if n in live]
    graph.link()


class Fuser:
    """Groups the nodes of a graph into units, greedily in node order; none over more than `max_dims` dims."""

    def __init__(self, graph: Graph, fuse: bool, max_dims: int = 64) -> None:
        self.graph, self.fuse, self.max_dims = graph, fuse, max_dims
        self.unit_of: dict[Node, Unit] = {}
        self.units: list[Unit] = []
        self.before: dict[Node, list[Node]] = self._dependencies()
        self.positions = {n: i for i, n in enumerate(graph.nodes)}

    def _dependencies(self) -> dict[Node, list[Node]]:
        """Nodes that each node waits for: writers of what it reads, and earlier writers of what a scatter adds to."""
        before: dict[Node, list[Node]] = {}
        for n in self.graph.nodes:
            found = [w for ref in n.refs() for w in ref.root.writers if w is not n]
            if n.kind == "scatter":
                writers = n.out.root.writers
                found += writers[: writers.index(n)]
            before[n] = found
        return before

    def run(self) -> list[Unit]:
        """The units, in an order that works."""
        for n in self.graph.nodes:
            deps = {self.unit_of[w] for w in self.before[n]}
            unit = self._join(n, deps) if n.kind in FUSABLE else None
            if unit is None:
                unit = Unit([n], space_of([n]) if n.kind in FUSABLE else None, deps)
                self.units.append(unit)
            self.unit_of[n] = unit
        return self._ordered()

    def _join(self, n: Node, deps: set[Unit]) -> Unit | None:
        """Put n into the units that it reads from, as far as they agree; None if it must stand alone."""
        if not self.fuse:
            return None
        joined: Unit | None = None
        order = sorted((u for u in deps if u.space is not None), key=lambda u: -self.units.index(u))
        order += self._siblings(n, deps)
        for unit in order:
            own = [n] if joined is None else joined.nodes
            if unit is joined or unit not in self.units:
                continue
            nodes = sorted([*unit.nodes, *own], key=self._position)
            others = (deps if joined is None else joined.deps) | unit.deps
            if len(nodes) > MAX_MEMBERS or self._cycle(others, unit, joined):
                continue
            space = space_of(nodes)
            if space is None or len(space.dims) > self.max_dims:
                continue
            unit.nodes, unit.space = nodes, space
            unit.deps |= deps
            if joined is not None:
                self._replace(joined, unit)
            unit.deps -= {unit}
            joined = unit
        return joined

    def _siblings(self, n: Node, deps: set[Unit]) -> list[Unit]:
        """Units that read what n reads, from the same place: one load serves both."""
        found = []
        for ref in n.refs():
            for other in ref.root.readers:
                unit = self.unit_of.get(other)
                if unit is None or unit.space is None or unit in deps or unit in found:
                    continue
                if any(o.root is ref.root and o.is_whole() == ref.is_whole() for o in other.refs()):
                    found.append(unit)
        return found

    def _position(self, n: Node) -> int:
        return self.positions[n]

    def _replace(self, old: Unit, new: Unit) -> None:
        """`old` has become part of `new`."""
        new.deps |= old.deps
        self.units.remove(old)
        for m in old.nodes:
            self.unit_of[m] = new
        for m in new.nodes:
            self.unit_of[m] = new
        for u in self.units:
            if old in u.deps:
                u.deps.discard(old)
                u.deps.add(new)
        new.deps -= {old, new}

    def _cycle(self, deps: set[Unit], a: Unit, b: Unit | None) -> bool:
        """Whether something that the merged unit would wait for waits for a or b itself."""
        seen: set[Unit] = set()
        stack = [u for u in deps if u is not a and u is not b]
        while stack:
            u = stack.pop()
            if u is a or u is b:
                return True
            if u not in seen:
                seen.add(u)
                stack.extend(u.deps)
        return False

    def _ordered(self) -> list[Unit]:
        """Units by dependency, earliest first node first."""
        done: set[Unit] = set()
        out: list[Unit] = []
        for start in sorted(self.units, key=lambda u: self._position(u.nodes[-1])):
            stack = [start]
            while stack:
                unit = stack[-1]
                waiting = [u for u in unit.deps if u not in done]
                if unit in done or not waiting:
                    stack.pop()
                    if unit not in done:
                        done.add(unit)
                        out.append(unit)
                else:
                    stack.extend(sorted(waiting, key=lambda u: self._position(u.nodes[-1])))
        return out
