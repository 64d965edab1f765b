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
