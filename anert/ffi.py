"""The door to C: loads anert._native on first use, and `call` turns a status into an exception.

Which build is loaded: the installed one, or the shared object that the environment variable ANERT_NATIVE names (a
sanitizer or cross build); ANERT_ANE does the same for anert._ane. Importing this module loads nothing.

    from anert import ffi
    pool = ffi.Pool()
    ffi.call(ffi.lib.anert_f16_to_f32, pool.ptr, src, dst, n)
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from anert.errors import (
    AnertError,
    BackendUnavailable,
    EngineError,
    InputError,
    NativeError,
    StateError,
    UnsupportedError,
)

# status.h: status -> class. ENOMEM and ESYSTEM are the machine's; anything unknown is too.
_ERRORS: dict[int, type[AnertError]] = {
    -1: InputError,
    -3: StateError,
    -4: UnsupportedError,
    -6: EngineError,
    -7: BackendUnavailable,
}
HEADERS = Path(__file__).resolve().parents[1] / "native"
ISAS = ("scalar", "avx2", "avx512", "avx512bf16", "neon", "amx", "blas")
"""Names of the instruction sets; the index is anert.h's number. `blas`: the CPU's best, with a BLAS for large GEMMs."""
ACCELERATE = "/System/Library/Frameworks/Accelerate.framework/Accelerate"
"""macOS' BLAS, which computes on the processor's matrix unit."""


def _interface(header: str) -> int | None:
    """The number that build_ffi gives to a build of this header; None where the headers do not lie beside the package,
    in an installation, whose parts came together."""
    try:
        both = b"".join((HEADERS / name).read_bytes() for name in (header, "status.h"))
    except OSError:
        return None
    import hashlib

    return int.from_bytes(hashlib.sha256(both).digest()[:4], "little") >> 1


def _module(name: str, variable: str, header: str, absent: str) -> ModuleType:
    """The installed extension `name`, or the shared object that the environment variable names.

    Raises BackendUnavailable, saying what `absent` says, if it is not there, does not load, or was built of another
    `header` than this anert calls.
    """
    path = os.environ.get(variable, "")
    try:
        from importlib.machinery import ExtensionFileLoader, PathFinder
        from importlib.util import module_from_spec, spec_from_file_location

        if path:
            spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))
        else:  # beside this file only: an editable install's finder would offer another checkout's
            spec = PathFinder.find_spec(name, [str(Path(__file__).parent)])
        if spec is None or spec.loader is None:
            raise ImportError(f"no extension module in {path or Path(__file__).parent}")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        built = getattr(module.lib, "ANERT_INTERFACE", None)
        if built is None or built != (_interface(header) or built):
            raise ImportError("it was built for another version of anert")
        sys.modules[name] = module
        return module
    except ImportError as error:
        where = f"{path} ({variable})" if path else name
        raise BackendUnavailable(absent.format(where=where, error=error)) from None


@functools.cache
def load() -> ModuleType:
    """The extension module anert._native, loaded once; ANERT_NATIVE is read at that moment.

    Raises BackendUnavailable if it is not there or does not load.
    """
    absent = "the native core {where} does not load ({error}): build it with `python build_ffi.py` in a checkout, "
    return _module("anert._native", "ANERT_NATIVE", "anert.h", absent + "or `pip install .`")


@functools.cache
def load_ane() -> ModuleType:
    """The shim to Apple's Neural Engine, anert._ane, loaded once; ANERT_ANE is read at that moment. No framework is
    opened.

    Its `ffi` is its own: pass `err=error(load_ane())` to `call`. Raises BackendUnavailable if it is not there or does
    not load.
    """
    absent = "the Neural Engine's shim {where} does not load ({error}): it is part of anert on macOS alone; use "
    return _module(
        "anert._ane", "ANERT_ANE", "ane.h", absent + "--backend cpu here, or build it with `python build_ffi.py`"
    )


def __getattr__(name: str) -> Any:
    """`anert.ffi.ffi` and `anert.ffi.lib`, loaded when first asked for."""
    if name in ("ffi", "lib"):
        return getattr(load(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def error(module: ModuleType | None = None) -> Any:
    """A new `anert_error *` for callers that call often: pass it to `call` as `err`, one per thread.

    module: whose functions it is for, `load()` unless given.
    """
    return (module or load()).ffi.new("anert_error *")


def call(function: Callable[..., int], *args: Any, err: Any = None) -> None:
    """Call a fallible C function with `args` and an anert_error, and raise what its status means.

    Raises InputError (EINVAL), StateError (ESTATE), UnsupportedError (EUNSUPPORTED), EngineError (EREFUSED),
    BackendUnavailable (EUNAVAILABLE) or NativeError (ENOMEM, ESYSTEM).
    The GIL is released meanwhile.
    """
    if err is None:
        err = error()
    status = function(*args, err)
    if status:
        message = load().ffi.string(err.message).decode(errors="replace")
        raise _ERRORS.get(status, NativeError)(message)


def _cgroup_cpus(root: Path, membership: str) -> float:
    """CPUs that the cgroup quotas along our path grant (v2 cpu.max, v1 cpu.cfs_quota_us); inf without a quota.

    `membership` is the text of /proc/self/cgroup, `root` the mount point /sys/fs/cgroup.
    """
    granted = math.inf
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / "cpu"
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            granted = min(granted, _quota(folder))
            if folder == base:
                break
    return granted


def _quota(folder: Path) -> float:
    """CPUs that one cgroup folder grants; inf where it says nothing."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def threads_granted() -> int:
    """Threads to compute with: ANERT_NUM_THREADS, else what affinity and the cgroup's CPU quota grant, rounded up.

    Raises InputError if ANERT_NUM_THREADS is no positive integer.
    """
    asked = os.environ.get("ANERT_NUM_THREADS", "")
    if asked:
        if not asked.isascii() or not asked.isdigit() or int(asked) == 0:
            raise InputError(f"ANERT_NUM_THREADS is {asked!r}, expected a positive integer: unset it or correct it")
        return int(asked)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota = _cgroup_cpus(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text())
    except (OSError, ValueError):
        quota = math.inf
    return max(1, cpus if quota == math.inf else min(cpus, math.ceil(quota)))


