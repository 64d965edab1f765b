"""Unit -> tile program: instructions by pass, registers, and how the space lies over rows, lanes and outer dims.

Passes: a reduction folds its operand in pass p; what needs its result runs after pass p (once per tile, on what does
not vary over the reduced dims) or in the body of pass p + 1. A value that a later body needs again is computed again
if that is cheap, else kept in the tile's scratch.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace

from anert.backend.fuse import Space, Unit
from anert.backend.nodes import Imm, Node, Ref, Root
from anert.backend.views import Layout
from anert.errors import UnsupportedError

DIMS = 6
LANES, ROWS = 1, 2
FULL = LANES | ROWS
CHUNK, PLAIN_CHUNK = 2048, 512
"""Elements of a register: 8 KiB where something is reduced, since its rows are short; 2 KiB elsewhere, so that all
registers and what they are loaded from stay in L1 (two thirds of the time of SwiGLU's backward pass at 8 KiB)."""
MAX_REGISTERS = 64
HEAVY = frozenset({"exp", "log", "tanh", "sigmoid", "erf", "pow", "sin", "cos", "tan", "asin", "acos", "atan", "sinh",
                   "cosh", "atanh", "mod", "i32_div", "i32_mod"})  # fmt: skip
"""Ops that are kept rather than computed again."""
CHEAP_OPS, SMALL_TILE = 4, 4096
"""Ops that cost no more than keeping their value; in a tile of so few elements, which stays in L1, that costs one."""
FOLDS = frozenset({"sum", "rmax", "rmin"})


@dataclass(frozen=True, slots=True)
class View:
    """A view over the program's dims. root None: the tile's scratch. loops: strides of a region's loops."""

    root: Root | None
    dtype: str
    offset: int
    strides: tuple[int, ...]
    loops: tuple[int, ...] = ()


@dataclass(slots=True)
class Instr:
    """dst, a, b, c are value numbers until registers are allotted; -1 reads imm."""

    op: str
    kind: int
    phase: int
    dst: int = -1
    a: int = -1
    b: int = -1
    c: int = -1
    view: int = -1
    imm: float = 0.0
    bits: bool = False
    counter: int = -1

    def sources(self) -> tuple[int, int, int]:
        return self.a, self.b, self.c

    def imm_value(self) -> float:
        """imm as the float whose bits the instruction holds."""
        return struct.unpack("f", struct.pack("i", int(self.imm)))[0] if self.bits else self.imm


@dataclass(slots=True)
class TileProgram:
    dims: tuple[int, ...]
    reduced: int
    passes: int
    registers: int
    rows: int
    lanes: int
    spill: int
    views: list[View]
    instrs: list[Instr]


@dataclass(slots=True)
class _Value:
    """A number of the program: where it comes from and which kind of register it needs."""

    kind: int
    phase: int
    op: str = ""
    sources: tuple[int | Imm, ...] = ()
    view: View | None = None
    counter: int = -1
    limit: float = 0.0
    stores: list[View] = field(default_factory=list)
    number: int = -1
    kept: View | None = None
    """Where a later pass finds it again."""


# ---- The order of dims ----


@dataclass(slots=True)
class _Axes:
    """How the unit's dims become the program's six: groups of dims that merge, in program order."""

    groups: list[list[int]]
    dims: tuple[int, ...]
    reduced: int

    def strides(self, unit_strides: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(unit_strides[g[-1]] if g else 0 for g in self.groups)


def _merge(space: Space, views: list[tuple[int, ...]], first: int) -> list[list[int]]:
    """Neighbouring dims from `first` on that every view steps through as one."""
    groups: list[list[int]] = []
    for d in range(first, len(space.dims)):
        last = groups[-1][-1] if groups else -1
        if groups and space.flags[last] == space.flags[d]:
            n = space.dims[d]
            if all(v[last] == v[d] * n for v in views):
                groups[-1].append(d)
                continue
        groups.append([d])
    return groups


def _axes(space: Space, views: list[tuple[int, ...]], first: int) -> _Axes:
    """Choose lanes and rows among the merged dims from `first` on, and put them last."""
    groups = _merge(space, views, first)
    if first:  # a region: queries and keys
        groups = [[first], [first + 1]]
    extent = {id(g): math.prod(space.dims[d] for d in g) for g in groups}
    folds = [g for g in groups if space.flags[g[0]]]

    def score(g: list[int]) -> tuple[float, int]:
        found = [v[g[-1]] for v in views]
        points = sum(2.0 if s == 1 else 0.5 if s == 0 else -1.0 for s in found)
        return (points if extent[id(g)] >= 8 else points - len(found)), g[-1]

    lanes = groups[-1] if first else max(groups, key=score, default=None)
    rest = [g for g in groups if g is not lanes]
    rows: list[int] | None = None
    if lanes is not None and folds and lanes not in folds:
        rows = max(folds, key=lambda g: (extent[id(g)], g[-1]))
    else:
        free = [g for g in rest if not space.flags[g[0]]]
        rows = max(free, key=lambda g: (min(extent[id(g)], 16), g[-1]), default=None)
    outer = [g for g in rest if g is not rows]
    if len(outer) > DIMS - 2:
        raise UnsupportedError(f"an elementwise program over {len(groups)} unmergeable dims: 'cpu' runs up to {DIMS}")
    order: list[list[int]] = [[] for _ in range(DIMS - 2 - len(outer))] + outer + [rows or [], lanes or []]
    dims = tuple(math.prod(space.dims[d] for d in g) for g in order)
    reduced = sum(1 << i for i, g in enumerate(order) if g and space.flags[g[0]])
    return _Axes(order, dims, reduced)


# ---- Building ----


class TileBuilder:
    """Builds the program of one unit. `outside`: roots that must be in memory. loops: as many leading dims of the
    space are a region's loops, not the program's."""

    def __init__(self, unit: Unit, outside: set[Root], loops: int | None = None) -> None:
        assert unit.space is not None
        self.unit, self.space, self.outside = unit, unit.space, outside
        self.values: list[_Value] = []
        self.loads: dict[tuple[Root, int, tuple[int, ...]], int] = {}
        self.made: dict[Root, int] = {}
        self.loops = loops
        self.axes = _axes(self.space, self._all_strides(), loops or 0)
        self.lanes_reduced = bool(self.axes.reduced >> (DIMS - 1) & 1)
        self.rows_reduced = bool(self.axes.reduced >> (DIMS - 2) & 1)

    def _all_strides(self) -> list[tuple[int, ...]]:
        made = {n.out.root for n in self.unit.nodes}
        found = []
        for n in self.unit.nodes:
            full = self.space.is_full(n)
            refs = [(r, full) for r in n.refs() if r.root not in made]
            if n.out.root in self.outside:
                refs.append((n.out, full and n.kind == "ew"))
            for ref, wide in refs:
                strides = self._out_strides(n, ref) if ref is n.out else self.space.strides(ref, wide)
                assert strides is not None
                found.append(strides)
        return found

    def _out_strides(self, n: Node, ref: Ref) -> tuple[int, ...] | None:
        """Strides over dims of what n writes; a reduction writes its kept dims."""
        if n.kind == "ew":
            return self.space.strides(ref, self.space.is_full(n))
        return self.space.strides(ref, False)

    def _kind(self, strides: tuple[int, ...]) -> int:
        kind = 0
        if strides[DIMS - 1] and self.axes.dims[DIMS - 1] > 1:
            kind |= LANES
        if strides[DIMS - 2] and self.axes.dims[DIMS - 2] > 1:
            kind |= ROWS
        return kind

    def _reduced_bits(self) -> int:
        return (LANES if self.lanes_reduced else 0) | (ROWS if self.rows_reduced else 0)

    def _add(self, value: _Value) -> int:
        value.number = len(self.values)
        self.values.append(value)
        return value.number

    def _view(self, ref: Ref, strides: tuple[int, ...]) -> View:
        loops = () if self.loops is None else strides[: self.loops + 1]
        return View(ref.root, ref.dtype, ref.layout.offset, self.axes.strides(strides), loops)

    def _load(self, ref: Ref, full: bool) -> int:
        strides = self.space.strides(ref, full)
        assert strides is not None
        view = self._view(ref, strides)
        key = (ref.root, ref.layout.offset, view.strides)
        if key not in self.loads:
            self.loads[key] = self._add(_Value(self._kind(view.strides), 0, "load", view=view))
        return self.loads[key]

    def _node(self, n: Node) -> None:
        full = self.space.is_full(n)
        sources: list[int | Imm] = []
        for s in n.sources:
            if isinstance(s, Imm):
                sources.append(s)
            else:
                sources.append(self.made[s.root] if s.root in self.made else self._load(s, full))
        kind, phase = 0, 0
        for number in sources:
            if isinstance(number, int):
                kind |= self.values[number].kind
                phase = max(phase, self.values[number].phase)
        if n.kind == "reduce":
            phase += phase & 1  # a body
            value = _Value(kind & ~self._reduced_bits(), phase + 1, n.op, tuple(sources))
            number = self._add(value)
        else:
            if full and phase & 1:
                phase += 1
            number = self._alu(n, kind, phase, sources)
        self.made[n.out.root] = number
        if n.out.root in self.outside:
            strides = self._out_strides(n, n.out)
            assert strides is not None
            self._store(number, self._view(n.out, strides), full and n.kind == "ew")

    def _alu(self, n: Node, kind: int, phase: int, sources: list[int | Imm]) -> int:
        """An elementwise value; all immediates but one become registers first."""
        imms = [i for i, s in enumerate(sources) if isinstance(s, Imm)]
        for i in imms[1:]:
            if sources[i] != sources[imms[0]]:
                sources[i] = self._add(_Value(0, phase, "mov", (sources[i],)))
        return self._add(_Value(kind, phase, n.op, tuple(sources), counter=n.args.get("counter", -1),
                                limit=n.args.get("limit", 0.0)))  # fmt: skip

    def _store(self, number: int, view: View, full: bool) -> None:
        """A store varies over all that its view varies over, so its value is widened if it varies over less."""
        value = self.values[number]
        wanted = self._kind(view.strides) | value.kind
        if value.op == "load" or (full and value.phase & 1) or (value.kind != wanted and value.kind != 0):
            phase = value.phase + (1 if full and value.phase & 1 else 0)
            number = self._add(_Value(wanted, phase, "mov", (number,)))
        self.values[number].stores.append(view)

    def build(self) -> TileProgram:
        for n in self.unit.nodes:
            self._node(n)
        rows, lanes, spill_strides = self._chunk(CHUNK)
        schedule = _Schedule(self.values, self.axes, spill_strides)
        schedule.run()
        registers = schedule.allot()
        if registers > MAX_REGISTERS:
            raise UnsupportedError(f"a fused program needs {registers} registers: 'cpu' has {MAX_REGISTERS}")
        if registers > 8:
            rows, lanes, again = self._chunk(CHUNK // 2)
            if again != spill_strides and schedule.spill:
                rows, lanes, again = self._chunk(CHUNK)
        passes = max((i.phase for i in schedule.instrs), default=0) // 2 + 1
        return TileProgram(self.axes.dims, self.axes.reduced, passes, max(1, registers), rows, lanes, schedule.spill,
                           schedule.views, schedule.instrs)  # fmt: skip

    def _chunk(self, size: int) -> tuple[int, int, Layout]:
        """Rows and lanes of a chunk, and the layout of a value kept in the tile's scratch."""
        r, w = self.axes.dims[DIMS - 2 :]
        if self.rows_reduced:
            tiles = math.prod(self.axes.dims[i] for i in range(DIMS - 2) if not self.axes.reduced >> i & 1)
            lanes = min(w, 64 if tiles * (w // 64) >= 16 else 32)
            rows = max(1, min(r, size // lanes))
        elif self.lanes_reduced:
            lanes = w if w <= size else size
            rows = max(1, min(r, size // lanes, 64))
        else:
            size = min(size, PLAIN_CHUNK)
            turned = any(v.view is not None and v.view.strides[DIMS - 1] not in (0, 1) for v in self.values)
            lanes = min(w, 32 if turned and r >= 32 else size)
            rows = max(1, min(r, size // lanes))
        extents = []
        for i, d in enumerate(self.axes.dims):
            chunk = rows if i == DIMS - 2 else lanes if i == DIMS - 1 else 1
            extents.append(d if self.axes.reduced >> i & 1 else chunk)
        return rows, lanes, Layout.of(extents)


class _Schedule:
    """Values -> instructions in pass order, then registers."""

    def __init__(self, values: list[_Value], axes: _Axes, tile: Layout) -> None:
        self.values, self.axes, self.tile = values, axes, tile
        self.instrs: list[Instr] = []
        self.views: list[View] = []
        self.spill = 0
        self.ready: dict[tuple[int, int], int] = {}
        self.numbers = len(values)
        self.lasting: set[int] = set()

    def run(self) -> None:
        phases = sorted({v.phase for v in self.values} | {v.phase - 1 for v in self.values if v.op in FOLDS})
        self._mark_kept()
        for phase in phases:
            for v in self.values:
                if v.op in FOLDS:
                    if v.phase == phase + 1:
                        self._fold(v, phase)
                    elif v.phase == phase:
                        self._stores(v, v.number, phase)
                elif v.phase == phase and v.op != "load":
                    self._number(v.number, phase)
        self._prune()
        self._skip_copies()

    def _skip_copies(self) -> None:
        """A value is stored as it is, where a copy of it would be stored and nothing else."""
        reads: dict[int, int] = {}
        kinds = {i.dst: i.kind for i in self.instrs if i.dst >= 0}
        for i in self.instrs:
            for n in i.sources():
                reads[n] = reads.get(n, 0) + 1
        kept: list[Instr] = []
        for i in self.instrs:
            copy = kept[-1] if kept and i.op == "store" and kept[-1].op == "mov" else None
            if copy and copy.dst == i.a and reads[i.a] == 1 and kinds.get(copy.a) == copy.kind == i.kind:
                kept[-1] = replace(i, a=copy.a)
            else:
                kept.append(i)
        self.instrs = kept

    def _prune(self) -> None:
        """Drop what computes a value that nothing of its body reads: later bodies compute it again. Counters count."""
        needed, live = set(self.lasting), []
        for i in reversed(self.instrs):
            if i.dst < 0 or i.dst in needed or i.counter >= 0:
                needed.update(i.sources())
                live.append(i)
        self.instrs = live[::-1]

    def _mark_kept(self) -> None:
        """Give a place in the tile to every value that a later body needs and that is dear to compute again."""
        for v in self.values:
            body = v.phase - 1 if v.op in FOLDS else v.phase
            if body & 1:
                continue
            for s in v.sources:
                if isinstance(s, int):
                    self._keep(s, body)

    def _keep(self, number: int, phase: int) -> None:
        v = self.values[number]
        if v.op in FOLDS or v.op == "load" or v.phase & 1 or v.phase >= phase or v.kept is not None:
            return
        home = next((s for s in v.stores if s.dtype == "f32" and s.strides[DIMS - 1] == 1), None)
        if home is not None:
            v.kept = home
            return
        if self._cost(number, phase) > (1 if self.tile.size <= SMALL_TILE else CHEAP_OPS):
            v.kept = View(None, "f32", self.spill, tuple(self._spill_strides(v.kind)))
            self.spill += self.tile.size
            return
        for s in v.sources:
            if isinstance(s, int):
                self._keep(s, phase)

    def _spill_strides(self, kind: int) -> list[int]:
        strides = list(self.tile.strides)
        if not kind & LANES:
            strides[DIMS - 1] = 0
        if not kind & ROWS:
            strides[DIMS - 2] = 0
        return strides

    def _cost(self, number: int, phase: int) -> float:
        """Ops to compute a value again from memory in a later body."""
        v = self.values[number]
        if v.op in FOLDS or v.phase & 1 or v.kept is not None:
            return 0
        if v.op == "load":
            assert v.view is not None
            return 0 if v.view.strides[DIMS - 1] in (0, 1) else CHEAP_OPS
        own = CHEAP_OPS + 1 if v.op in HEAVY else 1
        return own + sum(self._cost(s, phase) for s in v.sources if isinstance(s, int))

    def _view(self, view: View) -> int:
        if view not in self.views:
            self.views.append(view)
        return self.views.index(view)

    def _fold(self, v: _Value, phase: int) -> None:
        a, imm = self._operand(v.sources[0], phase)
        self.instrs.append(Instr(v.op, v.kind, phase, v.number, a, imm=imm.value if imm else 0.0))
        self.lasting.add(v.number)

    def _operand(self, s: int | Imm, phase: int) -> tuple[int, Imm | None]:
        return (-1, s) if isinstance(s, Imm) else (self._number(s, phase), None)

    def _number(self, number: int, phase: int) -> int:
        """The register-to-be that holds a value in a phase; emits what computes it if it is not there yet."""
        v = self.values[number]
        if v.op in FOLDS or (v.phase & 1 and v.phase < phase):
            return v.number
        key = (number, phase)
        if key in self.ready:
            return self.ready[key]
        if phase & 1 and v.op == "load":
            last = [self.ready[(number, p)] for p in range(1, phase, 2) if (number, p) in self.ready]
            if last:
                return last[-1]
        again = v.phase < phase
        if v.op == "load" or (again and v.kept is not None):
            view = v.view if v.op == "load" else v.kept
            assert view is not None
            out = self._fresh()
            self.instrs.append(Instr("load", v.kind, phase, out, view=self._view(view)))
        else:
            out = self._compute(v, phase, again)
        self.ready[key] = out
        if phase & 1:
            self.lasting.add(out)
        if not again and v.op != "load":
            self._stores(v, out, phase)
            if v.kept is not None and v.kept.root is None:
                self.instrs.append(Instr("store", v.kind, phase, a=out, view=self._view(v.kept)))
        return out

    def _compute(self, v: _Value, phase: int, again: bool) -> int:
        operands = [self._operand(s, phase) for s in v.sources]
        imm = next((i for _, i in operands if i is not None), None)
        abc = [n for n, _ in operands] + [-1] * (3 - len(operands))
        out = self._fresh() if again or v.phase & 1 == 0 else v.number
        counter = -1 if again else v.counter
        self.instrs.append(Instr(v.op, v.kind, phase, out, abc[0], abc[1], abc[2], -1, imm.value if imm else v.limit,
                                 bool(imm and imm.bits), counter))  # fmt: skip
        return out

    def _stores(self, v: _Value, number: int, phase: int) -> None:
        for view in v.stores:
            kind = v.kind
            if kind == 0:
                kind = (LANES if view.strides[DIMS - 1] and self.axes.dims[DIMS - 1] > 1 else 0) | (
                    ROWS if view.strides[DIMS - 2] and self.axes.dims[DIMS - 2] > 1 else 0
                )
            self.instrs.append(Instr("store", kind, phase, a=number, view=self._view(view)))

    def _fresh(self) -> int:
        self.numbers += 1
        return self.numbers - 1

    def allot(self) -> int:
        """Replace value numbers by registers; those that outlive their phase keep theirs. Returns how many there
        are.
        """
        last: dict[int, int] = {}
        for at, i in enumerate(self.instrs):
            for n in (*i.sources(), i.dst):
                last[n] = at
        register = {n: k for k, n in enumerate(sorted(self.lasting))}
        count = len(register)
        free: list[int] = []
        for at, i in enumerate(self.instrs):
            done = {n for n in i.sources() if n >= 0 and n not in self.lasting and last[n] == at}
            a, b, c = (register[n] if n >= 0 else -1 for n in i.sources())
            dst = i.dst
            if dst >= 0:
                if dst not in register:
                    if not free:
                        free.append(count)
                        count += 1
                    register[dst] = free.pop()
                    if last[dst] == at:
                        done.add(dst)
                dst = register[dst]
            self.instrs[at] = replace(i, dst=dst, a=a, b=b, c=c)
            free.extend(register[n] for n in sorted(done))
        return count
