/* sync.c: the weights of a model, written to all their copies in one call. */
#include "internal.h"

anert_status anert_params_sync(anert_pool *pool, const anert_param *params, int64_t n, uint64_t *clamped, anert_error *err) {
    uint64_t past = 0, total = 0;
    if (n < 0 || (n > 0 && params == NULL))
        return anert_fail(err, ANERT_EINVAL, "sync: %lld params at %p", (long long)n, (const void *)params);
    for (int64_t i = 0; i < n; i++) {
        const anert_param *p = &params[i];
        anert_status status = anert_param_sync(pool, p->master, p->rows, p->cols, p->placements,
                                               p->n_placements, &past, err);
        if (status == ANERT_OK && p->encoded != NULL)
            status = anert_q8_encode(pool, p->master, p->rows, p->cols, p->encoded, err);
        if (status != ANERT_OK)
            return status;
        total += past;
    }
    if (clamped != NULL)
        *clamped = total;
    return ANERT_OK;
}
