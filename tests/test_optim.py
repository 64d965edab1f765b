"""Optimizer passes, reductions and recipes against NumPy in float64 and PyTorch; placements and threads bit for bit."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import ffi as native
from anert.errors import InputError

ISAS = native.isas()
SPECIAL = np.array([0, -0.0, 1, 65504, 65505, 65520, -1e9, np.inf, -np.inf, 6e-8, 2.98e-8], np.float32)


@functools.cache
def pool(isa, threads=2):
    return native.Pool(threads, isa)


def pointer(array, kind):
    return native.ffi.cast(kind, array.__array_interface__["data"][0])


def floats(array):
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    return pointer(array, "float *")


def randn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def halves_of(master):
    """What a placement must hold: fp16 bits, clamped."""
    return np.clip(master, -65504, 65504).astype(np.float16)


class Places:
    """fp16 copies of a (rows, cols) Param: their memory, their records, and what they must hold. aligned: to 64 bytes,
    else three elements in."""

    def __init__(self, rows, cols, kinds, aligned=False):
        self.rows, self.cols, self.kinds = rows, cols, kinds
        self.memory, self.starts, records = [], [], []
        for kind in kinds:
            size, row_stride, col_stride, broadcast = self.layout(kind)
            memory = np.full(size + 40, 7, np.float16)
            self.memory.append(memory)
            self.starts.append(-memory.ctypes.data % 64 // 2 if aligned else 3)
            records.append((pointer(memory[self.starts[-1] :], "uint16_t *"), row_stride, col_stride, broadcast))
        self.records = native.ffi.new("anert_placement[]", records) if records else native.ffi.NULL

    def layout(self, kind):
        """(elements, row_stride, col_stride, broadcast)"""
        name, extra = kind
        if name == "straight":
            return self.rows * (self.cols + extra), self.cols + extra, 1, 1
        if name == "transposed":
            return self.cols * (self.rows + extra), 1, self.rows + extra, 1
        if name == "scattered":  # every second element, rows apart
            return self.rows * (2 * self.cols + extra), 2 * self.cols + extra, 2, 1
        width = extra + 1  # "broadcast"
        return self.rows * self.cols * width, self.cols * width, width, width

    def check(self, master):
        """Each copy is the clamped master, and nothing beside it was written."""
        for memory, start, kind in zip(self.memory, self.starts, self.kinds, strict=True):
            size, row_stride, col_stride, broadcast = self.layout(kind)
            expected = np.full(size + 40, 7, np.float16)
            strides = (row_stride * 2, col_stride * 2, 2)
            view = np.ndarray((self.rows, self.cols, broadcast), np.float16, expected, 2 * start, strides)
            view[...] = halves_of(master)[:, :, None]
            np.testing.assert_array_equal(memory.view(np.uint16), expected.view(np.uint16), err_msg=str(kind))


def settings_of(step=1, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_scale=1.0):
    names = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    names |= {"bias1": 1 - betas[0] ** step, "bias2": 1 - betas[1] ** step, "grad_scale": grad_scale}
    return native.ffi.new("anert_adamw_args *", names)[0]


def update(function, pool, master, m, v, grad, rows, cols, args, where, n, clamped, decays=True):
    """One Param by a native optimizer."""
    item = {"master": master, "m": m, "v": v, "grad": grad, "rows": rows, "cols": cols, "decays": decays}
    native.call(function, pool, [item | {"placements": where, "n_placements": n}], 1, args, clamped)


def adamw(pool, master, m, v, grad, args, places=None):
    clamped = native.ffi.new("uint64_t *", 99)
    places = places or Places(*master.shape, [])
    update(native.lib.anert_adamw, pool.ptr, floats(master), floats(m), floats(v), floats(grad), *master.shape, args,
           places.records, len(places.kinds), clamped)  # fmt: skip
    return clamped[0]


def lion(pool, master, m, grad, args, places=None):
    clamped = native.ffi.new("uint64_t *", 99)
    places = places or Places(*master.shape, [])
    update(native.lib.anert_lion, pool.ptr, floats(master), floats(m), F.NULL, floats(grad), *master.shape, args,
           places.records, len(places.kinds), clamped)  # fmt: skip
    return clamped[0]


def sync(pool, master, places):
    clamped = native.ffi.new("uint64_t *", 99)
    arguments = floats(master), *master.shape, places.records, len(places.kinds), clamped
    native.call(native.lib.anert_param_sync, pool.ptr, *arguments)
    return clamped[0]


# ---- AdamW and Lion ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (130, 300), (1, 40_000), (700, 1)])
def test_adamw_against_float64(isa, shape):
    """Ten steps of the paper's algorithm 2 (decoupled decay), gradients scaled on the way in."""
    p, m, v = randn(0, *shape), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    want_p, want_m, want_v = p.astype(np.float64), np.zeros(shape), np.zeros(shape)
    lr, (b1, b2), eps, decay, scale = 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.25
    for step in range(1, 11):
        grad = randn(step, *shape)
        adamw(pool(isa), p, m, v, grad, settings_of(step, lr, (b1, b2), eps, decay, scale))
        g = grad.astype(np.float64) * scale
        want_m = b1 * want_m + (1 - b1) * g
        want_v = b2 * want_v + (1 - b2) * g * g
        update = want_m / (1 - b1**step) / (np.sqrt(want_v / (1 - b2**step)) + eps)
        want_p = want_p * (1 - lr * decay) - lr * update
    np.testing.assert_allclose(m, want_m, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(v, want_v, rtol=2e-6)
    np.testing.assert_allclose(p, want_p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_adamw_against_torch(isa):
    torch = pytest.importorskip("torch")
    p, m, v = randn(1, 96, 80), np.zeros((96, 80), np.float32), np.zeros((96, 80), np.float32)
    theirs = torch.nn.Parameter(torch.tensor(p, dtype=torch.float32))
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.2)
    for step in range(1, 21):
        grad = randn(100 + step, 96, 80) * np.float32(10.0 ** (step % 5 - 3))
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        adamw(pool(isa), p, m, v, grad, settings_of(step, 3e-3, (0.9, 0.999), 1e-6, 0.2))
    np.testing.assert_allclose(p, theirs.detach().numpy(), rtol=1e-6, atol=1e-6)
    state = optimizer.state[theirs]
    np.testing.assert_allclose(m, state["exp_avg"].numpy(), rtol=1e-5, atol=2e-6)  # gradients reach 40 and cancel
    np.testing.assert_allclose(v, state["exp_avg_sq"].numpy(), rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(3, 5), (130, 300), (1, 40_000), (700, 1)])
