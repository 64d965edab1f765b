"""What a caller can do wrong with surfaces, bindings and arrays raises one of our errors and corrupts nothing."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest

from anert import ffi
from anert.backend.base import Program
from anert.backend.cpu import CpuBackend
from anert.backend.reference import ReferenceBackend
from anert.errors import AnertError, ShapeError, StateError
from anert.ffi import Pool
from anert.mil import ops
from anert.mil.graph import Function
from anert.mil.text import print_module
from anert.param import ParamStore, Spec
from anert.runtime import Runtime
from anert.surface import Heap, Surface


def program(backend: CpuBackend | ReferenceBackend, n: int = 64, repeat: int = 1) -> Program:
    fn = Function("main")
    a, b = fn.input("i00_a", (n, n)), fn.input("i01_b", (n, n))
    y = a
    for _ in range(repeat):
        y = ops.mul(ops.matmul(y, b), 1.0 / n)
    fn.claim("o00_y", y)
    fn.returns(y)
    return backend.compile(print_module(fn))


def bound(backend: CpuBackend | ReferenceBackend, p: Program) -> tuple[dict[str, Surface], object]:
    surfaces = {port.name: backend.surface(port.nbytes) for port in (*p.inputs, *p.outputs)}
    for port in p.inputs:
        surfaces[port.name].array(np.float16, port.type.shape)[...] = 1.0
    return surfaces, p.bind(surfaces)


def test_surfaces_and_arrays_outlive_their_runtime() -> None:
    runtime = Runtime("cpu", "fp32")
    surface = runtime.backend.surface(4096)
    array = surface.array(np.float16)
    array[:] = 3.0
    runtime.close()
    del runtime, surface
    gc.collect()
    Heap()  # would reuse what was freed
    assert np.all(array == 3.0)


def test_two_threads_on_one_binding() -> None:
    """One run in flight: the other thread is refused, and the result is that of one run."""
    backend = CpuBackend(Pool(1))
    surfaces, binding = bound(backend, program(backend, 256, 40))
    refused, begun, end = [], threading.Barrier(4), time.monotonic() + 60

    def run() -> None:
        begun.wait()
        while not refused and time.monotonic() < end:  # until two have met
            try:
                binding.run()  # type: ignore[attr-defined]
            except StateError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert refused and "already running" in refused[0]
    np.testing.assert_array_equal(surfaces["o00_y"].array(np.float16), np.float16(1.0))


@pytest.mark.parametrize("kind", [CpuBackend, ReferenceBackend])
def test_running_while_a_port_is_locked(kind: type) -> None:
    backend = kind(heap=Heap()) if kind is CpuBackend else kind(Heap())
    surfaces, binding = bound(backend, program(backend))
    with surfaces["o00_y"].lock(), pytest.raises(StateError, match="o00_y"):
        binding.run()  # type: ignore[attr-defined]
    with surfaces["i00_a"].lock(), pytest.raises(StateError, match="i00_a"):
        binding.run()  # type: ignore[attr-defined]
    with surfaces["i00_a"].lock(read_only=True):
        binding.run()  # type: ignore[attr-defined]  # readers share
    np.testing.assert_array_equal(surfaces["o00_y"].array(np.float16), np.float16(1.0))


def test_locks_are_refused_not_waited_for() -> None:
    surface = Surface(Heap(), 64)
    with surface.lock(), pytest.raises(StateError), surface.lock(read_only=True):  # waiting would be for ever
        pass
    with surface.lock(read_only=True), pytest.raises(StateError), surface.lock():
        pass


def test_binding_what_does_not_fit() -> None:
    backend = CpuBackend()
    p = program(backend)
    surfaces = {port.name: backend.surface(port.nbytes) for port in (*p.inputs, *p.outputs)}
    for wrong, message in (
        ({**surfaces, "i09_z": surfaces["i00_a"]}, "no port named 'i09_z'"),
        ({k: v for k, v in surfaces.items() if k != "i01_b"}, "port 'i01_b' has no surface"),
        ({**surfaces, "o00_y": backend.surface(64)}, "port 'o00_y' needs 8192 bytes, its surface has 64"),
    ):
        with pytest.raises(ShapeError, match=message):
            p.bind(wrong)


@pytest.mark.parametrize(
    "bad",
    [
        {"w": np.zeros((4, 5), np.float32)},
        {"w": np.zeros((4, 4), np.complex64)},
        {"w": np.zeros((4, 4), object)},
        {"v": np.zeros((4, 4), np.float32)},
        {},
    ],
    ids=["shape", "complex", "object", "unknown name", "missing"],
)
def test_weights_that_do_not_fit(bad: dict[str, np.ndarray]) -> None:
    store = ParamStore(Heap(), Pool(1), {"w": Spec.normal(4, 4)}, train=True)
    store.initialise(1)
    before = store["w"].master.copy()
    with pytest.raises(AnertError):
        store.load(bad)
    np.testing.assert_array_equal(store["w"].master, before)


def test_strided_and_read_only_weights_are_copied() -> None:
    store = ParamStore(Heap(), Pool(1), {"w": Spec.normal(4, 4)}, train=True)
    source = np.arange(64, dtype=np.float64).reshape(8, 8)[::2, ::-2]
    source.flags.writeable = False
    store.load({"w": source})
    store.sync()
    np.testing.assert_array_equal(store["w"].master, source)


def test_views_stay_inside_their_surface() -> None:
    surface = Surface(Heap(), 128)
    for settings in (
        {"shape": (65,)}, {"shape": (64,), "offset": 2}, {"shape": (8,), "strides": (32,)}, {"offset": 129},
        {"shape": (2,), "strides": (-2,)}, {"shape": (-1,)}, {"offset": -2}, {"shape": (1 << 62, 4)},
    ):  # fmt: skip
        with pytest.raises(ShapeError):
            surface.array(np.float16, **settings)  # type: ignore[arg-type]


def test_native_calls_refuse_null_and_negative() -> None:
    native = ffi.load()
    c, lib = native.ffi, native.lib
    empty = c.new("anert_matrix *")[0]
    with pytest.raises(AnertError):
        ffi.call(lib.anert_gemm, Pool(1).ptr, lib.ANERT_F32, 1, -1, 4, 4, 1.0, empty, empty, 0.0, empty)
    with pytest.raises(AnertError):
        ffi.call(lib.anert_gemm, Pool(1).ptr, 99, 1, 4, 4, 4, 1.0, empty, empty, 0.0, empty)
