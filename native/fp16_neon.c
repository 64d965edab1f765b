/* fp16_neon.c: the row and block converters of aarch64's base instruction set. */
#include "internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>

static inline uint16x8_t load_down(const float *src) {
    return vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(vld1q_f32(src)), vcvt_f16_f32(vld1q_f32(src + 4))));
}

static inline void store_up(float *dst, uint16x8_t halves) {
    float16x8_t x = vreinterpretq_f16_u16(halves);
    vst1q_f32(dst, vcvt_f32_f16(vget_low_f16(x)));
    vst1q_f32(dst + 4, vcvt_f32_f16(vget_high_f16(x)));
}

static void down_neon(const float *src, uint16_t *dst, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        vst1q_u16(dst + i, load_down(src + i));
    anert_fp16_down(src + i, dst + i, n - i);
}

static void up_neon(const uint16_t *src, float *dst, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        store_up(dst + i, vld1q_u16(src + i));
    anert_fp16_up(src + i, dst + i, n - i);
}

static inline uint16x8_t even_32(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_u16_u32(vtrn1q_u32(vreinterpretq_u32_u16(a), vreinterpretq_u32_u16(b)));
}

static inline uint16x8_t odd_32(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_u16_u32(vtrn2q_u32(vreinterpretq_u32_u16(a), vreinterpretq_u32_u16(b)));
}

static inline uint16x8_t even_64(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_u16_u64(vtrn1q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

static inline uint16x8_t odd_64(uint16x8_t a, uint16x8_t b) {
    return vreinterpretq_u16_u64(vtrn2q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

/* Transposes 8 rows of 8 halves in place: 2x2 blocks of 16, 32, then 64 bits. */
static inline void transpose_8x8(uint16x8_t x[8]) {
    uint16x8_t y[8];
    for (int k = 0; k < 8; k += 2) {
        y[k] = vtrn1q_u16(x[k], x[k + 1]);
        y[k + 1] = vtrn2q_u16(x[k], x[k + 1]);
    }
    for (int k = 0; k < 8; k += 4)
        for (int j = k; j < k + 2; j++) {
            x[j] = even_32(y[j], y[j + 2]);
            x[j + 2] = odd_32(y[j], y[j + 2]);
        }
    for (int k = 0; k < 4; k++) {
        y[k] = even_64(x[k], x[k + 4]);
        y[k + 4] = odd_64(x[k], x[k + 4]);
    }
    memcpy(x, y, sizeof y);
}

static void down_block_neon(const float *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols) {
    size_t c = 0;
    for (; c + 8 <= cols; c += 8) { /* down the rows: fills whole cache lines of dst, whose stride may alias */
        size_t r = 0;
        for (; r + 8 <= rows; r += 8) {
            uint16x8_t x[8];
            for (size_t k = 0; k < 8; k++)
                x[k] = load_down(src + (r + k) * ss + c);
            transpose_8x8(x);
            for (size_t k = 0; k < 8; k++)
                vst1q_u16(dst + (c + k) * ds + r, x[k]);
        }
        anert_fp16_down_block(src + r * ss + c, ss, dst + c * ds + r, ds, rows - r, 8);
    }
    anert_fp16_down_block(src + c, ss, dst + c * ds, ds, rows, cols - c);
}

static void up_block_neon(const uint16_t *src, size_t ss, float *dst, size_t ds, size_t rows, size_t cols) {
    size_t c = 0;
    for (; c + 8 <= cols; c += 8) { /* down the rows: fills whole cache lines of dst, whose stride may alias */
        size_t r = 0;
        for (; r + 8 <= rows; r += 8) {
            uint16x8_t x[8];
            for (size_t k = 0; k < 8; k++)
                x[k] = vld1q_u16(src + (r + k) * ss + c);
            transpose_8x8(x);
            for (size_t k = 0; k < 8; k++)
                store_up(dst + (c + k) * ds + r, x[k]);
        }
        anert_fp16_up_block(src + r * ss + c, ss, dst + c * ds + r, ds, rows - r, 8);
    }
    anert_fp16_up_block(src + c, ss, dst + c * ds, ds, rows, cols - c);
}

static void turn_block_neon(const uint16_t *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols) {
    size_t c = 0;
    for (; c + 8 <= cols; c += 8) { /* down the rows: fills whole cache lines of dst, whose stride may alias */
        size_t r = 0;
        for (; r + 8 <= rows; r += 8) {
            uint16x8_t x[8];
            for (size_t k = 0; k < 8; k++)
                x[k] = vld1q_u16(src + (r + k) * ss + c);
            transpose_8x8(x);
            for (size_t k = 0; k < 8; k++)
                vst1q_u16(dst + (c + k) * ds + r, x[k]);
        }
        anert_fp16_turn_block(src + r * ss + c, ss, dst + c * ds + r, ds, rows - r, 8);
    }
    anert_fp16_turn_block(src + c, ss, dst + c * ds, ds, rows, cols - c);
}

/* FMIN and FMAX give NaN where an operand is one; lanes of `past` count down. */
static inline float32x4_t within(float32x4_t x, uint32x4_t *past) {
    float32x4_t y = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-65504.0f)), vdupq_n_f32(65504.0f));
    *past = vaddq_u32(*past, vcagtq_f32(x, vdupq_n_f32(65504.0f)));
    return y;
}

static size_t clamp_neon(const float *src, uint16_t *dst, size_t n) {
    enum { PART = 1 << 20 }; /* so that no lane of the count wraps */
    size_t i = 0, total = 0;
    while (i + 8 <= n) {
        uint32x4_t past = vdupq_n_u32(0);
        for (size_t end = MIN(n, i + PART); i + 8 <= end; i += 8) {
            float32x4_t low = within(vld1q_f32(src + i), &past), high = within(vld1q_f32(src + i + 4), &past);
            vst1q_u16(dst + i, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(low), vcvt_f16_f32(high))));
        }
        total += vaddvq_u32(vsubq_u32(vdupq_n_u32(0), past));
    }
    return total + anert_fp16_clamp(src + i, dst + i, n - i);
}

static void stream_neon(const uint16_t *src, uint16_t *dst, size_t n) { memcpy(dst, src, n * sizeof *dst); }
static void fence_neon(void) {}

const anert_fp16_kernels anert_fp16_neon = {down_neon, up_neon, down_block_neon, up_block_neon, turn_block_neon, clamp_neon,
                                            clamp_neon, stream_neon, down_neon, up_neon, fence_neon, NULL};
#endif
