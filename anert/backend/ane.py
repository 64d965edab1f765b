"""The Neural Engine: MIL text -> the shim (native/ane.h) -> a loaded program; IOSurfaces on its ports.

    backend = AneBackend()                       # BackendUnavailable where there is none, saying why
    program = backend.compile(text)              # counted against what a process may compile
    binding = program.bind({"i00_x": sx, "o00_y": sy})
    binding.run()                                # raises EngineError when the engine answers NO

Which shim and framework: the installed ones; a test build named by ANERT_ANE opens the framework that
ANERT_ANE_FRAMEWORK names.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from anert.backend.base import Backend, Binding, Port, Program, ProgramStats, written_flops
from anert.capabilities import ANE, Capabilities, load_record
from anert.errors import CompileError, EngineError, EngineRefused, ShapeError, StateError, UnsupportedError
from anert.ffi import call, error, load_ane
from anert.kernel import LARGE_CONST
from anert.mil.blob import BlobDirectory
from anert.mil.graph import DTYPES, Module
from anert.mil.text import parse, print_module
from anert.surface import Surface

FLOOR_NS = 50_000
"""An evaluate faster than this did not reach any known engine: its fastest dispatch takes 70 us (ane_facts 6.1)."""
POISON = 0x7E
"""Byte that fills outputs before a doubted evaluate: 0x7e7e is a NaN in fp16 that no arithmetic makes."""


class AneSurface(Surface):
    """`nbytes` of zeroed memory in an IOSurface: the host reads and writes it under lock alone."""

    __slots__ = ()
    shared: ClassVar[bool] = True

    def __init__(self, backend: AneBackend, nbytes: int) -> None:
        shim = backend.shim
        if nbytes < 1:
            raise ShapeError(f"a surface holds at least 1 byte, not {nbytes}")
        out = shim.ffi.new("anert_ane_surface **")
        call(shim.lib.anert_ane_surface_new, backend.engine, nbytes, out, err=error(shim))
        handle, free = out[0], shim.lib.anert_ane_surface_free
        self.handle = handle
        self._base = shim.ffi.gc(shim.lib.anert_ane_surface_base(handle), lambda _: free(handle), size=nbytes)
        self.nbytes = nbytes

    @property
    def seed(self) -> int:
        return int(load_ane().lib.anert_ane_surface_seed(self.handle))

    def acquire(self, read_only: bool) -> None:
        shim = load_ane()
        call(shim.lib.anert_ane_surface_lock, self.handle, int(read_only), err=error(shim))

    def release(self, read_only: bool) -> None:
        shim = load_ane()
        call(shim.lib.anert_ane_surface_unlock, self.handle, int(read_only), err=error(shim))

    def touch(self) -> None:
        """Nothing: writers lock, and the unlock advances the seed."""


class AneBinding(Binding):
    """A program with IOSurfaces on its ports: one request, built here, evaluated at each run."""

    __slots__ = ("_busy", "_err", "_handle", "_keep", "_lib", "_ns", "_outputs", "_program")

    def __init__(self, program: AneProgram, surfaces: Mapping[str, Surface]) -> None:
        shim = program.backend.shim
        ports = []
        for side in (program.inputs, program.outputs):
            array = shim.ffi.new("anert_ane_port[]", max(1, len(side)))
            names = [shim.ffi.new("char[]", p.name.encode()) for p in side]
            for item, name, port in zip(array, names, side, strict=False):
                if not isinstance(surfaces[port.name], AneSurface):
                    raise ShapeError(f"port {port.name!r} needs a surface of backend ane: make it by backend.surface()")
                item.name, item.surface, item.nbytes = name, surfaces[port.name].handle, port.nbytes
            ports.append((array, len(side), names))
        out = shim.ffi.new("anert_ane_binding **")
        (inputs, n_in, _), (outputs, n_out, _) = ports
        call(shim.lib.anert_ane_bind, program.handle, inputs, n_in, outputs, n_out, out, err=error(shim))
        self._handle = shim.ffi.gc(out[0], shim.lib.anert_ane_binding_free)
        self._lib, self._err, self._ns = shim.lib, error(shim), shim.ffi.new("uint64_t *")
        self._program, self._busy = program, threading.Lock()
        self._outputs = [(p, surfaces[p.name]) for p in program.outputs]
        self._keep = dict(surfaces)

    def run(self) -> None:
        """Evaluate once. Raises EngineError when the engine answers NO, or a YES that came too soon left nothing."""
        if not self._busy.acquire(blocking=False):
            raise StateError("this Binding is already running: bind the program a second time to run it twice at once")
        program = self._program
        try:
            with program.in_use:
                self._evaluate()
                if self._ns[0] < program.trusted_ns:
                    self._verify()
        finally:
            self._busy.release()

    def _evaluate(self) -> None:
        program = self._program
        program.backend.make_resident(program)
        if self._lib.anert_ane_run(self._handle, self._ns, self._err):
            try:
                call(lambda err: err.status, err=self._err)
            except EngineError as refusal:
                raise EngineError(f"{refusal}; program {program.name}") from None

    def _verify(self) -> None:
        """A YES that came sooner than an engine can answer counts as a NO until a second one has overwritten every
        element of poisoned outputs. What it took is then the program's own floor."""
        first = self._ns[0]
        for port, surface in self._outputs:
            with surface.lock():
                surface.array(np.uint8, port.nbytes).fill(POISON)
        self._evaluate()
        for port, surface in self._outputs:
            kind = DTYPES[port.type.dtype]
            with surface.lock(read_only=True):
                array = surface.array(kind, port.type.shape)
                left = np.count_nonzero(array.view(f"u{kind.itemsize}") == _poisoned(kind))
            if left:
                raise EngineError(
                    f"an evaluate said YES after {first / 1e3:.0f} us, and after {self._ns[0] / 1e3:.0f} us again, but "
                    f"left {left} of {array.size} elements of port {port.name!r} unwritten: it did not run; program "
                    f"{self._program.name}"
                )
        self._program.trusted_ns = min(first, self._ns[0]) // 2


