/* head_kernels.h: the head's lane loops, compiled once per instruction set: the including file sets the target, defines one of
 * vec.h's sets and HEAD_TABLE, the name of its table. The last lanes are loaded in part and go through the same operations. */
#include "head.h"
#include "vmath.h"

#define EACH_VECTOR(cols) for (int64_t t = 0, w = MIN(VL, (cols)); t < (cols); t += VL, w = MIN(VL, (cols) - t))

VEC_INLINE vf get(const void *p, int64_t i, int32_t dtype, int64_t w) {
    return w == VL ? vf_load_as(p, i, dtype) : vf_load_part(p, i, dtype, w);
}
VEC_INLINE void put(void *p, int64_t i, int32_t dtype, int64_t w, vf x) {
    if (w == VL)
        vf_store_as(p, i, dtype, x);
    else
        vf_store_part(p, i, dtype, w, x);
}

VEC_FN void head_norm(const uint16_t *x, int64_t xs, const float *gain, float eps, int64_t dim, int64_t cols, float *h,
                      int64_t hs, float *r) {
    EACH_VECTOR(cols) {
        vf sum = vf_zero(), scale = vf_set1(1.0f);
        if (gain) {
            for (int64_t c = 0; c < dim; c++) {
                vf v = get(x, c * xs + t, ANERT_F16, w);
                sum = vf_fma(v, v, sum);
            }
            vf mean = vf_add(vf_div(sum, vf_set1((float)dim)), vf_set1(eps));
            scale = vf_div(vf_set1(1.0f), vf_sqrt(mean));
        }
        put(r, t, ANERT_F32, w, scale);
        for (int64_t c = 0; c < dim; c++) {
            vf v = vf_mul(get(x, c * xs + t, ANERT_F16, w), scale);
            put(h, c * hs + t, ANERT_F32, w, gain ? vf_mul(v, vf_set1(gain[c])) : v);
        }
    }
}

VEC_FN void head_norm_back(const float *dh, int64_t hs, const uint16_t *x, int64_t xs, const float *r, const float *gain,
                           int64_t dim, int64_t cols, float scale, uint16_t *dx, int64_t dxs) {
    EACH_VECTOR(cols) {
        vf dot = vf_zero(), rt = get(r, t, ANERT_F32, w);
        for (int64_t c = 0; gain && c < dim; c++) {
            vf g = vf_mul(get(dh, c * hs + t, ANERT_F32, w), vf_set1(gain[c]));
            dot = vf_fma(g, vf_mul(get(x, c * xs + t, ANERT_F16, w), rt), dot);
        }
        vf mean = vf_div(dot, vf_set1((float)dim)), out = vf_mul(rt, vf_set1(scale));
        for (int64_t c = 0; c < dim; c++) {
            vf g = get(dh, c * hs + t, ANERT_F32, w);
            if (gain)
                g = vf_fnma(vf_mul(get(x, c * xs + t, ANERT_F16, w), rt), mean, vf_mul(g, vf_set1(gain[c])));
            put(dx, c * dxs + t, ANERT_F16, w, vf_mul(g, out));
        }
    }
}

VEC_FN void head_gain_grad(const float *dh, int64_t hs, const uint16_t *x, int64_t xs, const float *r, int64_t rows,
                           int64_t cols, float alpha, float *dgain) {
    for (int64_t c = 0; c < rows; c++) {
        vf sum = vf_zero();
        EACH_VECTOR(cols) {
            vf xhat = vf_mul(get(x, c * xs + t, ANERT_F16, w), get(r, t, ANERT_F32, w));
            sum = vf_fma(get(dh, c * hs + t, ANERT_F32, w), xhat, sum);
        }
        dgain[c] += alpha * vf_sum(sum);
    }
}

/* Row after row, as they lie: a column at a time would take a line of every row, most of them in the same sets of L1. */
VEC_FN void head_soft_part(const float *logits, int64_t ls, int64_t rows, int64_t cols, float *top, float *sum) {
    memcpy(top, logits, (size_t)cols * sizeof *top);
    memset(sum, 0, (size_t)cols * sizeof *sum);
    for (int64_t v = 1; v < rows; v++)
        EACH_VECTOR(cols) put(top, t, ANERT_F32, w, vf_max(get(top, t, ANERT_F32, w), get(logits, v * ls + t, ANERT_F32, w)));
    for (int64_t v = 0; v < rows; v++)
        EACH_VECTOR(cols) {
            vf x = vf_exp(vf_sub(get(logits, v * ls + t, ANERT_F32, w), get(top, t, ANERT_F32, w)));
            put(sum, t, ANERT_F32, w, vf_add(get(sum, t, ANERT_F32, w), x));
        }
}

VEC_FN void head_soft_grad(float *logits, int64_t ls, int64_t rows, int64_t cols, const float *top, const float *scale) {
    for (int64_t v = 0; v < rows; v++)
        EACH_VECTOR(cols) {
            vf x = vf_exp(vf_sub(get(logits, v * ls + t, ANERT_F32, w), get(top, t, ANERT_F32, w)));
            put(logits, v * ls + t, ANERT_F32, w, vf_mul(x, get(scale, t, ANERT_F32, w)));
        }
}

const anert_head_kernels HEAD_TABLE = {head_norm, head_norm_back, head_gain_grad, head_soft_part, head_soft_grad};
