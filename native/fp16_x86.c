/* fp16_x86.c: the row and block converters of F16C/AVX2 and of AVX-512. */
#define VEC_AVX512 /* of the AVX-512 part alone */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "vec.h"

enum { AHEAD = 1024 }; /* elements: a page of fp32, where hardware prefetch stops */

#define AVX2 TARGET("avx2,fma,f16c")
#define AVX512 TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

AVX2 static void down_avx2(const float *src, uint16_t *dst, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    anert_fp16_down(src + i, dst + i, n - i);
}

AVX2 static void up_avx2(const uint16_t *src, float *dst, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
    anert_fp16_up(src + i, dst + i, n - i);
}

/* Transposes 8 rows of 8 halves in place: interleaves of 16, 32, then 64 bits. */
AVX2 static inline void transpose_8x8(__m128i x[8]) {
    __m128i y[8];
    for (int k = 0; k < 4; k++) {
        y[2 * k] = _mm_unpacklo_epi16(x[2 * k], x[2 * k + 1]);
        y[2 * k + 1] = _mm_unpackhi_epi16(x[2 * k], x[2 * k + 1]);
    }
    for (int k = 0; k < 8; k += 4) {
        x[k] = _mm_unpacklo_epi32(y[k], y[k + 2]);
        x[k + 1] = _mm_unpackhi_epi32(y[k], y[k + 2]);
        x[k + 2] = _mm_unpacklo_epi32(y[k + 1], y[k + 3]);
        x[k + 3] = _mm_unpackhi_epi32(y[k + 1], y[k + 3]);
    }
    for (int k = 0; k < 4; k++) {
        y[2 * k] = _mm_unpacklo_epi64(x[k], x[k + 4]);
        y[2 * k + 1] = _mm_unpackhi_epi64(x[k], x[k + 4]);
    }
    memcpy(x, y, sizeof y);
}

AVX2 static void down_block_avx2(const float *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols) {
    size_t c = 0;
    for (; c + 8 <= cols; c += 8) { /* down the rows: fills whole cache lines of dst, whose stride may alias */
        size_t r = 0;
        for (; r + 8 <= rows; r += 8) {
            __m128i x[8];
            for (size_t k = 0; k < 8; k++)
                x[k] = _mm256_cvtps_ph(_mm256_loadu_ps(src + (r + k) * ss + c), _MM_FROUND_TO_NEAREST_INT);
            transpose_8x8(x);
            for (size_t k = 0; k < 8; k++)
                _mm_storeu_si128((__m128i *)(dst + (c + k) * ds + r), x[k]);
        }
        anert_fp16_down_block(src + r * ss + c, ss, dst + c * ds + r, ds, rows - r, 8);
    }
    anert_fp16_down_block(src + c, ss, dst + c * ds, ds, rows, cols - c);
}

AVX2 static void up_block_avx2(const uint16_t *src, size_t ss, float *dst, size_t ds, size_t rows, size_t cols) {
    size_t c = 0;
    for (; c + 8 <= cols; c += 8) { /* down the rows: fills whole cache lines of dst, whose stride may alias */
        size_t r = 0;
        for (; r + 8 <= rows; r += 8) {
            __m128i x[8];
            for (size_t k = 0; k < 8; k++)
                x[k] = _mm_loadu_si128((const __m128i *)(src + (r + k) * ss + c));
            transpose_8x8(x);
            for (size_t k = 0; k < 8; k++)
                _mm256_storeu_ps(dst + (c + k) * ds + r, _mm256_cvtph_ps(x[k]));
        }
        anert_fp16_up_block(src + r * ss + c, ss, dst + c * ds + r, ds, rows - r, 8);
    }
    anert_fp16_up_block(src + c, ss, dst + c * ds, ds, rows, cols - c);
}

AVX2 static void turn_block_avx2(const uint16_t *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols) {
    size_t c = 0;
    for (; c + 8 <= cols; c += 8) { /* down the rows: fills whole cache lines of dst, whose stride may alias */
        size_t r = 0;
        for (; r + 8 <= rows; r += 8) {
            __m128i x[8];
            for (size_t k = 0; k < 8; k++)
                x[k] = _mm_loadu_si128((const __m128i *)(src + (r + k) * ss + c));
            transpose_8x8(x);
            for (size_t k = 0; k < 8; k++)
                _mm_storeu_si128((__m128i *)(dst + (c + k) * ds + r), x[k]);
        }
        anert_fp16_turn_block(src + r * ss + c, ss, dst + c * ds + r, ds, rows - r, 8);
    }
    anert_fp16_turn_block(src + c, ss, dst + c * ds, ds, rows, cols - c);
}

