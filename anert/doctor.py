"""What this machine can do with anert, as checks: platform, native core, speed, tools, packages, Neural Engine.

    for check in examine():
        print(check.id, check.ok, check.value, check.remedy)

On a Mac it also runs the probes and keeps what they found for kernels and lint (capabilities.py).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anert import __version__, ffi
from anert.capabilities import Capabilities, from_probes, write_record
from anert.errors import AnertError
from anert.probes import BASIC, PROBES, in_child

COMPILERS = ("cc", "gcc", "clang")
PACKAGES = {
    "torch": "an oracle in tests, a peer in bench",
    "transformers": "reads what convert writes",
    "sentencepiece": "an oracle in tests",
    "tokenizers": "an oracle in tests",
    "tiktoken": "an oracle in tests",
    "gguf": "reads GGUF checkpoints",
    "mpi4py": "trains on several machines",
}
"""Optional packages, and what they are good for."""
COPY_BYTES = 256 << 20
CPU_ERROR = 2e-3
"""Largest error of the cpu engine's self-test, of the largest result: its ports round to fp16."""


@dataclass(frozen=True, slots=True)
class Check:
    """ok: True good, False wrong (see remedy), None neither: a fact, or something optional that is not there."""

    id: str
    ok: bool | None
    value: str
    remedy: str = ""


def examine(probe: bool | None = None, exhaust: bool = False, plugins: Sequence[str] = ()) -> Iterator[Check]:
    """Every check, as it is made. probe: run the engine's probes (None: where there is a Neural Engine shim).

    exhaust: also the probes that cost minutes. plugins: paths to load, beside the installed ones that are listed.
    """
    yield Check("platform", None, f"{platform.platform()}, Python {platform.python_version()}, anert {__version__}")
    yield from _native()
    yield from _tools(plugins)
    yield from _engine(probe, exhaust)


def _native() -> Iterator[Check]:
    """The native core, its speed, and whether it computes what the reference backend does."""
    try:
        pool = ffi.Pool()
        isas = ffi.isas()
    except AnertError as error:
        named = [name for name in ("ANERT_BLAS", "ANERT_ISA", "ANERT_NUM_THREADS") if os.environ.get(name)]
        remedy = f"correct or unset {', '.join(named)}" if named else "build it: pip install -e . (needs a C compiler)"
        yield Check("native", False, str(error), remedy)
        return
    features = ", ".join(isas)
    slow = "scalar is all: a CPU with AVX2 or NEON computes many times faster" if len(isas) == 1 else ""
    yield Check("native", True, f"instruction sets {features}; {pool.isa} is used", slow)
    if pool.blas:
        own = ffi.own_isa()
        yield Check("blas", True, f"large products by {pool.blas}, the rest by {own}; ANERT_ISA={own} leaves it out")
    elif sys.platform == "darwin":
        yield Check("blas", None, f"not used: products by {pool.isa}", "unset ANERT_ISA for the matrix unit's")
    yield Check("threads", None, f"{pool.threads} granted of {os.cpu_count()} processors")
    yield from _memory()
    yield from _speed()
    off = self_test()
    remedy = "" if off < CPU_ERROR else "report it with the output of anert doctor --json"
    yield Check("cpu-engine", off < CPU_ERROR, f"differs from the reference by {off:.1e} of the largest value", remedy)


def _memory() -> Iterator[Check]:
    from anert.runtime import memory_available

    free = memory_available()
    remedy = "" if free > 1 << 30 else "close other programs: training the 15m preset takes about 1 GiB"
    yield Check("memory", free > 1 << 30, f"{free / 2**30:.1f} GiB available", remedy)
    disk = shutil.disk_usage(".").free
    remedy = "" if disk > 2 << 30 else "free some: a checkpoint of the 110m preset takes 1.3 GiB"
    yield Check("disk", disk > 2 << 30, f"{disk / 2**30:.1f} GiB free here", remedy)


