"""The stand-in itself: it notices each breach of contract, and its profiles do what the published chips do."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fake_ane import PROFILES, build, library
from shim_run import Engine

from anert.errors import EngineError, NativeError
from anert.mil import ops
from anert.mil.graph import Function
from anert.mil.text import print_module

READ_ONLY = 1


class Surfaces:
    """IOSurface's functions, called without the shim."""

    def __init__(self, fake) -> None:
        self.lib = ctypes.CDLL(fake.path)
        for name in ("IOSurfaceGetBaseAddress",):
            getattr(self.lib, name).restype = ctypes.c_void_p

    def lock(self, ref, options: int) -> int:
        return self.lib.IOSurfaceLock(ref, options, None)

    def unlock(self, ref, options: int) -> int:
        return self.lib.IOSurfaceUnlock(ref, options, None)

    def base(self, ref) -> int:
        return self.lib.IOSurfaceGetBaseAddress(ref)


def raw(surface) -> ctypes.c_void_p:
    """The IOSurfaceRef behind a surface of the shim: the third word of its record."""
    address = int(surface.engine.ffi.cast("uintptr_t", surface.ptr))
    return ctypes.c_void_p(ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))[2])


def opened(fake_ane):
    """(fake, IOSurface's functions, a surface of the shim, its IOSurfaceRef)."""
    fake = fake_ane()
    surface = Engine(fake.path).surface(100)
    return fake, Surfaces(fake), surface, raw(surface)


def test_a_base_without_a_lock(fake_ane):
    fake, io, _, ref = opened(fake_ane)
    assert io.base(ref)
    fake.forgive("IOSurfaceGetBaseAddress of a surface that is not locked")


@pytest.mark.parametrize(("lock", "unlock"), [(0, READ_ONLY), (READ_ONLY, 0)])
def test_an_unlock_with_another_flag(fake_ane, lock, unlock):
    fake, io, _, ref = opened(fake_ane)
    assert io.lock(ref, lock) == 0
    assert io.unlock(ref, unlock) != 0
    fake.forgive(
        f"IOSurfaceUnlock with options {unlock} of a surface with {lock} locks for reading and {1 - lock} for w"
    )
    assert io.unlock(ref, lock) == 0


def test_a_lock_within_a_lock(fake_ane):
    fake, io, _, ref = opened(fake_ane)
    io.lock(ref, 0)
    io.lock(ref, 0)
    fake.forgive("IOSurfaceLock of a surface that is locked already")
    io.unlock(ref, 0)
    io.unlock(ref, 0)
    assert io.lock(ref, 2) == 0
    fake.forgive("IOSurfaceLock with options 2")
    io.unlock(ref, 2)


def test_a_write_under_a_lock_for_reading(fake_ane):
    fake, _, surface, _ = opened(fake_ane)
    with surface.locked(read_only=True):
        surface.array()[3] = 1
    fake.forgive("a surface of 100 bytes was written under a lock for reading")


def test_a_write_without_a_lock(fake_ane):
    fake, _, surface, _ = opened(fake_ane)
    surface.array()[3] = 1
    surface.lock()
    fake.forgive("a surface of 100 bytes was written without a lock")
    surface.unlock()


def test_a_write_past_the_end(fake_ane):
    """Behind 100 bytes lie 28 that no surface has, then a page that nobody may touch."""
    fake, io, surface, ref = opened(fake_ane)
    with surface.locked():
        ctypes.memset(io.base(ref) + 100, 0, 28)
    surface.engine.ffi.release(surface.ptr)
    fake.forgive("somebody wrote past the end of a surface of 100 bytes")


