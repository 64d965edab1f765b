/* chain.c: what one decoded token needs of the core beside plans: many of them in one call, and their columns put away. */
#include "internal.h"

anert_status anert_chain_run(const anert_link *links, int32_t n_links, anert_pool *pool, void *arena, anert_error *err) {
    anert_status status = ANERT_OK;
    if (n_links < 0 || (n_links > 0 && links == NULL))
        return anert_fail(err, ANERT_EINVAL, "chain: %d links at %p", n_links, (const void *)links);
    anert_pool_enter(pool);
    for (int32_t i = 0; i < n_links && status == ANERT_OK; i++)
        status = anert_plan_run(links[i].plan, pool, links[i].bases, links[i].n_bases, arena, err);
    anert_pool_leave(pool);
    return status;
}

anert_status anert_columns_put(const anert_columns *columns, int32_t n, int64_t at, int64_t count, anert_error *err) {
    if (n < 0 || (n > 0 && columns == NULL) || at < 0 || count < 0)
        return anert_fail(err, ANERT_EINVAL, "columns: %d of them, %lld at %lld", n, (long long)count, (long long)at);
    for (int32_t i = 0; i < n; i++) {
        const anert_columns *c = &columns[i];
        if (count > c->cols - at || count > c->src_stride)
            return anert_fail(err, ANERT_EINVAL, "columns: %lld at %lld do not fit a cache of %lld", (long long)count,
                              (long long)at, (long long)c->cols);
        for (int64_t r = 0; r < c->rows; r++)
            memcpy(c->dst + r * c->dst_stride + at, c->src + r * c->src_stride, (size_t)count * sizeof *c->dst);
    }
    return ANERT_OK;
}
