"""Backend ane through shim and stand-in: its protocol, its budgets, what the engine refuses, and who gets chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_ane_shim import difference
from test_network import batch_of, gradients, model_of
from test_schedule import delayed, equal, step_of

from anert import capabilities
from anert.backend.ane import FLOOR_NS, AneBackend, AneSurface
from anert.backend.cpu import CpuBackend
from anert.capabilities import ANE
from anert.decode import Session
from anert.errors import (
    BackendUnavailable,
    CompileError,
    EngineError,
    EngineRefused,
    ShapeError,
    StateError,
    UnsupportedError,
)
from anert.mil import ops
from anert.mil.graph import Function
from anert.mil.text import parse, print_module
from anert.network import Network
from anert.param import ParamStore
from anert.plugin import load
from anert.runtime import Runtime
from anert.schedule import ENGINE, HOST
from anert.surface import Heap, Surface

ROOT = Path(__file__).resolve().parents[1]
ROOMY = replace(ANE, compile_budget=1_000_000)
SIZE = 16384


@pytest.fixture(scope="module")
def stories():
    return load(str(ROOT / "plugins" / "stories.py"))


def backend_of(fake, **changes) -> AneBackend:
    return AneBackend(replace(ROOMY, **changes), framework=fake.path)


def doubled(factor: float = 2.0, opset: str = "ios18") -> str:
    """out = factor * a over [1, 4, 1, 32]; the factor lies in a weight file's size of constants, inline."""
    fn = Function("main", opset)
    y = ops.mul(fn.input("i00_a", (1, 4, 1, 32)), factor)
    fn.claim("o00_y", y)
    return print_module(fn.returns(y))


def bound(backend, text):
    """(binding, surfaces by port) with a, 0, 1, ... in every input."""
    program = backend.compile(text)
    surfaces = {p.name: backend.surface(SIZE) for p in (*program.inputs, *program.outputs)}
    for i, port in enumerate(program.inputs):
        fill(surfaces[port.name], np.arange(128) + i)
    return program.bind(surfaces), surfaces


def fill(surface, values) -> None:
    with surface.lock():
        surface.array(np.float16, np.size(values))[:] = np.ravel(values)


def read(surface, n=128) -> np.ndarray:
    with surface.lock(read_only=True):
        return surface.array(np.float16, n).copy()


# ---- the protocol


def test_a_program_runs_as_often_as_it_is_asked_to(fake_ane):
    fake = fake_ane(seal=1)
    backend = backend_of(fake)
    binding, surfaces = bound(backend, difference())
    program = backend.compile(difference())
    assert [p.name for p in program.inputs] == ["i00_a", "i01_b"] and program.stats.bytes_in == 2 * 256
    for n in range(3):
        fill(surfaces["i00_a"], np.arange(128) * n)
        binding.run()
        assert np.array_equal(read(surfaces["o00_out"]), np.arange(128) * n - 2 * (np.arange(128) + 1))
    counts = fake.counts()
    assert (counts.compiles, counts.loads, counts.requests, counts.evaluates) == (1, 1, 1, 3)
    assert backend.compiles == 1


def test_surfaces_are_zeroed_locked_and_counted(fake_ane):
    fake = fake_ane(seal=1)
    surface = backend_of(fake).surface(1000)
    assert isinstance(surface, AneSurface) and surface.shared and surface.nbytes == 1000
    assert not read(surface, 500).any()
    seed = surface.seed
    with surface.access(read_only=True), surface.access(read_only=True), pytest.raises(StateError):
        surface.acquire(False)
    assert surface.seed == seed
    with surface.access(), pytest.raises(StateError):
        surface.acquire(True)
    assert surface.seed > seed
    with pytest.raises(ShapeError, match="at least 1 byte"):
        AneSurface(backend_of(fake), 0)


