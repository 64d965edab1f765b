"""fp16 conversions, bit for bit, on every instruction set: NumPy is the oracle, the hardware's rule that for NaN."""

import functools
import os
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_build import SHIMS, compile_c, load_c

from anert import ffi as native
from anert.errors import InputError

ISAS = native.isas()


@functools.cache
def pool(isa, threads=2):
    return native.Pool(threads, isa)


def pointer(array, kind):
    """C pointer to the first element, whatever the strides."""
    return native.ffi.cast(kind, array.__array_interface__["data"][0])


def down(x, isa, clamp=0):
    """(halves as uint16, count of clamped)."""
    x = np.ascontiguousarray(x, np.float32)
    out, clamped = np.empty(x.size, np.uint16), native.ffi.new("uint64_t *", 99)
    arguments = pointer(x, "float *"), pointer(out, "uint16_t *"), x.size, clamp, clamped
    native.call(native.lib.anert_f32_to_f16, pool(isa).ptr, *arguments)
    return out, clamped[0]


def up(halves, isa):
    halves = np.ascontiguousarray(halves, np.uint16)
    out = np.empty(halves.size, np.float32)
    arguments = pointer(halves, "uint16_t *"), pointer(out, "float *"), halves.size
    native.call(native.lib.anert_f16_to_f32, pool(isa).ptr, *arguments)
    return out.view(np.uint32)


