"""The Neural Engine's shim against the stand-in that enforces the framework's contract (tests/fake_apple).

tests/test_ane_mutants.py breaks the shim in as many ways and runs these tests against each.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import threading
import time

import numpy as np
import pytest
from shim_run import Engine, Program

from anert.errors import BackendUnavailable, EngineError, InputError, NativeError, StateError
from anert.mil.blob import BlobDirectory
from anert.mil.graph import Function
from anert.mil.text import print_module

X, Y = np.arange(128.0), np.arange(128.0)[::-1]
NBYTES = 256


def difference(a: str = "i00_a", b: str = "i01_b") -> str:
    """o00_out = a - 2 b and o01_sum = a + b, declared in this order, over [1, 4, 1, 32]."""
    f = Function()
    x, y = f.input(a, (1, 4, 1, 32)), f.input(b, (1, 4, 1, 32))
    out, total = x - y * 2.0, x + y
    f.rename(out, "o00_out")
    f.rename(total, "o01_sum")
    return print_module(f.returns(out, total))


def with_weights(scale: float = 3.0) -> tuple[str, dict[str, bytes]]:
    """o00_out = (x * scale) + y, two constant tensors in two weight files."""
    f, files = Function(), BlobDirectory("@model_path/weights/deep")
    x = f.input("i00_x", (1, 4, 1, 32))
    factor, term = f.const(np.full((1, 4, 1, 32), scale), name="factor"), f.const(Y.reshape(1, 4, 1, 32), name="term")
    out = x * factor + term
    f.rename(out, "o00_out")
    return print_module(f.returns(out), files, 1), files.files()


def bound(engine: Engine, program: Program):
    """A Binding of `difference` and its surfaces a, b, out, total."""
    surfaces = [engine.surface(NBYTES) for _ in range(4)]
    a, b, out, total = surfaces
    binding = program.bind({"i00_a": a.write(X), "i01_b": b.write(Y)}, {"o00_out": out, "o01_sum": total})
    return binding, surfaces


def right(surfaces) -> bool:
    _, _, out, total = surfaces
    half = (X - 2 * Y).astype(np.float16), (X + Y).astype(np.float16)
    return np.array_equal(out.read(), half[0]) and np.array_equal(total.read(), half[1])


# ---- The way through ----


def test_numbers_flow(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    lib, compiles = engine.lib, engine.lib.anert_ane_compiles()
    program = engine.compile(difference())
    assert fake.staged() == [program.id]
    assert not program.loaded
    assert program.load().loaded
    assert (lib.anert_ane_compiles() - compiles, lib.anert_ane_loaded()) == (1, 1)
    binding, surfaces = bound(engine, program)
    seeds = [s.seed for s in surfaces]
    for _ in range(3):
        assert binding.run() > 50_000
        assert right(surfaces)
    assert [s.seed - before for s, before in zip(surfaces, seeds, strict=True)] == [0, 0, 3, 3]
    counts = fake.counts()
    assert (counts.compiles, counts.loads, counts.evaluates, counts.requests) == (1, 1, 3, 1)
    program.unload()
    assert not program.loaded
    assert lib.anert_ane_loaded() == 0


@pytest.mark.parametrize("declaration_order", [False, True])
def test_names_that_agree_bind_in_either_order(fake_ane, declaration_order):
    fake = fake_ane(declaration_order=declaration_order)
    engine = Engine(fake.path)
    program = engine.compile(difference()).load()
    a, b, out, total = (engine.surface(NBYTES) for _ in range(4))
    backwards = {"i01_b": b.write(Y), "i00_a": a.write(X)}
    program.bind(backwards, {"o01_sum": total, "o00_out": out}).run()
    assert right((a, b, out, total))


@pytest.mark.parametrize("names", [("b", "a"), ("a", "B"), ("x10", "x2"), ("i00_a", "i01_b")])
def test_ports_bind_in_byte_order_of_their_names(fake_ane, names):
    """The engine puts them there, wherever the text declares them and the caller lists them."""
    engine = Engine(fake_ane().path)
    program = engine.compile(difference(*names)).load()
    a, b, out, total = (engine.surface(NBYTES) for _ in range(4))
    outputs = [("o01_sum", total), ("o00_out", out)]
    program.bind([(names[0], a.write(X)), (names[1], b.write(Y))], outputs).run()
    assert right((a, b, out, total))


def test_weights_are_staged_and_reach_the_program(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    text, files = with_weights()
    assert len(files) == 2
    program = engine.compile(text, files).load()
    x, out = engine.surface(NBYTES).write(X), engine.surface(NBYTES)
    program.bind({"i00_x": x}, {"o00_out": out}).run()
    assert np.array_equal(out.read(), (3 * X + Y).astype(np.float16))
    other, other_files = with_weights(4.0)
    assert other == text
    assert engine.compile(other, other_files).id != program.id, "the hash covers the weights"


def clobber() -> None:
    """Takes memory that was just freed, writes over it, and gives it back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [(libc.malloc(size), size) for size in range(24, 1024, 16) for _ in range(64)]
    for block, size in blocks:
        ctypes.memset(block, 0xA5, size)
        libc.free(ctypes.c_void_p(block))


