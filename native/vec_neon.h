/* vec_neon.h: vec.h for NEON of aarch64, 4 lanes. */
#include <arm_neon.h>

typedef float32x4_t vf;
typedef uint32x4_t vm;
enum { VL = 4 };

VEC_INLINE vf vf_set1(float x) { return vdupq_n_f32(x); }
VEC_INLINE vf vf_zero(void) { return vdupq_n_f32(0.0f); }
VEC_INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
VEC_INLINE void vf_store(float *p, vf x) { vst1q_f32(p, x); }
VEC_INLINE void vf_stream(float *p, vf x) { vf_store(p, x); } /* nothing goes past the caches here */
VEC_INLINE void vf_fence(void) {}
VEC_INLINE vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
VEC_INLINE void vf_store_f16(uint16_t *p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
VEC_INLINE vf vf_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
/* x rounded to bf16 to nearest even, as fp32 */
VEC_INLINE vf vf_round_bf16(vf x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    uint32x4_t rounded = vbslq_u32(vceqq_f32(x, x), up, quiet);
    return vreinterpretq_f32_u32(vandq_u32(rounded, vdupq_n_u32(0xffff0000)));
}
VEC_INLINE void vf_store_bf16(uint16_t *p, vf x) {
    vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(vf_round_bf16(x)), 16));
}

VEC_INLINE vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
VEC_INLINE vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
VEC_INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
VEC_INLINE vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
VEC_INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }  /* a b + c */
VEC_INLINE vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); } /* c - a b */
VEC_INLINE vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
VEC_INLINE vf vf_min(vf a, vf b) { return vminq_f32(a, b); }
VEC_INLINE vf vf_sqrt(vf x) { return vsqrtq_f32(x); }
VEC_INLINE vf vf_abs(vf x) { return vabsq_f32(x); }
VEC_INLINE vf vf_neg(vf x) { return vnegq_f32(x); }
VEC_INLINE vf vf_copysign(vf magnitude, vf sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }
VEC_INLINE vf vf_round(vf x) { return vrndnq_f32(x); }
VEC_INLINE vm vf_lt(vf a, vf b) { return vcltq_f32(a, b); }
VEC_INLINE vm vf_le(vf a, vf b) { return vcleq_f32(a, b); }
VEC_INLINE vm vf_eq(vf a, vf b) { return vceqq_f32(a, b); }
VEC_INLINE vf vf_select(vm mask, vf yes, vf no) { return vbslq_f32(mask, yes, no); }

/* 2^n for whole n in [-126, 127] */
VEC_INLINE vf vf_pow2(vf n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
/* x 2^n for whole n in [-252, 254], rounded once (x in [0.5, 2]) */
VEC_INLINE vf vf_scale(vf x, vf n) {
    vf half = vf_round(vf_mul(n, vf_set1(0.5f)));
    return vf_mul(vf_mul(x, vf_pow2(half)), vf_pow2(vf_sub(n, half)));
}
/* x = m 2^e with m in [2/3, 4/3), for normal x > 0 */
VEC_INLINE vf vf_split(vf x, vf *e) {
    int32x4_t bits = vreinterpretq_s32_f32(x);
    int32x4_t power = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f2aaaab)), 23);
    *e = vcvtq_f32_s32(power);
    return vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(power, 23)));
}

/* Sum and maximum over the lanes, by halves. */
VEC_INLINE float vf_sum(vf x) {
    float32x2_t s = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}
VEC_INLINE float vf_hmax(vf x) { return vmaxvq_f32(x); }

/* r[i] lane j becomes r[j] lane i */
VEC_INLINE void vf_transpose(vf r[4]) {
    vf a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]);
    vf c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    r[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    r[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    r[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}
