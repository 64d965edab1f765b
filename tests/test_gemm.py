"""anert_gemm: against float64, bit for bit across threads, strides, layouts and entries, on every instruction set."""

import ctypes
from typing import Any

import numpy as np
import pytest
from blas_library import open_library
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_build import compile_native

from anert import ffi
from anert.errors import InputError

open_library()  # then `blas` is one of the instruction sets
F32, F16, BF16 = 0, 1, 2
SETTINGS = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def pools() -> dict[tuple[str, int], ffi.Pool]:
    return {(isa, threads): ffi.Pool(threads, isa) for isa in ffi.isas() for threads in (1, 2)}


def bf16(x: np.ndarray) -> np.ndarray:
    """x (finite float32) rounded to bf16 to nearest even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widen(x: np.ndarray, dtype: int) -> np.ndarray:
    """The values of an array of a dtype (bf16 as uint16), float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == BF16 else x.astype(np.float32)


def narrow(x: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BF16:
        return bf16(x)
    with np.errstate(over="ignore"):
        return x.astype(np.float16 if dtype == F16 else np.float32)


def matrix(x: np.ndarray, dtype: int) -> Any:
    """anert_matrix of a (batch, rows, cols) view."""
    batch, row, col = (stride // x.itemsize for stride in x.strides)
    return {
        "data": ffi.ffi.cast("void *", x.ctypes.data),
        "dtype": dtype,
        "row_stride": row,
        "col_stride": col,
        "batch_stride": batch,
    }


def gemm(
    pool: ffi.Pool,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    dtypes: tuple[int, int, int] = (F32, F32, F32),
    precision: int = F32,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> np.ndarray:
    """c = beta c + alpha a b, in place; arrays (batch, rows, cols) of any strides."""
    operands = [matrix(x, dtype) for x, dtype in zip((a, b, c), dtypes, strict=True)]
    held = [ffi.ffi.new("anert_matrix *", operand)[0] for operand in operands]
    ffi.call(
        ffi.lib.anert_gemm, pool.ptr, precision, c.shape[0], c.shape[1], c.shape[2], a.shape[2], alpha, held[0], held[1],
        beta, held[2],
    )  # fmt: skip
    return c


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """The same values at other strides: rows contiguous, columns contiguous, or neither."""
    batch, rows, cols = x.shape
    if layout == "rows":
        wide = np.zeros((batch, rows, cols + 3), x.dtype)
        view = wide[:, :, 1 : cols + 1]
    elif layout == "cols":
        view = np.zeros((batch, cols, rows + 2), x.dtype)[:, :, 2:].transpose(0, 2, 1)
    else:
        view = np.zeros((rows, batch, cols, 3), x.dtype)[..., 1].transpose(1, 0, 2)
    view[...] = x
    return view


DIM = st.one_of(st.integers(0, 9), st.integers(10, 70))
LAYOUT = st.sampled_from(["rows", "cols", "strided"])
DTYPE = st.sampled_from([F32, F16, BF16])
PROBLEM = st.fixed_dictionaries(
    {
        "batch": st.integers(0, 3),
        "m": DIM,
        "n": DIM,
        "k": st.one_of(DIM, st.sampled_from([128, 319, 321, 333, 650])),
        "layouts": st.tuples(LAYOUT, LAYOUT, LAYOUT),
        "dtypes": st.tuples(DTYPE, DTYPE, DTYPE),
        "precision": st.sampled_from([F32, BF16]),
        "alpha": st.sampled_from([1.0, -0.5, 3.0]),
        "beta": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 1000),
    }
)


def made(problem: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B, C of a problem: contiguous, of its dtypes."""
    rng = np.random.default_rng(problem["seed"])
    batch, m, n, k = (problem[name] for name in ("batch", "m", "n", "k"))
    shapes = ((batch, m, k), (batch, k, n), (batch, m, n))
    return tuple(
        narrow(rng.standard_normal(shape, np.float32), d) for shape, d in zip(shapes, problem["dtypes"], strict=True)
    )  # type: ignore[return-value]


def solve(pool: ffi.Pool, problem: dict[str, Any], layouts: tuple[str, str, str]) -> np.ndarray:
    a, b, c = (laid_out(x, layout) for x, layout in zip(made(problem), layouts, strict=True))
    gemm(pool, a, b, c, problem["dtypes"], problem["precision"], problem["alpha"], problem["beta"])
    return np.ascontiguousarray(c)


def expected(problem: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """float64 result, and a bound on the error of fp32 sums: k + 8 roundings of sum |a||b| |alpha|, and C's own."""
    a, b, c = (widen(x, d).astype(np.float64) for x, d in zip(made(problem), problem["dtypes"], strict=True))
    if problem["precision"] == BF16:
        a, b = (widen(bf16(x.astype(np.float32)), BF16).astype(np.float64) for x in (a, b))
    exact = problem["alpha"] * (a @ b) + problem["beta"] * c
    magnitude = abs(problem["alpha"]) * (np.abs(a) @ np.abs(b)) + np.abs(c)
    half_ulp = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}[problem["dtypes"][2]]
    return exact, (problem["k"] + 8) * 2.0**-24 * magnitude + half_ulp * np.abs(exact) + 2.0**-25


@SETTINGS
@given(PROBLEM)
@example(dict(batch=1, m=200, n=300, k=70, layouts=("rows",) * 3, dtypes=(F16, F16, F16), precision=F32, alpha=1.0, beta=0.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=70, n=40, k=2100, layouts=("rows", "cols", "rows"), dtypes=(F16, F16, F16), precision=F32, alpha=-0.5, beta=1.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=800, n=40, k=330, layouts=("rows", "cols", "rows"), dtypes=(F16, F16, F32), precision=BF16, alpha=1.0, beta=1.0, seed=1))  # fmt: skip
def test_against_float64(pools, problem):
    exact, bound = expected(problem)
    for (isa, threads), pool in pools.items():
        got = widen(solve(pool, problem, problem["layouts"]), problem["dtypes"][2])
        error = np.abs(got - exact)
        assert (error <= bound).all(), f"{isa}, {threads} threads: {np.max(error / bound):.2f} of the bound"


@SETTINGS
@given(PROBLEM)
@example(dict(batch=2, m=1, n=300, k=700, layouts=("strided", "cols", "rows"), dtypes=(F16, F32, F16), precision=F32, alpha=1.0, beta=0.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=70, n=300, k=1100, layouts=("cols", "rows", "strided"), dtypes=(F16, F32, F16), precision=F32, alpha=1.0, beta=1.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=800, n=300, k=330, layouts=("cols", "strided", "cols"), dtypes=(F16, F32, F16), precision=F32, alpha=1.0, beta=0.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=900, n=1, k=333, layouts=("cols", "strided", "cols"), dtypes=(BF16, F32, F16), precision=BF16, alpha=1.0, beta=1.0, seed=1))  # fmt: skip
def test_bits_do_not_depend_on_strides_or_threads(pools, problem):
    for isa in ffi.isas():
        want = solve(pools[isa, 1], problem, ("rows", "rows", "rows"))
        got = solve(pools[isa, 2], problem, problem["layouts"])
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8), err_msg=isa)


