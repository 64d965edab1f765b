"""The door to C: what loads, how a status becomes an exception, how many threads are granted; and the build itself."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from cffi import FFI
from native_build import NATIVE, compiler

import build_ffi
from anert import errors
from anert import ffi as native

ROOT = NATIVE.parent


def python(program, **environment):
    """Standard output of a fresh interpreter that runs `program` in the repository."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_nothing():
    program = """
import sys, anert.ffi
print([name for name in ("numpy", "cffi", "_cffi_backend", "anert._native") if name in sys.modules])
"""
    assert python(program) == "[]"


def test_accessors():
    from anert.ffi import ffi, lib

    assert lib is native.load().lib
    assert ffi is native.load().ffi
    with pytest.raises(AttributeError, match="no attribute 'libb'"):
        native.libb  # noqa: B018


def test_another_build_is_one_switch(tmp_path):
    shutil.copy(native.load().__file__, tmp_path / "other.abi3.so")
    program = "from anert import ffi; print(ffi.load().__file__, ffi.Pool(1).threads)"
    assert python(program, ANERT_NATIVE=str(tmp_path / "other.abi3.so")) == f"{tmp_path / 'other.abi3.so'} 1"


@pytest.mark.parametrize("content", [None, b"", b"no ELF"])
def test_a_build_that_does_not_load(tmp_path, content):
    path = tmp_path / "other.so"
    if content is not None:
        path.write_bytes(content)
    program = """
from anert import ffi, errors
try:
    ffi.Pool(1)
except errors.BackendUnavailable as error:
    print(error)
"""
    message = python(program, ANERT_NATIVE=str(path))
    assert str(path) in message
    assert "python build_ffi.py" in message
    assert "\n" not in message