def test_lion_against_float64(isa, shape):
    """Chen et al. 2023, algorithm 2, with a zero gradient among the rest: sign(0) is 0."""
    p, m = randn(0, *shape), np.zeros(shape, np.float32)
    want_p, want_m = p.astype(np.float64), np.zeros(shape)
    for step in range(10):
        grad = randn(step, *shape)
        grad[0, 0] = 0
        lion(pool(isa), p, m, grad, settings_of(lr=1e-3, betas=(0.9, 0.99), grad_scale=2.0))
        g = grad.astype(np.float64) * 2
        want_p = want_p * (1 - 1e-3 * 0.1) - 1e-3 * np.sign(0.9 * want_m + 0.1 * g)
        want_m = 0.99 * want_m + 0.01 * g
    np.testing.assert_allclose(m, want_m, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(p, want_p, atol=3e-6)


def test_bits_are_the_same_for_every_isa_thread_count_and_placement():
    """No fused multiply-add, no reduction: an update has one result."""
    seen = set()
    for isa in ISAS:
        for threads in (1, 2, 3):
            for kinds in ([], [("straight", 0)], [("straight", 8), ("transposed", 3)]):
                p, m, v, g = (randn(i, 300, 217) for i in range(4))
                v = np.abs(v)
                adamw(pool(isa, threads), p, m, v, g, settings_of(3), Places(300, 217, kinds))
                q, n = randn(5, 300, 217), randn(6, 300, 217)
                lion(pool(isa, threads), q, n, g, settings_of(3), Places(300, 217, kinds))
                seen.add(b"".join(a.tobytes() for a in (p, m, v, q, n)))
    assert len(seen) == 1


kinds_of = st.lists(
    st.tuples(st.sampled_from(["straight", "transposed", "scattered", "broadcast"]), st.integers(0, 40)), max_size=4
)
sides = st.one_of(st.integers(1, 70), st.sampled_from([1, 64, 65, 127, 256, 257, 300]))


@given(sides, sides, kinds_of, st.sampled_from(ISAS), st.integers(1, 3), st.booleans())
@settings(max_examples=120, deadline=None)
def test_placements(rows, cols, kinds, isa, threads, with_special):
    """Every placement holds the clamped fp16 of master bit for bit; sync, AdamW and Lion write alike."""
    master = randn(rows * 1000 + cols, rows, cols)
    if with_special:
        spots = np.random.default_rng(cols).integers(0, master.size, 5)
        master.flat[spots] = np.random.default_rng(rows).choice(SPECIAL, 5)
    past = np.count_nonzero(np.abs(master) > 65504) if kinds else 0
    for write in ("sync", "adamw", "lion"):
        places, p = Places(rows, cols, kinds), master.copy()
        m, v, g = (np.zeros((rows, cols), np.float32) for _ in range(3))
        still = settings_of(lr=0.0)  # inf * 1 - 0 stays as it is
        if write == "sync":
            count = sync(pool(isa, threads), p, places)
        elif write == "adamw":
            count = adamw(pool(isa, threads), p, m, v, g, still, places)
        else:
            count = lion(pool(isa, threads), p, m, g, still, places)
        np.testing.assert_array_equal(p, master)
        places.check(master)
        assert count == past, "a weight counts once, however many copies it has"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(330, 2500), (352, 2200)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "kinds",
    [
        [("straight", 0)],
        [("straight", 64)],
        [("transposed", 0)],
        [("transposed", 8), ("straight", 3)],
        [("broadcast", 3)],
    ],
)
def test_large_placements(kinds, threads, shape, isa):
    """Many tiles in both directions: long rows, blocks whose halves lie in the pool's scratch, and copies of whole
    lines."""
    master = randn(0, *shape) * 100
    master[::50, ::70] = 1e6
    places = Places(*shape, kinds, aligned=shape[0] % 32 == 0)
    assert sync(pool(isa, threads), master, places) == np.count_nonzero(np.abs(master) > 65504)
    places.check(master)


