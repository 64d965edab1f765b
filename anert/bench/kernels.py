"""The parts: products, conversions, weight sync, dispatch. Each against the plainest thing that moves or computes as
much."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from anert import ffi
from anert.bench.measure import Case
from anert.bench.options import BenchOptions
from anert.errors import AnertError
from anert.ffi import call
from anert.surface import Surface

CACHED_OUT = 64 << 20
"""Elements of an array that no last-level cache holds, with its result: 256 MiB and 128 MiB."""
SMALL_MODEL = (768, 2048, 32000)
"""dim, hidden_dim, vocab_size where no model is named: Stories 110M."""


def cases(name: str, options: BenchOptions) -> list[Case]:
    """The cases of `gemm`, `convert`, `sync` or `dispatch`."""
    table: dict[str, Callable[[BenchOptions], list[Case]]] = {
        "gemm": gemm, "convert": convert, "sync": sync, "dispatch": dispatch,
    }  # fmt: skip
    return table[name](options)


# ---- products


def gemm(options: BenchOptions) -> list[Case]:
    """W X, W^T dY and dY X^T of a model's matrices at batch * seq_len positions, fp16 operands as in a step."""
    rt = options.runtime()
    if options.plugin:
        _, c = options.model()
        dim, hidden, vocab, n = c.dim, c.hidden_dim, c.vocab_size, c.seq_len * options.batch
    else:
        (dim, hidden, vocab), n = SMALL_MODEL, (options.seq_len or 256) * options.batch
    peak = partial(rt.peak_gflops, again=True)
    shapes = dict.fromkeys(((dim, dim), (hidden, dim), (dim, hidden), (vocab, dim)))
    kinds = ("forward", "dx", "dw")
    return [_product(rt, kind, rows, cols, n, peak) for rows, cols in shapes for kind in kinds]


