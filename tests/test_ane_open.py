"""The shim's surfaces, and what it opens: frameworks that are missing, or not as it knows them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_ane import ROOT, run
from shim_run import Engine, inspect

import build_ffi
from anert.errors import BackendUnavailable, InputError, NativeError, StateError

# ---- Surfaces ----


@pytest.mark.parametrize("nbytes", [1, 2, 63, 64, 100, 4096, 16384, 49152, 1 << 20])
def test_a_surface_is_zeroed_and_ends_where_it_ends(fake_ane, nbytes):
    """New memory of the stand-in is NaN, and the byte behind it cannot be touched."""
    engine = Engine(fake_ane().path)
    surface = engine.surface(nbytes)
    assert surface.nbytes == nbytes
    with surface.locked():
        memory = surface.array(np.uint8)
        assert not memory.any()
        memory[...] = 0xFF
    with surface.locked(read_only=True):
        assert (surface.array(np.uint8) == 0xFF).all()


def test_locks_follow_the_rules_of_a_surface(fake_ane):
    """As tests/test_surface.py has them for the core's own surfaces."""
    fake = fake_ane()
    surface = Engine(fake.path).surface(256)
    before = fake.counts().locks
    with surface.locked(read_only=True), surface.locked(read_only=True):
        with pytest.raises(StateError, match="locked by readers"):
            surface.lock()
        with pytest.raises(StateError, match="not locked for writing"):
            surface.unlock()
    assert surface.seed == 0
    with surface.locked():
        for read_only in (False, True):
            with pytest.raises(StateError, match="locked by a writer"):
                surface.lock(read_only)
        with pytest.raises(StateError, match="not locked for reading"):
            surface.unlock(read_only=True)
        assert surface.seed == 0
    assert surface.seed == 1
    with pytest.raises(StateError, match="not locked for reading"):
        surface.unlock(read_only=True)
    counts = fake.counts()
    assert (counts.locks - before, counts.unlocks - before) == (3, 3), "IOSurface saw what was granted, and no more"


def test_a_lock_that_iosurface_refuses(fake_ane):
    fake = fake_ane()
    surface = Engine(fake.path).surface(256)
    for read_only in (False, True):
        fake.set(lock_failures=1)
        with pytest.raises(NativeError, match="IOSurfaceLock answers -536870174"):
            surface.lock(read_only)
        with pytest.raises(StateError, match="not locked"):
            surface.unlock(read_only)
    with surface.locked():
        pass


def test_an_unlock_that_iosurface_refuses(fake_ane):
    fake = fake_ane()
    surface = Engine(fake.path).surface(256)
    surface.lock()
    fake.set(unlock_failures=1)
    with pytest.raises(NativeError, match="IOSurfaceUnlock answers -536870174"):
        surface.unlock()
    del surface
    gc.collect()
    fake.forgive("freed while it is locked")  # what else could be done


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"create_failures": 1}, "IOSurfaceCreate gives no surface of 4096 bytes"),
        ({"short_surface": 1}, "gives 2048 bytes where 4096 were asked for"),
        ({"lock_failures": 1}, "IOSurfaceLock of a new surface answers"),
        ({"unlock_failures": 1}, "IOSurfaceUnlock answers"),
    ],
)
def test_a_surface_that_cannot_be_had(fake_ane, options, words):
    fake = fake_ane(**options)
    engine = Engine(fake.path)
    with pytest.raises(NativeError, match=words):
        engine.surface(4096)
    if "unlock_failures" in options:
        fake.forgive("freed while it is locked")  # what else could be done
    with pytest.raises(InputError, match="at least 1 byte"):
        engine.surface(0)


# ---- Opening ----

MODEL, DESCRIPTOR = "_ANEInMemoryModel", "_ANEInMemoryModelDescriptor"


