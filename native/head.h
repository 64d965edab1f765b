/* head.h: the lane loops of the head, one table per instruction set. */
#ifndef ANERT_HEAD_H
#define ANERT_HEAD_H
#include "internal.h"

/* Columns are positions. x is fp16 (dim, cols), h and dh are fp32 (dim, cols), logits fp32 (rows, cols); each with a row stride.
 * A column's value depends on the column alone: neither on how many stand beside it nor on where it stands. */
typedef struct {
    /* h = x * r * gain, r[t] = rsqrt(mean(x[:, t]^2) + eps); gain NULL: h = x, r = 1 */
    void (*norm)(const uint16_t *x, int64_t xs, const float *gain, float eps, int64_t dim, int64_t cols, float *h, int64_t hs,
                 float *r);
    /* dx = scale * r * (g dh - xhat mean(g dh xhat)), xhat = x r; gain NULL: dx = scale * dh */
    void (*norm_back)(const float *dh, int64_t hs, const uint16_t *x, int64_t xs, const float *r, const float *gain, int64_t dim,
                      int64_t cols, float scale, uint16_t *dx, int64_t dxs);
    /* dgain[c] += alpha * sum over t of dh[c, t] * x[c, t] * r[t], rows channels */
    void (*gain_grad)(const float *dh, int64_t hs, const uint16_t *x, int64_t xs, const float *r, int64_t rows, int64_t cols,
                      float alpha, float *dgain);
    /* top[t] = max over rows, sum[t] = sum over rows of exp(logit - top[t]) */
    void (*soft_part)(const float *logits, int64_t ls, int64_t rows, int64_t cols, float *top, float *sum);
    /* logits = exp(logits - top[t]) * scale[t], in place */
    void (*soft_grad)(float *logits, int64_t ls, int64_t rows, int64_t cols, const float *top, const float *scale);
} anert_head_kernels;
#endif