def down_oracle(x):
    """NumPy for numbers; NaN: sign | 0x7e00 | payload >> 13."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        halves = x.astype(np.float16).view(np.uint16)
    quiet = (bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x3FF).astype(np.uint16)
    return np.where(np.isnan(x), quiet, halves)


def up_oracle(halves):
    bits = halves.view(np.float16).astype(np.float32).view(np.uint32)
    wide = halves.astype(np.uint32)
    quiet = (wide & 0x8000) << 16 | 0x7FC00000 | (wide & 0x3FF) << 13
    return np.where((halves & 0x7FFF) > 0x7C00, quiet, bits)


ALL = np.arange(65536, dtype=np.uint16)


def hard_cases():
    """Every half, every midpoint between neighbours and the floats beside it, the edges of fp32, a million patterns."""
    finite = ALL[(ALL & 0x7FFF) < 0x7C00].view(np.float16).astype(np.float32)
    positive = np.sort(finite[np.signbit(finite) == 0])
    ties = np.append((positive[1:] + positive[:-1]) / 2, np.float32(65520))
    around = [np.nextafter(ties, np.float32(edge)) for edge in (-np.inf, np.inf)]
    exact = np.concatenate([positive, ties, *around])
    edges = np.array(
        [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x32FFFFFF, 0x7F7FFFFF, 0x7F800000,
         0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 0x7F801FFF, 0x7F802000], np.uint32)  # fmt: skip
    edges = edges.view(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, np.uint32).view(np.float32)
    return np.concatenate([exact, -exact, edges, -edges, random])


CASES = hard_cases()


@pytest.mark.parametrize("isa", ISAS)
def test_all_halves_up(isa):
    np.testing.assert_array_equal(up(ALL, isa), up_oracle(ALL))


@pytest.mark.parametrize("isa", ISAS)
def test_hard_cases_down(isa):
    out, clamped = down(CASES, isa)
    np.testing.assert_array_equal(out, down_oracle(CASES))
    assert clamped == 0


@pytest.mark.parametrize("isa", ISAS)
def test_round_trip(isa):
    """Every half but signalling NaNs, which come back quiet."""
    back, _ = down(up(ALL, isa).view(np.float32), isa)
    signalling = ((ALL & 0x7FFF) > 0x7C00) & ((ALL & 0x200) == 0)
    np.testing.assert_array_equal(back, np.where(signalling, ALL | 0x200, ALL))


@pytest.mark.parametrize("isa", ISAS)
def test_clamp(isa):
    out, clamped = down(CASES, isa, clamp=1)
    np.testing.assert_array_equal(out, down_oracle(np.clip(CASES, -65504, 65504)))
    assert clamped == np.count_nonzero(np.abs(CASES) > 65504)
    edge = np.array([65504, 65504.004, 65519, 65520, np.inf, np.nan, -65505, -np.inf, 1], np.float32)
    out, clamped = down(edge, isa, clamp=1)
    assert out[:5].tolist() == [0x7BFF] * 5
    assert out[5:].tolist() == [0x7E00, 0xFBFF, 0xFBFF, 0x3C00]
    assert clamped == 6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 65535, 65537, 200_003])
def test_lengths_and_alignments(isa, n):
    """Any length at any alignment, nothing written beside."""
    for shift in (0, 1, 3):
        x = CASES[shift : n + shift]
        out = np.full(n + 8, 0xABCD, np.uint16)
        source = pointer(CASES[shift:], "float *")
        native.call(
            native.lib.anert_f32_to_f16,
            pool(isa).ptr,
            source,
            pointer(out[shift:], "uint16_t *"),
            n,
            0,
            native.ffi.NULL,
        )
        np.testing.assert_array_equal(out[shift : n + shift], down_oracle(x))
        assert (out[:shift] == 0xABCD).all()
        assert (out[n + shift :] == 0xABCD).all()


shapes = st.one_of(
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.tuples(st.integers(0, 200), st.integers(0, 20)),
    st.sampled_from([(1, 300), (300, 1), (128, 64), (65, 129), (8, 8), (513, 140)]),
)


def strided(rows, cols, extra, shift, dtype):
    """A (rows, cols) view with row stride cols + extra, `shift` elements into its memory, and that memory."""
    memory = np.full(shift + max(rows, 1) * (cols + extra) + 5, 77, dtype)
    step = memory.itemsize
    view = np.ndarray((rows, cols), dtype, memory, shift * step, ((cols + extra) * step, step))
    return view, memory


@given(
    shapes, st.integers(0, 9), st.integers(0, 9), st.integers(0, 5), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(ISAS), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_matrices(shape, extra_src, extra_dst, shift, transpose, is_down, clamp, isa, seed):
    """Straight and transposed, both ways, at odd sizes, strides and offsets; nothing beside the target is touched."""
    rows, cols = shape
    target = (cols, rows) if transpose else shape
    kinds = (np.float32, np.uint16) if is_down else (np.uint16, np.float32)
    src, _ = strided(rows, cols, extra_src, shift, kinds[0])
    dst, memory = strided(*target, extra_dst, shift, kinds[1])
    random = np.random.default_rng(seed)
    size = rows * cols
    values = CASES[random.integers(0, CASES.size, size)] if is_down else random.integers(0, 65536, size, np.uint16)
    src[...] = values.reshape(shape)
    before = memory.copy()
    lib = native.lib
    numbers = (cols + extra_src, target[1] + extra_dst, rows, cols, int(transpose))
    if is_down:
        clamped = native.ffi.new("uint64_t *")
        arguments = pointer(src, "float *"), numbers[0], pointer(dst, "uint16_t *"), *numbers[1:]
        native.call(lib.anert_f32_to_f16_2d, pool(isa).ptr, *arguments, int(clamp), clamped)
        expected = down_oracle(np.clip(src, -65504, 65504) if clamp else src)
        assert clamped[0] == (np.count_nonzero(np.abs(src) > 65504) if clamp else 0)
    else:
        arguments = pointer(src, "uint16_t *"), numbers[0], pointer(dst, "float *"), *numbers[1:]
        native.call(lib.anert_f16_to_f32_2d, pool(isa).ptr, *arguments)
        expected = up_oracle(np.ascontiguousarray(src)).view(np.float32)
    whole, whole_memory = strided(*target, extra_dst, shift, kinds[1])
    whole_memory[:] = before
    whole[...] = expected.T if transpose else expected
    np.testing.assert_array_equal(memory.view(np.uint8), whole_memory.view(np.uint8))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_default_pool_agree(threads):
    """Large enough for several chunks and blocks: one and many threads, and no pool at all, give the same bits."""
    x = np.resize(CASES, (1003, 701))
    expected = down_oracle(x)
    handles = [pool(native.Pool(1).isa, threads).ptr, native.ffi.NULL]
    for handle in handles:
        for transpose in (0, 1):
            out = np.zeros((701, 1003) if transpose else x.shape, np.uint16)
            arguments = pointer(x, "float *"), 701, pointer(out, "uint16_t *"), out.shape[1], 1003, 701, transpose
            native.call(native.lib.anert_f32_to_f16_2d, handle, *arguments, 0, native.ffi.NULL)
            np.testing.assert_array_equal(out, expected.T if transpose else expected)
            back = np.zeros(x.shape, np.float32)
            arguments = pointer(out, "uint16_t *"), out.shape[1], pointer(back, "float *"), 701, *out.shape, transpose
            native.call(native.lib.anert_f16_to_f32_2d, handle, *arguments)
            np.testing.assert_array_equal(back.view(np.uint32), up_oracle(expected))


def test_bad_arguments():
    lib, null = native.lib, native.ffi.NULL
    floats, halves = native.ffi.new("float[64]"), native.ffi.new("uint16_t[64]")
    cases = [
        ((null, 8, halves, 8, 2, 8, 0), "src is NULL"),
        ((floats, 8, null, 8, 2, 8, 0), "dst is NULL"),
        ((floats, 7, halves, 8, 2, 8, 0), "src_stride 7 is less than a row of 8"),
        ((floats, 8, halves, 7, 2, 8, 0), "dst_stride 7 is less than a row of 8"),
        ((floats, 8, halves, 1, 2, 8, 1), "dst_stride 1 is less than a row of 2"),
        ((floats, 1 << 62, halves, 8, 8, 8, 0), "exceed the address space"),
        ((floats, 8, halves, 1 << 60, 8, 8, 1), "exceed the address space"),
        ((floats, 8, halves, 8, 1, (1 << 64) - 1, 0), "exceed the address space"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            native.call(lib.anert_f32_to_f16_2d, null, *arguments, 0, null)
    with pytest.raises(InputError, match="src is NULL"):
        native.call(lib.anert_f16_to_f32, null, null, floats, 3)
    native.call(lib.anert_f16_to_f32, null, null, null, 0)
    native.call(lib.anert_f32_to_f16_2d, null, null, 0, null, 0, 0, 5, 1, 0, null)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("transpose", [0, 1])
@pytest.mark.parametrize("clamp", [0, 1])
def test_past_the_caches(isa, transpose, clamp):
    """A matrix that is large enough to be streamed, odd in every stride and address."""
    rows, cols, ss = 1301, 1207, 1213
    out_rows, out_cols = (cols, rows) if transpose else (rows, cols)
    ds = out_cols + 3
    held = np.random.default_rng(1).standard_normal(rows * ss + 1, np.float32) * 40000
    wide = held[1:].reshape(rows, ss)[:, :cols]
    narrow = np.full(out_rows * ds + 1, 0xABCD, np.uint16)
    out, clamped = narrow[1:].reshape(out_rows, ds), native.ffi.new("uint64_t *")
    lib, p = native.lib, pool(isa).ptr
    native.call(lib.anert_f32_to_f16_2d, p, pointer(wide, "float *"), ss, pointer(out, "uint16_t *"), ds, rows, cols,
                transpose, clamp, clamped)  # fmt: skip
    expected = down_oracle(np.clip(wide, -65504, 65504) if clamp else wide)
    np.testing.assert_array_equal(out[:, :out_cols], expected.T if transpose else expected)
    assert (out[:, out_cols:] == 0xABCD).all() and narrow[0] == 0xABCD
    assert clamped[0] == (np.count_nonzero(np.abs(wide) > 65504) if clamp else 0)
    back = np.full(rows * ss + 1, -1, np.float32)
    again = back[1:].reshape(rows, ss)
    native.call(lib.anert_f16_to_f32_2d, p, pointer(out, "uint16_t *"), ds, pointer(again, "float *"), ss, out_rows,
                out_cols, transpose)  # fmt: skip
    np.testing.assert_array_equal(again[:, :cols].view(np.uint32), up_oracle(expected))
    assert (again[:, cols:] == -1).all() and back[0] == -1


# AVX-512 on a CPU without it: the same source over SIMDe's portable intrinsics. SIMDe itself includes the compiler's
# immintrin.h; its 0.7.4 lacks the two conversions, which are their 256-bit halves side by side.
SHIM = r"""
#ifdef SHIM
#include_next <immintrin.h>
#else
#define SHIM
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
static inline simde__m256i shim_cvtps_ph(simde__m512 x) {
    simde__m512_private p = simde__m512_to_private(x);
    simde__m256i_private out;
    out.m128i[0] = simde_mm256_cvtps_ph(p.m256[0], 0);
    out.m128i[1] = simde_mm256_cvtps_ph(p.m256[1], 0);
    return simde__m256i_from_private(out);
}
static inline simde__m512 shim_cvtph_ps(simde__m256i x) {
    simde__m256i_private p = simde__m256i_to_private(x);
    simde__m512_private out;
    out.m256[0] = simde_mm256_cvtph_ps(p.m128i[0]);
    out.m256[1] = simde_mm256_cvtph_ps(p.m128i[1]);
    return simde__m512_from_private(out);
}
#define _mm512_cvtps_ph(x, mode) shim_cvtps_ph(x)
#define _mm512_cvtph_ps(x) shim_cvtph_ps(x)
#define _mm512_shuffle_f32x4(a, b, imm)                                                                                \
    _mm512_castsi512_ps(simde_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), imm))
