/* immintrin.h for a CPU without AVX-512: SIMDe's, and what SIMDe 0.7 lacks of the intrinsics that native/ uses. */
#ifndef ANERT_TEST_IMMINTRIN_H
#define ANERT_TEST_IMMINTRIN_H
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <math.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <string.h>

typedef simde__mmask16 __mmask16;
#define _mm512_stream_ps simde_mm512_storeu_ps
#define _mm512_stream_si512 simde_mm512_storeu_si512
#define _mm512_shuffle_f32x4(a, b, imm)                                                                                \
    _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), imm))
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC

static inline __m512 _mm512_cvtph_ps(__m256i halves) {
    simde__m128i part[2];
    simde__m256 wide[2];
    __m512 out;
    memcpy(part, &halves, sizeof halves);
    for (int i = 0; i < 2; i++)
        wide[i] = simde_mm256_cvtph_ps(part[i]);
    memcpy(&out, wide, sizeof out);
    return out;
}

static inline __m256i _mm512_cvtps_ph(__m512 x, int rounding) {
    simde__m256 wide[2];
    simde__m128i part[2];
    __m256i out;
    (void)rounding;
    memcpy(wide, &x, sizeof x);
    for (int i = 0; i < 2; i++)
        part[i] = simde_mm256_cvtps_ph(wide[i], SIMDE_MM_FROUND_TO_NEAREST_INT);
    memcpy(&out, part, sizeof out);
    return out;
}

/* A function of 16 lanes: each lane of x, as `in`, through the expression, to a lane of the result, as `out`. */
#define LANES(name, result, out, operand, in, expression, ...)                                                          \
    static inline result name(operand vector, ##__VA_ARGS__) {                                                         \
        in lanes[16];                                                                                                  \
        out made[16];                                                                                                  \
        result packed;                                                                                                 \
        memcpy(lanes, &vector, sizeof lanes);                                                                          \
        for (int i = 0; i < 16; i++) {                                                                                 \
            in x = lanes[i];                                                                                           \
            made[i] = (out)(expression);                                                                               \
        }                                                                                                              \
        memcpy(&packed, made, sizeof packed);                                                                          \
        return packed;                                                                                                 \
    }
LANES(_mm512_cvtepu16_epi32, __m512i, uint32_t, __m256i, uint16_t, x)
LANES(_mm512_cvtepi32_epi16, __m256i, uint16_t, __m512i, uint32_t, x)
LANES(_mm512_cvtepi32_ps, __m512, float, __m512i, int32_t, x)
LANES(_mm512_cvtps_epi32, __m512i, int32_t, __m512, float, fabsf(x) < 0x1p31f ? (int32_t)rintf(x) : INT32_MIN)
LANES(_mm512_srai_epi32, __m512i, int32_t, __m512i, int32_t, x >> count, int count)

/* SIMDe multiplies by 2^n, which is inf for n = 128; the instruction scales. */
#undef _mm512_scalef_ps
static inline __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
    float lanes[16], powers[16];
    memcpy(lanes, &x, sizeof lanes);
    memcpy(powers, &n, sizeof powers);
    for (int i = 0; i < 16; i++)
        lanes[i] = isnan(powers[i]) ? powers[i] : ldexpf(lanes[i], (int)fmaxf(-400.0f, fminf(400.0f, floorf(powers[i]))));
    return _mm512_loadu_ps(lanes);
}

static inline __m256 _mm512_extractf32x8_ps(__m512 x, int part) {
    float lanes[16];
    memcpy(lanes, &x, sizeof lanes);
    return _mm256_loadu_ps(lanes + 8 * part);
}

/* vcvtne2ps2bf16: the second operand fills the low half. */
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    uint32_t bits[32];
    uint16_t halves[32];
    __m512bh out;
    memcpy(bits, &low, sizeof low);
    memcpy(bits + 16, &high, sizeof high);
    for (int i = 0; i < 32; i++)
        halves[i] = (uint16_t)((bits[i] & 0x7fffffffu) > 0x7f800000u ? bits[i] >> 16 | 0x40u
                                                                   : (bits[i] + 0x7fffu + (bits[i] >> 16 & 1u)) >> 16);
    memcpy(&out, halves, sizeof out);
    return out;
}
#endif
