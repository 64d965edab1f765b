/* arm_neon.h for a CPU without NEON: SIMDe's, and what SIMDe 0.7 lacks of the intrinsics that native/ uses. */
#ifndef ANERT_TEST_ARM_NEON_H
#define ANERT_TEST_ARM_NEON_H
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <math.h>
#include <simde/arm/neon.h>

static inline float32x4_t vdivq_f32(float32x4_t a, float32x4_t b) {
    float x[4], y[4];
    vst1q_f32(x, a), vst1q_f32(y, b);
    for (int i = 0; i < 4; i++)
        x[i] /= y[i];
    return vld1q_f32(x);
}

static inline float32x4_t vsqrtq_f32(float32x4_t a) {
    float x[4];
    vst1q_f32(x, a);
    for (int i = 0; i < 4; i++)
        x[i] = sqrtf(x[i]);
    return vld1q_f32(x);
}

static inline float32x4_t vfmsq_f32(float32x4_t c, float32x4_t a, float32x4_t b) { return vfmaq_f32(c, vnegq_f32(a), b); }
#endif
