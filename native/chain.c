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

static void move(const anert_columns *c, const uint16_t *src, uint16_t *dst, int64_t count) {
    if (count == 1) /* of each row another line: no call for 2 bytes */
        for (int64_t r = 0; r < c->rows; r++)
            dst[r * c->dst_stride] = src[r * c->src_stride];
    else
        for (int64_t r = 0; r < c->rows; r++)
            memcpy(dst + r * c->dst_stride, src + r * c->src_stride, (size_t)count * sizeof *dst);
}

anert_status anert_columns_move(const anert_columns *columns, int32_t n, int64_t from, int64_t to, int64_t count,
                                anert_error *err) {
    if (n < 0 || (n > 0 && columns == NULL) || from < 0 || to < 0 || count < 0)
        return anert_fail(err, ANERT_EINVAL, "columns: %d of them, %lld from %lld to %lld", n, (long long)count,
                          (long long)from, (long long)to);
    for (int32_t i = 0; i < n; i++)
        if (count > columns[i].src_cols - from || count > columns[i].dst_cols - to)
            return anert_fail(err, ANERT_EINVAL, "columns: %lld from %lld of %lld do not fit at %lld of %lld", (long long)count,
                              (long long)from, (long long)columns[i].src_cols, (long long)to, (long long)columns[i].dst_cols);
    for (int32_t i = 0; i < n; i++)
        move(&columns[i], columns[i].src + from, columns[i].dst + to, count);
    return ANERT_OK;
}
