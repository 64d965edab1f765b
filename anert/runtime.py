"""Runtime: one context (heap, pool, backend, precision, layout) that is handed to everything; nothing of it is
global."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anert import ffi
from anert.errors import BackendUnavailable, DoesNotFit, InputError
from anert.ffi import Pool, call
from anert.stages import Boundaries
from anert.surface import Heap

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from anert.backend.baked import Baked
    from anert.backend.base import Backend, Program
    from anert.backend.plan import PlanCache
    from anert.kernel import Kernel

BACKENDS = ("auto", "cpu", "ane", "reference")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LAYOUTS = ("auto", "ports", "packed")
STRATEGIES = ("tensors", "baked")


class Runtime:
    """What programs compile and run on. `note` says in a sentence what was chosen and why.

    backend: a name of BACKENDS. `ane` raises BackendUnavailable off a Mac and where the engine does not pass the basic
    probe: it never runs elsewhere instead. `auto` is `ane` where that passes, else `cpu`. precision `auto`: bf16 where
    the CPU multiplies bf16 natively, else fp32; on `ane`, whose blocks compute in fp16, it is that of the host's part.
    threads 0: what the machine grants. strategy `tensors`: weights are inputs; `baked`: constants, for comparison.
    fusion: `blocks` (each its programs, cut alike on every backend), a number of layers in one, or `auto`: on `ane`
    what anert.boundaries.settle chooses, else `blocks`.
    """

    def __init__(self, backend: str = "auto", precision: str = "auto", layout: str = "auto", threads: int = 0,
                 compile_budget: int = 0, isa: str = "auto", strategy: str = "tensors",
                 fusion: str = "auto") -> None:  # fmt: skip
        for value, known, option in (
            (backend, BACKENDS, "backend"),
            (precision, PRECISIONS, "precision"),
            (layout, LAYOUTS, "layout"),
            (strategy, STRATEGIES, "strategy"),
        ):
            if value not in known:
                raise InputError(f"--{option} takes one of {', '.join(known)}, got {value!r}")
        self.heap, self.pool = Heap(), Pool(threads, isa)
        native_bf16 = self.pool.isa in ("avx512bf16", "amx")
        self.precision = precision if precision != "auto" else "bf16" if native_bf16 else "fp32"
        self.backend, reason = self._open(backend)
        if compile_budget:
            self.backend.budget = compile_budget
        self.engine: Executor | None = None
        """What the engine's lane of a Schedule runs on; None where engine and host are the same cores."""
        if self.backend.name == "ane":
            from concurrent.futures import ThreadPoolExecutor

            self.engine = ThreadPoolExecutor(1, "anert-engine")
        self.note = self._note(backend, precision, reason)
        self.asked_layout, self.fusion = layout, fusion
        self.boundaries = self._boundaries(layout, fusion)
        self.baked: Baked | None = None
        if strategy == "baked":
            self._bake(layout)
        self._peak = 0.0

    @property
    def layout(self) -> str:
        return self.boundaries.layout

    def _boundaries(self, layout: str, fusion: str) -> Boundaries:
        """As asked for. Raises InputError for a fusion that is none."""
        caps = self.backend.capabilities
        layout = layout if layout != "auto" else caps.layout
        if fusion in ("auto", "blocks"):
            return Boundaries(layout)
        if not fusion.isascii() or not fusion.isdigit() or int(fusion) == 0:
            raise InputError(f"--fusion takes auto, blocks or a number of layers, got {fusion!r}")
        return Boundaries(layout, int(fusion), caps, packable=layout == "packed")

    def _bake(self, layout: str) -> None:
        from anert.backend.baked import Baked
        from anert.backend.cpu import CpuBackend

        self.boundaries = self._boundaries("ports" if layout == "auto" else layout, self.fusion)
        if isinstance(self.backend, CpuBackend):
            self.backend.cache = None  # programs that nobody will ask for again
        self.baked = Baked(self.backend)

    def compile(self, kernel: Kernel) -> Program:
        """The Program of a kernel, by this runtime's strategy. Raises CompileError past the budget."""
        return self.baked.program(kernel) if self.baked else self.backend.compile(kernel.text, kernel.blobs)

    def _open(self, asked: str) -> tuple[Backend, str]:
        """The backend, and where `auto` chose it, why."""
        if asked == "reference":
            from anert.backend.reference import ReferenceBackend

            return ReferenceBackend(self.heap, "fp16" if self.precision == "fp16" else "exact"), ""
        reason = ""
        if asked in ("ane", "auto"):
            try:
                return open_ane(), "passes the basic probe"
            except BackendUnavailable as error:
                if asked == "ane":
                    raise
                reason = str(error)
        from anert.backend.cpu import CpuBackend

        return CpuBackend(self.pool, self.precision, self.heap, cache=plan_cache()), reason

    def _note(self, asked: str, precision: str, reason: str) -> str:
        where = f"backend {self.backend.name}" + (f" (auto: {reason})" if asked == "auto" else "")
        why = (
            ""
            if precision != "auto"
            else f" (auto: {self.pool.isa} multiplies bf16 {'' if self.precision == 'bf16' else 'not '}natively)"
        )
        part = " on the host, fp16 on the engine" if self.backend.name == "ane" else ""
        isa = f"{self.pool.isa} ({self.pool.blas})" if self.pool.blas else self.pool.isa
        return f"{where}; precision {self.precision}{why}{part}; {self.pool.threads} threads, {isa}"

    def check_memory(self, nbytes: int, what: str) -> None:
        """Raise DoesNotFit if `nbytes` more do not fit into what the machine grants now."""
        free = memory_available()
        if nbytes > free:
            raise DoesNotFit(
                f"{what} need {nbytes / 2**20:.0f} MiB, this machine grants {free / 2**20:.0f} MiB: "
                "take a smaller preset, batch or seq_len"
            )

    def peak_gflops(self, again: bool = False) -> float:
        """What this machine's GEMM reaches at this runtime's precision: the best product of 1024^3, and of 2048^3 where
        that is quick; measured once (~0.3 s), or `again`, which can only raise it. 0 on `ane`, whose peak nobody
        measured here."""
        if (not self._peak or again) and self.backend.name != "ane":
            seconds = self._product_seconds(1024, 0.15)
            best = 2 * 1024**3 / seconds
            if seconds < 0.01:
                best = max(best, 2 * 2048**3 / self._product_seconds(2048, 0.15))
            self._peak = max(self._peak, best / 1e9)
        return self._peak

    def _product_seconds(self, n: int, budget_s: float) -> float:
        """The fastest n^3 product of fp16 matrices within the budget."""
        from anert.surface import Surface

        c, size = ffi.ffi, n * n
        surface = Surface(self.heap, 3 * size * 2)
        base = c.cast("uint16_t *", surface.ptr)
        a, b, out = (c.new("anert_matrix *", (base + i * size, ffi.lib.ANERT_F16, n, 1, 0))[0] for i in range(3))
        kind = ffi.lib.ANERT_BF16 if self.precision == "bf16" else ffi.lib.ANERT_F32
        best, end = float("inf"), time.perf_counter() + budget_s
        while time.perf_counter() < end:
            start = time.perf_counter()
            call(ffi.lib.anert_gemm, self.pool.ptr, kind, 1, n, n, n, 1.0, a, b, 0.0, out)
            best = min(best, time.perf_counter() - start)
        return best

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
        self.backend.close()


