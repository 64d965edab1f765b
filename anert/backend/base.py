"""What a backend is: MIL text in, Program out; surfaces bound to its ports, run. The cache and the budget of compiles
live here.

program = backend.compile(text)                        # counted, cached by content
binding = program.bind({"i00_x": sx, "o00_y": sy})     # once per set of surfaces
binding.run()                                          # once per use: nothing allocated, no GIL held
"""

from __future__ import annotations

import abc
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anert.backend.gradient import WeightGradient
from anert.capabilities import Capabilities
from anert.errors import CompileError, ShapeError, StateError, UnsupportedError
from anert.mil.graph import Function, TensorType
from anert.surface import Surface


@dataclass(frozen=True, slots=True)
class Port:
    """A named slot of a Program, in wire shape; `nbytes` is the least that a bound surface must hold."""

    name: str
    type: TensorType
    encoded: int = 0
    """Bytes of an encoded weight; 0: as the type says."""

    @property
    def nbytes(self) -> int:
        return self.encoded or self.type.nbytes


@dataclass(slots=True)
class ProgramStats:
    """What a compiled program is made of. FLOPs count multiply-adds as 2; `executed` leaves out skipped causal
    tiles."""

    flops_written: int = 0
    flops_executed: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    steps: int = 0
    arena_bytes: int = 0
    compile_ms: float = 0.0
    patterns: dict[str, int] = field(default_factory=dict)
    """How often each fusion was found: `attention`, `attention_backward`, `tile`, `gemm`, ..."""


def written_flops(function: Function) -> int:
    """FLOPs of the function as it is written, multiply-adds as 2."""
    from anert.mil.ops.table import lookup, types_of

    total = 0
    for op in function.ops:
        row = lookup(op.kind)
        if row.flops is not None:
            total += row.flops(types_of(op.inputs), op.attrs, [v.type for v in op.outputs])
    return total


class Binding(abc.ABC):
    """A Program with surfaces on all its ports. One run in flight at a time; a second raises StateError."""

    @abc.abstractmethod
    def run(self) -> None: ...


Positions = Callable[[int, int, Any], None]
"""(cached positions, new positions, float * of logits or NULL)."""


class Chain(Binding):
    """Bindings, and gradients of weights, that run one after another. kinds: the part of a step that the time of each
    counts for."""

    def __init__(self, members: Sequence[Binding | WeightGradient], kinds: Sequence[str] = ()) -> None:
        self.members, self.kinds = tuple(members), tuple(kinds) or ("",) * len(members)

    def run(self) -> None:
        self.advance(1.0, False, {})

    def advance(self, alpha: float, fresh: bool, ms: dict[str, float]) -> None:
        """A part of a training step: `alpha` and `fresh` are what gradients are given; `ms` gains the time of each
        kind."""
        now = time.perf_counter()
        for kind, member in zip(self.kinds, self.members, strict=True):
            start = now
            if isinstance(member, Binding):
                member.run()
            else:
                member.run(alpha, fresh)
            now = time.perf_counter()
            ms[kind] = ms.get(kind, 0.0) + (now - start) * 1e3

    def positions(self, args: Any) -> Positions | None:
        """What runs anert_positions_run on `args`, an anert_positions whose blocks this is: all that new positions
        take in one native call. None where the bindings are no native plans."""
        return None


