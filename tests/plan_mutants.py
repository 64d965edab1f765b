"""Corrupts the plans of real kernels and offers them to the native core: what it refuses is well, what it takes it must
run without leaving its buffers. Run under AddressSanitizer by test_sanitizers.py, where each buffer is an allocation of
its own:

    python tests/plan_mutants.py 2000 7     # mutants, seed; one JSON line of counts
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from anert import ffi
from anert.backend import emit
from anert.backend.cpu import CpuBackend
from anert.blocks import build_blocks
from anert.capabilities import CPU
from anert.mil import ops
from anert.mil.graph import Function
from anert.mil.text import print_module
from anert.plugin import load_file

ROOT = Path(__file__).resolve().parents[1]
MAX_WORK = 1 << 21
"""A mutant whose steps walk more elements than this is valid or not, but not run: it would only take time."""
TABLES = ("buffers", "views", "instrs", "steps")
Plan = dict[str, list[dict[str, Any]]]


def captured(texts: Iterator[tuple[str, dict[str, bytes]]]) -> list[Plan]:
    """The plans that the cpu backend makes of MIL texts, as rows of plain numbers."""
    plans: list[Plan] = []
    real = emit.Emitter._make

    def make(self: Any) -> Any:
        sizes = [{"nbytes": self.arena, "writable": 1}]
        sizes += [{"nbytes": r.nbytes, "writable": int(r.place == "output")} for r in self.buffers[1:]]
        plans.append(deepcopy({"buffers": sizes, "views": self.views, "instrs": self.instrs, "steps": self.steps}))
        return real(self)

    emit.Emitter._make = make  # type: ignore[method-assign]
    for precision in ("fp32", "bf16", "fp16"):
        backend = CpuBackend(precision=precision)
        for text, blobs in texts if precision == "fp32" else list(kernels())[:4]:
            backend.compile(text, blobs)
    emit.Emitter._make = real  # type: ignore[method-assign]
    return plans


def kernels() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Attention and FFN with their backwards, and one program a kind of step that they do not have."""
    preset = load_file(ROOT / "plugins" / "stories.py").preset("260k")
    for block in build_blocks(preset.model(preset.config), 32, 1, True, "ports", CPU):
        for kernel in block.kernels:
            yield kernel.text, kernel.blobs
    for made in (_gather, _scatter, _conv, _conv_transpose, _argmax, _reductions):
        fn = Function("main")
        fn.returns(made(fn))
        yield print_module(fn), {}


def _gather(fn: Function) -> Any:
    index = fn.const(np.array([3, -1, 0, 2], np.int32), "int32")
    return ops.gather(fn.input("x", (5, 7)), index, axis=0)


def _scatter(fn: Function) -> Any:
    index = fn.const(np.array([3, -1, 0, 3], np.int32), "int32")
    return ops.scatter(fn.input("x", (5, 7)), index, fn.input("u", (4, 7)), axis=0, mode="add")


def _conv(fn: Function) -> Any:
    return ops.conv(fn.input("x", (1, 4, 9, 9)), fn.input("w", (6, 4, 3, 3)), pad_type="same", strides=(2, 1))


def _conv_transpose(fn: Function) -> Any:
    return ops.conv_transpose(fn.input("x", (1, 6, 5, 5)), fn.input("w", (6, 4, 3, 3)), strides=(2, 2))


def _argmax(fn: Function) -> Any:
    return ops.reduce_argmax(fn.input("x", (6, 33)), axis=1, keep_dims=False)


def _reductions(fn: Function) -> Any:
    x = fn.input("x", (3, 40, 17))
    return ops.add(ops.softmax(x, axis=1), ops.reduce_max(x, axes=(0, 2), keep_dims=True))


# ---- mutation

NUMBERS = (0, 1, -1, 2, -2, 3, 7, 63, 64, 65, 1 << 15, 1 << 24, 1 << 31, -(1 << 31), 1 << 40, -(1 << 40), (1 << 63) - 1)
INT32 = {"buffer", "dtype", "op", "kind", "pass", "dst", "a", "b", "c", "view", "counter", "reduced", "first_view",
         "n_views", "first_instr", "n_instrs", "precision", "writable"}  # fmt: skip