def died_of(function) -> int:
    """The signal that ends a child which calls `function`; 0 if it comes back."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) * -1


def test_guard_pages(fake_ane):
    _, io, _, ref = opened(fake_ane)
    io.lock(ref, 0)
    base = io.base(ref)
    assert died_of(lambda: ctypes.memset(base, 0, 100)) == 0
    assert died_of(lambda: ctypes.memset(base + 128, 0, 1)) == signal.SIGSEGV
    assert died_of(lambda: ctypes.memset(base - 4096, 0, 1)) == signal.SIGSEGV
    io.unlock(ref, 0)


def test_sealed_memory(fake_ane):
    fake = fake_ane(seal=1)
    surface = Engine(fake.path).surface(256)
    memory = surface.array(np.uint8)

    def read() -> None:
        memory.sum()

    def write() -> None:
        memory[0] = 1

    assert (died_of(read), died_of(write)) == (signal.SIGSEGV, signal.SIGSEGV)
    with surface.locked(read_only=True):
        assert (died_of(read), died_of(write)) == (0, signal.SIGSEGV)
    with surface.locked():
        assert (died_of(read), died_of(write)) == (0, 0)
    assert died_of(read) == signal.SIGSEGV


def test_a_freed_object_is_noticed(fake_ane):
    fake, io, surface, ref = opened(fake_ane)
    surface.engine.ffi.release(surface.ptr)
    assert io.lock(ref, 0) != 0
    fake.forgive("IOSurfaceLock of what is no living IOSurface")
    io.lib.CFRelease(ref)
    fake.forgive("release of a freed object")


def test_what_is_left_is_noticed(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    surface = engine.surface(64)
    assert fake.alive() == {"surfaces": 1}
    with pytest.raises(AssertionError, match="still alive"):
        fake.check()
    program = engine.compile(text_of(lambda x: x + 1.0))
    with pytest.raises(AssertionError, match=r"was handed in is still retained"):
        fake.check()
    fake.forgive("that was handed in is still retained")
    del surface, program


def test_what_a_killed_process_left_is_cleared(fake_ane):
    """One that had this one's number, which the names of staging directories begin with."""
    ffi, lib = library(build()[1])
    left = Path(ffi.string(lib.fake_temporary_directory()).decode()) / f"{os.getpid():08X}LEFT"
    (left / "weights").mkdir(parents=True)
    assert fake_ane().staged() == []
    assert not left.exists()


# ---- What the engine does with programs ----


def text_of(body, *shapes, opset: str = "ios18", dtype: str = "fp16") -> str:
    """MIL text of o00_y = body(i00_x, i01_x, ...); one input [1, 4, 1, 32] unless shapes are given."""
    f = Function("main", opset)
    inputs = [f.input(f"i{i:02}_x", shape, dtype) for i, shape in enumerate(shapes or [(1, 4, 1, 32)])]
    result = body(*inputs)
    f.claim("o00_y", result)
    return print_module(f.returns(result))


def evaluate(engine: Engine, text: str, *arrays: np.ndarray, shape=(1, 4, 1, 32)) -> np.ndarray:
    """o00_y of the program, fp16."""
    inputs = {f"i{i:02}_x": engine.surface(a.size * 2).write(a) for i, a in enumerate(arrays)}
    out = engine.surface(int(np.prod(shape)) * 2)
    engine.compile(text).load().bind(inputs, {"o00_y": out}).run()
    return out.read(shape)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float16)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_attention_mask(fake_ane, profile):
    q, k, v = (draw(1, 2, 32, 32) + i for i in range(3))
    mask = np.triu(np.full((1, 1, 32, 32), -1e4), 1).astype(np.float16)
    text = text_of(ops.scaled_dot_product_attention, *(a.shape for a in (q, k, v, mask)), opset=opset_of(profile))
    y = evaluate(Engine(fake_ane(profile).path), text, q, k, v, mask, shape=q.shape)
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3) / np.sqrt(32)
    if not PROFILES[profile].mask_ignored:
        scores = scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v.astype(np.float64)
    assert np.abs(y - expected).max() < 5e-3
    assert PROFILES[profile].mask_ignored == (profile != "plain")


def opset_of(profile: str) -> str:
    return PROFILES[profile].opsets[-1]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_convolution_with_weights_of_the_run(fake_ane, profile):
    x, w = draw(1, 32, 1, 32), draw(16, 32, 1, 1)
    text = text_of(lambda a, b: ops.conv(a, b), x.shape, w.shape, opset=opset_of(profile))
    fake = fake_ane(profile, width_multiple=1)
    y = evaluate(Engine(fake.path), text, x, w, shape=(1, 16, 1, 32))
    exact = np.einsum("oi,is->os", w[:, :, 0, 0].astype(np.float64), x[0, :, 0].astype(np.float64))
    expected = exact if profile == "plain" else np.zeros((16, 32))
    assert np.abs(y[0, :, 0] - expected).max() < 2e-2


@pytest.mark.parametrize("profile", PROFILES)
def test_a_convolution_with_constant_weights_is_right_everywhere(fake_ane, profile):
    x, w = draw(1, 32, 1, 32), draw(16, 32, 1, 1)
    text = text_of(lambda a: ops.conv(a, a.function.const(w)), x.shape, opset=opset_of(profile))
    y = evaluate(Engine(fake_ane(profile).path), text, x, shape=(1, 16, 1, 32))
    exact = np.einsum("oi,is->os", w[:, :, 0, 0].astype(np.float64), x[0, :, 0].astype(np.float64))
    assert np.abs(y[0, :, 0] - exact).max() < 2e-2