#define _mm512_stream_ps simde_mm512_storeu_ps
#define _mm512_stream_si512 simde_mm512_storeu_si512
#endif
"""
PROBE = r"""
#include "internal.h"
#define K (&TABLE)
void probe_down(const float *s, uint16_t *d, size_t n) { K->f32_to_f16(s, d, n); }
void probe_up(const uint16_t *s, float *d, size_t n) { K->f16_to_f32(s, d, n); }
void probe_stream(const uint16_t *s, uint16_t *d, size_t n) { K->stream(s, d, n); }
void probe_stream_down(const float *s, uint16_t *d, size_t n) { K->stream_down(s, d, n); }
void probe_stream_up(const uint16_t *s, float *d, size_t n) { K->stream_up(s, d, n); }
size_t probe_clamp(const float *s, uint16_t *d, size_t n) { return K->clamp(s, d, n); }
size_t probe_stream_clamp(const float *s, uint16_t *d, size_t n) { return K->stream_clamp(s, d, n); }
void probe_turn(const uint16_t *s, size_t ss, uint16_t *d, size_t ds, size_t r, size_t c) {
    K->transpose(s, ss, d, ds, r, c);
}
void probe_lines(const uint16_t *s, size_t ss, uint16_t *d, size_t ds, size_t r, size_t c) {
    anert_fp16_turn(K, true, s, ss, d, ds, r, c);
    K->fence();
}
void probe_down_block(const float *s, size_t ss, uint16_t *d, size_t ds, size_t r, size_t c) {
    K->transpose_f32_to_f16(s, ss, d, ds, r, c);
}
void probe_up_block(const uint16_t *s, size_t ss, float *d, size_t ds, size_t r, size_t c) {
    K->transpose_f16_to_f32(s, ss, d, ds, r, c);
}
"""
CDEF = """
void probe_down(const float *, uint16_t *, size_t);
void probe_up(const uint16_t *, float *, size_t);
void probe_stream(const uint16_t *, uint16_t *, size_t);
void probe_stream_down(const float *, uint16_t *, size_t);
void probe_stream_up(const uint16_t *, float *, size_t);
size_t probe_clamp(const float *, uint16_t *, size_t);
size_t probe_stream_clamp(const float *, uint16_t *, size_t);
void probe_turn(const uint16_t *, size_t, uint16_t *, size_t, size_t, size_t);
void probe_lines(const uint16_t *, size_t, uint16_t *, size_t, size_t, size_t);
void probe_down_block(const float *, size_t, uint16_t *, size_t, size_t, size_t);
void probe_up_block(const uint16_t *, size_t, float *, size_t, size_t, size_t);
"""
EMULATED = ["fp16.c", "fp16_x86.c", "error.c", "pool.c"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The AVX-512 kernels over emulated intrinsics."""
    if not os.path.exists("/usr/include/simde/x86/avx512.h"):
        pytest.skip("no SIMDe headers (apt install libsimde-dev)")
    tmp = tmp_path_factory.mktemp("simde")
    (tmp / "probe.c").write_text(PROBE)
    flags = ["-DANERT_NO_TARGET", "-DVEC_EMULATED", "-DTABLE=anert_fp16_avx512", "-Wno-psabi"]
    if "avx2" in ISAS:
        (tmp / "immintrin.h").write_text(SHIM)
        flags += [f"-I{tmp}", "-mavx2", "-mfma", "-mf16c"]
    else:
        flags.append(f"-I{SHIMS}")
    return load_c(tmp, CDEF, [*EMULATED, tmp / "probe.c"], *flags)


