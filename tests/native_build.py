"""Compiles small shared objects from native/ for tests, among them instruction sets that this CPU lacks, through
SIMDe."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI

NATIVE = Path(__file__).resolve().parents[1] / "native"
FLAGS = ("-O1", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
PROGRAM_FLAGS = ["-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", f"-I{NATIVE}"]
SIMDE = Path("/usr/include/simde")
SHIMS = Path(__file__).resolve().parent / "simde"  # immintrin.h and arm_neon.h on top of SIMDe


def compile_native(
    folder: Path, code: str, sources: tuple[str, ...] = (), defines: tuple[str, ...] = ()
) -> ctypes.CDLL:
    """A shared object of `code` and files of native/, loaded; skips without a C compiler.

    With `VEC_EMULATED` among the defines, immintrin.h and arm_neon.h are SIMDe's (tests/simde); skips where it is
    absent.
    """
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C compiler {compiler[0]}")
    include: list[str] = []
    if "VEC_EMULATED" in defines:
        if not SIMDE.is_dir():
            pytest.skip(f"no SIMDe headers in {SIMDE}: apt install libsimde-dev")
        include = ["-I", str(SHIMS)]
    source, target = folder / "test.c", folder / "test.so"
    source.write_text(code)
    files = [str(source), *(str(NATIVE / name) for name in sources)]
    command = [*compiler, *FLAGS, *include, "-I", str(NATIVE), *(f"-D{d}" for d in defines), *files, "-o", str(target)]
    built = subprocess.run([*command, "-lm", "-pthread"], capture_output=True, text=True)
    assert built.returncode == 0, f"{' '.join(command)}\n{built.stderr[:4000]}"
    return ctypes.CDLL(str(target))


def compiler(name: str = "") -> list[str]:
    """The C compiler's command; skips where there is none."""
    command = shlex.split(name or os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"no compiler {command[0]}")
    return command


def compile_c(out: Path, sources: list[str | Path], *flags: str, cc: str = "") -> Path:
    """`out` built of native sources (by name) and others (by path)."""
    paths = [str(NATIVE / source) if isinstance(source, str) else str(source) for source in sources]
    command = [*compiler(cc), *flags, *PROGRAM_FLAGS, *paths, "-o", str(out), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return out


def load_c(tmp: Path, cdef: str, sources: list[str | Path], *flags: str) -> tuple[FFI, Any]:
    """(ffi, lib) of a shared object with the declarations of anert.h and `cdef`."""
    import build_ffi

    ffi = FFI()
    ffi.cdef(build_ffi.cdef())
    ffi.cdef(cdef)
    return ffi, ffi.dlopen(str(compile_c(tmp / "probe.so", sources, "-O2", "-shared", "-fPIC", *flags)))
