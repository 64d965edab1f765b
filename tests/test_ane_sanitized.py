"""The shim and the stand-in built with ASan + UBSan run the shim's tests in a child process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from fake_ane import ROOT, SANITIZE, build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TESTS = ("test_ane_shim.py", "test_ane_open.py", "test_fake_apple.py")
FORKS = "not release and not guard and not sealed and not objective_c"
"""Left out: compilers and deliberate crashes, which the sanitizer would have a word with."""


def sanitized(folder, *command: str) -> tuple[int, str, str]:
    """(exit code, output, the sanitizers' reports) of Python on the sanitized builds."""
    build(SANITIZE)
    name = ["clang", "-print-file-name=libclang_rt.asan-x86_64.so"]
    runtime = subprocess.run(name, check=True, capture_output=True, text=True).stdout.strip()
    logs = folder / "report"
    # LeakSanitizer is off: CPython keeps memory to its end, and the stand-in keeps its dead on purpose; it counts the
    # living itself. log_path, because pytest holds the streams.
    env = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={logs}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={logs}",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "ANERT_FAKE_FLAGS": shlex.join(SANITIZE),
    }
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    reports = "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("report.*")))
    return done.returncode, done.stdout + done.stderr, reports


def test_the_shims_tests_under_address_and_undefined(tmp_path):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", FORKS]
    code, output, reports = sanitized(tmp_path, "-m", "pytest", *options, *(f"tests/{name}" for name in TESTS))
    assert code == 0 and not reports, f"exit code {code}\n{reports[:6000]}\n{output[-3000:]}"
    assert " passed" in output


def test_a_bad_access_is_reported(tmp_path):
    """The lane can fail: a surface that is used after its end."""
    code, output, reports = sanitized(tmp_path, "-c", USE_AFTER_FREE)
    assert code != 0
    assert "AddressSanitizer: heap-use-after-free" in reports, output
    assert "anert_ane_surface_size" in reports


USE_AFTER_FREE = """
from fake_ane import stand_in
from shim_run import Engine
with stand_in() as make:
    surface = Engine(make().path).surface(64)
    address = surface.engine.ffi.cast("anert_ane_surface *", surface.ptr)
    surface.engine.ffi.release(surface.ptr)
    surface.engine.lib.anert_ane_surface_size(address)
"""