def test_avx512_rows_emulated(emulated):
    ffi, lib = emulated
    for n in (0, 1, 15, 16, 17, 40, CASES.size):
        out = np.full(n + 1, 0xABCD, np.uint16)
        lib.probe_down(ffi.from_buffer("float[]", CASES), ffi.from_buffer("uint16_t[]", out), n)
        same = down_oracle(CASES[:n]) == out[:n]
        if "avx2" not in ISAS:
            same |= np.isnan(CASES[:n])  # SIMDe's portable F16C has its own NaN rule
        assert same.all()
        assert out[n] == 0xABCD
        want = down_oracle(np.clip(CASES[:n], -65504, 65504))
        for clamp in (lib.probe_clamp, lib.probe_stream_clamp):
            out[:] = 0xABCD
            past = clamp(ffi.from_buffer("float[]", CASES), ffi.from_buffer("uint16_t[]", out), n)
            assert past == np.count_nonzero(np.abs(CASES[:n]) > 65504)
            same = want == out[:n]
            if "avx2" not in ISAS:
                same |= np.isnan(CASES[:n])
            assert same.all()
            assert out[n] == 0xABCD
    wide = np.zeros(65536, np.float32)
    lib.probe_up(ffi.from_buffer("uint16_t[]", ALL), ffi.from_buffer("float[]", wide), 65536)
    same = wide.view(np.uint32) == up_oracle(ALL)
    assert (same | np.isnan(wide) if "avx2" not in ISAS else same).all()


