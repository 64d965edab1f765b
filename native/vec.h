/* vec.h: the vector of one instruction set, so that a kernel is written once and compiled once for each.
 *
 * The file that includes it defines one of VEC_SCALAR, VEC_AVX2, VEC_AVX512, VEC_AVX512BF16, VEC_NEON first, and holds
 * kernels of that instruction set alone: VEC_FN marks their functions with its compile target. Here: the types vf (VL
 * fp32 lanes) and vm (a lane mask), and operations named vf_*. vf_load and vf_store need no alignment. vf_stream goes past the
 * caches, vf_fence makes that visible. Of vf_max and
 * vf_min, a NaN in the second operand is the result. Narrowing rounds to nearest even and overflows to inf. */
#ifndef ANERT_VEC_H
#define ANERT_VEC_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "internal.h"

#if defined(VEC_EMULATED) /* a test compiles the intrinsics of another CPU through SIMDe */
#define VEC_TARGET
#elif defined(VEC_AVX2)
#define VEC_TARGET __attribute__((target("avx2,fma,f16c")))
#elif defined(VEC_AVX512)
#define VEC_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#elif defined(VEC_AVX512BF16)
#define VEC_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#else
#define VEC_TARGET
#endif
#define VEC_FN static __attribute__((unused)) VEC_TARGET
#define VEC_INLINE static inline __attribute__((always_inline, unused)) VEC_TARGET

#if defined(VEC_AVX2)
#include "vec_avx2.h"
#elif defined(VEC_AVX512) || defined(VEC_AVX512BF16)
#include "vec_avx512.h"
#elif defined(VEC_NEON)
#include "vec_neon.h"
#else
#include "vec_scalar.h"
#endif

/* ---- What follows is the same for every instruction set ---- */

static inline __attribute__((unused)) size_t dtype_size(int32_t dtype) { return dtype == ANERT_F32 ? 4 : 2; }

/* VL elements of a dtype from element i on, and one of them. dtype is best a constant. */
VEC_INLINE vf vf_load_as(const void *p, int64_t i, int32_t dtype) {
    if (dtype == ANERT_F32)
        return vf_load((const float *)p + i);
    return dtype == ANERT_F16 ? vf_load_f16((const uint16_t *)p + i) : vf_load_bf16((const uint16_t *)p + i);
}

VEC_INLINE void vf_store_as(void *p, int64_t i, int32_t dtype, vf x) {
    if (dtype == ANERT_F32)
        vf_store((float *)p + i, x);
    else if (dtype == ANERT_F16)
        vf_store_f16((uint16_t *)p + i, x);
    else
        vf_store_bf16((uint16_t *)p + i, x);
}

static inline __attribute__((unused)) float element(const void *p, int64_t i, int32_t dtype) {
    if (dtype == ANERT_F32)
        return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return dtype == ANERT_F16 ? anert_float(bits) : bf16_float(bits);
}

static inline __attribute__((unused)) void set_element(void *p, int64_t i, int32_t dtype, float x) {
    if (dtype == ANERT_F32)
        ((float *)p)[i] = x;
    else
        ((uint16_t *)p)[i] = dtype == ANERT_F16 ? anert_half(x) : bf16_of(x);
}

/* The first n < VL lanes; the others load as zero. */
VEC_INLINE vf vf_load_part(const void *p, int64_t i, int32_t dtype, int64_t n) {
    float wide[VL] = {0};
    uint16_t narrow[VL] = {0};
    for (int j = 0; j < n && j < VL; j++)
        if (dtype == ANERT_F32)
            wide[j] = ((const float *)p)[i + j];
        else
            narrow[j] = ((const uint16_t *)p)[i + j];
    return dtype == ANERT_F32 ? vf_load(wide) : vf_load_as(narrow, 0, dtype);
}

VEC_INLINE void vf_store_part(void *p, int64_t i, int32_t dtype, int64_t n, vf x) {
    float wide[VL];
    uint16_t narrow[VL];
    vf_store_as(dtype == ANERT_F32 ? (void *)wide : (void *)narrow, 0, dtype, x);
    for (int j = 0; j < n && j < VL; j++)
        if (dtype == ANERT_F32)
            ((float *)p)[i + j] = wide[j];
        else
            ((uint16_t *)p)[i + j] = narrow[j];
}
#endif
