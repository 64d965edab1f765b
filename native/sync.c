/* sync.c: the weights of a model, written to all their copies in one call. */
#include <stdlib.h>

#include "internal.h"

static anert_status write_copies(anert_pool *pool, const anert_param *p, const float *master, uint64_t *total, anert_error *err) {
    uint64_t past = 0;
    anert_status status = anert_param_sync(pool, master, p->rows, p->cols, p->placements, p->n_placements, &past, err);
    if (status == ANERT_OK && p->encoded != NULL)
        status = anert_q8_encode(pool, master, p->rows, p->cols, p->encoded, err);
    *total += past;
    return status;
}

/* Of weights that are halves: widened a few rows at a time. */
static anert_status write_narrow(anert_pool *pool, const anert_param *p, uint64_t *total, anert_error *err) {
    enum { WIDE = 1 << 20, ROWS = 16 }; /* elements; int8's blocks of rows */
    if (p->halves == NULL || p->rows < 1 || p->cols < 1 || p->n_placements < 0 || (p->n_placements > 0 && p->placements == NULL))
        return anert_fail(err, ANERT_EINVAL, "sync: halves (%lld, %lld) at %p with %d placements", (long long)p->rows,
                          (long long)p->cols, (const void *)p->halves, p->n_placements);
    int64_t step = MIN(p->rows, MAX((int64_t)ROWS, WIDE / p->cols / ROWS * ROWS)), wide_bytes;
    anert_placement *moved = malloc(sizeof *moved * (size_t)MAX(p->n_placements, 1));
    float *wide = __builtin_mul_overflow(step * (int64_t)sizeof *wide, p->cols, &wide_bytes) ? NULL : malloc((size_t)wide_bytes);
    anert_status status = ANERT_OK;
    if (moved == NULL || wide == NULL)
        status = anert_fail(err, ANERT_ENOMEM, "no memory for %lld rows of %lld weights", (long long)step, (long long)p->cols);
    for (int64_t row = 0; row < p->rows && status == ANERT_OK; row += step) {
        anert_param part = *p;
        part.rows = MIN(step, p->rows - row);
        part.placements = moved;
        part.encoded = p->encoded == NULL ? NULL : p->encoded + anert_q8_bytes(row, p->cols);
        for (int32_t i = 0; i < p->n_placements; i++) {
            moved[i] = p->placements[i];
            moved[i].base += row * moved[i].row_stride;
        }
        status = anert_f16_to_f32(pool, p->halves + row * p->cols, wide, (size_t)(part.rows * p->cols), err);
        if (status == ANERT_OK)
            status = write_copies(pool, &part, wide, total, err);
    }
    free(moved);
    free(wide);
    return status;
}

anert_status anert_params_sync(anert_pool *pool, const anert_param *params, int64_t n, uint64_t *clamped, anert_error *err) {
    uint64_t total = 0;
    if (n < 0 || (n > 0 && params == NULL))
        return anert_fail(err, ANERT_EINVAL, "sync: %lld params at %p", (long long)n, (const void *)params);
    for (int64_t i = 0; i < n; i++) {
        const anert_param *p = &params[i];
        anert_status status = p->halves != NULL && p->master == NULL ? write_narrow(pool, p, &total, err)
                                                                     : write_copies(pool, p, p->master, &total, err);
        if (status != ANERT_OK)
            return status;
    }
    if (clamped != NULL)
        *clamped = total;
    return ANERT_OK;
}
