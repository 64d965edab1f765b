/* vec_scalar.h: vec.h without vectors, 1 lane. vf_fma rounds twice: a fused one is a library call on a CPU without it. */
#include <math.h>

typedef float vf;
typedef int vm;
enum { VL = 1 };

VEC_INLINE vf vf_set1(float x) { return x; }
VEC_INLINE vf vf_zero(void) { return 0.0f; }
VEC_INLINE vf vf_load(const float *p) { return *p; }
VEC_INLINE void vf_store(float *p, vf x) { *p = x; }
VEC_INLINE void vf_stream(float *p, vf x) { vf_store(p, x); } /* nothing goes past the caches here */
VEC_INLINE void vf_fence(void) {}
VEC_INLINE vf vf_load_f16(const uint16_t *p) { return anert_float(*p); }
VEC_INLINE void vf_store_f16(uint16_t *p, vf x) { *p = anert_half(x); }
VEC_INLINE vf vf_load_bf16(const uint16_t *p) { return bf16_float(*p); }
VEC_INLINE vf vf_round_bf16(vf x) { return bf16_float(bf16_of(x)); } /* to nearest even, as fp32 */
VEC_INLINE void vf_store_bf16(uint16_t *p, vf x) { *p = bf16_of(x); }

VEC_INLINE vf vf_add(vf a, vf b) { return a + b; }
VEC_INLINE vf vf_sub(vf a, vf b) { return a - b; }
VEC_INLINE vf vf_mul(vf a, vf b) { return a * b; }
VEC_INLINE vf vf_div(vf a, vf b) { return a / b; }
VEC_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
VEC_INLINE vf vf_fnma(vf a, vf b, vf c) { return c - a * b; }
VEC_INLINE vf vf_max(vf a, vf b) { return a > b ? a : b; }
VEC_INLINE vf vf_min(vf a, vf b) { return a < b ? a : b; }
VEC_INLINE vf vf_sqrt(vf x) { return sqrtf(x); }
VEC_INLINE vf vf_abs(vf x) { return fabsf(x); }
VEC_INLINE vf vf_neg(vf x) { return -x; }
VEC_INLINE vf vf_copysign(vf magnitude, vf sign) { return copysignf(magnitude, sign); }
VEC_INLINE vf vf_round(vf x) { return rintf(x); }
VEC_INLINE vm vf_lt(vf a, vf b) { return a < b; }
VEC_INLINE vm vf_le(vf a, vf b) { return a <= b; }
VEC_INLINE vm vf_eq(vf a, vf b) { return a == b; }
VEC_INLINE vf vf_select(vm mask, vf yes, vf no) { return mask ? yes : no; }

/* 2^n for whole n in [-126, 127]; any other n is the caller's error, NaN included, and gives some number */
VEC_INLINE vf vf_pow2(vf n) {
    uint32_t bits = (uint32_t)((n > -127.0f && n < 128.0f ? (int32_t)n : 0) + 127) << 23;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
/* x 2^n for whole n in [-252, 254], rounded once (x in [0.5, 2]) */
VEC_INLINE vf vf_scale(vf x, vf n) {
    vf half = vf_round(n * 0.5f);
    return x * vf_pow2(half) * vf_pow2(n - half);
}
/* x = m 2^e with m in [2/3, 4/3), for normal x > 0 */
VEC_INLINE vf vf_split(vf x, vf *e) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t offset = (uint32_t)bits - 0x3f2aaaabu;
    *e = (float)((int32_t)offset >> 23);
    bits = (int32_t)((uint32_t)bits - (offset & 0xff800000u));
    memcpy(&x, &bits, sizeof x);
    return x;
}

VEC_INLINE float vf_sum(vf x) { return x; }
VEC_INLINE float vf_hmax(vf x) { return x; }
VEC_INLINE void vf_transpose(vf r[1]) { (void)r; }