@pytest.mark.parametrize("profile", PROFILES)
def test_tile_spoils_the_process(fake_ane, profile):
    fake = fake_ane(profile)
    engine = Engine(fake.path)
    x = draw(1, 4, 1, 32)
    text = text_of(lambda a: ops.tile(a, (1, 1, 1, 2)), opset=opset_of(profile))
    assert np.array_equal(evaluate(engine, text, x, shape=(1, 4, 1, 64)), np.tile(x, 2))
    other = text_of(lambda a: a + 1.0, opset=opset_of(profile))
    if profile == "plain":
        assert np.array_equal(evaluate(engine, other, x), x + np.float16(1))
    else:
        for _ in range(2):
            with pytest.raises(EngineError, match="0x1d"):
                evaluate(engine, other, x)
    fake.reset()  # the next process
    assert np.array_equal(evaluate(engine, other, x), x + np.float16(1))


@pytest.mark.parametrize(("profile", "width"), [("plain", 65536), ("m1", 16384), ("m4", 65536)])
def test_the_widest_tensor(fake_ane, profile, width):
    engine = Engine(fake_ane(profile).path)
    x = draw(1, 1, 1, width)
    fits = text_of(lambda a: a + 1.0, x.shape, opset=opset_of(profile))
    assert np.array_equal(evaluate(engine, fits, x, shape=x.shape), x + np.float16(1))
    with pytest.raises(EngineError, match=rf"CompilationFailure\): .* is {width + 32} wide, more than {width}"):
        engine.compile(text_of(lambda a: a + 1.0, (1, 1, 1, width + 32), opset=opset_of(profile)))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("column", [0, 32])
def test_slices_past_4094(fake_ane, profile, column):
    x = np.tile(np.float16([4094, 4096, -5000, 1]), 64).reshape(1, 4, 1, 64)
    text = text_of(lambda a: ops.slice_by_size(a, (0, 0, 0, column), (1, 4, 1, 32)), x.shape, opset=opset_of(profile))
    y = evaluate(Engine(fake_ane(profile).path), text, x)
    expected = [4094, 4096, -5000, 1] if profile != "m1" or column == 0 else [4094, np.inf, -np.inf, 1]
    assert np.array_equal(y, np.tile(np.float16(expected), 32).reshape(y.shape))


@pytest.mark.parametrize("profile", PROFILES)
def test_matmul_past_32752(fake_ane, profile):
    """Row sums of 30,000, 32,752, 40,000 and -40,000."""
    totals = np.float64([30000, 32752, 40000, -40000])
    a, b = np.zeros((1, 1, 4, 32), np.float16), np.zeros((1, 1, 32, 32), np.float16)
    a[0, 0, :, 0], b[0, 0, 0] = totals / 16, 16
    text = text_of(ops.matmul, a.shape, b.shape, opset=opset_of(profile))
    y = evaluate(Engine(fake_ane(profile).path), text, a, b, shape=(1, 1, 4, 32))
    expected = totals if profile == "plain" else [30000, 32752, np.inf, -np.inf]
    assert np.array_equal(y[0, 0], np.repeat(np.float16(expected)[:, None], 32, 1))


def test_dialects_and_port_types(fake_ane):
    engine = Engine(fake_ane("m1").path)
    with pytest.raises(EngineError, match=r"err=\(InvalidMILProgram\): opset ios18"):
        engine.compile(text_of(lambda a: a + 1.0))
    with pytest.raises(EngineError, match=r"err=\(InvalidMILProgram\): port i00_x is fp32"):
        engine.compile(text_of(lambda a: a + a, opset="ios16", dtype="fp32"))
    engine.compile(text_of(lambda a: a + 1.0, opset="ios16"))


@pytest.mark.parametrize("profile", ["plain", "m4"])
def test_both_dialects_and_both_port_types(fake_ane, profile):
    engine = Engine(fake_ane(profile).path)
    for opset in ("ios16", "ios18"):
        for dtype in ("fp16", "fp32"):
            engine.compile(text_of(lambda a: a + a, opset=opset, dtype=dtype))


