"""ane.h as Python objects, as thin as can be, for tests of the shim itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from anert.ffi import call, error, load_ane


class Engine:
    """An opened framework; framework and iosurface as for anert_ane_open, None for the system's."""

    def __init__(self, framework: str | None, iosurface: str | None = None) -> None:
        self.module = load_ane()
        self.ffi, self.lib = self.module.ffi, self.module.lib
        out = self.ffi.new("anert_ane **")
        paths = [p.encode() if p is not None else self.ffi.NULL for p in (framework, iosurface or framework)]
        self.call(self.lib.anert_ane_open, *paths, out)
        self.ptr = self.ffi.gc(out[0], self.lib.anert_ane_free)

    def call(self, function: Any, *args: Any) -> None:
        call(function, *args, err=error(self.module))

    def surface(self, nbytes: int) -> Surface:
        return Surface(self, nbytes)

    def compile(self, text: str | bytes, blobs: Mapping[str, bytes] | Sequence[tuple[str, bytes]] = ()) -> Program:
        return Program(self, text.encode() if isinstance(text, str) else text, blobs)


class Surface:
    def __init__(self, engine: Engine, nbytes: int) -> None:
        self.engine = engine
        out = engine.ffi.new("anert_ane_surface **")
        engine.call(engine.lib.anert_ane_surface_new, engine.ptr, nbytes, out)
        self.ptr = engine.ffi.gc(out[0], engine.lib.anert_ane_surface_free)
        self.nbytes = engine.lib.anert_ane_surface_size(self.ptr)

    @property
    def seed(self) -> int:
        return int(self.engine.lib.anert_ane_surface_seed(self.ptr))

    def array(self, dtype: Any = np.float16, shape: Any = -1) -> np.ndarray:
        """The memory; do not look at it without a lock."""
        base = self.engine.lib.anert_ane_surface_base(self.ptr)
        return np.frombuffer(self.engine.ffi.buffer(base, self.nbytes), dtype).reshape(shape)

    def lock(self, read_only: bool = False) -> None:
        self.engine.call(self.engine.lib.anert_ane_surface_lock, self.ptr, int(read_only))

    def unlock(self, read_only: bool = False) -> None:
        self.engine.call(self.engine.lib.anert_ane_surface_unlock, self.ptr, int(read_only))

    @contextmanager
    def locked(self, read_only: bool = False) -> Any:
        self.lock(read_only)
        try:
            yield self
        finally:
            self.unlock(read_only)

    def write(self, values: Any) -> Surface:
        flat = np.asarray(values, np.float16).ravel()
        with self.locked():
            self.array()[: flat.size] = flat
        return self

    def read(self, shape: Any = -1) -> np.ndarray:
        n = int(np.prod(shape)) if shape != -1 else -1
        with self.locked(read_only=True):
            return self.array()[: n if n >= 0 else None].copy().reshape(shape)


class Program:
    def __init__(self, engine: Engine, text: bytes, blobs: Any) -> None:
        self.engine = engine
        ffi, pairs = engine.ffi, list(blobs.items() if isinstance(blobs, Mapping) else blobs)
        keep = [(ffi.new("char[]", path.encode()), ffi.from_buffer(data)) for path, data in pairs]
        records = ffi.new("anert_ane_blob[]", len(pairs))
        for record, (path, data) in zip(records, keep, strict=True):
            record.path, record.data, record.nbytes = path, ffi.cast("void *", data), len(data)
        out = ffi.new("anert_ane_program **")
        engine.call(engine.lib.anert_ane_compile, engine.ptr, text, len(text), records, len(pairs), out)
        self.ptr = ffi.gc(out[0], engine.lib.anert_ane_program_free)

    @property
    def id(self) -> str:
        return self.engine.ffi.string(self.engine.lib.anert_ane_program_id(self.ptr)).decode()

    @property
    def loaded(self) -> bool:
        return bool(self.engine.lib.anert_ane_program_loaded(self.ptr))

    def load(self) -> Program:
        self.engine.call(self.engine.lib.anert_ane_program_load, self.ptr)
        return self

    def unload(self) -> None:
        self.engine.call(self.engine.lib.anert_ane_program_unload, self.ptr)

    def bind(self, inputs: Mapping[str, Any] | Sequence, outputs: Mapping[str, Any] | Sequence) -> Binding:
        """name -> Surface, or (Surface, nbytes of the port)."""
        return Binding(self, inputs, outputs)


class Binding:
    def __init__(self, program: Program, inputs: Any, outputs: Any) -> None:
        engine = self.engine = program.engine
        keep: list[Any] = []
        sides = []
        for side in (inputs, outputs):
            pairs = list(side.items() if isinstance(side, Mapping) else side)
            ports = engine.ffi.new("anert_ane_port[]", len(pairs))
            for port, (name, bound) in zip(ports, pairs, strict=True):
                surface, nbytes = bound if isinstance(bound, tuple) else (bound, bound.nbytes)
                keep.append(engine.ffi.new("char[]", name.encode()))
                port.name, port.surface, port.nbytes = keep[-1], surface.ptr, nbytes
            sides += [ports, len(pairs)]
        out = engine.ffi.new("anert_ane_binding **")
        engine.call(engine.lib.anert_ane_bind, program.ptr, *sides, out)
        self.ptr = engine.ffi.gc(out[0], engine.lib.anert_ane_binding_free)

    def run(self) -> int:
        """Nanoseconds of the framework's call."""
        ns = self.engine.ffi.new("uint64_t *")
        self.engine.call(self.engine.lib.anert_ane_run, self.ptr, ns)
        return int(ns[0])


def inspect(framework: str) -> list[dict[str, Any]]:
    """The selectors that the shim sends, as found: class, selector ("+modelWith..."), expected, found, ok."""
    module = load_ane()
    rows = module.ffi.new("anert_ane_selector[]", module.lib.anert_ane_selectors())
    call(module.lib.anert_ane_inspect, framework.encode(), rows, err=error(module))

    def text(field: Any) -> str:
        return module.ffi.string(field).decode()

    return [
        {
            "class": text(row.class_name),
            "selector": "-+"[row.class_method] + text(row.selector),
            "expected": text(row.expected),
            "found": text(row.found),
            "ok": bool(row.ok),
        }
        for row in rows
    ]
