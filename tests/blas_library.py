"""A BLAS for tests: the one that ANERT_BLAS names, the platform's, or Debian's OpenBLAS."""

import os
import platform
import sys
from pathlib import Path

from anert import ffi

DEBIAN = Path("/usr/lib") / f"{platform.machine()}-linux-gnu"
CANDIDATES = (
    DEBIAN / "libopenblas.so.0",
    DEBIAN / "openblas-pthread" / "libopenblas.so.0",  # where packages were unpacked without their scripts
    Path("/usr/lib64/libopenblas.so.0"),
)


def library() -> str:
    """The path of a BLAS; empty where there is none, which CI does not accept."""
    if named := os.environ.get("ANERT_BLAS"):
        return named
    if sys.platform == "darwin":
        return ffi.ACCELERATE
    found = next((str(path) for path in CANDIDATES if path.exists()), "")
    if not found and os.environ.get("CI"):
        raise FileNotFoundError(f"no BLAS among {', '.join(map(str, CANDIDATES))}: apt install libopenblas0-pthread")
    return found


def open_library() -> str:
    """Open it for this process: `blas` is then one of `ffi.isas()`."""
    path = library()
    return ffi.open_blas(path) if path else ""