/* What is past +-65504 becomes that, and is counted; min and max give their second operand where one is NaN. */
AVX2 static inline __m256 within_avx2(__m256 x, size_t *past) {
    __m256 y = _mm256_min_ps(_mm256_set1_ps(65504.0f), _mm256_max_ps(_mm256_set1_ps(-65504.0f), x));
    *past += (size_t)__builtin_popcount((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_NEQ_OQ)));
    return y;
}

/* stream: past the caches, whose stores want an aligned address. */
AVX2 static inline size_t clamp_row(const float *src, uint16_t *dst, size_t n, bool stream) {
    size_t i = stream ? MIN(n, (size_t)(-(uintptr_t)dst & 15) / 2) : 0, past = anert_fp16_clamp(src, dst, i);
    for (; i + 8 <= n; i += 8) {
        __builtin_prefetch(src + i + AHEAD);
        __m128i halves = _mm256_cvtps_ph(within_avx2(_mm256_loadu_ps(src + i), &past), _MM_FROUND_TO_NEAREST_INT);
        if (stream)
            _mm_stream_si128((__m128i *)(dst + i), halves);
        else
            _mm_storeu_si128((__m128i *)(dst + i), halves);
    }
    return past + anert_fp16_clamp(src + i, dst + i, n - i);
}

AVX2 static size_t clamp_avx2(const float *src, uint16_t *dst, size_t n) { return clamp_row(src, dst, n, false); }
AVX2 static size_t stream_clamp_avx2(const float *src, uint16_t *dst, size_t n) { return clamp_row(src, dst, n, true); }

AVX2 static void stream_avx2(const uint16_t *src, uint16_t *dst, size_t n) {
    size_t i = 0;
    for (; i < n && ((uintptr_t)(dst + i) & 31) != 0; i++)
        dst[i] = src[i];
    for (; i + 16 <= n; i += 16)
        _mm256_stream_si256((__m256i *)(dst + i), _mm256_loadu_si256((const __m256i *)(src + i)));
    memcpy(dst + i, src + i, (n - i) * sizeof *dst);
}

AVX2 static void stream_down_avx2(const float *src, uint16_t *dst, size_t n) {
    size_t i = 0;
    for (; i < n && ((uintptr_t)(dst + i) & 15) != 0; i++)
        dst[i] = anert_half(src[i]);
    for (; i + 8 <= n; i += 8)
        _mm_stream_si128((__m128i *)(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    anert_fp16_down(src + i, dst + i, n - i);
}

AVX2 static void stream_up_avx2(const uint16_t *src, float *dst, size_t n) {
    size_t i = 0;
    for (; i < n && ((uintptr_t)(dst + i) & 31) != 0; i++)
        dst[i] = anert_float(src[i]);
    for (; i + 8 <= n; i += 8)
        _mm256_stream_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
    anert_fp16_up(src + i, dst + i, n - i);
}

static void fence(void) { _mm_sfence(); }

const anert_fp16_kernels anert_fp16_avx2 = {down_avx2, up_avx2, down_block_avx2, up_block_avx2, turn_block_avx2, clamp_avx2,
                                            stream_clamp_avx2, stream_avx2, stream_down_avx2, stream_up_avx2, fence, NULL};

AVX512 static void down_avx512(const float *src, uint16_t *dst, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(dst + i), _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    anert_fp16_down(src + i, dst + i, n - i);
}

AVX512 static void up_avx512(const uint16_t *src, float *dst, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src + i))));
    anert_fp16_up(src + i, dst + i, n - i);
}

AVX512 static inline __m256i clamped_avx512(const float *src, size_t *past) {
    __m512 x = _mm512_loadu_ps(src);
    __m512 y = _mm512_min_ps(_mm512_set1_ps(65504.0f), _mm512_max_ps(_mm512_set1_ps(-65504.0f), x));
    *past += (size_t)__builtin_popcount(_mm512_cmp_ps_mask(x, y, _CMP_NEQ_OQ));
    return _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT);
}

