"""The native core built with ASan + UBSan and with TSan runs its own tests, and corrupted plans, in child processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1",
    "thread": "-fsanitize=thread -fno-omit-frame-pointer -g -O1",
}
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
ADDRESS_TESTS = ("test_surface.py", "test_fp16.py", "test_optim.py", "test_cpu.py", "test_misuse.py")
THREAD_TESTS = ("test_surface.py", "test_network.py", "test_misuse.py")
SUPPRESSED = "race:libtorch\nrace:libgomp\n"
"""PyTorch, the oracle in some of the tests, is not built for TSan."""


class Sanitized:
    """A sanitized build of the native core; `run` runs Python on it and returns (exit code, output, reports)."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        compiler = shutil.which("gcc")
        assert compiler, "gcc is needed: apt install gcc"
        environment = {**os.environ, "CC": "gcc", "ANERT_CFLAGS": FLAGS[kind]}
        command = [sys.executable, "build_ffi.py", "--out", str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
                 for name in LIBRARIES[kind]]  # fmt: skip
        self.preload = " ".join(found)

    def run(self, *argv: str) -> tuple[int, str, str]:
        logs, quiet = self.folder / "report", self.folder / "suppressions"
        quiet.write_text(SUPPRESSED)
        # LeakSanitizer is off: CPython keeps memory to its end. log_path, because pytest holds the streams.
        environment = {
            **os.environ,
            "LD_PRELOAD": self.preload,
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={logs}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={logs}",
            "TSAN_OPTIONS": f"suppressions={quiet}:log_path={logs}",
            "PYTHONMALLOC": "malloc",
            "ANERT_NATIVE": str(self.folder / "_native.abi3.so"),
            "PYTHONPATH": str(ROOT),
        }
        # TSan's shadow memory wants the addresses that randomisation moves.
        prefix = ["setarch", "-R"] if self.kind == "thread" else []
        command = [*prefix, sys.executable, *argv]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        reports = "\n".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("report.*")))
        return done.returncode, done.stdout + done.stderr, reports

    def check(self, *argv: str) -> str:
        code, output, reports = self.run(*argv)
        assert code == 0 and not reports, f"exit code {code}\n{reports[:6000]}\n{output[-3000:]}"
        return output


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized("address", tmp_path_factory.mktemp("asan"))


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized("thread", tmp_path_factory.mktemp("tsan"))


def pytest_command(files: tuple[str, ...]) -> list[str]:
    return ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *(f"tests/{f}" for f in files)]


def test_a_bad_access_is_reported(address: Sanitized) -> None:
    """The lane can fail: fp16 conversion told of a hundred times what there is."""
    code = "from anert import ffi\nc = ffi.load()\na, b = c.ffi.new('float[]', 100), c.ffi.new('uint16_t[]', 100)\n"
    code += "c.lib.anert_f32_to_f16(c.ffi.NULL, a, b, 10_000, 0, c.ffi.NULL, c.ffi.NULL)\n"
    exit_code, _, reports = address.run("-c", code)
    for path in address.folder.glob("report.*"):
        path.unlink()
    assert exit_code != 0 and "ERROR: AddressSanitizer: " in reports


def test_native_tests_under_address_and_undefined(address: Sanitized) -> None:
    assert " passed" in address.check(*pytest_command(ADDRESS_TESTS))


def test_native_tests_under_thread(thread: Sanitized) -> None:
    assert " passed" in thread.check(*pytest_command(THREAD_TESTS))


def test_corrupted_plans_never_leave_their_buffers(address: Sanitized) -> None:
    output = address.check("tests/plan_mutants.py", os.environ.get("ANERT_MUTANTS", "3000"), "7")
    counts = json.loads(output.splitlines()[-1])
    assert counts["refused"] > 1000 and counts["ran"] > 300 and "WROTE A READ-ONLY BUFFER" not in counts, counts