def _speed() -> Iterator[Check]:
    from anert.runtime import Runtime

    for precision in ("fp32", "bf16"):
        peak = Runtime("cpu", precision).peak_gflops()
        yield Check(f"peak-{precision}", None, f"{peak:.0f} GFLOP/s in a product of 1024^3")
    source, target = np.ones(COPY_BYTES // 4, np.float32), np.zeros(COPY_BYTES // 4, np.float32)
    best = min(_timed(lambda: np.copyto(target, source)) for _ in range(4))
    yield Check("bandwidth", None, f"{2 * COPY_BYTES / best / 1e9:.1f} GB/s read and written by one thread's copy")


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def self_test() -> float:
    """Largest error of the cpu engine against the reference backend in a softmax attention with a residual."""
    from anert.backend.cpu import CpuBackend
    from anert.backend.reference import ReferenceBackend
    from anert.mil import ops
    from anert.mil.graph import Function
    from anert.probes import data, evaluate, result
    from anert.surface import Heap

    fn = Function("main")
    q, k, v = (fn.input(f"i{i:02d}_x", (1, 4, 64, 64)) for i in range(3))
    scores = ops.softmax(ops.mul(ops.matmul(q, k, transpose_y=True), 0.125), axis=-1)
    result(fn, ops.add(ops.matmul(scores, v), q))
    feeds = {x.name: data(*x.shape, seed=i) for i, x in enumerate(fn.inputs)}
    (got,) = evaluate(CpuBackend(ffi.Pool(), "fp32", Heap()), fn, feeds)
    (expected,) = evaluate(ReferenceBackend(Heap()), fn, feeds)
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def _tools(plugins: Sequence[str]) -> Iterator[Check]:
    found = [f"{name} ({path})" for name in COMPILERS if (path := shutil.which(name))]
    remedy = "" if found else "building from source needs one: apt install gcc, or xcode-select --install"
    yield Check("compilers", bool(found) or None, ", ".join(found) or "none", remedy)
    for name, use in PACKAGES.items():
        try:
            yield Check(f"package-{name}", True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(f"package-{name}", None, f"not installed: {use}")
    from anert.plugin import discover

    for row in discover(plugins):
        broken = row.status == "broken"
        yield Check(f"plugin-{row.name}", not broken, f"{row.status}, {row.source}", row.reason)


# ---- the Neural Engine


def _engine(probe: bool | None, exhaust: bool) -> Iterator[Check]:
    if probe is None:
        probe = sys.platform == "darwin" or bool(os.environ.get("ANERT_ANE"))
    if not probe:
        yield Check("neural-engine", None, f"needs macOS on Apple silicon, this is {sys.platform}",
                    "programs run on the cpu backend, from the same MIL text")  # fmt: skip
        return
    outcome = in_child("dialect")
    opset = outcome["record"].get("opset", "ios18")
    first = in_child(BASIC, opset=opset)
    remedy = "" if first["ok"] else "send us the output of anert doctor --json; --backend cpu works meanwhile"
    yield Check("neural-engine", bool(first["ok"]), first["value"], remedy)
    if not first["ok"]:
        return
    record, rules, answers = dict(outcome["record"]), dict(outcome["rules"]), {"dialect": outcome["value"]}
    yield Check("probe-dialect", outcome["ok"], outcome["value"])
    for name, one in PROBES.items():
        if name in ("dialect", BASIC) or (one.optional and not exhaust):
            continue
        outcome = in_child(name, opset=opset)
        answers[name] = outcome["value"]
        record |= outcome["record"]
        rules |= outcome["rules"]
        remedy = "" if outcome["ok"] else f"open question: {one.question}; the safe default stays"
        yield Check(f"probe-{name}", outcome["ok"], outcome["value"], remedy)
    yield _keep(chosen(record, rules), answers)


def chosen(record: dict[str, Any], rules: dict[str, bool]) -> Capabilities:
    """The Capabilities that the probes allow: separate ports (the faster layout) only where inputs of different sizes
    bind in our order."""
    trusted = record.get("binding") == "sorted" and record.get("output_binding") == "sorted"
    if trusted and record.get("equal_sizes") is False and record.get("max_inputs", 0) >= 8:
        record = {**record, "layout": "ports"}
    return from_probes(record, rules)


def _keep(capabilities: Capabilities, answers: dict[str, str]) -> Check:
    try:
        path = write_record(capabilities, answers)
    except OSError as error:
        return Check("record", False, f"cannot be written: {error}", "name a file that can be: ANERT_CAPABILITIES=...")
    return Check("record", True, f"{path}: dialect {capabilities.opset}, layout {capabilities.layout}")
