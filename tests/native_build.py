"""What tests of C internals share: small shared objects and programs made of the core's own sources."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI

NATIVE = Path(__file__).resolve().parents[1] / "native"
FLAGS = ["-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", f"-I{NATIVE}"]


def compiler(name: str = "") -> list[str]:
    """The C compiler's command; skips where there is none."""
    command = shlex.split(name or os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"no compiler {command[0]}")
    return command


def compile_c(out: Path, sources: list[str | Path], *flags: str, cc: str = "") -> Path:
    """`out` built of native sources (by name) and others (by path)."""
    paths = [str(NATIVE / source) if isinstance(source, str) else str(source) for source in sources]
    command = [*compiler(cc), *flags, *FLAGS, *paths, "-o", str(out), "-lm"]
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