def bent(rng: random.Random, value: int, field: str) -> int:
    """Another number for a field: a near one, a far one, or a special one; in the field's range."""
    new = rng.choice((value + 1, value - 1, value * 2, -value, value ^ (1 << rng.randrange(20)), rng.choice(NUMBERS)))
    low, high = (-(1 << 31), (1 << 31) - 1) if field in INT32 else (-(1 << 63), (1 << 63) - 1)
    return max(low, min(high, new))


def mutate(rng: random.Random, plan: Plan) -> None:
    """One to three fields of the plan changed in place, or two rows exchanged."""
    for _ in range(rng.randint(1, 3)):
        table = plan[rng.choice([t for t in TABLES if plan[t]])]
        row = table[rng.randrange(len(table))]
        if rng.random() < 0.1:
            other = table[rng.randrange(len(table))]
            row_copy, other_copy = dict(row), dict(other)
            row.update(other_copy), other.update(row_copy)
            continue
        field = rng.choice([k for k, v in row.items() if isinstance(v, (int, list))])
        if isinstance(row[field], list):
            row[field] = list(row[field])
            i = rng.randrange(len(row[field]))
            row[field][i] = bent(rng, row[field][i], field)
        else:
            row[field] = bent(rng, int(row[field]), field)


# ---- the native core


class Native:
    """Offers plans to anert_plan_new, and runs those that it takes on exact buffers."""

    def __init__(self) -> None:
        native = ffi.load()
        self.c, self.lib = native.ffi, native.lib
        self.pool = ffi.Pool(2)
        self.error = ffi.error()

    def verdict(self, plan: Plan) -> str:
        arrays = {t: self.c.new(f"anert_{t[:-1]}[]", plan[t]) for t in TABLES}
        counts = {f"n_{t}": len(plan[t]) for t in TABLES}
        definition = self.c.new("anert_plan_def *", {**arrays, **counts, "n_counters": 64})
        out = self.c.new("anert_plan **")
        if self.lib.anert_plan_new(definition, out, self.error):
            return "refused"
        made = self.c.gc(out[0], self.lib.anert_plan_free)
        sizes = [b["nbytes"] for b in plan["buffers"]]
        work = sum(int(np.prod([float(d) for d in s["dims"]])) for s in plan["steps"])
        if work > MAX_WORK or max(sizes) > 1 << 22 or any(s < 0 for s in sizes):
            return "too large to run"
        return self.run(made, plan, sizes)

    def run(self, made: Any, plan: Plan, sizes: list[int]) -> str:
        rng = np.random.default_rng(1)
        memory = [self.c.new("char[]", max(1, n)) for n in sizes]
        for m, n in zip(memory, sizes, strict=True):
            # Small buffers hold indices of gather and scatter, the others fp16 numbers from 0 to 1.5.
            values = rng.integers(-2, 4, n // 4 + 1).astype(np.int32) if n <= 64 else rng.random(n // 2 + 1) * 1.5
            raw = values.tobytes() if n <= 64 else values.astype(np.float16).tobytes()
            self.c.buffer(m, max(1, n))[:] = raw[: max(1, n)]
        fixed = [(m, bytes(self.c.buffer(m))) for m, b in zip(memory, plan["buffers"], strict=True)
                 if not b["writable"]]  # fmt: skip
        bases = self.c.new("void *[]", [self.c.cast("void *", m) for m in memory])
        status = self.lib.anert_plan_run(made, self.pool.ptr, bases, len(memory), bases[0], self.error)
        if any(bytes(self.c.buffer(m)) != before for m, before in fixed):
            return "WROTE A READ-ONLY BUFFER"
        return "failed in words" if status else "ran"


def main(mutants: int, seed: int) -> None:
    plans = captured(kernels())
    native, rng, counts = Native(), random.Random(seed), Counter[str]()
    for plan in plans:
        assert native.verdict(plan) in ("ran", "too large to run"), "the plan as it was made is not taken"
    for _ in range(mutants):
        plan = deepcopy(rng.choice(plans))
        mutate(rng, plan)
        counts[native.verdict(plan)] += 1
    sys.stdout.write(json.dumps({"plans": len(plans), **counts}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