AVX512 static size_t clamp_avx512(const float *src, uint16_t *dst, size_t n) {
    size_t i = 0, past = 0;
    for (; i + 16 <= n; i += 16) {
        __builtin_prefetch(src + i + AHEAD);
        _mm256_storeu_si256((__m256i *)(dst + i), clamped_avx512(src + i, &past));
    }
    return past + anert_fp16_clamp(src + i, dst + i, n - i);
}

AVX512 static size_t stream_clamp_avx512(const float *src, uint16_t *dst, size_t n) {
    size_t i = MIN(n, (size_t)(-(uintptr_t)dst & 63) / 2), past = anert_fp16_clamp(src, dst, i);
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(src + i + AHEAD);
        __builtin_prefetch(src + i + AHEAD + 16);
        __m256i low = clamped_avx512(src + i, &past), high = clamped_avx512(src + i + 16, &past);
        _mm512_stream_si512((__m512i *)(dst + i), _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
    return past + anert_fp16_clamp(src + i, dst + i, n - i);
}

/* Stores of whole lines, which leave the write buffers at once. */
AVX512 static void stream_avx512(const uint16_t *src, uint16_t *dst, size_t n) {
    size_t i = 0;
    for (; i < n && ((uintptr_t)(dst + i) & 63) != 0; i++)
        dst[i] = src[i];
    for (; i + 32 <= n; i += 32)
        _mm512_stream_si512((__m512i *)(dst + i), _mm512_loadu_si512(src + i));
    memcpy(dst + i, src + i, (n - i) * sizeof *dst);
}

AVX512 static void stream_down_avx512(const float *src, uint16_t *dst, size_t n) {
    size_t i = 0;
    for (; i < n && ((uintptr_t)(dst + i) & 63) != 0; i++)
        dst[i] = anert_half(src[i]);
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(src + i + AHEAD);
        __builtin_prefetch(src + i + AHEAD + 16);
        __m256i low = _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
        __m256i high = _mm512_cvtps_ph(_mm512_loadu_ps(src + i + 16), _MM_FROUND_TO_NEAREST_INT);
        _mm512_stream_si512((__m512i *)(dst + i), _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
    anert_fp16_down(src + i, dst + i, n - i);
}

AVX512 static void stream_up_avx512(const uint16_t *src, float *dst, size_t n) {
    size_t i = 0;
    for (; i < n && ((uintptr_t)(dst + i) & 63) != 0; i++)
        dst[i] = anert_float(src[i]);
    for (; i + 16 <= n; i += 16)
        _mm512_stream_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src + i))));
    anert_fp16_up(src + i, dst + i, n - i);
}

/* Pairs of rows as words of 32 bits, which 16 x 16 transpose: then a column of 32 halves is a register, and a line. */
AVX512 static void turn_lines_avx512(const uint16_t *src, size_t ss, uint16_t *dst, size_t ds) {
    enum { ROWS = 32, COLS = 16 };
    uint16_t order[ROWS];
    for (int i = 0; i < COLS; i++)
        order[2 * i] = (uint16_t)i, order[2 * i + 1] = (uint16_t)(COLS + i);
    const __m512i interleave = _mm512_loadu_si512(order);
    vf pairs[COLS];
    for (size_t i = 0; i < COLS; i++) {
        __m256i even = _mm256_loadu_si256((const __m256i *)(src + 2 * i * ss));
        __m256i odd = _mm256_loadu_si256((const __m256i *)(src + (2 * i + 1) * ss));
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
        pairs[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, both));
    }
    vf_transpose(pairs);
    for (size_t c = 0; c < COLS; c++)
        vf_stream((float *)(void *)(dst + c * ds), pairs[c]);
}

/* Transposes are bound by their loads and stores of 8 halves: the AVX2 ones serve. */
const anert_fp16_kernels anert_fp16_avx512 = {down_avx512, up_avx512, down_block_avx2, up_block_avx2, turn_block_avx2, clamp_avx512,
                                              stream_clamp_avx512, stream_avx512, stream_down_avx512, stream_up_avx512, fence, turn_lines_avx512};
#endif
