"""Attention: scores, softmax and the products with its result become one region that runs head by head in scratch.

The pattern is one tile unit over (batch..., queries, keys) that reduces over the keys; its inputs of that shape come
from GEMMs that nobody else reads, its outputs of that shape go into GEMMs alone. That covers softmax(q^T k * scale +
mask) v and the backward that grad.py derives from it (dP = dout^T v, dS = P (dP - rowsum), dQ, dK, dV) alike; nothing
depends on names. An additive constant mask that is 0 up to the diagonal and at most -1e4 above it makes the region
causal: blocks above the diagonal are not computed. What does not match runs as GEMM, tile program, GEMM through memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from anert.backend.fuse import Space, Unit
from anert.backend.nodes import Node, Ref, Root

MASKED = -1e4
"""A mask value at or below it takes a key away: exp of the difference to any score is 0."""
MAX_BATCH_DIMS = 3


@dataclass(slots=True)
class Product:
    """A GEMM of a region: which of m, n, k (0, 1, 2) are the queries and the keys."""

    node: Node
    query: int
    key: int

    @property
    def adds_up(self) -> bool:
        """Whether blocks of queries add up in its result."""
        return self.query == 2


@dataclass(slots=True)
class Region:
    """`steps` in order; `scratch` roots live in the thread's scratch, a block of rows at a time."""

    batch: tuple[int, ...]
    queries: int
    keys: int
    block: int
    causal: bool
    softmax: Unit
    products: list[Product]
    steps: list[Unit] = field(default_factory=list)
    scratch: list[Root] = field(default_factory=list)

    @property
    def independent(self) -> bool:
        return not any(p.adds_up for p in self.products)

    @property
    def backward(self) -> bool:
        return not self.independent

    def product_of(self, n: Node) -> Product:
        return next(p for p in self.products if p.node is n)

    def executed(self) -> float:
        """Share of the (query, key) pairs that is computed."""
        if not self.causal:
            return 1.0
        pairs = 0
        for q in range(0, self.queries, self.block):
            rows = min(self.block, self.queries - q)
            pairs += rows * min(self.keys, q + rows)
        return pairs / (self.queries * self.keys)


def block_rows(queries: int) -> int:
    """Rows of queries at a time: enough for the GEMM's register tiles, few enough that causal blocks are worth
    skipping.
    """
    return 64 if queries <= 512 else 128


def _batch(n: Node) -> tuple[int, ...]:
    return tuple(d for d in n.shape[:-2] if d != 1)


def _square(ref: Ref, queries: int, keys: int) -> tuple[int, int] | None:
    """For an operand whose last two axes are the queries and the keys of a root (..., queries, keys) in one order or
    the other: the places (0 or 1) of query and key among the two."""
    root = ref.root
    if root.shape[-2:] != (queries, keys) or ref.layout.offset or ref.layout.size != root.size:
        return None
    strides = ref.layout.strides
    batch = [(d, s) for d, s in zip(ref.shape[:-2], strides[:-2], strict=True) if d != 1]
    step = queries * keys
    for extent, stride in reversed(batch):
        if stride != step:
            return None
        step *= extent
    if strides[-2:] == (keys, 1) and ref.shape[-2:] == (queries, keys):
        return 0, 1
    if strides[-2:] == (1, keys) and ref.shape[-2:] == (keys, queries):
        return 1, 0
    return None