def test_every_selector_is_as_expected(fake_ane):
    rows = inspect(fake_ane().path)
    assert len(rows) == 9
    assert all(row["ok"] and row["found"] == row["expected"] for row in rows)
    found = {(row["class"], row["selector"].partition(":")[0]): row["found"].replace("C@:", "B@:") for row in rows}
    assert found == {
        (DESCRIPTOR, "+modelWithMILText"): "@@:@@@",
        (MODEL, "+inMemoryModelWithDescriptor"): "@@:@",
        (MODEL, "-hexStringIdentifier"): "@@:",
        (MODEL, "-compileWithQoS"): "B@:I@^@",
        (MODEL, "-loadWithQoS"): "B@:I@^@",
        (MODEL, "-evaluateWithQoS"): "B@:I@@^@",
        (MODEL, "-unloadWithQoS"): "B@:I^@",
        ("_ANEIOSurfaceObject", "+objectWithIOSurface"): "@@:^{__IOSurface}",
        ("_ANERequest", "+requestWithInputs"): "@@:@@@@@@@",
    }


REQUEST = "_ANERequest requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:procedureIndex:"
SHORT = "_ANERequest requestWithInputs:inputIndices:outputs:outputIndices:procedureIndex:"
SURFACE, TEXT = "_ANEIOSurfaceObject objectWithIOSurface:", f"{DESCRIPTOR} modelWithMILText:weights:optionsPlist:"


def opened_as(fake, variants: list[tuple[str, str]]) -> list[list]:
    """[exception, message, selectors that are not as expected] for each (missing, changed): tests/ane_variants.py."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests" / "ane_variants.py"), fake.path]
    done = subprocess.run(command, input=json.dumps(variants), capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_other_versions_of_the_framework(fake_ane):
    """A class or selector that is missing, or a type that has changed, is a sentence before anything is sent."""
    fake = fake_ane()
    rows = [row for row in inspect(fake.path) if row["class"] != "_ANERequest"]
    classes = sorted({row["class"] for row in rows} | {"_ANERequest"})
    names = [f"{row['class']} {row['selector'][1:]}" for row in rows]
    variants = [*((c, "") for c in classes), *((n, "") for n in names), *(("", n) for n in names)]
    answers = opened_as(fake, variants)
    assert {kind for kind, _, _ in answers} == {"BackendUnavailable"}
    for name in classes:
        _, message, odd = answers.pop(0)
        assert message == f"AppleNeuralEngine.framework has no class {name}"
        assert {row["class"] for row in odd} == {name}
    for row in rows:
        _, message, odd = answers.pop(0)
        assert message == f"{row['class']} does not answer {row['selector']}"
        assert odd == [{**row, "found": "", "ok": False}]
    for row in rows:
        _, message, odd = answers.pop(0)
        call = f"{row['selector'][0]}[{row['class']} {row['selector'][1:]}]"
        assert message == f"{call} has type encoding v@:, this build sends {row['expected']}"
        assert odd == [{**row, "found": "v@:", "ok": False}]
    assert not answers


def test_the_shorter_request_does_too(fake_ane):
    variants = [(REQUEST, ""), ("", REQUEST), ("", SHORT), (f"{SHORT}|{REQUEST}", ""), (REQUEST, SHORT)]
    answers = opened_as(fake_ane(), variants)
    assert [answer[:2] for answer in answers[:3]] == [["", ""]] * 3
    assert [[row["found"] for row in odd] for _, _, odd in answers[:3]] == [[""], ["v@:"], []]
    words = ["BackendUnavailable", "_ANERequest does not answer +" + REQUEST.partition(" ")[2]]
    assert [answer[:2] for answer in answers[3:]] == [words, words]


def test_types_that_differ_in_spelling_alone(fake_ane):
    """Offsets, qualifiers, class names and the members of structs do not count, and an IOSurface is an object."""
    spelt = [
        f'{TEXT}=@"{DESCRIPTOR}"40@0:8@"NSData"16n@24r@32',
        f"{SURFACE}=@24@0:8^{{__IOSurface=iI@}}16",
        f"{SURFACE}=@24@0:8@16",
        f"{SURFACE}=@20@0:8I16",
    ]
    answers = opened_as(fake_ane(), [("", ""), *(("", s) for s in spelt)])
    assert answers[:4] == [["", "", []]] * 4
    sends = "[_ANEIOSurfaceObject objectWithIOSurface:] has type encoding @@:I, this build sends @@:^{__IOSurface}"
    assert answers[4][:2] == ["BackendUnavailable", "+" + sends]


def test_a_framework_that_is_not_there(fake_ane):
    fake = fake_ane()
    for paths in [(None, None), ("/nowhere/libane.so", fake.path), ("/nowhere/libane.so", None)]:
        with pytest.raises(BackendUnavailable, match=r"^AppleNeuralEngine.framework does not open: .*No such file"):
            Engine(*paths)
    with pytest.raises(BackendUnavailable, match=r"^IOSurface does not open: .*No such file"):
        Engine(fake.path, "/nowhere/libsurface.so")
    with pytest.raises(BackendUnavailable, match=r"^IOSurface has no symbol IOSurfaceCreate$"):
        Engine(fake.path, "libm.so.6")
    Engine(fake.path)  # a failure is not remembered


def test_a_release_build_opens_the_systems_framework_alone(fake_ane, tmp_path):
    fake = fake_ane()
    path = build_shim(tmp_path, testing=False)
    program = """
