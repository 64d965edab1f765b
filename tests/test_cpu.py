"""The CPU engine against the NumPy definition of every op."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_run import run_function, run_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import CASES, feed, op_cases, trace

from anert.backend.cpu import CpuBackend
from anert.backend.reference import evaluate
from anert.ffi import Pool
from anert.mil.graph import Function
from anert.mil.ops.table import TABLE

POOL = None


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(threads=2)


CPU_KINDS = sorted(k for k, row in TABLE.items() if "cpu" in row.backends and k in CASES)


def close(got: np.ndarray, want: np.ndarray, rtol: float, atol: float) -> None:
    """Equal where exact, near where floating; inf and NaN at the same places."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(
            got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True
        )


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_op_fp32(kind: str, pool: Pool) -> None:
    """One op, fp16 ports: within one rounding of the definition, in a scale that sums of its operands set."""
    fused = CpuBackend(pool)

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(op_cases(kind), st.booleans())
    def check(case, wide):
        f = trace(kind, case, "fp32" if wide else None)
        inputs = feed(case)
        got = run_function(fused, f, inputs)
        want = evaluate(f, inputs)
        for name in want:
            rtol, atol = (2e-5, 2e-5) if wide else (1.1e-3, 2e-5)
            close(got[name], want[name], rtol, atol)

    check()


@pytest.mark.parametrize("shape", [(1,), (2, 3), (2, 40)])
def test_what_is_stored_is_no_copy_and_a_constant_stays_one(shape: tuple[int, ...], pool: Pool) -> None:
    """Stored several times in one program: a value as it lies, an immediate as the number it is."""
    from anert.mil import ops

    f = Function("main")
    x = f.input("x", shape)
    y = ops.add(x, x)
    f.returns(ops.identity(y), ops.pad(y, pad=(0, 1) * len(shape), constant_val=-1.5), y, ops.identity(x))
    backend, given = CpuBackend(pool), np.arange(1, 1 + np.prod(shape)).astype(np.float16).reshape(shape)
    got = [run_function(backend, f, {"x": given})[v.name] for v in f.outputs]
    padded = np.pad(2 * given, [(0, 1)] * len(shape), constant_values=-1.5)
    for found, want in zip(got, (2 * given, padded, 2 * given, given), strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(("precision", "kept"), [("fp32", True), ("bf16", True), ("fp16", False)])
def test_sums_of_constants_keep_the_interior_s_precision(precision: str, kept: bool, pool: Pool) -> None:
    """Two fp16 constants that make one number of 22 bits cost nothing at run time, and round where every op does."""
    from anert.mil import ops

    f, exact = Function("main"), np.linspace(0.5, 1.0, 64).reshape(2, 32)
    high = exact.astype(np.float16)
    x = f.input("x", (2, 32))
    table = ops.add(f.const(high, "fp16", "high"), f.const(exact - high, "fp16", "low"))
    f.returns(ops.mul(ops.sub(x * table, x * high), 1024.0))
    backend = CpuBackend(pool, precision)
    program = backend.compile_function(f)
    got = run_program(backend, program, {"x": np.ones((2, 32), np.float16)})[f.outputs[0].name]
    want = (exact - high) * 1024.0
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want if kept else 0.0, atol=2e-3)
    assert program.stats.steps == 1