class Program(abc.ABC):
    """A compiled MIL function."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    stats: ProgramStats

    def bind(self, surfaces: Mapping[str, Surface]) -> Binding:
        """Put a surface on every port. Raises ShapeError for a missing, unknown or short one, StateError for one to be
        written that cannot be."""
        ports = {p.name: p for p in (*self.inputs, *self.outputs)}
        for name in surfaces:
            if name not in ports:
                raise ShapeError(f"no port named {name!r}: this program has {', '.join(ports)}")
        for name, port in ports.items():
            if name not in surfaces:
                raise ShapeError(f"port {name!r} has no surface")
            if surfaces[name].nbytes < port.nbytes:
                raise ShapeError(f"port {name!r} needs {port.nbytes} bytes, its surface has {surfaces[name].nbytes}")
        for port in self.outputs:
            if surfaces[port.name].read_only:
                raise StateError(f"port {port.name!r} is written, its surface is read-only: make it one of its own")
        return self._bind(surfaces)

    @abc.abstractmethod
    def _bind(self, surfaces: Mapping[str, Surface]) -> Binding: ...


def program_key(text: str, blobs: Mapping[str, bytes], encodings: Mapping[str, str]) -> str:
    """Names a program by its content."""
    key = hashlib.sha256(text.encode())
    for path in sorted(blobs):
        key.update(path.encode() + b"\0" + hashlib.sha256(blobs[path]).digest())
    for port, encoding in sorted(encodings.items()):
        key.update(f"\0{port}={encoding}".encode())
    return key.hexdigest()


class Backend(abc.ABC):
    """Compiles MIL text and hands out surfaces. `compiles` counts real compiles; identical text is compiled once."""

    name: str
    capabilities: Capabilities
    any_memory: ClassVar[bool] = True
    """Whether programs can be bound to surfaces that this backend did not make."""

    def __init__(self, capabilities: Capabilities, budget: int) -> None:
        self.capabilities = capabilities
        self.budget = budget
        self.compiles = 0
        self.compile_ms = 0.0
        self._cache: dict[str, Program] = {}

    def compile(
        self, text: str, blobs: Mapping[str, bytes] | None = None, encodings: Mapping[str, str] | None = None
    ) -> Program:
        """The Program of this MIL text and its weight files. Raises CompileError past the budget.

        encodings: of input ports that hold an encoded weight: `int8`, on `cpu` alone (else UnsupportedError).
        """
        digest = program_key(text, blobs or {}, encodings or {})
        program = self._cache.get(digest)
        if program is not None:
            return program
        self.check_budget()
        start = time.perf_counter()
        program = self._compile_encoded(text, blobs or {}, encodings) if encodings else self._compile(text, blobs or {})
        self.compiles += 1
        program.stats.compile_ms = (time.perf_counter() - start) * 1e3
        self.compile_ms += program.stats.compile_ms
        self._cache[digest] = program
        return program

    def forget(self, program: Program) -> None:
        """Keep a program no longer for the next who compiles its text: it lives as long as its bindings."""
        self._cache = {key: kept for key, kept in self._cache.items() if kept is not program}

    def spent(self) -> int:
        """Compiles that count against the budget."""
        return self.compiles

    def check_budget(self) -> None:
        """Raise CompileError if the next compile would pass the budget."""
        if self.spent() >= self.budget:
            raise CompileError(
                f"the compile budget of {self.budget} programs is spent on backend {self.name!r}: "
                "weights are inputs, so a run needs each kernel once; raise the budget with --compile-budget"
            )

    @abc.abstractmethod
    def _compile(self, text: str, blobs: Mapping[str, bytes]) -> Program: ...

    def _compile_encoded(self, text: str, blobs: Mapping[str, bytes], encodings: Mapping[str, str]) -> Program:
        """As _compile, with encoded weights on these ports."""
        found = ", ".join(sorted(set(encodings.values())))
        raise UnsupportedError(f"backend {self.name!r} takes fp16 weights: {found} weights are for backend 'cpu'")

    def chain(self, members: Sequence[Binding | WeightGradient], kinds: Sequence[str] = ()) -> Chain:
        """Bindings of this backend, and gradients, as one, run in order: see Chain."""
        return Chain(members, kinds)

    @abc.abstractmethod
    def surface(self, nbytes: int) -> Surface:
        """A zeroed surface of at least `nbytes` that this backend's programs can be bound to."""

    def close(self) -> None:
        """Release what the backend holds; idempotent."""
        self._cache.clear()
