"""Stages: a Function cut into the programs that its inputs allow on the wire.

A stage fits when its inputs can lie side by side in one packed tensor: all with one channel count (`column`:
activations and matrices next to each other as columns), or all of one width (`channel`: stacked along channels, no
matrices); and when there are at most eight. The cut does not depend on layout or backend: values that cross it are fp16
ports, and ports are where a model rounds, so that every layout and backend computes the same numbers (the reference
design's kernels, ane_facts 5.3, come out of this rule).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from anert.capabilities import ANE, Capabilities
from anert.mil.grad import extract
from anert.mil.graph import Function, Op, Value
from anert.mil.ops.table import lookup

VECTOR_WIDTH = 32
"""Columns that a (C, 1) vector takes in a packed tensor: the least legal width."""


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where a model's programs begin and end. `limits` cut a function into stages; those of the ANE's safe defaults, so
    that the same ports round everywhere, unless an engine's own are asked for."""

    layout: str
    group: int = 0
    """Whole layers traced as one block; 0: each block apart."""
    limits: Capabilities = ANE
    packable: bool = True
    """Whether each stage's inputs must be able to share one packed tensor, or only their number counts."""

    @property
    def portable(self) -> bool:
        """Whether every backend and layout computes the same numbers with them."""
        return self.group == 0 and self.limits == ANE and self.packable

    @property
    def label(self) -> str:
        blocks = f"{self.group} layer{'s' * (self.group > 1)} in one" if self.group else "blocks apart"
        wide = f", at most {self.limits.max_inputs} inputs" if self.layout == "ports" else ""
        cut = ", as on cpu" if self.portable else wide
        return f"{self.layout}, {blocks}{cut}"


@dataclass(slots=True)
class Stage:
    """One program: `mode` is `column`, `channel`, or `` where only separate ports can carry it."""

    function: Function
    mode: str


@dataclass(slots=True)
class _Draft:
    leaves: dict[Value, None] = field(default_factory=dict)
    """Function inputs and values of earlier stages that this stage reads."""
    anchors: set[Op] = field(default_factory=set)
    """Contractions computed here."""
    results: dict[str, Value] = field(default_factory=dict)


def roles(function: Function, params: Iterable[str]) -> dict[str, str]:
    """`activation`, `matrix` or `vector` for each input of a Function: parameters (C, 1) are vectors."""
    names = set(params)
    return {
        v.name: "activation" if v.name not in names else "vector" if v.type.rank == 2 and v.shape[1] == 1 else "matrix"
        for v in function.inputs
    }


def packing_mode(leaves: Iterable[Value], role: dict[str, str], limits: Capabilities) -> str:
    """How these values can share one packed tensor: `column`, `channel`, or `` if they cannot."""
    values = list(leaves)
    if any(v.type.rank != 2 for v in values):
        return ""
    kind = [role.get(v.name, "activation") for v in values]
    rows = {v.shape[0] for v, k in zip(values, kind, strict=True) if k != "matrix"}
    candidates = rows or {d for v in values for d in v.shape}
    for c in sorted(candidates):
        fits = len(rows) <= 1 and all(k != "matrix" or c in v.shape for v, k in zip(values, kind, strict=True))
        width = sum(_columns(v, k, c) for v, k in zip(values, kind, strict=True)) if fits else 0
        if fits and width <= limits.max_width:
            return "column"
    widths = {v.shape[1] for v, k in zip(values, kind, strict=True) if k == "activation"}
    return "channel" if "matrix" not in kind and len(widths) == 1 else ""


def _columns(value: Value, role: str, channels: int) -> int:
    """Columns that a value takes beside others of `channels` rows."""
    if role == "vector":
        return VECTOR_WIDTH
    rows, cols = value.shape
    return cols if role == "activation" or rows == channels else rows