@pytest.mark.parametrize("declared", ["", "enum { ANERT_INTERFACE = 7 };"], ids=["older", "another"])
def test_a_core_of_another_version_is_said_so(tmp_path, declared):
    """It loads well, and lacks what this anert would call."""
    builder = FFI()
    builder.cdef(declared + "int anert_pool_threads(void);")
    builder.set_source("_native", declared + "static int anert_pool_threads(void) { return 1; }")
    core = builder.compile(str(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ANERT_NATIVE": core}
    command = [sys.executable, "-m", "anert", "bench", "dispatch"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 3, done.stderr
    assert f"the native core {core} (ANERT_NATIVE) does not load (it was built for another version" in done.stderr
    assert done.stderr.count("\n") == 1 and "python build_ffi.py" in done.stderr


def test_both_sides_number_the_headers_alike():
    for header in ("anert.h", "ane.h"):
        assert native._interface(header) == build_ffi.interface(NATIVE / header)
    assert build_ffi.interface() == native.load().lib.ANERT_INTERFACE


def test_an_installation_has_no_headers(tmp_path):
    """The number of its core is then what it is."""
    shutil.copytree(ROOT / "anert", tmp_path / "anert", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from anert import ffi; print(ffi._interface('anert.h'), ffi.Pool(1).threads)"
    assert python(program, PYTHONPATH=str(tmp_path)) == "None 1"


def test_absent_extension(tmp_path):
    shutil.copytree(ROOT / "anert", tmp_path / "anert", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
from anert import ffi, errors
try:
    ffi.load()
except errors.BackendUnavailable as error:
    print(error)
"""
    message = python(program, PYTHONPATH=str(tmp_path))
    assert message.startswith("the native core anert._native does not load")
    assert "python build_ffi.py" in message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (-1, errors.InputError),
        (-2, errors.NativeError),
        (-3, errors.StateError),
        (-4, errors.UnsupportedError),
        (-5, errors.NativeError),
        (-6, errors.EngineError),
        (-7, errors.BackendUnavailable),
        (-77, errors.NativeError),
    ],
)
def test_status_becomes_exception(status, kind):
    def function(argument, err):
        err.status = status
        err.message = b"expected 3, got %d" % argument
        return status

    with pytest.raises(errors.AnertError, match=r"^expected 3, got 4$") as raised:
        native.call(function, 4)
    assert type(raised.value) is kind


def test_a_caller_owned_error_is_reused():
    mine, seen = native.error(), []

    def function(err):
        seen.append(err)
        return 0

    native.call(function, err=mine)
    native.call(function)
    assert seen[0] is mine
    assert seen[1] is not mine


def test_long_messages_are_cut():
    """508 bytes with the terminator; the tail of a multi-byte character is no second error."""
    with pytest.raises(errors.InputError) as raised:
        native.call(native.lib.anert_pool_new, -(2**31), -1, native.ffi.new("anert_pool **"))
    assert str(raised.value) == "a pool takes 1 to 1024 threads, not -2147483648"


def test_threads_from_the_environment(monkeypatch):
    monkeypatch.setenv("ANERT_NUM_THREADS", "3")
    assert native.threads_granted() == 3
    assert native.Pool().threads == 3
    for bad in ("0", "-1", "two", "1.5", "٣", " 2"):
        monkeypatch.setenv("ANERT_NUM_THREADS", bad)
        with pytest.raises(errors.InputError, match="positive integer"):
            native.threads_granted()
    monkeypatch.setenv("ANERT_NUM_THREADS", "")
    assert native.threads_granted() >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
def test_threads_follow_affinity():
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from anert.ffi import threads_granted
print(threads_granted())
"""
    assert python(program, ANERT_NUM_THREADS="") == "1"


V2 = "0::/user.slice/run-1.scope\n"
V1 = "11:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "granted"),
    [
        (V2, {"user.slice/run-1.scope/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"user.slice/run-1.scope/cpu.max": "max 100000\n", "user.slice/cpu.max": "400000 100000\n"}, 4),
        (V2, {"cpu.max": "50000 100000\n", "user.slice/cpu.max": "400000 100000\n"}, 0.5),
        (V2, {"user.slice/cpu.max": "nonsense\n"}, float("inf")),
        (V2, {}, float("inf")),
        (V1, {"cpu/docker/x/cpu.cfs_quota_us": "250000\n", "cpu/docker/x/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/docker/x/cpu.cfs_quota_us": "-1\n", "cpu/docker/x/cpu.cfs_period_us": "100000\n"}, float("inf")),
        # in a container, the mount shows our group as its root
        (V1, {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_cgroup_quotas(tmp_path, membership, files, granted):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert native._cgroup_cpus(tmp_path, membership) == granted


def test_the_header_is_the_declaration():
    """Every function of anert.h is in the extension: nothing is declared and missing, or there and undeclared."""
    import re

    declared = set(re.findall(r"\b(anert_\w+)\(", build_ffi.cdef()))
    assert declared == {name for name in dir(native.lib) if name.startswith("anert_")}
    assert "#" not in build_ffi.cdef()
    assert "/*" not in build_ffi.cdef()


def test_the_shim_is_not_here():
    """Off a Mac anert._ane is not built, and a build that is named must load."""
    program = """
from anert import ffi, errors
try:
    ffi.load_ane()
except errors.BackendUnavailable as error:
    print(error.exit_code, error)
"""
    message = python(program, ANERT_ANE="/nowhere/_ane.so")
    assert message.startswith("3 the Neural Engine's shim /nowhere/_ane.so (ANERT_ANE) does not load")
    assert "--backend cpu" in message
    assert "\n" not in message


def checkout(tmp_path):
    """A copy of what a build needs."""
    for name in ("native", "anert"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "build_ffi.py", tmp_path)
    return tmp_path


def build(root, *arguments, **environment):
    env = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(
        [sys.executable, "build_ffi.py", *arguments], cwd=root, capture_output=True, text=True, env=env, timeout=300
    )


def test_no_compiler_is_one_sentence(tmp_path):
    done = build(checkout(tmp_path), CC="no-such-cc")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for words in ("'no-such-cc' was not found", "apt install gcc", "dnf install gcc", "xcode-select --install"):
        assert words in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_in_place_build_recompiles_what_changed(tmp_path):
    compiler()
    root = checkout(tmp_path)
    flags = {"ANERT_CFLAGS": "-O0"}
    done = build(root, "--werror", **flags)
    assert done.returncode == 0, done.stderr
    built = list((root / "anert").glob("_native*"))
    assert [path.name for path in built] == ["_native.abi3.so"], "the extension alone, no generated C"

    def objects():
        return {path.name: path.stat().st_mtime_ns for path in (root / "build").rglob("*.o")}

    first = objects()
    assert build(root, "--werror", **flags).returncode == 0
    assert objects() == first, "nothing changed, nothing is compiled"
    (root / "native" / "error.c").touch()
    assert build(root, "--werror", **flags).returncode == 0
    assert [name for name, at in objects().items() if at != first[name]] == ["error.o"]
    (root / "native" / "error.c").write_text("#error broken\n")
    later = time.time() + 2  # older versions of setuptools compare whole seconds
    os.utime(root / "native" / "error.c", (later, later))
    done = build(root, **flags)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "the native core did not build" in done.stderr