class Finder:
    """Looks for regions among the units of a graph."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self.unit_of = {n: u for u in units for n in u.nodes}

    def run(self) -> list[Unit]:
        """Units with regions in place of what they cover."""
        for unit in list(self.units):
            region = self._region(unit) if unit.space is not None and unit in self.units else None
            if region is not None:
                self._replace(region)
        return self.units

    def _region(self, unit: Unit) -> Region | None:
        space = unit.space
        assert space is not None
        if len(space.dims) < 2 or space.flags != (False,) * (len(space.dims) - 1) + (True,):
            return None
        batch, (queries, keys) = space.dims[:-2], space.dims[-2:]
        if len(batch) > MAX_BATCH_DIMS:
            return None
        products = self._producers(unit, batch, queries, keys)
        consumers = self._consumers(unit, batch, queries, keys)
        if not products or not consumers:
            return None
        causal = queries == keys and any(is_causal(n, space) for n in unit.nodes)
        region = Region(batch, queries, keys, block_rows(queries), causal, unit, [*products, *consumers])
        members = [self.unit_of[p.node] for p in products] + [unit] + [self.unit_of[p.node] for p in consumers]
        if self._surrounds(set(members)):
            return None
        region.steps = members
        inside = [r.root for p in consumers for r in p.node.refs() if self._made(unit, r.root)]
        region.scratch = list(dict.fromkeys([p.node.out.root for p in products] + inside))
        return region

    def _made(self, unit: Unit, root: Root) -> bool:
        return any(w in unit.nodes for w in root.writers)

    def _producers(self, unit: Unit, batch: tuple[int, ...], queries: int, keys: int) -> list[Product]:
        """GEMMs whose results the unit alone reads, query by key."""
        found: dict[Node, Product] = {}
        for n in unit.nodes:
            for ref in n.refs():
                writers = ref.root.writers
                if len(writers) != 1 or writers[0].kind != "gemm" or ref.root.place != "arena":
                    continue
                gemm = writers[0]
                mine = all(self.unit_of[r] is unit for r in ref.root.readers)
                square = _square(gemm.out, queries, keys) == (0, 1) and gemm.out.root.shape == gemm.shape
                if mine and square and _batch(gemm) == batch and ref.is_whole():
                    found[gemm] = Product(gemm, 0, 1)
        return list(found.values())

    def _consumers(self, unit: Unit, batch: tuple[int, ...], queries: int, keys: int) -> list[Product] | None:
        """GEMMs that read what the unit writes; None if anything it writes goes elsewhere."""
        found: dict[Node, Product] = {}
        for n in unit.nodes:
            outside = [r for r in n.out.root.readers if self.unit_of[r] is not unit]
            if n.out.root.place == "arena" and not outside:
                continue
            if (
                n.out.root.place != "arena"
                or n.kind != "ew"
                or math.prod(n.shape) != math.prod((*batch, queries, keys))
            ):
                return None
            if n.out.root.shape[-2:] != (queries, keys) or not n.out.is_whole():
                return None
            for reader in outside:
                product = self._consumer(reader, n.out.root, batch, queries, keys) if reader.kind == "gemm" else None
                if product is None or reader in found:
                    return None
                found[reader] = product
        return list(found.values())

    def _consumer(self, n: Node, root: Root, batch: tuple[int, ...], queries: int, keys: int) -> Product | None:
        a, b = n.refs()
        if _batch(n) != batch or (a.root is root) == (b.root is root):
            return None
        if a.root is root:
            place = _square(a, queries, keys)
            return None if place is None else Product(n, (0, 2)[place[0]], (0, 2)[place[1]])
        place = _square(b, queries, keys)
        return None if place is None else Product(n, (2, 1)[place[0]], (2, 1)[place[1]])

    def _surrounds(self, members: set[Unit]) -> bool:
        """Whether a unit outside waits for a member and a member waits for it."""
        seen: set[Unit] = set()
        stack = [d for m in members for d in m.deps if d not in members]
        while stack:
            u = stack.pop()
            if u in seen:
                continue
            seen.add(u)
            if u.deps & members:
                return True
            stack.extend(u.deps)
        return False

    def _replace(self, region: Region) -> None:
        members = set(region.steps)
        nodes = [n for u in region.steps for n in u.nodes]
        unit = Unit(nodes, None, {d for m in members for d in m.deps} - members, region)
        at = max(self.units.index(m) for m in members)
        self.units[at] = unit
        self.units = [u for u in self.units if u not in members]
        for n in nodes:
            self.unit_of[n] = unit
        for u in self.units:
            if u.deps & members:
                u.deps -= members
                u.deps.add(unit)
        self.units = ordered(self.units)


def ordered(units: Sequence[Unit]) -> list[Unit]:
    """Units by dependency, else as they are."""
    done: set[Unit] = set()
    out: list[Unit] = []
    for start in units:
        stack = [start]
        while stack:
            unit = stack[-1]
            waiting = [u for u in units if u in unit.deps and u not in done]
            if waiting and unit not in done:
                stack.extend(waiting)
                continue
            stack.pop()
            if unit not in done:
                done.add(unit)
                out.append(unit)
    return out


def is_causal(n: Node, space: Space) -> bool:
    """Whether a node adds a constant that is 0 up to the diagonal and takes keys away above it, for every place of
    the batch.
    """
    if n.kind != "ew" or n.op != "add" or not space.is_full(n):
        return False
    for ref in n.refs():
        data = ref.root.data
        strides = space.strides(ref, True)
        if ref.root.place != "const" or data is None or strides is None or any(strides[:-2]):
            continue
        t = space.dims[-1]
        if strides[-2:] != (t, 1) or data.size != t * t:
            continue
        mask = data.reshape(t, t).astype(np.float32)
        lower = np.tril(np.ones((t, t), bool))
        if np.all(mask[lower] == 0.0) and np.all(mask[~lower] <= MASKED):
            return True
    return False