class _Splitter:
    def __init__(self, function: Function, role: dict[str, str], limits: Capabilities, packable: bool) -> None:
        self.fn, self.role, self.limits, self.packable = function, role, limits, packable
        self.drafts: list[_Draft] = []
        self.stage: dict[Op, int] = {}
        self.inputs = set(function.inputs)

    def is_anchor(self, op: Op) -> bool:
        """Work that is done once: contractions of values that are not constants."""
        return lookup(op.kind).category == "contract" and not any(v.is_const for v in op.operands())

    def reads(self, value: Value, s: int, seen: dict[Value, frozenset[Value]]) -> frozenset[Value]:
        """The leaves through which stage `s` obtains `value`. Cheap ops are computed again, and contractions of
        activations that are no (C, T) (attention scores); other results of earlier stages cross as ports."""
        if value in seen:
            return seen[value]
        op = value.op
        if op is None:
            result = frozenset((value,))
        elif op.kind == "const" or self.stage.get(op) == s:
            result = frozenset()
        elif self.crosses(value, s):
            result = frozenset((value,))
        else:
            result = frozenset().union(*(self.reads(v, s, seen) for v in op.operands()))
        seen[value] = result
        return result

    def crosses(self, value: Value, s: int) -> bool:
        """Whether stage `s` reads this op's result from an earlier stage; else it computes it (again)."""
        assert value.op is not None
        if value.op in self.stage:
            weighted = any(v in self.inputs and self.role.get(v.name) == "matrix" for v in _roots(value.op))
            return value.type.rank == 2 or weighted
        home = self.home(value) if value.type.rank == 2 else None
        return home is not None and home < s

    def home(self, value: Value) -> int | None:
        """The earlier stage that already has all that a cheap value needs, an anchor among it: it crosses from
        there."""
        anchors, leaves, stack, visited = set(), set(), [value], set()
        while stack:
            v = stack.pop()
            if v in visited:
                continue
            visited.add(v)
            if v.op is None:
                leaves.add(v)
            elif v.op.kind != "const":
                if self.is_anchor(v.op):
                    anchors.add(self.stage[v.op])
                else:
                    stack.extend(v.op.operands())
        if len(anchors) != 1:
            return None
        s = anchors.pop()
        return s if leaves <= set(self.drafts[s].leaves) else None

    def place(self, values: Iterable[Value], first: int) -> int:
        """The earliest stage from `first` on where these values can be had; adds their leaves to it."""
        wanted = list(values)
        for s in range(first, len(self.drafts) + 1):
            draft = self.drafts[s] if s < len(self.drafts) else _Draft()
            seen: dict[Value, frozenset[Value]] = {}
            need = frozenset().union(*(self.reads(v, s, seen) for v in wanted))
            leaves = dict.fromkeys((*draft.leaves, *(v for v in self._ordered(need) if v not in draft.leaves)))
            fresh = s == len(self.drafts)
            if fresh or set(leaves) == set(draft.leaves) or self.fits(leaves):
                if fresh:
                    self.drafts.append(draft)
                draft.leaves = leaves
                return s
        raise AssertionError("a fresh stage takes anything")

    def fits(self, leaves: Iterable[Value]) -> bool:
        values = list(leaves)
        if len(values) > self.limits.max_inputs:
            return False
        return not self.packable or packing_mode(values, self.role, self.limits) != ""

    def _ordered(self, values: Iterable[Value]) -> list[Value]:
        wanted = set(values)
        return [v for v in (*self.fn.inputs, *(o for op in self.fn.ops for o in op.outputs)) if v in wanted]

    def latest(self, value: Value) -> int:
        """The last stage among the anchors behind a value; 0 without any."""
        last, stack, visited = 0, [value], set()
        while stack:
            v = stack.pop()
            if v.op is None or v in visited:
                continue
            visited.add(v)
            if v.op in self.stage:
                last = max(last, self.stage[v.op])
            else:
                stack.extend(v.op.operands())
        return last

    def run(self) -> list[Stage]:
        for op in self.fn.ops:
            if self.is_anchor(op):
                s = self.place(op.operands(), max(self.latest(v) for v in op.operands()))
                self.stage[op] = s
                self.drafts[s].anchors.add(op)
        home: dict[Value, int] = {}
        for out in sorted(self.fn.outputs, key=self.latest, reverse=True):
            home[out] = self._settle(out)
        for out in self.fn.outputs:
            self.drafts[home[out]].results[out.name] = out
        made = {v: s for s, d in enumerate(self.drafts) for v in d.results.values()}
        for d in self.drafts:  # values that cross: made where their anchors are, as further results
            for v in d.leaves:
                if v.op is not None and v not in made:
                    s = made[v] = self.latest(v)
                    self.drafts[s].results[v.name] = v
        return [
            Stage(
                extract(self.fn, f"{self.fn.name}_{i}", d.results, {v: v.name for v in d.leaves}, self.fn.ops),
                packing_mode(d.leaves, self.role, self.limits) if len(d.leaves) <= self.limits.max_inputs else "",
            )
            for i, d in enumerate(self.drafts)
            if d.results
        ]

    def _settle(self, out: Value) -> int:
        """Where a result is formed: with its anchor, or wherever its leaves already are, before opening room for it."""
        if out.op is not None and out.op in self.stage:
            return self.stage[out.op]
        first = self.latest(out)
        for s in range(first, len(self.drafts)):
            if self.reads(out, s, {}) <= set(self.drafts[s].leaves):
                return s
        return self.place((out,), first)


def _roots(op: Op) -> list[Value]:
    """The operands of an op, behind views."""
    roots = []
    for v in op.operands():
        while v.op is not None and lookup(v.op.kind).category == "view":
            v = next(v.op.operands())
        roots.append(v)
    return roots


def split(function: Function, role: dict[str, str], limits: Capabilities = ANE, packable: bool = True) -> list[Stage]:
    """Cut a Function into stages in execution order. `role` names its inputs' roles (see `roles`).

    A stage's inputs are inputs of the function or results of earlier stages, by name; the function's outputs keep
    theirs. packable False: only the number of inputs cuts, for functions that separate ports alone can carry.
    """
    return _Splitter(function, role, limits, packable).run()