def open_runtime(options: Any) -> Runtime:
    """A Runtime by the fields `backend, precision, layout, threads, compile_budget, strategy, fusion` of `options`
    (TrainOptions)."""
    return Runtime(options.backend, options.precision, options.layout, options.threads, options.compile_budget,
                   strategy=options.strategy, fusion=options.fusion)  # fmt: skip


def open_ane() -> Backend:
    """The Neural Engine's backend, after it has passed the basic probe. Raises BackendUnavailable, saying why not."""
    platform: str = sys.platform
    if platform != "darwin" and not os.environ.get("ANERT_ANE"):
        raise BackendUnavailable(f"the Neural Engine needs macOS on Apple silicon, this is {platform}")
    from anert.backend.ane import AneBackend
    from anert.probes import basic_probe

    capabilities, fault = basic_probe()
    if capabilities is None:
        raise BackendUnavailable(f"the Neural Engine does not pass the basic probe: {fault}; see `anert doctor`")
    return AneBackend(capabilities)


def plan_cache() -> PlanCache | None:
    """Where plans outlast the process: the folder that ANERT_CACHE names (`off`: nowhere), else the user's cache."""
    from anert.backend.plan import PlanCache

    asked = os.environ.get("ANERT_CACHE", "")
    if asked == "off":
        return None
    if asked:
        return PlanCache(Path(asked))
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return PlanCache(Path(os.environ.get("XDG_CACHE_HOME") or home) / "anert" / "plans")


def memory_available() -> int:
    """Bytes that can still be had: the least of MemAvailable and what the cgroup's memory limit leaves."""
    free = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
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
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