def _product(rt: Any, kind: str, rows: int, cols: int, n: int, peak: Callable[[], float]) -> Case:
    rng = np.random.default_rng(rows + cols)
    w, x, dy = (Surface(rt.heap, 2 * a * b).array(np.float16, (a, b)) for a, b in ((rows, cols), (cols, n), (rows, n)))
    for array in (w, x, dy):
        array[...] = rng.uniform(-1, 1, array.shape)
    left, right = {"forward": (w, x), "dx": (w.T, dy), "dw": (dy, x.T)}[kind]
    m, k, columns = left.shape[0], left.shape[1], right.shape[1]
    size = np.float32 if kind == "dw" else np.float16
    out = Surface(rt.heap, m * columns * np.dtype(size).itemsize).array(size, (m, columns))
    a, b, c = (_matrix(array) for array in (left, right, out))
    precision = ffi.lib.ANERT_BF16 if rt.precision == "bf16" else ffi.lib.ANERT_F32
    error = ffi.error()

    def run() -> None:
        call(ffi.lib.anert_gemm, rt.pool.ptr, precision, 1, m, columns, k, 1 / 16, a, b, 0.0, c, err=error)

    def verify() -> None:
        some = np.s_[:: max(1, m // 16)]
        expected = left[some].astype(np.float64) @ right.astype(np.float64) / 16
        worst = np.max(np.abs(out[some] - expected)) / np.max(np.abs(expected))
        if not worst < (2e-2 if rt.precision == "bf16" else 2e-3):
            raise AnertError(f"bench gemm {kind} {rows}x{cols}: wrong by {worst:.2e} of the largest value")

    moved = left.nbytes + right.nbytes + out.nbytes
    return Case(f"gemm {kind} {rows}x{cols} n={n} {rt.precision}", run, "GFLOP/s", 2e-9 * m * columns * k,
                2 * m * columns * k, moved, peak, verify=verify)  # fmt: skip


def _matrix(array: np.ndarray) -> Any:
    dtype = ffi.lib.ANERT_F16 if array.dtype == np.float16 else ffi.lib.ANERT_F32
    strides = (s // array.itemsize for s in array.strides)
    pointer = ffi.ffi.cast("void *", array.ctypes.data)
    return ffi.ffi.new("anert_matrix *", (pointer, dtype, *strides, 0))[0]


# ---- conversions and copies


def copier(source: np.ndarray, target: np.ndarray, threads: int) -> Callable[[], None]:
    """A plain copy by as many threads as the engine has."""
    source.fill(1.0)  # pages that nobody wrote are all the same one, which a cache holds
    pool = ThreadPoolExecutor(threads)
    edges = np.linspace(0, source.size, threads + 1).astype(int)
    pairs = [(target[a:b], source[a:b]) for a, b in pairwise(edges)]

    def run() -> None:
        list(pool.map(lambda pair: np.copyto(*pair), pairs))

    return run


def convert(options: BenchOptions) -> list[Case]:
    """fp32 -> fp16, fp16 -> fp32, and the transposing forms."""
    rt = options.runtime()
    n = options.size or CACHED_OUT
    rows = 1 << (n.bit_length() // 2)
    cols = n // rows
    n = rows * cols
    wide = Surface(rt.heap, 4 * n).array(np.float32, (n,))
    narrow = Surface(rt.heap, 2 * n).array(np.uint16, (n,))
    half = n // 4 * 3
    a, b = (Surface(rt.heap, 4 * half).array(np.float32, (half,)) for _ in range(2))
    wide[...] = np.random.default_rng(1).standard_normal(n, np.float32)
    c, lib, error = ffi.ffi, ffi.lib, ffi.error()
    w, h = c.cast("float *", wide.ctypes.data), c.cast("uint16_t *", narrow.ctypes.data)
    none, pool, moved = c.NULL, rt.pool.ptr, 6 * n

    def verify() -> None:
        call(lib.anert_f32_to_f16, pool, w, h, n, 0, none, err=error)
        if not np.array_equal(narrow.view(np.float16)[:4096], wide[:4096].astype(np.float16)):
            raise AnertError("bench convert: fp16 differs from NumPy's")

    def case(name: str, function: Any, *args: Any) -> Case:
        return Case(name, lambda: call(function, *args, err=error), "GB/s", moved / 1e9, 0.0, moved,
                    baseline="copy", verify=verify)  # fmt: skip

    return [
        Case("copy", copier(a, b, rt.pool.threads), "GB/s", 8 * half / 1e9, 0.0, 8 * half),
        case("fp32 to fp16", lib.anert_f32_to_f16, pool, w, h, n, 0, none),
        case("fp16 to fp32", lib.anert_f16_to_f32, pool, h, w, n),
        case("fp32 to fp16, transposed", lib.anert_f32_to_f16_2d, pool, w, cols, h, rows, rows, cols, 1, 0, none),
        case("fp16 to fp32, transposed", lib.anert_f16_to_f32_2d, pool, h, cols, w, rows, rows, cols, 1),
    ]


# ---- weight sync


def sync(options: BenchOptions) -> list[Case]:
    """Masters -> every fp16 copy: straight, transposed, both; and what the fused write adds to AdamW."""
    from anert.optim import AdamW
    from anert.param import ParamStore, Spec

    rt = options.runtime()
    if options.plugin:
        model, _ = options.model()
        specs = {n: s for n, s in model.specs().items() if n.startswith("layers.")}
    else:
        dim, hidden, _ = SMALL_MODEL
        shapes = [(dim, dim)] * 4 + [(hidden, dim)] * 2 + [(dim, hidden)]
        specs = {f"layers.{i}.w{j}": Spec.normal(*shape) for i in range(12) for j, shape in enumerate(shapes)}

    def store(train: bool, *ways: str) -> ParamStore:
        made = ParamStore(rt.heap, rt.pool, specs, train)
        for p in made.values():
            for way in ways:
                p.place(Surface(rt.heap, 2 * p.spec.size), _slot(p, way))
        made.initialise(1)
        if made.grads is not None:
            made.grads[...] = 1e-3
        return made

    straight, turned, both = (
        store(False, "straight"),
        store(False, "transposed"),
        store(False, "straight", "transposed"),
    )
    n = straight.n_params
    source, target = (np.zeros(3 * n // 4, np.float32) for _ in range(2))
    made = [Case("copy", copier(source, target, rt.pool.threads), "GB/s", 8 * source.size / 1e9, 0.0, 8 * source.size)]
    for name, s, moved in (("straight", straight, 6), ("transposed", turned, 6), ("both", both, 8)):
        made.append(Case(f"sync {name}", s.sync, "GB/s", moved * n / 1e9, 0.0, moved * n, baseline="copy",
                         notes={"params": n}))  # fmt: skip
    for name, ways in (("no copy", ()), ("straight", ("straight",)), ("both", ("straight", "transposed"))):
        optimizer = AdamW(store(True, *ways), 0.9, 0.95, 1e-8, 0.1)
        made.append(Case(f"adamw, {name}", partial(optimizer.step, 1e-4, 1.0), "ms", nbytes=(28 + 2 * len(ways)) * n,
                         baseline="adamw, no copy"))  # fmt: skip
    return made


def _slot(p: Any, way: str) -> Any:
    from anert.kernel import Slot

    strides = (p.cols, 1) if way == "straight" else (1, p.rows)
    return Slot(way, p.rows, p.cols, 0, *strides)


# ---- dispatch


def dispatch(options: BenchOptions) -> list[Case]:
    """One run of a program that adds eight single numbers: what a call costs the host."""
    from anert.backend.base import Binding
    from anert.mil import ops
    from anert.mil.graph import Function
    from anert.mil.text import print_module

    rt = options.runtime()
    fn = Function("main")
    xs = [fn.input(f"i{i:02d}_x", (1, 1)) for i in range(8)]
    total = xs[0]
    for x in xs[1:]:
        total = ops.add(total, x)
    fn.claim("o00_y", total)
    fn.returns(total)
    program = rt.backend.compile(print_module(fn))
    surfaces = {p.name: rt.backend.surface(p.nbytes) for p in (*program.inputs, *program.outputs)}
    for p in program.inputs:
        surfaces[p.name].array(np.float16, (1, 1))[...] = 1.5
    binding: Binding = program.bind(surfaces)

    def verify() -> None:
        if surfaces["o00_y"].array(np.float16, (1, 1))[0, 0] != 12.0:
            raise AnertError("bench dispatch: the sum is wrong")

    return [Case(f"dispatch {rt.backend.name}", binding.run, "us", verify=verify)]