def open_blas(path: str = "") -> str:
    """Open the BLAS that instruction set `blas` multiplies with, and return its path: ANERT_BLAS unless given, else
    the one that is open, on macOS else Accelerate. It stays for the process.

    Raises BackendUnavailable where none is named, or it does not open or has no cblas_sgemm of 32-bit integers;
    StateError if another one is open.
    """
    path = path or os.environ.get("ANERT_BLAS") or _blas_path() or (ACCELERATE if sys.platform == "darwin" else "")
    if not path:
        raise BackendUnavailable(
            "instruction set 'blas' multiplies with a BLAS library: name one, as ANERT_BLAS=/usr/lib/libopenblas.so.0"
        )
    native = load()
    call(native.lib.anert_blas_open, native.ffi.new("char[]", os.fsencode(path)))
    return path


def _blas_path() -> str:
    """Of the BLAS that is open; empty if none is."""
    native = load()
    path = native.lib.anert_blas_path()
    return os.fsdecode(native.ffi.string(path)) if path else ""


def _chosen(isa: str) -> tuple[str, str]:
    """(instruction set, path of its BLAS) of a pool that asks for `isa`; `auto` is the CPU's own best."""
    isa = os.environ.get("ANERT_ISA") or "auto" if isa == "auto" else isa
    if isa != "auto" and isa not in ISAS:
        raise InputError(f"no instruction set is called {isa!r}: auto, {', '.join(ISAS)}")
    if isa == "blas" or (isa == "auto" and os.environ.get("ANERT_BLAS")):
        return "blas", open_blas()
    if isa == "auto" and sys.platform == "darwin":
        with contextlib.suppress(BackendUnavailable):  # a system without it: NEON
            return "blas", open_blas()
    return isa, ""


class Pool:
    """The threads and the instruction set that native calls compute with; freed with its last reference.

    threads: counts the caller; 0 takes `threads_granted()`. isa: a name of ISAS, or `auto`: the one that ANERT_ISA
    names, else `blas` where ANERT_BLAS names a library and on macOS, else the best of this CPU. blas: the path of its
    library, or empty.
    A forked child computes on its calling thread alone. Raises InputError or UnsupportedError for what it cannot be,
    BackendUnavailable for a BLAS that does not open.
    """

    __slots__ = ("blas", "isa", "ptr", "threads")

    def __init__(self, threads: int = 0, isa: str = "auto") -> None:
        isa, self.blas = _chosen(isa)
        native = load()
        out = native.ffi.new("anert_pool **")
        number = ISAS.index(isa) if isa != "auto" else native.lib.ANERT_ISA_AUTO
        call(native.lib.anert_pool_new, threads or threads_granted(), number, out)
        self.ptr = native.ffi.gc(out[0], native.lib.anert_pool_free)
        self.threads: int = native.lib.anert_pool_threads(out[0])
        self.isa: str = ISAS[native.lib.anert_pool_isa(out[0])]

    def __repr__(self) -> str:
        return f"Pool(threads={self.threads}, isa={self.isa!r})"


def own_isa() -> str:
    """The best instruction set of this CPU, BLAS apart."""
    native = load()
    return ISAS[native.lib.anert_pool_isa(native.ffi.NULL)]


def isas() -> tuple[str, ...]:
    """The instruction sets that this build and CPU have, `scalar` first; `blas` once one is open."""
    supported = load().lib.anert_isa_supported
    return tuple(name for number, name in enumerate(ISAS) if supported(number))