@pytest.mark.parametrize(
    ("layout", "dtype", "k", "precision"),
    [("rows", F16, 448, BF16), ("rows", F32, 416, BF16), ("rows", BF16, 64, BF16), ("rows", F16, 300, BF16),
     ("cols", F16, 416, BF16), ("cols", F32, 330, BF16), ("cols", BF16, 64, BF16), ("strided", F16, 390, BF16),
     ("rows", F16, 390, F32), ("cols", F16, 64, F32)],
)  # fmt: skip
def test_a_product_of_many_tasks(pools, layout, dtype, k, precision):
    """Blocks of A that are packed ahead, within a task and for the next one, and register tiles that are stored late."""
    problem = {"batch": 1 + (k == 416), "m": 200 + k % 7, "n": 530, "k": k, "layouts": (layout,) * 3,
               "dtypes": (dtype, F16, F16), "precision": precision, "alpha": 0.5, "beta": 1.0, "seed": k}  # fmt: skip
    exact, bound = expected(problem)
    seen = {isa: set() for isa, _ in pools}
    for (isa, threads), pool in pools.items():
        result = solve(pool, problem, (layout, "rows", "rows"))
        seen[isa].add(result.tobytes())
        assert np.all(np.abs(widen(result, F16) - exact) <= bound), (isa, threads)
    assert all(len(bits) == 1 for bits in seen.values())


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("precision", [F32, BF16])
def test_bits_do_not_depend_on_the_dtype_of_equal_values(pools, isa, precision):
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-128, 128, shape).astype(np.float32) / 64 for shape in ((1, 50, 90), (1, 90, 33)))
    results = []
    for dtype in (F32, F16, BF16):
        c = np.zeros((1, 50, 33), np.float32)
        gemm(pools[isa, 1], narrow(a, dtype), narrow(b, dtype), c, (dtype, dtype, F32), precision)
        results.append(c)
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("shape", [(130, 70, 40), (64, 1, 400), (1, 64, 400)])
def test_a_part_of_the_rows_gives_the_same_bits(pools, isa, shape):
    m, n, k = shape
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((1, m, k), np.float32), rng.standard_normal((1, k, n), np.float32)
    whole = gemm(pools[isa, 2], a, b, np.zeros((1, m, n), np.float32))
    if m > 1:
        part = gemm(pools[isa, 1], a[:, m // 3 :], b, np.zeros((1, m - m // 3, n), np.float32))
        assert part.tobytes() == np.ascontiguousarray(whole[:, m // 3 :]).tobytes()
    if n > 2:
        part = gemm(pools[isa, 1], a, b[:, :, : n // 2], np.zeros((1, m, n // 2), np.float32))
        assert part.tobytes() == np.ascontiguousarray(whole[:, :, : n // 2]).tobytes()


@pytest.mark.parametrize("isa", ffi.isas())
def test_zero_strides_repeat_an_operand(pools, isa):
    rng = np.random.default_rng(5)
    row, column = rng.standard_normal((1, 1, 40), np.float32), rng.standard_normal((1, 40, 1), np.float32)
    a, b = np.broadcast_to(row, (2, 7, 40)), np.broadcast_to(column, (2, 40, 9))
    got = gemm(pools[isa, 2], a, b, np.zeros((2, 7, 9), np.float32))
    np.testing.assert_allclose(got, np.broadcast_to(row @ column, (2, 7, 9)), rtol=1e-5)
    assert (got == got[0, 0, 0]).all()


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("n", [1, 5])
def test_nothing_outside_the_operands_is_read_or_written(pools, isa, n):
    """NaN around the operands never reaches C, and a margin around C keeps its value."""
    rng = np.random.default_rng(6)
    for m, k in ((1, 1), (5, 3), (7, 17), (13, 33), (203, 9)):
        padded = [np.full((1, r + 4, c + 4), np.nan, np.float32) for r, c in ((m, k), (k, n), (m, n))]
        for turn in (False, True):
            a, b, c = (x[:, 2:-2, 2:-2] for x in padded)
            a[...], b[...] = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
            padded[2][...] = 7.0
            out = gemm(pools[isa, 1], a, b, c, beta=0.0) if not turn else None
            if turn:
                gemm(pools[isa, 1], b.transpose(0, 2, 1), a.transpose(0, 2, 1), c.transpose(0, 2, 1))
            np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)
            margin = padded[2].copy()
            margin[:, 2:-2, 2:-2] = 7.0
            assert (margin == 7.0).all(), out is None


@pytest.mark.parametrize("isa", ffi.isas())
def test_beta_zero_does_not_read_c_and_k_zero_clears_it(pools, isa):
    c = np.full((1, 5, 6), np.nan, np.float32)
    gemm(pools[isa, 1], np.ones((1, 5, 3), np.float32), np.ones((1, 3, 6), np.float32), c)
    assert (c == 3.0).all()
    c[...] = np.nan
    gemm(pools[isa, 1], np.ones((1, 5, 0), np.float32), np.ones((1, 0, 6), np.float32), c)
    assert (c == 0.0).all()
    c[...] = 4.0
    gemm(pools[isa, 1], np.ones((1, 5, 0), np.float32), np.ones((1, 0, 6), np.float32), c, beta=1.0)
    assert (c == 4.0).all()


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("n", [1, 20])
def test_fp16_overflows_to_inf_and_nan_stays(pools, isa, n):
    a = np.array([[[60000.0, 60000.0], [65519.0, 0.0], [65520.0, 0.0], [np.nan, 1.0]]], np.float32)
    c = np.zeros((1, 4, n), np.float16)
    gemm(pools[isa, 1], a, np.ones((1, 2, n), np.float32), c, (F32, F32, F16))
    assert (
        np.isposinf(c[0, 0]).all()
        and (c[0, 1] == 65504).all()
        and np.isposinf(c[0, 2]).all()
        and np.isnan(c[0, 3]).all()
    )


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("layout", ["rows", "cols", "strided"])
def test_bf16_operands_are_rounded_as_ml_dtypes_does(pools, isa, layout):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(7)
    x = rng.standard_normal((1, 37, 64)).astype(np.float32)
    ties = (x.view(np.uint32) & np.uint32(0xFFFF0000) | np.uint32(0x8000)).view(np.float32)
    x[:, ::2] = ties[:, ::2]
    want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    c = np.zeros((1, 37, 64), np.float32)
    gemm(pools[isa, 1], laid_out(x, layout), np.eye(64, dtype=np.float32)[None], c, precision=BF16)
    np.testing.assert_array_equal(c, want)
    gemm(pools[isa, 1], np.eye(37, dtype=np.float32)[None], laid_out(x, layout), c, precision=BF16)
    np.testing.assert_array_equal(c, want)
    stored = np.zeros((1, 37, 64), np.uint16)
    gemm(pools[isa, 1], laid_out(x, layout), np.eye(64, dtype=np.float32)[None], stored, (F32, F32, BF16))
    np.testing.assert_array_equal(widen(stored, BF16), want)


def good() -> dict[str, Any]:
    x = np.ones((2, 4, 4), np.float32)
    return {"batch": 2, "m": 4, "n": 4, "k": 4, "precision": F32, "alpha": 1.0, "beta": 0.0, "keep": x,
            "a": matrix(x, F32), "b": matrix(x, F32), "c": matrix(np.zeros_like(x), F32)}  # fmt: skip


def call_with(pool: Any, changes: dict[str, Any]) -> None:
    args = good()
    for name, value in changes.items():
        if isinstance(value, dict):
            args[name] = {**args[name], **value}
        else:
            args[name] = value
    a, b, c = (ffi.ffi.new("anert_matrix *", args[name])[0] for name in "abc")
    ffi.call(
        ffi.lib.anert_gemm, pool, args["precision"], args["batch"], args["m"], args["n"], args["k"], args["alpha"], a, b,
        args["beta"], c,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": -1}, "m -1"),
        ({"k": -5}, "k -5"),
        ({"batch": -1}, "batch -1"),
        ({"precision": 1}, "precision is 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"beta": 0.5}, "beta is 0.5, expected 0 or 1"),
        ({"a": {"dtype": 3}}, "dtype of A is 3"),
        ({"c": {"dtype": 7}}, "dtype of C is 7"),
        ({"b": {"row_stride": -4}}, "strides of B are -4, 1"),
        ({"a": {"data": 0}}, "A is NULL"),
        ({"b": {"data": 0}}, "B is NULL"),
        ({"c": {"data": 0}}, "C is NULL"),
        ({"a": {"row_stride": 1 << 62}}, "A of 2 x 4 x 4 spans more than memory"),
        ({"m": 1 << 62, "a": {"row_stride": 3}}, "A of 2 x"),
        ({"c": {"row_stride": 0}}, "C overlaps itself"),
        ({"c": {"row_stride": 3}}, "C overlaps itself"),
        ({"c": {"batch_stride": 8}}, "C overlaps itself"),
    ],
)
def test_bad_arguments(pools, changes, message):
    changes = {
        name: {**value, "data": ffi.ffi.NULL} if isinstance(value, dict) and value.get("data") == 0 else value
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match=message):
        call_with(next(iter(pools.values())).ptr, changes)


def test_no_pool_is_refused():
    with pytest.raises(InputError, match="pool is NULL"):
        call_with(ffi.ffi.NULL, {})


# ---- The serial entry, and instruction sets that this CPU lacks ----

HARNESS = """
#include "gemm.h"
int run_serial(int isa, int precision, long m, long n, long k, float alpha, anert_matrix *x, float beta);
int run_serial(int isa, int precision, long m, long n, long k, float alpha, anert_matrix *x, float beta) {
    anert_pool *pool;
    if (anert_pool_new(1, ANERT_ISA_SCALAR, &pool, NULL) != ANERT_OK)
        return 1;
    void *scratch = anert_pool_scratch(pool, 0, 0, anert_gemm_scratch(isa, k));
    anert_gemm_serial(isa, precision, m, n, k, alpha, x[0], x[1], beta, x[2], scratch);
    anert_pool_free(pool);
    return 0;
}
"""
SOURCES = (
    *(
        "gemm.c",
        "gemm_check.c",
        "gemm_scalar.c",
        "gemm_avx2.c",
        "gemm_avx512.c",
        "gemm_avx512bf16.c",
        "gemm_amx.c",
        "gemm_neon.c",
    ),
    *(
        "gemm_blas_scalar.c",
        "gemm_blas_avx2.c",
        "gemm_blas_avx512.c",
        "gemm_blas_neon.c",
        "blas.c",
        "pool.c",
        "error.c",
    ),
)
BUILDS: dict[str, tuple[str, ...]] = {"native": (), "emulated": ("VEC_EMULATED",)}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("row_stride", "col_stride", "batch_stride")),
    ]


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    made: dict[str, ctypes.CDLL] = {}

    def get(name: str) -> ctypes.CDLL:
        if name not in made:
            made[name] = compile_native(tmp_path_factory.mktemp(name), HARNESS, SOURCES, BUILDS[name])
        return made[name]

    return get


def serial(library: ctypes.CDLL, isa: str, problem: dict[str, Any]) -> np.ndarray:
    """anert_gemm_serial on each matrix of the batch."""
    arrays = [laid_out(x, layout) for x, layout in zip(made(problem), problem["layouts"], strict=True)]
    for i in range(problem["batch"]):
        operands = (Matrix * 3)()
        for j, (x, dtype) in enumerate(zip(arrays, problem["dtypes"], strict=True)):
            row, col = (stride // x.itemsize for stride in x.strides[1:])
            operands[j] = Matrix(x[i].ctypes.data, dtype, row, col, 0)
        status = library.run_serial(
            ffi.ISAS.index(isa), problem["precision"], *(ctypes.c_long(problem[name]) for name in "mnk"),
            ctypes.c_float(problem["alpha"]), operands, ctypes.c_float(problem["beta"]),
        )  # fmt: skip
        assert status == 0
    return np.ascontiguousarray(arrays[2])


@settings(max_examples=30, deadline=None)
@given(PROBLEM)
@example(dict(batch=1, m=300, n=300, k=330, layouts=("rows",) * 3, dtypes=(F16, F16, F16), precision=F32, alpha=1.0, beta=0.0, seed=1))  # fmt: skip
def test_serial_gives_the_bits_of_the_parallel_entry(pools, builds, problem):
    for isa in ffi.isas():
        own = isa if isa != "blas" else ffi.own_isa()  # a BLAS is for what all threads work at
        want = solve(pools[own, 2], problem, problem["layouts"])
        got = serial(builds("native"), isa, problem)
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8), err_msg=isa)


@pytest.mark.parametrize("isa", ["avx512", "avx512bf16", "neon"])
@settings(max_examples=25, deadline=None)
@given(PROBLEM)
@example(dict(batch=1, m=30, n=150, k=333, layouts=("rows", "rows", "rows"), dtypes=(F16, F16, F16), precision=BF16, alpha=1.0, beta=1.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=90, n=70, k=661, layouts=("cols", "cols", "cols"), dtypes=(F32, BF16, F16), precision=BF16, alpha=1.0, beta=1.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=90, n=1, k=333, layouts=("cols", "cols", "cols"), dtypes=(F32, BF16, F16), precision=BF16, alpha=1.0, beta=1.0, seed=1))  # fmt: skip
def test_instruction_sets_that_this_cpu_lacks(builds, isa, problem):
    library = builds("emulated")
    exact, bound = expected(problem)
    got = serial(library, isa, problem)
    assert (np.abs(widen(got, problem["dtypes"][2]) - exact) <= bound).all()
    contiguous = serial(library, isa, {**problem, "layouts": ("rows", "rows", "rows")})
    np.testing.assert_array_equal(got.view(np.uint8), contiguous.view(np.uint8))


# ---- Gradients: streamed past the caches, their squares summed up on the way


def gradient(pool, a, b, dw, dtypes, precision, beta=0.0, alpha=1.0) -> float:
    held = [ffi.ffi.new("anert_matrix *", matrix(x, d))[0] for x, d in zip((a, b), dtypes, strict=True)]
    squares = ffi.ffi.new("double *")
    _, m, k = a.shape
    ffi.call(ffi.lib.anert_gemm_grad, pool.ptr, precision, m, b.shape[2], k, alpha, *held, beta,
             ffi.ffi.cast("float *", dw.ctypes.data), squares)  # fmt: skip
    return squares[0]


@settings(max_examples=30, deadline=None)
@given(PROBLEM)
@example(dict(batch=1, m=640, n=480, k=70, layouts=("rows", "cols", "rows"), dtypes=(F16, F16, F32), precision=BF16, alpha=0.5, beta=0.0, seed=1))  # fmt: skip
@example(dict(batch=1, m=640, n=483, k=70, layouts=("rows", "cols", "rows"), dtypes=(F16, F16, F32), precision=F32, alpha=0.5, beta=0.0, seed=1))  # fmt: skip
def test_a_gradient_is_the_product_and_its_squares(pools, problem):
    problem = {**problem, "batch": 1, "dtypes": (*problem["dtypes"][:2], F32)}
    a, b, c = (laid_out(x, layout) for x, layout in zip(made(problem), (*problem["layouts"][:2], "rows"), strict=True))
    for isa in ffi.isas():
        results = []
        for threads in (1, 2):
            want, dw = np.array(c), np.array(c)
            gemm(
                pools[isa, threads],
                a,
                b,
                want,
                problem["dtypes"],
                problem["precision"],
                problem["alpha"],
                problem["beta"],
            )
            squares = gradient(pools[isa, threads], a, b, dw, problem["dtypes"][:2], problem["precision"],
                               problem["beta"], problem["alpha"])  # fmt: skip
            assert dw.tobytes() == want.tobytes(), isa
            np.testing.assert_allclose(squares, np.sum(want.astype(np.float64) ** 2), rtol=1e-5)
            results.append(squares)
        assert results[0] == results[1], isa


@pytest.mark.parametrize("isa", ffi.isas())
def test_squares_of_a_gradient_tell_what_is_not_finite(pools, isa):
    a, b, dw = np.ones((1, 70, 40), np.float32), np.ones((1, 40, 50), np.float32), np.zeros((70, 50), np.float32)
    for bad in (np.inf, np.nan):
        a[0, 69, 3] = bad
        assert not np.isfinite(gradient(pools[isa, 2], a, b, dw, (F32, F32), F32))


def test_a_gradient_needs_somewhere_for_its_squares(pools):
    x = np.ones((1, 4, 4), np.float32)
    held = ffi.ffi.new("anert_matrix *", matrix(x, F32))[0]
    with pytest.raises(InputError, match="squares is NULL"):
        ffi.call(ffi.lib.anert_gemm_grad, pools["scalar", 1].ptr, F32, 4, 4, 4, 1.0, held, held, 0.0,
                 ffi.ffi.cast("float *", np.zeros((4, 4), np.float32).ctypes.data), ffi.ffi.NULL)  # fmt: skip


@pytest.mark.parametrize("isa", ffi.isas())
@pytest.mark.parametrize("precision", [F32, BF16])
@pytest.mark.parametrize("layout", ["rows", "cols", "strided"])
def test_a_few_columns_have_the_bits_of_one_by_one(pools, isa, precision, layout):
    """Up to eight columns are multiplied by A as it lies: a token's products do not depend on the prompt around it."""
    rng = np.random.default_rng(8)
    for m, k, n in ((33, 70, 2), (130, 333, 5), (64, 96, 8), (1, 40, 7)):
        a = laid_out(narrow(rng.standard_normal((2, m, k), np.float32), F16), layout)
        b = rng.standard_normal((2, k, n), np.float32)
        whole = gemm(pools[isa, 2], a, b, np.zeros((2, m, n), np.float32), (F16, F32, F32), precision)
        for j in range(n):
            one = np.zeros((2, m, 1), np.float32)
            gemm(pools[isa, 1], a, np.ascontiguousarray(b[:, :, j : j + 1]), one, (F16, F32, F32), precision)
            assert one.tobytes() == np.ascontiguousarray(whole[:, :, j : j + 1]).tobytes()
