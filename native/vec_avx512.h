/* vec_avx512.h: vec.h for AVX-512 F, BW, VL, DQ, 16 lanes. */
#include <immintrin.h>

typedef __m512 vf;
typedef __mmask16 vm;
enum { VL = 16 };

VEC_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
VEC_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
VEC_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
VEC_INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
#if defined(VEC_EMULATED)
VEC_INLINE void vf_stream(float *p, vf x) { vf_store(p, x); }
#else
VEC_INLINE void vf_stream(float *p, vf x) { _mm512_stream_ps(p, x); } /* p aligned to 64 bytes */
#endif
VEC_INLINE void vf_fence(void) { _mm_sfence(); }
VEC_INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
VEC_INLINE void vf_store_f16(uint16_t *p, vf x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
VEC_INLINE vf vf_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* x rounded to bf16 to nearest even, as fp32 */
VEC_INLINE vf vf_round_bf16(vf x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i rounded = _mm512_mask_mov_epi32(up, nan, quiet);
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32((int)0xffff0000)));
}
VEC_INLINE void vf_store_bf16(uint16_t *p, vf x) {
    __m512i high = _mm512_srli_epi32(_mm512_castps_si512(vf_round_bf16(x)), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(high));
}

VEC_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
VEC_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
VEC_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
VEC_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
VEC_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   /* a b + c */
VEC_INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
VEC_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
VEC_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
VEC_INLINE vf vf_sqrt(vf x) { return _mm512_sqrt_ps(x); }
VEC_INLINE vf vf_abs(vf x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
VEC_INLINE vf vf_neg(vf x) { return _mm512_xor_ps(_mm512_set1_ps(-0.0f), x); }
VEC_INLINE vf vf_copysign(vf magnitude, vf sign) {
    __m512 bit = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude), _mm512_and_ps(bit, sign));
}
VEC_INLINE vf vf_round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VEC_INLINE vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
VEC_INLINE vm vf_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
VEC_INLINE vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
VEC_INLINE vf vf_select(vm mask, vf yes, vf no) { return _mm512_mask_blend_ps(mask, no, yes); }

/* 2^n for whole n in [-126, 127] */
VEC_INLINE vf vf_pow2(vf n) {
    __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
/* x 2^n for whole n in [-252, 254], rounded once (x in [0.5, 2]) */
VEC_INLINE vf vf_scale(vf x, vf n) { return _mm512_scalef_ps(x, n); }
/* x = m 2^e with m in [2/3, 4/3), for normal x > 0 */
VEC_INLINE vf vf_split(vf x, vf *e) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i power = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f2aaaab)), 23);
    *e = _mm512_cvtepi32_ps(power);
    return _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)));
}

/* Sum and maximum over the lanes, by halves. */
VEC_INLINE float vf_sum(vf x) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
VEC_INLINE float vf_hmax(vf x) {
    __m256 h = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* r[i] lane j becomes r[j] lane i */
VEC_INLINE void vf_transpose(vf r[16]) {
    vf a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* b[i + j], 128-bit lane l: column 4 l + j of rows i..i + 3 */
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {
        a[j] = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88); /* columns j, j + 8 of rows 0..7 */
        a[j + 4] = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
        a[j + 8] = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
        a[j + 12] = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
    }
    for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_f32x4(a[j], a[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_f32x4(a[j], a[j + 8], 0xdd);
        r[j + 4] = _mm512_shuffle_f32x4(a[j + 4], a[j + 12], 0x88);
        r[j + 12] = _mm512_shuffle_f32x4(a[j + 4], a[j + 12], 0xdd);
    }
}
