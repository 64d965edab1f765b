"""Runtime: one context (heap, pool, backend, precision, layout) that is handed to everything; nothing of it is
global."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anert import ffi
from anert.errors import BackendUnavailable, DoesNotFit, InputError
from anert.ffi import Pool, call
from anert.surface import Heap

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from anert.backend.base import Backend

BACKENDS = ("auto", "cpu", "ane", "reference")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LAYOUTS = ("auto", "ports", "packed")


class Runtime:
    """What programs compile and run on. `note` says in a sentence what was chosen and why.

    backend: a name of BACKENDS; `ane` off a Mac raises BackendUnavailable, it never runs elsewhere instead.
    precision `auto`: bf16 where the CPU multiplies bf16 natively, else fp32. threads 0: what the machine grants.
    """

    def __init__(self, backend: str = "auto", precision: str = "auto", layout: str = "auto", threads: int = 0,
                 compile_budget: int = 0, isa: str = "auto") -> None:  # fmt: skip
        for value, known, option in (
            (backend, BACKENDS, "backend"),
            (precision, PRECISIONS, "precision"),
            (layout, LAYOUTS, "layout"),
        ):
            if value not in known:
                raise InputError(f"--{option} takes one of {', '.join(known)}, got {value!r}")
        if backend == "ane":
            raise BackendUnavailable(_no_ane())
        self.heap, self.pool = Heap(), Pool(threads, isa)
        native_bf16 = self.pool.isa in ("avx512bf16", "amx")
        self.precision = precision if precision != "auto" else "bf16" if native_bf16 else "fp32"
        self.note = self._note(backend, precision)
        self.backend: Backend = self._open("cpu" if backend == "auto" else backend)
        if compile_budget:
            self.backend.budget = compile_budget
        self.engine: Executor | None = None
        """What the engine's lane of a Schedule runs on; None where engine and host are the same cores."""
        self.layout = layout if layout != "auto" else self.backend.capabilities.layout
        self._peak = 0.0

    def _open(self, name: str) -> Backend:
        if name == "reference":
            from anert.backend.reference import ReferenceBackend

            return ReferenceBackend(self.heap, "fp16" if self.precision == "fp16" else "exact")
        from anert.backend.cpu import CpuBackend

        return CpuBackend(self.pool, self.precision, self.heap)

    def _note(self, asked: str, precision: str) -> str:
        where = f"backend {asked}" if asked != "auto" else "backend cpu (auto: " + _no_ane() + ")"
        why = (
            ""
            if precision != "auto"
            else f" (auto: {self.pool.isa} multiplies bf16 {'' if self.precision == 'bf16' else 'not '}natively)"
        )
        return f"{where}; precision {self.precision}{why}; {self.pool.threads} threads, {self.pool.isa}"

    def check_memory(self, nbytes: int, what: str) -> None:
        """Raise DoesNotFit if `nbytes` more do not fit into what the machine grants now."""
        free = memory_available()
        if nbytes > free:
            raise DoesNotFit(
                f"{what} need {nbytes / 2**20:.0f} MiB, this machine grants {free / 2**20:.0f} MiB: "
                "take a smaller preset, batch or seq_len"
            )

    def peak_gflops(self) -> float:
        """Best of several (1024)^3 products at this runtime's precision: what this machine's GEMM can reach, measured
        once (~0.2 s)."""
        if not self._peak:
            from anert.surface import Surface

            n, c = 1024, ffi.ffi
            surface = Surface(self.heap, 3 * n * n * 4)
            base = c.cast("float *", surface.ptr)
            a, b, out = (c.new("anert_matrix *", (base + i * n * n, ffi.lib.ANERT_F32, n, 1, 0))[0] for i in range(3))
            kind = ffi.lib.ANERT_BF16 if self.precision == "bf16" else ffi.lib.ANERT_F32
            best, end = float("inf"), time.perf_counter() + 0.25
            while time.perf_counter() < end:
                start = time.perf_counter()
                call(ffi.lib.anert_gemm, self.pool.ptr, kind, 1, n, n, n, 1.0, a, b, 0.0, out)
                best = min(best, time.perf_counter() - start)
            self._peak = 2 * n**3 / best / 1e9
        return self._peak

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
        self.backend.close()


def open_runtime(options: Any) -> Runtime:
    """A Runtime by the fields `backend, precision, layout, threads, compile_budget` of `options` (TrainOptions)."""
    return Runtime(options.backend, options.precision, options.layout, options.threads, options.compile_budget)


def _no_ane() -> str:
    platform: str = sys.platform
    if platform != "darwin":
        return f"the Neural Engine needs macOS on Apple silicon, this is {platform}"
    return "this build of anert has no Neural Engine shim"


def memory_available() -> int:
    """Bytes that can still be had: the least of MemAvailable and what the cgroup's memory limit leaves."""
    free = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        import os

        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(limit).read_text().strip()
            if text != "max":
                free = min(free, int(text) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(0, free)


def rss_bytes() -> int:
    """Resident memory of this process."""
    try:
        import os

        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