@pytest.mark.parametrize("n", [0, 1, 31, 32, 100, 1000])
@pytest.mark.parametrize("at", [0, 1, 17])
def test_avx512_streams_emulated(emulated, n, at):
    """From and to any address, and not a byte beyond."""
    ffi, lib = emulated
    halves, floats = ALL[15000 : 15000 + n], CASES[:n][np.isfinite(CASES[:n])]
    copied, down = np.full(at + n + 1, 0xABCD, np.uint16), np.full(at + floats.size + 1, 0xABCD, np.uint16)
    up = np.full(at + n + 1, -1, np.float32)
    lib.probe_stream(ffi.from_buffer("uint16_t[]", halves), ffi.from_buffer("uint16_t[]", copied) + at, n)
    lib.probe_stream_down(ffi.from_buffer("float[]", floats), ffi.from_buffer("uint16_t[]", down) + at, floats.size)
    lib.probe_stream_up(ffi.from_buffer("uint16_t[]", halves), ffi.from_buffer("float[]", up) + at, n)
    np.testing.assert_array_equal(copied[at:-1], halves)
    np.testing.assert_array_equal(down[at:-1], floats.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(up[at:-1], halves.view(np.float16).astype(np.float32))
    assert (copied[-1], down[-1], up[-1]) == (0xABCD, 0xABCD, -1)
    assert (copied[:at] == 0xABCD).all() and (down[:at] == 0xABCD).all() and (up[:at] == -1).all()


@pytest.mark.parametrize("shape", [(64, 64), (8, 8), (9, 23), (63, 1), (1, 64), (16, 40)])
def test_avx512_blocks_emulated(emulated, shape):
    ffi, lib = emulated
    rows, cols = shape
    x = np.linspace(-70000, 70000, rows * cols, dtype=np.float32).reshape(shape)
    halves = down_oracle(x)
    out, turned, back = (np.zeros((cols, rows), kind) for kind in (np.uint16, np.uint16, np.float32))
    float_of, half_of = (lambda a: ffi.from_buffer("float[]", a)), (lambda a: ffi.from_buffer("uint16_t[]", a))
    lib.probe_down_block(float_of(x), cols, half_of(out), rows, rows, cols)
    lib.probe_turn(half_of(halves), cols, half_of(turned), rows, rows, cols)
    lib.probe_up_block(half_of(halves), cols, float_of(back), rows, rows, cols)
    np.testing.assert_array_equal(out, halves.T)
    np.testing.assert_array_equal(turned, halves.T)
    np.testing.assert_array_equal(back.view(np.uint32), up_oracle(halves).T)


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (192, 130), (70, 65), (32, 16)])
@pytest.mark.parametrize("at", [0, 32, 8])
def test_avx512_lines_emulated(emulated, shape, at):
    """Whole squares go line by line where the copy is aligned, all else through a square of its own; nothing beyond."""
    ffi, lib = emulated
    rows, cols = shape
    x = np.random.default_rng(7).integers(0, 65536, (rows, cols + 3)).astype(np.uint16)
    ds = (rows + 63) // 32 * 32
    memory = np.full((cols + 2) * ds + 64, 0xABCD, np.uint16)
    start = -memory.ctypes.data % 64 // 2 + at
    source, target = (ffi.from_buffer("uint16_t[]", a) for a in (x, memory))
    lib.probe_lines(source, cols + 3, target + start, ds, rows, cols)
    want = np.full_like(memory, 0xABCD)
    for c in range(cols):
        want[start + c * ds : start + c * ds + rows] = x[:, c]
    np.testing.assert_array_equal(memory, want)