def test_what_cannot_be_bound_is_said(fake_ane):
    fake = fake_ane()
    backend = backend_of(fake)
    program = backend.compile(doubled())
    a, y, small = backend.surface(SIZE), backend.surface(SIZE), backend.surface(128)
    with pytest.raises(ShapeError, match="'o00_y' has no surface"):
        program.bind({"i00_a": a})
    with pytest.raises(ShapeError, match="needs 256 bytes, its surface has 128"):
        program.bind({"i00_a": small, "o00_y": y})
    with pytest.raises(ShapeError, match=r"make it by backend\.surface"):
        program.bind({"i00_a": Surface(Heap(), SIZE), "o00_y": y})
    binding = program.bind({"i00_a": a, "o00_y": y})
    with a.lock(), pytest.raises(StateError, match="locked"):
        binding.run()
    binding.run()


def test_a_binding_that_runs_is_not_started_again(fake_ane):
    fake = fake_ane()
    backend = backend_of(fake)
    binding, _ = bound(backend, doubled())
    thread = threading.Thread(target=binding.run)
    with backend.compile(doubled()).in_use:  # the engine is busy with this program
        thread.start()
        while not binding._busy.locked():
            time.sleep(0.001)
        with pytest.raises(StateError, match="already running"):
            binding.run()
    thread.join()
    assert fake.counts().evaluates == 1


# ---- refusals


def test_a_no_is_an_error_in_the_frameworks_words(fake_ane):
    fake = fake_ane()
    binding, surfaces = bound(backend_of(fake), doubled())
    fake.set(evaluate_failures=1)
    with pytest.raises(EngineError, match=r"code 8.*program \(i00_a\) -> o00_y") as refused:
        binding.run()
    assert "\n" not in str(refused.value)
    binding.run()
    assert np.array_equal(read(surfaces["o00_y"]), 2 * np.arange(128))


def test_the_canonical_dialect_is_tried_when_the_first_program_is_refused(fake_ane):
    fake = fake_ane(profile="m1")
    backend = backend_of(fake)
    binding, surfaces = bound(backend, doubled())
    binding.run()
    assert np.array_equal(read(surfaces["o00_y"]), 2 * np.arange(128))
    assert backend.opset == "ios16" and backend.compile(doubled()).opset == "ios16"
    assert backend.compiles == fake.counts().compiles == 2
    assert backend.compile(doubled(3.0)).opset == "ios16"  # at once
    assert backend.compiles == fake.counts().compiles == 3
    assert backend.compile(doubled(5.0, "ios16")).opset == "ios16" and backend.compiles == 4
    with pytest.raises(EngineRefused, match="ios18"):
        AneBackend(ROOMY, fallback=False, framework=fake.path).compile(doubled())


def test_the_same_weights_reach_the_engine_in_either_dialect(fake_ane, stories):
    def texts(profile):
        fake = fake_ane(profile=profile)
        net = network_on(backend_of(fake), model_of(stories, seq_len=32))
        assert net.runtime.backend.opset == ("ios16" if profile == "m1" else "ios18")
        return gradients(net)

    want = gradients(network_on(cpu(), model_of(stories, seq_len=32)))
    assert equal(texts("m1"), want)


def test_what_both_dialects_refuse_is_an_error_with_both_answers(fake_ane):
    fake = fake_ane()
    backend = backend_of(fake)
    fake.set(compile_failures=2)
    with pytest.raises(EngineRefused, match=r"ANECCompile.*in the canonical dialect too; program \(i00_a\)") as refused:
        backend.compile(doubled())
    assert refused.value.exit_code == 3 and backend.compiles == fake.counts().compiles == 2
    assert backend.compile(doubled()).opset == "ios18"
    fake.set(compile_failures=1)
    with pytest.raises(EngineRefused, match="ANECCompile"):  # ios18 has been taken: another dialect is no remedy
        backend.compile(doubled(3.0))
    assert backend.compiles == fake.counts().compiles == 4


def test_bad_text_never_reaches_the_engine(fake_ane):
    fake = fake_ane()
    with pytest.raises(Exception, match="expected"):
        backend_of(fake).compile("program(1.3) nonsense")
    with pytest.raises(CompileError, match="no function 'main'"):
        backend_of(fake).compile(doubled().replace("func main", "func other"))
    assert fake.counts().compiles == 0