def _poisoned(kind: np.dtype[Any]) -> int:
    return int.from_bytes(bytes([POISON]) * kind.itemsize, "little")


class AneProgram(Program):
    """A compiled model. `opset` is the dialect that the engine took it in, `trusted_ns` the time below which an
    evaluate is doubted."""

    def __init__(self, backend: AneBackend, module: Module, handle: Any, name: str, opset: str) -> None:
        function = module.main
        self.backend, self.handle, self.name, self.opset = backend, handle, name, opset
        self.inputs = tuple(Port(v.name, v.type) for v in function.inputs)
        self.outputs = tuple(Port(v.name, v.type) for v in function.outputs)
        flops = written_flops(function)
        self.stats = ProgramStats(
            flops_written=flops,
            flops_executed=flops,  # causal tiles are not skipped: attention is dense there
            bytes_in=sum(p.nbytes for p in self.inputs),
            bytes_out=sum(p.nbytes for p in self.outputs),
            steps=len(function.ops),
        )
        self.trusted_ns = FLOOR_NS
        self.last_used = 0
        self.in_use = threading.Lock()

    def _bind(self, surfaces: Mapping[str, Surface]) -> Binding:
        return AneBinding(self, surfaces)


class AneBackend(Backend):
    """Runs MIL on the Neural Engine. Compiles are counted for the whole process, whoever made them.

    capabilities: those of the machine's record, else the safe ones. fallback: when the engine refuses the first program
    in ios18, say it in the canonical dialect (ios16), and so all that follow. Raises BackendUnavailable where shim or
    framework is missing or not as known. framework: where both frameworks are, for test builds of the shim alone.
    """

    name = "ane"
    any_memory = False

    def __init__(self, capabilities: Capabilities | None = None, fallback: bool = True, framework: str = "") -> None:
        caps = capabilities or load_record() or ANE
        super().__init__(caps, caps.compile_budget)
        self.shim: ModuleType = load_ane()
        self.engine = self._open(framework or os.environ.get("ANERT_ANE_FRAMEWORK", ""))
        self.fallback = fallback
        self.opset = ""
        """The dialect of the programs that the engine has taken; empty before the first."""
        self._programs: weakref.WeakSet[AneProgram] = weakref.WeakSet()
        self._gate = threading.RLock()
        self._uses = 0

    def _open(self, framework: str) -> Any:
        ffi, lib = self.shim.ffi, self.shim.lib
        path = ffi.new("char[]", framework.encode()) if framework else ffi.NULL
        out = ffi.new("anert_ane **")
        call(lib.anert_ane_open, path, path, out, err=error(self.shim))
        return ffi.gc(out[0], lib.anert_ane_free)

    def surface(self, nbytes: int) -> Surface:
        return AneSurface(self, max(nbytes, 1))

    # ---- compiling

    def spent(self) -> int:
        """Compiles of this process, the refused ones too."""
        return int(self.shim.lib.anert_ane_compiles())

    def _compile(self, text: str, blobs: Mapping[str, bytes]) -> Program:
        module = parse(text, blobs=blobs)
        if "main" not in module.functions:
            raise CompileError(f"the program has no function 'main': it has {', '.join(module.functions)}")
        name = "(" + ", ".join(v.name for v in module.main.inputs) + ") -> " + module.main.outputs[0].name
        opset = module.main.opset
        if opset == "ios18" and self.opset == "ios16":
            opset, (text, blobs) = "ios16", canonical(module)
        try:
            handle = self._take(text, blobs)
        except EngineRefused as refusal:
            if not self.fallback or self.opset or opset != "ios18":
                raise EngineRefused(f"{refusal}; program {name}") from None
            handle, opset = self._take_canonical(module, refusal, name), "ios16"
        self.opset = self.opset or opset
        return self._loaded(AneProgram(self, module, handle, name, opset))

    def _take(self, text: str, blobs: Mapping[str, bytes]) -> Any:
        """The compiled program of this very text. EngineRefused, counted, when the compiler says NO."""
        ffi, lib = self.shim.ffi, self.shim.lib
        paths = [ffi.new("char[]", path.encode()) for path in blobs]
        array = ffi.new("anert_ane_blob[]", max(1, len(paths)))
        buffers = [ffi.from_buffer(data) for data in blobs.values()]
        for item, path, data in zip(array, paths, buffers, strict=False):
            item.path, item.data, item.nbytes = path, data, len(data)
        out = ffi.new("anert_ane_program **")
        source = text.encode()
        try:
            call(lib.anert_ane_compile, self.engine, source, len(source), array, len(paths), out, err=error(self.shim))
        except EngineError as refusal:
            self.compiles += 1
            raise EngineRefused(str(refusal)) from None
        return ffi.gc(out[0], lib.anert_ane_program_free)

    def _take_canonical(self, module: Module, refusal: EngineRefused, name: str) -> Any:
        """The same program in ios16. The first refusal stands where that is refused as well or cannot be said."""
        self.check_budget()
        try:
            return self._take(*canonical(module))
        except UnsupportedError as unsaid:
            raise EngineRefused(f"{refusal}; no canonical form: {unsaid}; program {name}") from None
        except EngineRefused as second:
            same = "; in the canonical dialect too" if str(second) == str(refusal) else f"; canonical: {second}"
            raise EngineRefused(f"{refusal}{same}; program {name}") from None

    # ---- residence: how many programs a process may have loaded at a time

    def _loaded(self, program: AneProgram) -> AneProgram:
        self._programs.add(program)
        try:
            self.make_resident(program)
        except EngineError as refusal:
            raise EngineRefused(f"{refusal}; program {program.name}") from None
        return program

    def make_resident(self, program: AneProgram) -> None:
        """Load a program that is not, unloading the one that was used longest ago where the engine has no room.

        Raises CompileError if every other program is running, EngineError if the engine refuses.
        """
        self._uses += 1
        program.last_used = self._uses
        lib = self.shim.lib
        if lib.anert_ane_program_loaded(program.handle):
            return
        with self._gate:
            while lib.anert_ane_loaded() >= self.capabilities.load_budget:
                self._unload_one(program)
            call(lib.anert_ane_program_load, program.handle, err=error(self.shim))

    def _unload_one(self, keep: AneProgram) -> None:
        lib = self.shim.lib
        for program in sorted(self._programs, key=lambda p: p.last_used):
            if program is keep or not lib.anert_ane_program_loaded(program.handle):
                continue
            if not program.in_use.acquire(blocking=False):
                continue
            try:
                call(lib.anert_ane_program_unload, program.handle, err=error(self.shim))
            finally:
                program.in_use.release()
            return
        raise CompileError(
            f"{self.capabilities.load_budget} programs are loaded on the Neural Engine and none of them is idle: "
            "release bindings and programs that are not needed"
        )


def canonical(module: Module) -> tuple[str, dict[str, bytes]]:
    """A program in the canonical dialect (program 1.0, ios16), and its weight files. UnsupportedError for an op that
    needs a newer opset."""
    function = module.main
    opset, function.opset = function.opset, "ios16"
    try:
        blobs = BlobDirectory()
        return print_module(function, blobs=blobs, blob_threshold=LARGE_CONST), blobs.files()
    finally:
        function.opset = opset
