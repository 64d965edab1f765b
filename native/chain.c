/* chain.c: what follows each other in one call: plans and gradients of a step; and all that new positions of a decoder take. */
#include <time.h>

#include "internal.h"

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

anert_status anert_chain_run(const anert_link *links, int32_t n_links, anert_pool *pool, void *arena, float alpha, int32_t fresh,
                             double *ms, anert_error *err) {
    anert_status status = ANERT_OK;
    if (n_links < 0 || (n_links > 0 && links == NULL))
        return anert_fail(err, ANERT_EINVAL, "chain: %d links at %p", n_links, (const void *)links);
    anert_pool_enter(pool);
    double start = ms != NULL ? now_ms() : 0.0;
    for (int32_t i = 0; i < n_links && status == ANERT_OK; i++) {
        const anert_link *link = &links[i];
        status = link->plan != NULL ? anert_plan_run(link->plan, pool, link->bases, link->n_bases, arena, err)
                                    : anert_gradient_run(pool, link->gradient, alpha, fresh, err);
        if (ms != NULL && (i + 1 == n_links || links[i + 1].part != link->part)) {
            double end = now_ms();
            ms[link->part] += end - start;
            start = end;
        }
    }
    anert_pool_leave(pool);
    return status;
}

/* ---- Columns ---- */
enum { SERIAL_ROWS = 512 }; /* below, waking a thread costs more than it saves */

typedef struct {
    const anert_columns *columns;
    int32_t n, parts;
    int64_t from, to, count;
} moving;

/* Part index / n of the rows of matrix index % n: the first part of every matrix, then the second. So a thread writes the rows
 * that it reads in the next product. */
static void move_part(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const moving *job = arg;
    const anert_columns *c = &job->columns[index % job->n];
    int64_t part = index / job->n, first = c->rows * part / job->parts, end = c->rows * (part + 1) / job->parts;
    const uint16_t *src = c->src + job->from;
    uint16_t *dst = c->dst + job->to;
    if (job->count == 1) /* of each row another line: no call for 2 bytes */
        for (int64_t r = first; r < end; r++)
            dst[r * c->dst_stride] = src[r * c->src_stride];
    else
        for (int64_t r = first; r < end; r++)
            memcpy(dst + r * c->dst_stride, src + r * c->src_stride, (size_t)job->count * sizeof *dst);
}

anert_status anert_columns_move(anert_pool *pool, const anert_columns *columns, int32_t n, int64_t from, int64_t to, int64_t count,
                                anert_error *err) {
    int64_t rows = 0;
    if (n < 0 || (n > 0 && columns == NULL) || from < 0 || to < 0 || count < 0)
        return anert_fail(err, ANERT_EINVAL, "columns: %d of them, %lld from %lld to %lld", n, (long long)count,
                          (long long)from, (long long)to);
    for (int32_t i = 0; i < n; i++) {
        if (count > columns[i].src_cols - from || count > columns[i].dst_cols - to)
            return anert_fail(err, ANERT_EINVAL, "columns: %lld from %lld of %lld do not fit at %lld of %lld", (long long)count,
                              (long long)from, (long long)columns[i].src_cols, (long long)to, (long long)columns[i].dst_cols);
        rows += columns[i].rows;
    }
    moving job = {columns, n, rows < SERIAL_ROWS ? 1 : anert_pool_threads(pool), from, to, count};
    if (job.parts > 1)
        anert_parallel_for(pool, (int64_t)n * job.parts, move_part, &job);
    for (int32_t i = 0; job.parts == 1 && i < n; i++)
        move_part(&job, i, 0);
    return ANERT_OK;
}

/* ---- All that new positions take ---- */
anert_status anert_positions_run(const anert_positions *p, void *arena, int64_t at, int64_t count, float *logits,
                                 anert_error *err) {
    if (p == NULL || p->n_touched < 0 || (p->n_touched > 0 && p->touched == NULL) || count < 1 || count > p->n)
        return anert_fail(err, ANERT_EINVAL, "positions: %lld of them at %p", (long long)count, (const void *)p);
    anert_status status = anert_embed(p->pool, p->table, p->vocab, p->dim, p->tokens, p->n, p->x, p->x_stride, err);
    if (!status)
        status = anert_columns_move(p->pool, p->before, p->n_before, at, 0, count, err);
    if (!status)
        status = anert_chain_run(p->links, p->n_links, p->pool, arena, 0.0f, 0, NULL, err);
    if (!status)
        status = anert_columns_move(p->pool, p->after, p->n_after, 0, at, count, err);
    for (int32_t i = 0; !status && i < p->n_touched; i++)
        anert_surface_touch(p->touched[i]);
    int32_t last = (int32_t)count - 1;
    return status || logits == NULL ? status : anert_head_logits(p->pool, p->head, &last, 1, logits, err);
}