NEON_MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
static uint32_t seed = 1;
static uint32_t next(void) { return seed = seed * 1664525u + 1013904223u; }
static uint16_t h[64 * 64 + 9], h2[64 * 64 + 9], h3[64 * 64 + 9];
static float f[64 * 64 + 9], f2[64 * 64 + 9], f3[64 * 64 + 9];
int main(void) {
    const anert_fp16_kernels *neon = anert_fp16_kernels_for(ANERT_ISA_NEON);
    const anert_fp16_kernels *scalar = anert_fp16_kernels_for(ANERT_ISA_SCALAR);
    if (neon == scalar || anert_isa_best() != ANERT_ISA_NEON) return 2;
    for (int round = 0; round < 300; round++) {
        size_t rows = 1 + next() % 64, cols = 1 + next() % 64, n = rows * cols, at = next() % 8;
        for (size_t i = 0; i < n + at; i++) {
            uint32_t bits = next() ^ next() >> 16;
            if (i % 3 == 0) bits = (bits & 0x80000fffu) | 0x33000000u + (bits >> 8 & 0x15ff0000u);
            memcpy(&f[i], &bits, 4);
            h[i] = (uint16_t)(round < 20 ? round * 4096 + i : next() >> 16);
        }
        neon->f32_to_f16(f + at, h2, n); scalar->f32_to_f16(f + at, h3, n);
        if (memcmp(h2, h3, n * 2)) return 3;
        neon->f16_to_f32(h + at, f2, n); scalar->f16_to_f32(h + at, f3, n);
        if (memcmp(f2, f3, n * 4)) return 4;
        neon->transpose_f32_to_f16(f + at, cols, h2, rows, rows, cols);
        scalar->transpose_f32_to_f16(f + at, cols, h3, rows, rows, cols);
        if (memcmp(h2, h3, n * 2)) return 5;
        neon->transpose_f16_to_f32(h + at, cols, f2, rows, rows, cols);
        scalar->transpose_f16_to_f32(h + at, cols, f3, rows, rows, cols);
        if (memcmp(f2, f3, n * 4)) return 6;
        neon->transpose(h + at, cols, h2, rows, rows, cols); scalar->transpose(h + at, cols, h3, rows, rows, cols);
        if (memcmp(h2, h3, n * 2)) return 7;
        if (neon->clamp(f + at, h2, n) != scalar->clamp(f + at, h3, n)) return 8;
        if (memcmp(h2, h3, n * 2)) return 9;
    }
    return 0;
}
"""


def neon_program(folder, code):
    """A static aarch64 program of `code` and the converters; run it with `qemu`."""
    if shutil.which("qemu-aarch64") is None or shutil.which("aarch64-linux-gnu-gcc") is None:
        assert not os.environ.get("CI"), "CI has qemu-user and gcc-aarch64-linux-gnu (.ci/run)"
        pytest.skip("no qemu-aarch64 and aarch64-linux-gnu-gcc (apt install qemu-user gcc-aarch64-linux-gnu)")
    source = folder / "neon.c"
    source.write_text('#include "internal.h"\n' + code)
    sources = ["fp16.c", "fp16_neon.c", "error.c", "pool.c", source]
    return compile_c(folder / "neon", sources, "-O3", "-static", cc="aarch64-linux-gnu-gcc")


def qemu(program, *arguments, data=b""):
    """Standard output of an aarch64 program on a CPU without fp16 arithmetic."""
    command = ["qemu-aarch64", "-cpu", "cortex-a53", str(program), *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_neon_under_qemu(tmp_path):
    """The NEON kernels against the scalar ones, which the tests above hold to NumPy."""
    qemu(neon_program(tmp_path, NEON_MAIN))


# down | up, rows, cols, source and target stride, shift in elements, transpose, clamp: source memory on stdin; target
# memory, which begins as 0xab, and the count of the clamped, eight bytes, on stdout. By the public functions.
NEON_FILTER = r"""
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
    if (argc != 9 || anert_isa_best() != ANERT_ISA_NEON) return 2;
    int down = argv[1][0] == 'd';
    size_t v[7];
    for (int i = 0; i < 7; i++) v[i] = strtoul(argv[i + 2], NULL, 10);
    size_t rows = v[0], cols = v[1], ss = v[2], ds = v[3], shift = v[4], turn = v[5], clamp = v[6];
    size_t n_src = shift + rows * ss, n_dst = shift + (turn ? cols : rows) * ds;
    size_t in = down ? 4 : 2, out = down ? 2 : 4;
    char *src = malloc(n_src * in + 1), *dst = malloc(n_dst * out + 1);
    uint64_t clamped = 0;
    anert_error err;
    if (fread(src, in, n_src, stdin) != n_src) return 3;
    memset(dst, 0xab, n_dst * out);
    anert_status status;
    if (down) {
        const float *s = (float *)src + shift;
        uint16_t *d = (uint16_t *)dst + shift;
        status = rows == 1 && !turn ? anert_f32_to_f16(NULL, s, d, cols, clamp, &clamped, &err)
                                    : anert_f32_to_f16_2d(NULL, s, ss, d, ds, rows, cols, turn, clamp, &clamped, &err);
    } else {
        const uint16_t *s = (uint16_t *)src + shift;
        float *d = (float *)dst + shift;
        status = rows == 1 && !turn ? anert_f16_to_f32(NULL, s, d, cols, &err)
                                    : anert_f16_to_f32_2d(NULL, s, ss, d, ds, rows, cols, turn, &err);
    }
    if (status != ANERT_OK) return 4;
    fwrite(dst, out, n_dst, stdout);
    fwrite(&clamped, 8, 1, stdout);
    return 0;
}
"""


@pytest.fixture(scope="module")
def neon(tmp_path_factory):
    """convert(values, extra, shift, transpose, clamp) by NEON: (target memory's bytes, those expected, clamped)."""
    program = neon_program(tmp_path_factory.mktemp("neon"), NEON_FILTER)

    def convert(values, extra=(0, 0), shift=0, transpose=False, clamp=False):
        is_down = values.dtype == np.float32
        rows, cols = values.shape
        target = (cols, rows) if transpose else (rows, cols)
        strides = cols + extra[0], target[1] + extra[1]
        source = np.zeros(shift + rows * strides[0], values.dtype)
        source[shift:].reshape(rows, strides[0])[:, :cols] = values
        numbers = (rows, cols, *strides, shift, int(transpose), int(clamp))
        output = qemu(program, "down" if is_down else "up", *numbers, data=source.tobytes())
        if is_down:
            expected = down_oracle(np.clip(values, -65504, 65504) if clamp else values)
        else:
            expected = up_oracle(np.ascontiguousarray(values))
        memory = np.full((shift + target[0] * strides[1]) * expected.itemsize, 0xAB, np.uint8).view(expected.dtype)
        memory[shift:].reshape(target[0], strides[1])[:, : target[1]] = expected.T if transpose else expected
        return output[:-8], memory.tobytes(), int.from_bytes(output[-8:], "little")

    return convert


def test_neon_is_numpys_rounding_for_all_halves_ties_and_random_floats(neon):
    for values in (CASES.reshape(1, -1), CASES[: CASES.size // 64 * 64].reshape(64, -1)):
        got, expected, clamped = neon(values)
        assert got == expected
        assert clamped == 0
    got, expected, _ = neon(ALL.reshape(1, -1))
    assert got == expected


def test_neon_clamps(neon):
    got, expected, clamped = neon(CASES.reshape(1, -1), clamp=True)
    assert got == expected
    assert clamped == np.count_nonzero(np.abs(CASES) > 65504)


@pytest.mark.parametrize("is_down", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 129), (64, 64), (65, 31), (200, 333)])
def test_neon_strided_and_transposed(neon, shape, transpose, is_down):
    """Rows apart, off alignment, blocks and their tails; nothing is written beside the target."""
    random = np.random.default_rng(shape[1])
    size = shape[0] * shape[1]
    values = CASES[random.integers(0, CASES.size, size)] if is_down else random.integers(0, 65536, size, np.uint16)
    for extra, shift, clamp in [((0, 0), 0, False), ((5, 3), 1, True), ((0, 8), 3, False)]:
        got, expected, _ = neon(values.reshape(shape), extra, shift, transpose, clamp and is_down)
        assert got == expected
