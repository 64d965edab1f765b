"""The CPU engine: MIL text -> Function -> plan, run by one C call on the surfaces of a Binding.

    backend = CpuBackend(Pool(), precision="fp32")
    program = backend.compile(text)
    binding = program.bind({"x": sx, "y": sy})
    binding.run()

Precision belongs to the graph: `fp32` rounds at ports alone, `bf16` rounds the operands of contractions as well, `fp16`
rounds every op's result to fp16 and counts what overflows (`program.overflows()`). A value that `bf16` returns in fp16
is what the program itself goes on with, where it would read it from memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anert.backend.base import Backend, Binding, Chain, Port, Positions, Program, program_key
from anert.backend.gradient import WeightGradient
from anert.backend.plan import Plan, PlanCache, code_identity
from anert.capabilities import CPU, Capabilities
from anert.errors import AnertError, CompileError, InputError, StateError
from anert.ffi import Pool, call, error, load
from anert.mil.graph import Function
from anert.surface import Heap, Hold, Surface

PRECISIONS = ("fp32", "bf16", "fp16")


class RunSlot:
    """The arena that programs of one backend run in, one at a time; it grows to the largest."""

    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self.lock = threading.Lock()
        self.surface: Surface | None = None
        self.base: Any = load().ffi.NULL

    def reserve(self, nbytes: int) -> None:
        """Make the arena at least `nbytes`; waits for a run in flight."""
        if nbytes == 0:
            return
        with self.lock:
            if self.surface is None or self.surface.nbytes < nbytes:
                self.surface = Surface(self.heap, nbytes)
                self.base = self.surface.ptr


class CpuBinding(Binding):
    """A CpuProgram on its surfaces. One run in flight: a second raises StateError."""

    __slots__ = ("_busy", "_err", "_hold", "_keep", "_lib", "_slot", "args", "reads", "writes")

    def __init__(self, program: CpuProgram, surfaces: Mapping[str, Surface]) -> None:
        native = load()
        self._lib = native.lib
        self._slot = program.slot
        self._busy = threading.Lock()
        bases = native.ffi.new("void *[]", len(program.buffers))
        for i, root in enumerate(program.buffers):
            if root is None:
                continue
            bases[i] = program.constants[root] if root.place == "const" else surfaces[root.name].ptr
        self.args = (program.plan, program.pool.ptr, bases, len(bases))
        self._err = error()
        self.reads = {p.name: surfaces[p.name] for p in program.inputs}
        self.writes = {p.name: surfaces[p.name] for p in program.outputs}
        self._hold = Hold(self.reads, self.writes)
        self._keep = program

    def run(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise StateError("this Binding is already running: bind the program a second time to run it twice at once")
        try:
            self._hold.take()
            try:
                slot = self._slot
                with slot.lock:
                    if self._lib.anert_plan_run(*self.args, slot.base, self._err):
                        call(lambda err: err.status, err=self._err)
            finally:
                self._hold.release()
        finally:
            self._busy.release()


class CpuChain(Chain):
    """CpuBindings of one backend, and gradients, run by one C call."""

    def __init__(self, members: Sequence[CpuBinding | WeightGradient], kinds: Sequence[str], pool: Pool,
                 slot: RunSlot) -> None:  # fmt: skip
        super().__init__(members, kinds)
        native = load()
        self._lib, self._slot, self._busy, self._err = native.lib, slot, threading.Lock(), error()
        self._parts = tuple(dict.fromkeys(self.kinds))
        self._ms = native.ffi.new("double[]", max(1, len(self._parts)))
        links = native.ffi.new("anert_link[]", len(members))
        for link, member, kind in zip(links, members, self.kinds, strict=True):
            link.part = self._parts.index(kind)
            if isinstance(member, CpuBinding):
                link.plan, _, link.bases, link.n_bases = member.args
            else:
                link.gradient = member.native
        self._args = (links, len(links), pool.ptr)
        bindings = [m for m in members if isinstance(m, CpuBinding)]
        reads = {f"{name} of {i}": s for i, b in enumerate(bindings) for name, s in b.reads.items()}
        writes = {f"{name} of {i}": s for i, b in enumerate(bindings) for name, s in b.writes.items()}
        self._hold = Hold(reads, writes)

    def advance(self, alpha: float, fresh: bool, ms: dict[str, float]) -> None:
        self._call(self._lib.anert_chain_run, self._args, (alpha, fresh, self._ms))
        for i, kind in enumerate(self._parts):
            ms[kind] = ms.get(kind, 0.0) + self._ms[i]
            self._ms[i] = 0.0

    def positions(self, args: Any) -> Positions:
        args.links, args.n_links, args.pool = self._args
        native = self._lib.anert_positions_run

        def run(at: int, count: int, logits: Any) -> None:
            self._call(native, (args,), (at, count, logits))

        return run

    def _call(self, native: Any, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
        """A native function with the arena among its arguments, while all surfaces are held."""
        if not self._busy.acquire(blocking=False):
            raise StateError("this Chain is already running: make a second one to run it twice at once")
        try:
            self._hold.take()
            try:
                with self._slot.lock:
                    if native(*before, self._slot.base, *after, self._err):
                        call(lambda err: err.status, err=self._err)
            finally:
                self._hold.release()
        finally:
            self._busy.release()


class CpuProgram(Program):
    """A plan on a pool. `stats` says what was fused."""

    def __init__(self, made: Plan, pool: Pool, slot: RunSlot) -> None:
        self.inputs, self.outputs, self.counters, self.stats = made.inputs, made.outputs, made.counters, made.stats
        self.pool, self.slot, self.buffers = pool, slot, made.buffers
        self.plan = made.make()
        ffi = load().ffi
        self.constants = {b: ffi.from_buffer(b.data) for b in made.buffers if b is not None and b.place == "const"}
        slot.reserve(made.stats.arena_bytes)

    def _bind(self, surfaces: Mapping[str, Surface]) -> Binding:
        return CpuBinding(self, surfaces)

    def overflows(self, reset: bool = False) -> dict[str, int]:
        """In precision fp16: how many values each op rounded to inf since the program was made, by the op's value
        name.
        """
        counter = load().lib.anert_plan_counter
        found = {name: int(counter(self.plan, i, int(reset))) for i, name in enumerate(self.counters)}
        return {name: n for name, n in found.items() if n}


class CpuBackend(Backend):
    """Runs MIL on this machine's cores.

    pool: the threads and instruction set. precision: `fp32`, `bf16` or `fp16`. heap: where surfaces and the arena
    come from. fuse=False makes every elementwise op a step of its own, for tests: the same bits, but for the order in
    which a sum over an axis may be added.
    cache: where plans are kept from one process to the next; None: nowhere.
    """

    name = "cpu"

    def __init__(
        self,
        pool: Pool | None = None,
        precision: str = "fp32",
        heap: Heap | None = None,
        capabilities: Capabilities = CPU,
        budget: int | None = None,
        fuse: bool = True,
        cache: PlanCache | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"no precision is called {precision!r}: {', '.join(PRECISIONS)}")
        super().__init__(capabilities, capabilities.compile_budget if budget is None else budget)
        self.pool = pool or Pool()
        self.precision = precision
        self.heap = heap or Heap()
        self.fuse, self.cache = fuse, cache
        self.slot = RunSlot(self.heap)

    def _compile(self, text: str, blobs: Mapping[str, bytes]) -> Program:
        return self._compile_encoded(text, blobs, {})

    def _compile_encoded(self, text: str, blobs: Mapping[str, bytes], encodings: Mapping[str, str]) -> Program:
        plan, key = None, ""
        if self.cache is not None:
            what = (
                f"{program_key(text, blobs, encodings)} {code_identity()} {self.pool.isa} {self.precision} {self.fuse}"
            )
            key = hashlib.sha256(what.encode()).hexdigest()
            plan = self.cache.get(key)
        if plan is not None:
            with contextlib.suppress(AnertError):  # tables that anert_plan_new refuses: made again
                return CpuProgram(plan, self.pool, self.slot)
        plan = self._planned(text, blobs, encodings)
        if self.cache is not None:
            self.cache.put(key, plan)
        return CpuProgram(plan, self.pool, self.slot)

    def _planned(self, text: str, blobs: Mapping[str, bytes], encodings: Mapping[str, str]) -> Plan:
        from anert.backend.planner import plan_function
        from anert.mil.text import parse

        module = parse(text, blobs=blobs)
        if "main" not in module.functions:
            raise CompileError(f"the program has no function 'main': it has {', '.join(module.functions)}")
        return plan_function(module.main, self.precision, self.fuse, encodings)

    def compile_function(self, function: Function, encodings: Mapping[str, str] | None = None) -> CpuProgram:
        """The Program of a Function without a way through text. Not counted, not cached."""
        from anert.backend.planner import plan_function

        return CpuProgram(plan_function(function, self.precision, self.fuse, encodings or {}), self.pool, self.slot)

    def chain(self, members: Sequence[Binding | WeightGradient], kinds: Sequence[str] = ()) -> Chain:
        native = [m for m in members if isinstance(m, (CpuBinding, WeightGradient))]
        if len(native) < len(members):  # weights that are baked
            return Chain(members, kinds)
        return CpuChain(native, kinds, self.pool, self.slot)

    def surface(self, nbytes: int) -> Surface:
        return Surface(self.heap, max(nbytes, 1))


def port_array(surface: Surface, port: Port) -> np.ndarray:
    """The array of a port on its surface: a view that owns the memory."""
    from anert.mil.graph import DTYPES

    return surface.array(DTYPES[port.type.dtype], port.type.shape)