def test_empty_param():
    for shape in ((0, 5), (5, 0)):
        empty = np.zeros(shape, np.float32)
        assert adamw(pool("scalar"), empty, empty, empty, empty, settings_of(), Places(*shape, [("straight", 0)])) == 0


# ---- Reductions ----


def sum_squares(pool, x):
    out, finite = native.ffi.new("double *"), native.ffi.new("int32_t *")
    native.call(native.lib.anert_sum_squares, pool.ptr, floats(x), x.size, out, finite)
    return out[0], finite[0]


def amax(pool, x):
    most, finite = native.ffi.new("float *"), native.ffi.new("int32_t *")
    native.call(native.lib.anert_f16_amax, pool.ptr, pointer(x, "uint16_t *"), x.size, most, finite)
    return most[0], finite[0]


@pytest.mark.parametrize("n", [0, 1, 15, 17, 16384, 16385, 100_000, 1_500_000])
def test_sum_squares(n):
    x = randn(n, n) * np.float32(1e15)
    exact = float(np.sum(x.astype(np.longdouble) ** 2))
    results = {sum_squares(pool(isa, threads), x) for isa in ISAS for threads in (1, 2, 4)}
    assert len(results) == 1, "one result for every instruction set and thread count"
    total, finite = results.pop()
    assert finite == 1
    assert total == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sum_squares_sees_what_is_not_finite(bad):
    largest = np.full(70_000, np.finfo(np.float32).max)
    assert sum_squares(pool("scalar"), largest)[1] == 1
    for spot in (0, 16_383, 69_999):
        x = randn(0, 70_000)
        x[spot] = bad
        assert sum_squares(pool(ISAS[-1]), x)[1] == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [0, 1, 33, 16385, 200_000])