def test_a_surface_outlives_its_engine(fake_ane):
    engine = Engine(fake_ane().path)
    surface = engine.surface(NBYTES)
    engine.ffi.release(engine.ptr)
    clobber()
    assert np.array_equal(surface.write(X).read(), X.astype(np.float16))


def test_handles_may_be_freed_in_any_order(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    program = engine.compile(difference()).load()
    binding, surfaces = bound(engine, program)
    views = [s.array().ctypes.data for s in surfaces]
    engine.ffi.release(engine.ptr)
    engine.ffi.release(program.ptr)
    for surface in surfaces[:3]:
        engine.ffi.release(surface.ptr)
    clobber()
    assert fake.alive() == {"descriptors": 1, "models": 1, "wrappers": 4, "requests": 1, "surfaces": 4, "loaded": 1}
    binding.run()
    assert np.array_equal(surfaces[3].read(), (X + Y).astype(np.float16))
    assert len(set(views)) == 4
    assert fake.staged()
    engine.ffi.release(binding.ptr)
    assert fake.alive() == {"surfaces": 1}
    assert fake.counts().unloads == 1, "the last holder unloads"
    assert not fake.staged()


# ---- Programs ----


@pytest.mark.parametrize("path", [
    "weights/w.bin", "not/a/model_path/weights/w.bin", "@model_path/", "@model_path/../w.bin", "@model_path//w.bin",
    "@model_path/weights/../../w.bin", "@model_path/./w.bin", "/etc/w.bin", "@model_path/model.mil",
    "@model_path/net.plist", "@model_path/data", "",
])  # fmt: skip
def test_a_weight_file_stays_below_its_directory(fake_ane, path):
    fake = fake_ane()
    with pytest.raises(InputError, match="is not a new file below @model_path/"):
        Engine(fake.path).compile(difference(), {path: b"1234"})
    assert fake.counts().compiles == 0


def test_a_weight_file_that_comes_twice(fake_ane):
    engine = Engine(fake_ane().path)
    text, files = with_weights()
    with pytest.raises(InputError, match="blob 2"):
        engine.compile(text, [*files.items(), next(iter(files.items()))])


def test_a_program_that_the_compiler_refuses(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    with pytest.raises(EngineError, match=r"^the engine refuses to compile the program: com.apple.appleneuralengine."
                       r"compiler code 1: .*err=\(InvalidMILProgram\)"):  # fmt: skip
        engine.compile("program(1.3) nonsense")
    with pytest.raises(InputError, match="MIL text"):
        engine.compile("")
    assert fake.counts().compiles == 1


def test_the_engines_words_are_one_line_with_what_lies_below(fake_ane):
    engine = Engine(fake_ane(compile_failures=1).path)
    with pytest.raises(EngineError, match=r"ANECCompile\(\) FAILED  : err=\(\): com\..*compiler code 7: below$"):
        engine.compile(difference())
    engine.compile(difference())


def test_the_compile_limit_is_a_refusal_without_reason(fake_ane):
    engine = Engine(fake_ane(compile_limit=1).path)
    engine.compile(difference())
    with pytest.raises(EngineError, match="to compile the program and gives no reason"):
        engine.compile(difference("a", "b"))


def test_a_load_that_fails_once_is_tried_again(fake_ane):
    fake = fake_ane(load_failures=1)
    program = Engine(fake.path).compile(difference())
    start = time.monotonic()
    program.load()
    assert time.monotonic() - start >= 0.1
    assert fake.counts().loads == 2


def test_a_load_that_fails_twice_is_refused(fake_ane):
    fake = fake_ane(load_failures=2)
    program = Engine(fake.path).compile(difference())
    with pytest.raises(EngineError, match="refuses to load the program and gives no reason"):
        program.load()
    assert not program.loaded
    assert program.load().loaded


def test_a_staging_directory_that_goes_away_during_a_load(fake_ane):
    """Another process with the same program unloads it."""
    fake = fake_ane(load_failures=1)
    program = Engine(fake.path).compile(difference())
    loading = Background(program.load)
    while fake.counts().loads == 0:
        time.sleep(0.001)
    gone = fake.temporary_directory() / f"gone-{program.id}"
    (fake.temporary_directory() / program.id).rename(gone)  # at once, however slow this process is
    loading.result()
    shutil.rmtree(gone)
    assert program.loaded


def test_states(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    program = engine.compile(difference())
    binding, surfaces = bound(engine, program)
    with pytest.raises(StateError, match="not loaded"):
        binding.run()
    with pytest.raises(StateError, match="not loaded"):
        program.unload()
    program.load()
    with pytest.raises(StateError, match="already loaded"):
        program.load()
    program.unload()
    with pytest.raises(StateError, match="not loaded"):
        binding.run()
    assert fake.counts().evaluates == 0
    assert (surfaces[2].read() == 0).all()


@pytest.mark.parametrize("keep_stage", [False, True])
def test_a_program_comes_back_without_a_compile(fake_ane, keep_stage):
    """An unload removes the staging directory with what the compiler had left there."""
    fake = fake_ane(keep_stage=keep_stage)
    engine = Engine(fake.path)
    text, files = with_weights()
    program = engine.compile(text, files)
    x, out = engine.surface(NBYTES).write(X), engine.surface(NBYTES)
    binding = program.bind({"i00_x": x}, {"o00_out": out})
    for _ in range(3):
        program.load()
        out.write(np.zeros(128))
        binding.run()
        assert np.array_equal(out.read(), (3 * X + Y).astype(np.float16))
        program.unload()
    assert fake.counts().compiles == 1


def test_the_load_limit(fake_ane):
    engine = Engine(fake_ane(load_limit=1).path)
    first, second = engine.compile(difference()).load(), engine.compile(difference("a", "b"))
    with pytest.raises(EngineError, match="to load"):
        second.load()
    assert engine.lib.anert_ane_loaded() == 1
    first.unload()
    second.load()


def test_an_unload_that_is_refused(fake_ane):
    fake = fake_ane()
    program = Engine(fake.path).compile(difference()).load()
    fake.set(unload_failures=1)
    with pytest.raises(EngineError, match="refuses to unload the program"):
        program.unload()
    assert program.loaded
    program.unload()


def test_programs_of_one_content_share_a_directory(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    first, second = engine.compile(difference()), engine.compile(difference())
    assert first.id == second.id
    assert fake.staged() == [first.id]
    first.load().unload()  # takes the directory away under the other's feet
    second.load()
    third = engine.compile(difference())
    engine.ffi.release(first.ptr)
    assert fake.staged(), "two others hold it"
    third.load()
    binding, surfaces = bound(engine, second)
    binding.run()
    assert right(surfaces)
    engine.ffi.release(third.ptr)
    second.unload()
    second.load()
    binding.run()


def test_a_staging_directory_that_cannot_be_written(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    program = engine.compile(difference())
    folder = fake.temporary_directory() / program.id
    engine.ffi.release(program.ptr)
    folder.write_text("a file in the way")
    with pytest.raises(NativeError, match=rf"the staging file {folder}/model.mil cannot be written: "):
        engine.compile(difference())
    assert not folder.exists()
    engine.compile(difference())


# ---- Bindings and runs ----


def test_an_evaluate_that_answers_no(fake_ane):
    fake = fake_ane(evaluate_failures=1)
    engine = Engine(fake.path)
    binding, surfaces = bound(engine, engine.compile(difference()).load())
    with pytest.raises(
        EngineError, match=r"refuses to evaluate the program: com\.apple\.appleneuralengine code 8: .*0x1d"
    ):
        binding.run()
    assert fake.counts().refused == 1
    binding.run()
    assert right(surfaces)


def test_ports_that_do_not_fit(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    program = engine.compile(difference())
    a, b, out, total = (engine.surface(NBYTES) for _ in range(4))
    good = {"o00_out": out, "o01_sum": total}
    with pytest.raises(InputError, match="port i01_b needs 512 bytes, its surface has 256"):
        program.bind({"i00_a": a, "i01_b": (b, 512)}, good)
    with pytest.raises(InputError, match="port i00_a comes twice"):
        program.bind([("i00_a", a), ("i01_b", b), ("i00_a", b)], good)
    with pytest.raises(InputError, match="port o00_out comes twice"):
        program.bind({"i00_a": a, "i01_b": b}, [("o00_out", out), ("o00_out", total)])
    with pytest.raises(InputError, match="output o01_sum is on the surface of port i00_a"):
        program.bind({"i00_a": a, "i01_b": b}, {"o00_out": out, "o01_sum": a})
    with pytest.raises(InputError, match="output o01_sum is on the surface of port o00_out"):
        program.bind({"i00_a": a, "i01_b": b}, {"o00_out": out, "o01_sum": out})
    with pytest.raises(InputError, match="at least one output"):
        program.bind({"i00_a": a, "i01_b": b}, {})
    program.load()
    assert fake.counts().wrappers == 0
    program.bind({"i00_a": a.write(X), "i01_b": a}, good).run()  # one surface may feed two inputs
    assert np.array_equal(out.read(), -X.astype(np.float16))


def test_a_surface_that_is_too_small_for_the_engine(fake_ane):
    """The caller's nbytes may be wrong: the engine has the last word."""
    engine = Engine(fake_ane().path)
    program = engine.compile(difference()).load()
    a, b, out, total = (engine.surface(n) for n in (NBYTES, NBYTES - 2, NBYTES, NBYTES))
    with pytest.raises(EngineError, match="0x1d"):
        program.bind({"i00_a": a, "i01_b": b}, {"o00_out": out, "o01_sum": total}).run()


def test_what_is_locked_is_not_evaluated(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    binding, surfaces = bound(engine, engine.compile(difference()).load())
    seeds = [s.seed for s in surfaces]
    for surface in surfaces:
        for read_only in (False, True):
            with surface.locked(read_only), pytest.raises(StateError, match="locked; unlock it first"):
                binding.run()
    assert fake.counts().evaluates == 0
    assert [s.seed - before for s, before in zip(surfaces, seeds, strict=True)] == [1, 1, 1, 1], "the locks' own"
    binding.run()
    assert right(surfaces)


class Background(threading.Thread):
    """Calls `function` on a thread; `result()` waits, and raises what it raised."""

    def __init__(self, function):
        super().__init__()
        self.function, self.error = function, None
        self.start()

    def run(self):
        try:
            self.function()
        except Exception as error:
            self.error = error

    def result(self):
        self.join(20)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def while_running(fake, binding) -> Background:
    """A run that takes 0.3 s, and has begun."""
    fake.set(evaluate_us=300_000)
    before = fake.counts().evaluates
    thread = Background(binding.run)
    while fake.counts().evaluates == before:
        time.sleep(0.001)
    time.sleep(0.02)
    fake.set(evaluate_us=0)
    return thread


def test_a_run_keeps_its_surfaces_and_its_program(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    program, other = engine.compile(difference()).load(), engine.compile(difference("a", "b")).load()
    binding, surfaces = bound(engine, program)
    a, b, out, total = surfaces
    spare = engine.surface(NBYTES)
    reader = other.bind({"a": a, "b": b}, {"o00_out": spare, "o01_sum": engine.surface(NBYTES)})
    writer = other.bind({"a": a, "b": b}, {"o00_out": spare, "o01_sum": total})
    fed = other.bind({"a": a, "b": out}, {"o00_out": spare, "o01_sum": engine.surface(NBYTES)})
    for surface in surfaces:
        with surface.locked(), pytest.raises(StateError, match="locked; unlock it first"):
            binding.run()
    running = while_running(fake, binding)
    for surface in surfaces:
        for read_only in (False, True):
            with pytest.raises(StateError, match="in use by a run"):
                surface.lock(read_only)
    with pytest.raises(StateError, match="already running"):
        binding.run()
    with pytest.raises(StateError, match="another run uses a surface"):
        writer.run()
    with pytest.raises(StateError, match="another run uses a surface"):
        fed.run()
    reader.run()  # inputs are shared
    start = time.monotonic()
    program.unload()
    assert time.monotonic() - start > 0.05, "an unload waits for the run"
    running.result()
    assert right(surfaces)
    for surface in (*surfaces, spare):
        surface.lock()
        surface.unlock()


def test_runs_of_one_program_wait_for_each_other(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    program = engine.compile(difference()).load()
    (first, seen), (second, also) = bound(engine, program), bound(engine, program)
    running = while_running(fake, first)
    second.run()
    running.result()
    assert right(seen)
    assert right(also)


def test_many_threads(fake_ane):
    fake = fake_ane(evaluate_us=0)
    engine = Engine(fake.path)
    shared = engine.compile(difference()).load()

    def work():
        for i in range(12):
            program = shared if i % 2 else engine.compile(difference("a", "b")).load()
            surfaces = [engine.surface(NBYTES) for _ in range(4)]
            names = ("i00_a", "i01_b") if i % 2 else ("a", "b")
            inputs = dict(zip(names, (surfaces[0].write(X), surfaces[1].write(Y)), strict=True))
            binding = program.bind(inputs, {"o00_out": surfaces[2], "o01_sum": surfaces[3]})
            binding.run()
            assert right(surfaces)

    fake.set(compile_limit=1000, evaluate_us=0)
    for thread in [Background(work) for _ in range(4)]:
        thread.result()
    assert fake.counts().evaluates == 48


# ---- What the framework may do to us ----

CALLS = (
    "modelWithMILText", "inMemoryModelWithDescriptor", "hexStringIdentifier", "compileWithQoS", "loadWithQoS",
    "objectWithIOSurface", "requestWithInputs", "evaluateWithQoS", "unloadWithQoS",
)  # fmt: skip


def whole_way(engine: Engine) -> None:
    program = engine.compile(difference()).load()
    binding, surfaces = bound(engine, program)
    binding.run()
    assert right(surfaces)
    program.unload()


@pytest.mark.parametrize("selector", CALLS)
def test_an_exception_becomes_an_error(fake_ane, selector):
    fake = fake_ane(throws=selector)
    engine = Engine(fake.path)
    with pytest.raises(NativeError, match=f"^ANEFakeException: thrown by {selector}$"):
        whole_way(engine)
    fake.set(throws="")
    gc.collect()
    whole_way(engine)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("nil_descriptor", "makes no descriptor of .* bytes of MIL text"),
        ("nil_model", "makes no model of its descriptor"),
        ("nil_wrapper", "does not take a surface"),
        ("nil_request", "makes no request of 2 inputs and 2 outputs"),
    ],
)
def test_nil_is_a_refusal(fake_ane, option, words):
    fake = fake_ane(**{option: 1})
    engine = Engine(fake.path)
    with pytest.raises(EngineError, match=words):
        whole_way(engine)
    fake.set(**{option: 0})
    whole_way(engine)


def test_a_hash_that_names_no_directory(fake_ane):
    fake = fake_ane(odd_hash=1)
    with pytest.raises(BackendUnavailable, match=r"hexStringIdentifier is \.\./.*, expected the name of a directory"):
        Engine(fake.path).compile(difference())
    assert fake.counts().compiles == 0