def test_encoded_weights_are_refused(fake_ane):
    fake = fake_ane()
    with pytest.raises(UnsupportedError, match="backend 'ane' takes fp16 weights: int8 weights are for backend 'cpu'"):
        backend_of(fake).compile(doubled(), encodings={"i00_a": "int8"})
    assert fake.counts().compiles == 0


def test_compiles_are_budgeted_for_the_process(fake_ane):
    fake = fake_ane()
    first = backend_of(fake)
    first.compile(doubled())
    second = backend_of(fake)
    second.budget = first.spent() + 1
    second.compile(doubled())  # another backend's program is not this one's
    with pytest.raises(CompileError, match="budget of"):
        second.compile(doubled(3.0))
    assert second.compile(doubled()) is second.compile(doubled())
    assert fake.counts().compiles == 2 and ANE.compile_budget == 100 < 119


def test_an_engine_full_of_programs_makes_room(fake_ane):
    fake = fake_ane(load_limit=2)
    backend = backend_of(fake, load_budget=2)
    pairs = [bound(backend, doubled(f)) for f in (2.0, 3.0, 4.0)]
    for _ in range(2):
        for factor, (binding, surfaces) in zip((2, 3, 4), pairs, strict=True):
            binding.run()
            assert np.array_equal(read(surfaces["o00_y"]), factor * np.arange(128))
    counts = fake.counts()
    assert counts.compiles == 3 and counts.loaded == 2 and counts.loads > 3
    programs = [backend.compile(doubled(f)) for f in (2.0, 3.0, 4.0)]
    loads = counts.loads
    pairs[2][0].run()  # the last used is there
    assert fake.counts().loads == loads
    for program in programs:
        program.in_use.acquire()
    with pytest.raises(CompileError, match="none of them is idle"):
        backend.make_resident(programs[0])
    for program in programs:
        program.in_use.release()


def test_programs_leave_the_engine_with_their_last_holder(fake_ane):
    fake = fake_ane()
    backend = backend_of(fake)
    binding, _ = bound(backend, doubled())
    backend.close()
    assert fake.counts().loaded == 1
    binding.run()
    del binding
    assert fake.counts().loaded == 0 and fake.staged() == []


def test_no_second_load_is_an_error(fake_ane):
    fake = fake_ane(load_failures=1)
    backend_of(fake).compile(doubled())  # the shim tries again
    fake.set(load_failures=2)
    with pytest.raises(EngineRefused, match="load"):
        backend_of(fake).compile(doubled(3.0))


# ---- doubt


class Hasty:
    """The shim's library, but evaluates take `ns`, and those that `skip` lists by number do nothing."""

    def __init__(self, lib, ns, skip=()):
        self.lib, self.ns, self.skip, self.runs = lib, ns, skip, 0

    def anert_ane_run(self, handle, ns, err):
        self.runs += 1
        status = 0 if self.runs - 1 in self.skip else self.lib.anert_ane_run(handle, ns, err)
        ns[0] = self.ns
        return status


def test_a_yes_that_comes_too_soon_is_verified_once(fake_ane):
    fake = fake_ane(seal=1)
    binding, surfaces = bound(backend_of(fake), doubled())
    binding._lib = Hasty(binding._lib, 20_000)
    for _ in range(3):
        binding.run()
    assert np.array_equal(read(surfaces["o00_y"]), 2 * np.arange(128))
    assert binding._lib.runs == fake.counts().evaluates == 4
    assert FLOOR_NS == 50_000 and binding._program.trusted_ns == 10_000


def test_a_yes_that_did_nothing_is_a_no(fake_ane):
    fake = fake_ane()
    binding, surfaces = bound(backend_of(fake), doubled())
    binding.run()
    binding._lib = Hasty(binding._lib, 20_000, skip=(0, 1))
    with pytest.raises(EngineError, match="after 20 us again, but left 128 of 128 elements of port 'o00_y' unwritten"):
        binding.run()
    binding._lib = Hasty(binding._lib.lib, 20_000, skip=(0,))  # the second time it works: so it did
    fill(surfaces["i00_a"], np.arange(128) + 5)
    binding.run()
    assert np.array_equal(read(surfaces["o00_y"]), 2 * (np.arange(128) + 5))