def test_amax(isa, n):
    x = np.random.default_rng(n).integers(0, 65536, n, np.uint16)
    x[(x & 0x7C00) == 0x7C00] = 0x8001
    x = x.view(np.float16)
    assert amax(pool(isa), x) == (float(np.max(np.abs(x), initial=0)), 1)
    if n:
        x[n // 2] = -np.inf
        assert amax(pool(isa), x) == (np.inf, 0)
        x[n // 2] = np.nan
        numbers = x[~np.isnan(x)]
        assert amax(pool(isa), x) == (float(np.max(np.abs(numbers), initial=0)), 0)


# ---- Gradient recipes ----


def half_view(seed, rows, cols, stride):
    memory = (np.random.default_rng(seed).standard_normal(rows * stride + cols) * 3).astype(np.float16)
    return np.ndarray((rows, cols), np.float16, memory, 0, (stride * 2, 2))


@given(
    st.integers(0, 80), st.sampled_from([0, 1, 5, 31, 256, 1024, 1500]), st.integers(0, 9), st.integers(0, 9),
    st.booleans(), st.sampled_from(ISAS),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_rowsum(c, n, extra_tap, extra_cot, with_tap, isa):
    tap, cot = half_view(1, c, n, n + extra_tap), half_view(2, c, n, n + extra_cot)
    start, alpha = randn(3, c), np.float32(0.37)
    taps = pointer(tap, "uint16_t *") if with_tap else native.ffi.NULL
    arguments = alpha, taps, n + extra_tap, pointer(cot, "uint16_t *"), n + extra_cot, c, n
    results = []
    for threads in (1, 2, 3):
        dw = start.copy()
        native.call(native.lib.anert_rowsum, pool(isa, threads).ptr, *arguments, floats(dw))
        results.append(dw.tobytes())
    assert len(set(results)) == 1
    products = cot.astype(np.float64) * (tap.astype(np.float64) if with_tap else 1)
    bound = 1e-6 * (np.abs(products).sum(axis=1) + 1)
    assert (np.abs(dw - (start + np.float64(alpha) * products.sum(axis=1))) <= bound).all()


@given(sides, sides, st.integers(0, 9), st.sampled_from(["straight", "transposed", "strided"]), st.sampled_from(ISAS))
@settings(max_examples=80, deadline=None)
def test_accumulate(rows, cols, extra, layout, isa):
    """alpha * cot rounds once, the sum once: the same bits as NumPy in fp32."""
    if layout == "transposed":
        cot = half_view(4, cols, rows, rows + extra).T
    elif layout == "straight":
        cot = half_view(4, rows, cols, cols + extra)
    else:
        cot = half_view(4, rows, 2 * cols, 2 * cols + extra)[:, ::2]
    strides = [s // 2 for s in cot.strides]
    start, alpha = randn(3, rows, cols), np.float32(0.37)
    for threads in (1, 3):
        dw = start.copy()
        arguments = alpha, pointer(cot, "uint16_t *"), *strides, rows, cols, floats(dw)
        native.call(native.lib.anert_accumulate, pool(isa, threads).ptr, *arguments)
        np.testing.assert_array_equal(dw, start + alpha * cot.astype(np.float32))


@pytest.mark.parametrize("transposed", [False, True])
def test_large_accumulate(transposed):
    cot = half_view(0, 700, 300, 301).T if transposed else half_view(0, 300, 700, 701)
    dw = np.zeros((300, 700), np.float32)
    arguments = 2.0, pointer(cot, "uint16_t *"), *(s // 2 for s in cot.strides), 300, 700, floats(dw)
    native.call(native.lib.anert_accumulate, pool(ISAS[-1], 3).ptr, *arguments)
    np.testing.assert_array_equal(dw, 2 * cot.astype(np.float32))


F32, F16 = native.lib.ANERT_F32, native.lib.ANERT_F16


def matrix_of(array, transposed=False):
    """An anert_matrix of a 2-d fp16 view, or of its transpose."""
    strides = [s // 2 for s in array.strides]
    return (pointer(array, "void *"), F16, *(strides[::-1] if transposed else strides), 0)


@given(
    st.sampled_from(["gemm", "rowsum", "ones", "add"]), st.integers(1, 70), st.integers(1, 70), st.integers(1, 40),
    st.booleans(), st.booleans(), st.sampled_from(ISAS),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_a_gradient_is_the_call_of_its_kind(kind, rows, cols, k, first, fresh, isa):
    """Its bits are those of the call by itself; it sets dw where it is the first of a fresh step, else it adds."""
    lib, alpha = native.lib, np.float32(0.37)
    tap, cot = half_view(1, rows, k, k + 3), half_view(2, cols if kind == "gemm" else rows, k, k + 1)
    if kind == "add":
        cot = half_view(2, rows, cols, cols + 1)
    shape = (rows, 1) if kind in ("rowsum", "ones") else (rows, cols)
    dw = randn(3, *shape)
    want = np.zeros_like(dw) if first and fresh else dw.copy()
    squares = native.ffi.new("double[2]", [-1.0, -1.0])
    record = {"first": first, "m": shape[0], "n": shape[1], "k": k, "dw": floats(dw), "precision": F32}
    if kind == "gemm":
        a, b = matrix_of(tap), matrix_of(cot, transposed=True)
        beta = 0.0 if first and fresh else 1.0
        arguments = F32, rows, cols, k, alpha, a, b, beta, floats(want), squares
        native.call(lib.anert_gemm_grad, pool(isa).ptr, *arguments)
        record |= {"kind": lib.ANERT_GRAD_GEMM, "a": a, "b": b, "squares": squares + 1}
    elif kind == "add":
        strides = [s // 2 for s in cot.strides]
        arguments = alpha, pointer(cot, "uint16_t *"), *strides, rows, cols, floats(want)
        native.call(lib.anert_accumulate, pool(isa).ptr, *arguments)
        record |= {"kind": lib.ANERT_GRAD_ADD, "b": matrix_of(cot)}
    else:
        taps = pointer(tap, "uint16_t *") if kind == "rowsum" else native.ffi.NULL
        arguments = alpha, taps, k + 3, pointer(cot, "uint16_t *"), k + 1, rows, k, floats(want)
        native.call(lib.anert_rowsum, pool(isa).ptr, *arguments)
        record |= {"kind": lib.ANERT_GRAD_ROWSUM, "b": matrix_of(cot)}
        record |= {"a": matrix_of(tap)} if kind == "rowsum" else {}
    made = native.ffi.new("anert_gradient *", record)
    native.call(lib.anert_gradient_run, pool(isa).ptr, made, alpha, fresh)
    assert dw.tobytes() == want.tobytes()
    assert squares[1] == squares[0]
    if kind == "gemm":  # nobody needs to ask for the squares
        made.squares = native.ffi.NULL
        native.call(lib.anert_gradient_run, pool(isa).ptr, made, alpha, 0)


def test_no_gradient_is_of_an_unknown_kind():
    for record in (native.ffi.NULL, native.ffi.new("anert_gradient *", {"kind": 3})):
        with pytest.raises(InputError, match="no gradient of kind"):
            native.call(native.lib.anert_gradient_run, pool(ISAS[0]).ptr, record, 1.0, 0)
    missing = native.ffi.new("anert_gradient *", {"kind": 2, "first": 1, "m": 2, "n": 2})
    with pytest.raises(InputError, match="dw is NULL"):
        native.call(native.lib.anert_gradient_run, pool(ISAS[0]).ptr, missing, 1.0, 1)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.booleans()), max_size=6), st.sampled_from(ISAS))
@settings(max_examples=40, deadline=None)
def test_squares_of_gradients_are_read_where_they_are_not_known(shapes, isa):
    """A known one is believed, a NaN or inf looked into; all are unknown afterwards, since gradients change."""
    ffi = native.ffi
    grads = [randn(i, rows, cols) for i, (rows, cols, _) in enumerate(shapes)]
    known = np.array([float(i + 1) if k else (np.nan, np.inf)[i % 2] for i, (*_, k) in enumerate(shapes)])
    records = [{"grad": floats(g), "rows": g.shape[0], "cols": g.shape[1]} for g in grads]
    total, table = ffi.new("double *"), ffi.new("anert_param[]", records or 1)
    want = 0.0
    for i, (grad, (*_, believed)) in enumerate(zip(grads, shapes, strict=True)):
        want += known[i] if believed else sum_squares(pool(isa), grad.reshape(-1))[0]
    native.call(
        native.lib.anert_grad_squares, pool(isa).ptr, table, len(grads), ffi.from_buffer("double[]", known), total
    )
    assert total[0] == want
    assert np.isnan(known).all()


def test_squares_of_gradients_tell_what_is_not_finite_and_what_is_missing():
    ffi, lib = native.ffi, native.lib
    grad = randn(0, 3, 5)
    grad[2, 4] = np.inf
    table = ffi.new("anert_param[]", [{"grad": floats(grad), "rows": 3, "cols": 5}])
    squares, total = ffi.new("double[]", [np.nan]), ffi.new("double *")
    native.call(lib.anert_grad_squares, ffi.NULL, table, 1, squares, total)
    assert not np.isfinite(total[0])
    for arguments, message in (
        ((table, 1, squares, ffi.NULL), "total is NULL"),
        ((ffi.NULL, 1, squares, total), "params is NULL"),
        ((table, 1, ffi.NULL, total), "squares is NULL"),
        ((table, -1, squares, total), "squares of -1 gradients"),
        ((ffi.new("anert_param[]", [{"rows": 3, "cols": 5}]), 1, squares, total), "x is NULL"),
    ):
        with pytest.raises(InputError, match=message):
            native.call(lib.anert_grad_squares, ffi.NULL, *arguments)


def test_a_pass_advances_the_seeds_of_the_surfaces_that_it_writes():
    from anert.surface import Heap, Surface

    surface, other, lib = Surface(Heap(), 256), Surface(Heap(), 256), native.lib
    x = randn(0, 4, 6)
    half = native.ffi.cast("uint16_t *", surface.ptr)
    where = native.ffi.new("anert_placement[]", [(half, 6, 1, 1, surface.handle)])
    before = surface.seed
    native.call(lib.anert_param_sync, pool(ISAS[0]).ptr, floats(x), 4, 6, where, 1, native.ffi.NULL)
    assert surface.seed == before + 1 and other.seed == before
    np.testing.assert_array_equal(surface.array(np.float16, (4, 6)), x.astype(np.float16))


# ---- Bad arguments ----

F = native.ffi


def records(*rows):
    return F.new("anert_placement[]", list(rows))


def test_bad_passes():
    lib, null = native.lib, F.NULL
    p, half = F.new("float[64]"), F.new("uint16_t[64]")
    args = settings_of()
    cases = [
        ((null, 4, 4, null, 0), "master is NULL"),
        ((p, -1, 4, null, 0), r"no Param has the shape \(-1, 4\)"),
        ((p, 1 << 40, 1 << 40, null, 0), "no Param has the shape"),
        ((p, 4, 4, null, 1), "1 placements at NULL"),
        ((p, 4, 4, null, -1), "-1 placements"),
        ((p, 4, 4, records((null, 4, 1, 1)), 1), "placement 0 has base NULL"),
        ((p, 4, 4, records((half, 4, 1, 1), (half, -4, 1, 1)), 2), r"placement 1 has base set, strides \(-4, 1\)"),
        ((p, 4, 4, records((half, 4, -1, 1)), 1), r"strides \(4, -1\)"),
        ((p, 4, 4, records((half, 4, 1, 0)), 1), "broadcast 0; expected"),
        ((p, 4, 4, records((half, 1 << 62, 1, 1)), 1), "exceeds the address space"),
        ((p, 4, 4, records((half, 1 << 61, 1 << 61, 1)), 1), "exceeds the address space"),
    ]
    for (master, rows, cols, where, n), message in cases:
        with pytest.raises(InputError, match=message):
            native.call(lib.anert_param_sync, null, master, rows, cols, where, n, null)
        with pytest.raises(InputError, match=message):
            update(lib.anert_adamw, null, master, p, p, p, rows, cols, args, where, n, null)
        with pytest.raises(InputError, match=message):
            update(lib.anert_lion, null, master, p, null, p, rows, cols, args, where, n, null)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta1", 1.0, r"betas \(1, 0.95\)"),
        ("beta2", -0.5, r"betas \(0.9, -0.5\)"),
        ("beta1", float("nan"), "betas"),
        ("lr", float("inf"), "lr inf"),
        ("weight_decay", float("nan"), "weight_decay nan"),
        ("grad_scale", float("inf"), "grad_scale inf"),
        ("eps", -1.0, "eps -1"),
        ("bias1", 0.0, "bias1 0"),
        ("bias2", float("nan"), "bias2 nan"),
    ],
)
def test_bad_settings(field, value, message):
    args, p, null = settings_of(), F.new("float[4]", [1, 2, 3, 4]), F.NULL
    setattr(args, field, value)
    with pytest.raises(InputError, match=message):
        update(native.lib.anert_adamw, null, p, p, p, p, 2, 2, args, null, 0, null)
    if field not in ("eps", "bias1", "bias2"):
        with pytest.raises(InputError, match=message):
            update(native.lib.anert_lion, null, p, p, null, p, 2, 2, args, null, 0, null)
    assert list(p) == [1, 2, 3, 4]


def test_null_state():
    args, p, null = settings_of(), F.new("float[4]"), F.NULL
    for arrays, name in (((p, null, p, p), "m"), ((p, p, null, p), "v"), ((p, p, p, null), "grad")):
        with pytest.raises(InputError, match=f"{name} is NULL"):
            update(native.lib.anert_adamw, null, *arrays, 2, 2, args, null, 0, null)
    for arrays, name in (((p, null, null, p), "m"), ((p, p, null, null), "grad")):
        with pytest.raises(InputError, match=f"{name} is NULL"):
            update(native.lib.anert_lion, null, *arrays, 2, 2, args, null, 0, null)


@pytest.mark.parametrize("name", ["anert_adamw", "anert_lion"])
def test_many_params_are_those_one_by_one(name):
    """Decayed and not, one matrix and one gain; and none is touched where one of them is refused."""
    function, pool, rng = getattr(native.lib, name), native.Pool(2), np.random.default_rng(5)
    arrays = [[rng.random((rows, cols), np.float32) for _ in range(4)] for rows, cols in ((33, 70), (50, 1), (4, 600))]
    decays = (True, False, True)
    alone, together = ([[x.copy() for x in group] for group in arrays] for _ in range(2))
    halves = [np.zeros(group[0].shape, np.float16) for group in arrays]

    def records(groups):
        for group, half, decay in zip(groups, halves, decays, strict=True):
            rows, cols = half.shape
            where = F.new("anert_placement[1]", [(F.cast("uint16_t *", half.ctypes.data), cols, 1, 1)])
            kept.append(where)
            names = dict(zip(("master", "m", "v", "grad"), map(floats, group), strict=True))
            yield names | {"rows": rows, "cols": cols, "decays": decay, "placements": where, "n_placements": 1}

    kept, counts, args = [], F.new("uint64_t *"), settings_of()
    for record in records(alone):
        native.call(function, pool.ptr, [record], 1, args, counts)
    native.call(function, pool.ptr, list(records(together)), 3, args, counts)
    assert [x.tobytes() for g in together for x in g] == [x.tobytes() for g in alone for x in g]
    assert all(np.array_equal(half, group[0].astype(np.float16)) for half, group in zip(halves, together, strict=True))
    before = [x.copy() for group in together for x in group]
    bad = list(records(together))
    bad[2]["grad"] = F.NULL
    with pytest.raises(InputError, match="grad is NULL"):
        native.call(function, pool.ptr, bad, 3, args, counts)
    assert all(np.array_equal(x, y) for x, y in zip(before, (x for g in together for x in g), strict=True))
    for n, message in ((-1, "-1 Params"), (2, "2 Params at NULL")):
        with pytest.raises(InputError, match=message):
            native.call(function, pool.ptr, F.NULL, n, args, counts)


def test_bad_reductions():
    lib, null, x, h = native.lib, F.NULL, F.new("float[4]"), F.new("uint16_t[4]")
    out, most = F.new("double *"), F.new("float *")
    cases = [
        (lib.anert_sum_squares, (null, 4, out, null), "x is NULL"),
        (lib.anert_sum_squares, (x, 4, null, null), "out is NULL"),
        (lib.anert_sum_squares, (x, 1 << 62, out, null), "too many"),
        (lib.anert_f16_amax, (null, 4, most, null), "x is NULL"),
        (lib.anert_f16_amax, (h, 4, null, null), "amax is NULL"),
        (lib.anert_f16_amax, (h, 1 << 63, most, null), "too many"),
        (lib.anert_rowsum, (1, null, 0, h, 1, 2, 2, x), "a stride is at least a row"),
        (lib.anert_rowsum, (1, h, 1, h, 2, 2, 2, x), "a stride is at least a row"),
        (lib.anert_rowsum, (1, null, 0, h, 2, -1, 2, x), "a stride is at least a row"),
        (lib.anert_rowsum, (1, null, 0, h, 1 << 62, 1 << 62, 2, x), "a stride is at least a row"),
        (lib.anert_rowsum, (1, null, 0, null, 2, 2, 2, x), "cot is NULL"),
        (lib.anert_rowsum, (1, null, 0, h, 2, 2, 2, null), "dw is NULL"),
        (lib.anert_accumulate, (1, h, -2, 1, 2, 2, x), "no gradient has the shape"),
        (lib.anert_accumulate, (1, h, 2, 1, 2, -2, x), "no gradient has the shape"),
        (lib.anert_accumulate, (1, h, 1 << 62, 1, 4, 2, x), "no gradient has the shape"),
        (lib.anert_accumulate, (1, null, 2, 1, 2, 2, x), "cot is NULL"),
        (lib.anert_accumulate, (1, h, 2, 1, 2, 2, null), "dw is NULL"),
    ]
    for function, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            native.call(function, null, *arguments)
    native.call(lib.anert_sum_squares, null, null, 0, out, null)
    assert out[0] == 0
