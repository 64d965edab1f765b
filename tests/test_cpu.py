"""The CPU engine against the NumPy definition of every op."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_run import run_function
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import CASES, feed, op_cases, trace

from anert.backend.cpu import CpuBackend
from anert.backend.reference import evaluate
from anert.ffi import Pool
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