# ---- a step


def cpu():
    return CpuBackend(precision="fp32", capabilities=ROOMY)


def network_on(backend, model, layout="ports", engine=None) -> Network:
    rt = Runtime("cpu", "fp32", layout, threads=1)
    rt.backend, rt.engine = backend, engine
    store = ParamStore(rt.heap, rt.pool, model.specs(), True)
    store.initialise(3)
    net = Network(rt, model, store, model.config.seq_len, 2, True)
    store.sync()
    return net


@pytest.mark.parametrize("layout", ["ports", "packed"])
def test_random_delays_change_no_bit_on_the_engine(fake_ane, stories, layout):
    import random
    from concurrent.futures import ThreadPoolExecutor

    fake = fake_ane(seal=1)
    model = model_of(stories, seq_len=32, n_layers=3)
    serial = gradients(network_on(cpu(), model, layout))
    with ThreadPoolExecutor(1) as engine:
        net = network_on(backend_of(fake), model, layout, engine)
        tasks = net._training.tasks
        for seed in range(6):
            rng, slow = random.Random(seed), (None, ENGINE, HOST)[seed % 3]
            some = [delayed(t, rng, 0.004) if slow in (None, t.lane) else t for t in tasks]
            assert equal(step_of(net, some, engine), serial), seed
        net.ms.clear()
        gradients(net)
        assert {"forward", "backward", "weight_grads", "head", "overlapped"} <= set(net.ms)
    assert fake.counts().refused == 0


def test_head_and_amax_and_blame_lock_what_they_read(fake_ane, stories):
    fake = fake_ane(seal=1)
    net = network_on(backend_of(fake), model_of(stories, seq_len=32))
    want = network_on(cpu(), model_of(stories, seq_len=32))
    tokens, targets = batch_of(net)
    assert net.loss(tokens, targets) == want.loss(tokens, targets) and net.amax() == want.amax()
    columns = np.array([0, 31], np.int32)
    assert np.array_equal(
        net.head.logits(net.forward(tokens), columns), want.head.logits(want.forward(tokens), columns)
    )
    net.store["layers.1.w3"].master[...] = net.store["layers.1.w1"].master[...] = 3e4
    net.store.sync()
    net.loss(tokens, targets)
    assert "layer 1, block ffn" in net.name_nonfinite()


def test_decoding_has_the_logits_of_backend_cpu(fake_ane, stories):
    fake = fake_ane(seal=1)
    model = model_of(stories, seq_len=64)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 40)

    def logits(backend):
        rt = Runtime("cpu", "fp32", threads=1)
        rt.backend = backend
        store = ParamStore(rt.heap, rt.pool, model.specs(), False)
        store.initialise(3)
        session = Session(rt, model, store)
        store.sync()
        rows = [session.extend(ids), session.extend(ids[:1])]
        session.rewind(35)
        return [*rows, session.extend(ids[35:])]

    want = logits(cpu())
    assert all(np.array_equal(a, b) for a, b in zip(logits(backend_of(fake)), want, strict=True))
    assert np.array_equal(want[0], want[2])
    with pytest.raises(UnsupportedError, match="int8"):
        rt = Runtime("cpu", "fp32", threads=1)
        rt.backend = backend_of(fake)
        Session(rt, model, ParamStore(rt.heap, rt.pool, model.specs(), False), weights="int8")


# ---- which backend


def child_env(**more) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "tests" / "fake_site"), str(ROOT)])
    env = {k: v for k, v in os.environ.items() if not k.startswith("ANERT")}
    return {**env, "PYTHONPATH": path, "ANERT_CAPABILITIES": "/nonexistent", "ANERT_NUM_THREADS": "1", **more}


def in_child(code: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=child_env(**more), capture_output=True, text=True, cwd=ROOT)


