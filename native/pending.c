/* pending.c: weak definitions of what has not arrived, so that the extension links. */
#include "internal.h"

#define PENDING(name, ...)                                                                                              \
    __attribute__((weak)) anert_status name(__VA_ARGS__);                                                               \
    __attribute__((weak)) anert_status name(__VA_ARGS__)
#define REFUSE return anert_fail(err, ANERT_EUNSUPPORTED, "%s is not part of this build", __func__)
#pragma GCC diagnostic ignored "-Wunused-parameter"

PENDING(anert_gemm, anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k, float alpha,
        anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err) { REFUSE; }
PENDING(anert_embed, anert_pool *pool, const uint16_t *table, int64_t vocab, int64_t dim, const int32_t *tokens, int64_t n,
        uint16_t *x, int64_t x_stride, anert_error *err) { REFUSE; }
PENDING(anert_embed_backward, anert_pool *pool, float alpha, const uint16_t *dx, int64_t dx_stride, const int32_t *tokens,
        int64_t n, int64_t vocab, int64_t dim, float *dtable, anert_error *err) { REFUSE; }
PENDING(anert_head_loss, anert_pool *pool, const anert_head_args *args, double *loss, int64_t *count, anert_error *err) { REFUSE; }
PENDING(anert_head_logits, anert_pool *pool, const anert_head_args *args, const int32_t *columns, int64_t n_out, float *logits,
        anert_error *err) { REFUSE; }
__attribute__((weak)) size_t anert_head_scratch(int64_t vocab, int64_t dim, int64_t n, int32_t threads) { return 0; }
__attribute__((weak)) size_t anert_gemm_scratch(int32_t isa, int64_t n, int64_t k) { return 64; }

PENDING(anert_f32_to_f16, anert_pool *pool, const float *src, uint16_t *dst, size_t n, int32_t clamp, uint64_t *clamped,
        anert_error *err) { REFUSE; }
PENDING(anert_f16_to_f32, anert_pool *pool, const uint16_t *src, float *dst, size_t n, anert_error *err) { REFUSE; }
PENDING(anert_f32_to_f16_2d, anert_pool *pool, const float *src, size_t src_stride, uint16_t *dst, size_t dst_stride,
        size_t rows, size_t cols, int32_t transpose, int32_t clamp, uint64_t *clamped, anert_error *err) { REFUSE; }
PENDING(anert_f16_to_f32_2d, anert_pool *pool, const uint16_t *src, size_t src_stride, float *dst, size_t dst_stride,
        size_t rows, size_t cols, int32_t transpose, anert_error *err) { REFUSE; }
PENDING(anert_adamw, anert_pool *pool, float *master, float *m, float *v, const float *grad, int64_t rows, int64_t cols,
        anert_adamw_args args, const anert_placement *placements, int32_t n_placements, uint64_t *clamped,
        anert_error *err) { REFUSE; }
PENDING(anert_lion, anert_pool *pool, float *master, float *m, const float *grad, int64_t rows, int64_t cols,
        anert_adamw_args args, const anert_placement *placements, int32_t n_placements, uint64_t *clamped,
        anert_error *err) { REFUSE; }
PENDING(anert_param_sync, anert_pool *pool, const float *master, int64_t rows, int64_t cols, const anert_placement *placements,
        int32_t n_placements, uint64_t *clamped, anert_error *err) { REFUSE; }
PENDING(anert_sum_squares, anert_pool *pool, const float *x, size_t n, double *out, int32_t *finite, anert_error *err) { REFUSE; }
PENDING(anert_f16_amax, anert_pool *pool, const uint16_t *x, size_t n, float *amax, int32_t *finite, anert_error *err) { REFUSE; }
PENDING(anert_rowsum, anert_pool *pool, float alpha, const uint16_t *tap, int64_t tap_stride, const uint16_t *cot,
        int64_t cot_stride, int64_t c, int64_t n, float *dw, anert_error *err) { REFUSE; }
PENDING(anert_accumulate, anert_pool *pool, float alpha, const uint16_t *cot, int64_t row_stride, int64_t col_stride,
        int64_t rows, int64_t cols, float *dw, anert_error *err) { REFUSE; }

static void refuse_down(const float *src, uint16_t *dst, size_t n) {
    for (size_t i = 0; i < n; i++)
        dst[i] = anert_half(src[i]);
}
static void refuse_up(const uint16_t *src, float *dst, size_t n) {
    for (size_t i = 0; i < n; i++)
        dst[i] = anert_float(src[i]);
}
static void turn_down(const float *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            dst[c * ds + r] = anert_half(src[r * ss + c]);
}
static void turn_up(const uint16_t *src, size_t ss, float *dst, size_t ds, size_t rows, size_t cols) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            dst[c * ds + r] = anert_float(src[r * ss + c]);
}
__attribute__((weak)) const anert_fp16_kernels *anert_fp16_kernels_for(int32_t isa) {
    static const anert_fp16_kernels scalar = {refuse_down, refuse_up, turn_down, turn_up};
    return &scalar;
}