import sys
from shim_run import Engine, inspect
from anert.errors import AnertError
for open in (lambda: Engine(sys.argv[1]), lambda: Engine(None, sys.argv[1]), lambda: inspect(sys.argv[1])):
    try:
        open()
    except AnertError as error:
        print(type(error).__name__, error)
"""
    env = {**os.environ, "ANERT_ANE": str(path), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", program, fake.path], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"UnsupportedError only a test build opens another framework: {fake.path}",
        f"UnsupportedError only a test build opens another IOSurface: {fake.path}",
        f"UnsupportedError only a test build opens another framework: {fake.path}",
    ]


def build_shim(folder: Path, testing: bool) -> Path:
    """The shim by build_ffi's own Extension, as macOS builds it, on this platform's Objective-C."""
    program = f"""
import os, sys
import build_ffi
from pathlib import Path
os.chdir(build_ffi.ROOT)
real = build_ffi.ane_extension
build_ffi.ane_extension = lambda folder, testing: real(folder, {testing})
build_ffi.build({str(folder)!r}, werror=True, ane_testing=True)
"""
    run([sys.executable, "-c", program], env={**os.environ, "CC": "clang", "PYTHONPATH": str(ROOT)})
    return folder / "_ane.abi3.so"


def test_what_a_mac_links(monkeypatch, tmp_path):
    """Foundation and the runtime: IOSurface and the private framework are opened by name."""
    monkeypatch.setattr(sys, "platform", "darwin")
    extension = build_ffi.ane_extension(tmp_path, testing=False)
    assert extension.extra_link_args == ["-framework", "Foundation", "-lobjc"]
    assert not [flag for flag in extension.extra_compile_args if "TESTING" in flag or "GNUSTEP" in flag.upper()]
    assert {Path(source).name for source in extension.sources} == {"_ane.c", *build_ffi.ANE_SOURCES}
    command = build_ffi.BuildExt(build_ffi.Distribution({"name": "anert", "packages": ["anert"]}))
    monkeypatch.chdir(tmp_path)
    command.ensure_finalized()
    assert [e.name for e in command.extensions] == ["anert._native", "anert._ane"]


def test_a_test_build_has_no_place_in_the_package():
    command = [sys.executable, "build_ffi.py", "--ane-testing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--ane-testing needs --out" in done.stderr


def test_no_objective_c_is_one_sentence(tmp_path):
    """Without GNUstep or gcc the test build says what to install."""
    env = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "build_ffi.py", "--ane-testing", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == build_ffi.NO_GNUSTEP