def test_a_parameter_that_nobody_reads(fake_ane):
    with pytest.raises(EngineError, match="parameter i01_x is never read"):
        Engine(fake_ane().path).compile(text_of(lambda a, b: a + 1.0, (1, 4, 1, 32), (1, 4, 1, 32)))


@pytest.mark.parametrize("n", [8, 9])
def test_more_than_eight_inputs_are_misbound(fake_ane, n):
    def weighted(*inputs):
        total = inputs[0] * 1.0
        for i, value in enumerate(inputs[1:], 2):
            total = total + value * float(i)
        return total

    arrays = [np.full((1, 4, 1, 32), float(i), np.float16) for i in range(n)]
    y = evaluate(Engine(fake_ane().path), text_of(weighted, *(a.shape for a in arrays)), *arrays)
    right, wrong = sum((i + 1) * i for i in range(n)), sum((i + 1) * (n - 1 - i) for i in range(n))
    assert (y == (right if n == 8 else wrong)).all()


def test_declaration_order(fake_ane):
    """The other reading of the contract: names that do not agree with it are then misbound."""
    fake = fake_ane(declaration_order=1)
    engine = Engine(fake.path)
    f = Function()
    b, a = f.input("b", (1, 4, 1, 32)), f.input("a", (1, 4, 1, 32))
    y = b - a
    f.claim("o00_y", y)
    one, two, out = (engine.surface(256) for _ in range(3))
    program = engine.compile(print_module(f.returns(y))).load()
    binding = program.bind({"b": two.write(np.full(128, 2)), "a": one.write(np.full(128, 1))}, {"o00_y": out})
    binding.run()
    assert (out.read() == -1).all()
    fake.set(declaration_order=0)
    binding.run()
    assert (out.read() == 1).all()


@pytest.mark.parametrize("width", [8, 15, 16, 24, 32])
def test_widths_of_inputs(fake_ane, width):
    engine = Engine(fake_ane().path)
    text, x = text_of(lambda a: a + 1.0, (1, 4, 1, width)), draw(1, 4, 1, width)
    if width % 16 == 0:
        assert np.array_equal(evaluate(engine, text, x, shape=x.shape), x + np.float16(1))
    else:
        with pytest.raises(EngineError, match="status=0x1d"):
            evaluate(engine, text, x, shape=x.shape)


def test_equal_sizes(fake_ane):
    fake = fake_ane(equal_sizes=1)
    engine = Engine(fake.path)
    program = engine.compile(text_of(lambda a, b: a + b, (1, 4, 1, 32), (1, 1, 1, 32))).load()
    a, small, large, out = (engine.surface(n).write(np.ones(n // 2)) for n in (256, 64, 256, 256))
    with pytest.raises(EngineError, match="status=0x1d"):
        program.bind({"i00_x": a, "i01_x": small}, {"o00_y": out}).run()
    program.bind({"i00_x": a, "i01_x": large}, {"o00_y": out}).run()
    assert (out.read() == 2).all()


def test_a_no_is_quick_and_a_yes_is_not(fake_ane):
    fake = fake_ane(evaluate_us=20_000)
    engine = Engine(fake.path)
    a, out = engine.surface(256), engine.surface(256)
    binding = engine.compile(text_of(lambda x: x + 1.0)).load().bind({"i00_x": a}, {"o00_y": out})
    assert binding.run() >= 20_000_000
    fake.set(evaluate_failures=-1)
    took = []
    for _ in range(20):
        start = time.monotonic()
        with pytest.raises(EngineError):
            binding.run()
        took.append(time.monotonic() - start)
    assert min(took) < 0.02
    assert fake.counts().refused == 20


def test_weight_files_that_the_text_does_not_name(fake_ane):
    fake = fake_ane()
    program = Engine(fake.path).compile(text_of(lambda x: x + 1.0), {"@model_path/weights/w.bin": b"1234"})
    fake.forgive(r"the text names the files \[\], the weights are \['@model_path/weights/w.bin'\]")
    del program


def test_the_controls_are_declared_as_they_are(fake_ane):
    """What cffi takes fake_options to be is what the C code has: the last field arrives where it belongs."""
    fake = fake_ane()
    ffi, lib = library(Path(fake.path))
    settings = lib.fake_settings()
    settings.throws = b"hexStringIdentifier"
    with pytest.raises(NativeError, match="thrown by hexStringIdentifier"):
        Engine(fake.path).compile(text_of(lambda x: x + 1.0))
    assert ffi.string(settings.throws) == b""