SAY = """from anert.runtime import Runtime
rt = Runtime({!r})
print(rt.backend.name, rt.engine is not None, rt.backend.capabilities.opset)
print(rt.note)
"""


def test_the_engine_is_chosen_where_it_passes_the_basic_probe():
    done = in_child(SAY.format("auto"), ANERT_FAKE_PROFILE="m4")
    name, note = done.stdout.splitlines()
    assert name == "ane True ios18" and note.startswith("backend ane (auto: passes the basic probe); precision")
    assert "on the host, fp16 on the engine; 1 threads, " in note
    done = in_child(SAY.format("ane"), ANERT_FAKE_PROFILE="m1")  # canonical dialect alone
    assert done.stdout.splitlines()[0] == "ane True ios16"


def test_an_engine_that_is_not_as_known_is_not_chosen_and_asking_for_it_is_an_error():
    broken = {"ANERT_FAKE_PROFILE": "m4", "ANERT_FAKE_MISSING": "_ANERequest"}
    done = in_child(SAY.format("auto"), **broken)
    name, note = done.stdout.splitlines()
    assert name == "cpu False ios18" and "backend cpu (auto: the Neural Engine does not pass the basic probe" in note
    assert "has no class _ANERequest" in note
    command = [sys.executable, "-m", "anert", "run", "plugins/stories.py", "--backend", "ane", "--json"]
    done = subprocess.run(command, env=child_env(**broken), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["exit_code"] == 3 and "has no class _ANERequest" in answer["error"]


def test_off_a_mac_there_is_no_engine():
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    command = [sys.executable, "-m", "anert", "run", "plugins/stories.py", "--backend", "ane"]
    done = subprocess.run(command, env=child_env(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3
    assert done.stderr.strip() == "anert: the Neural Engine needs macOS on Apple silicon, this is linux"


def test_a_record_of_doctors_says_what_the_engine_takes(fake_ane, monkeypatch, tmp_path):
    fake = fake_ane()
    monkeypatch.setenv("ANERT_ANE_FRAMEWORK", fake.path)
    monkeypatch.setenv("ANERT_CAPABILITIES", str(tmp_path / "capabilities.json"))
    assert AneBackend().capabilities == ANE  # safe, without a record
    capabilities.write_record(replace(ANE, layout="ports", width_multiple=16, compile_budget=90), {})
    rt = Runtime("ane", "fp32", threads=1)
    assert rt.backend.capabilities.width_multiple == 16 and rt.layout == "ports" and rt.backend.budget == 90
    assert rt.engine is not None and rt.peak_gflops() == 0.0
    rt.close()
    assert Runtime("ane", compile_budget=50).backend.budget == 50


def test_another_framework_needs_a_test_build(fake_ane, tmp_path):
    fake_ane()
    with pytest.raises(BackendUnavailable, match="does not open"):
        AneBackend(ANE, framework=str(tmp_path / "nothing.so"))


def test_what_is_printed_in_the_canonical_dialect_is_the_same_program():
    from anert.backend.ane import canonical

    fn = Function("main")
    x = fn.input("i00_a", (1, 4, 1, 32))
    weights = fn.const(np.arange(128).reshape(1, 4, 1, 32), "fp16", "weights")
    y = ops.add(ops.mul(x, 2.0), weights)
    fn.claim("o00_y", y)
    text, blobs = canonical(parse(print_module(fn.returns(y))))
    assert text.startswith("program(1.0)") and "main<ios16>" in text and len(blobs) == 1
    again = parse(text, blobs=blobs).main
    assert [v.name for v in (*again.inputs, *again.outputs)] == ["i00_a", "o00_y"] and fn.opset == "ios18"


@pytest.mark.parametrize("over", [{}, {"n_kv_heads": 1}, {"n_kv_heads": 4}], ids=["gqa", "mqa", "mha"])
def test_both_layouts_of_the_engines_wire_form_agree_on_the_cpu(stories, over):
    model = model_of(stories, seq_len=32, **over)
    assert equal(*(gradients(network_on(cpu(), model, layout)) for layout in ("ports", "packed")))
