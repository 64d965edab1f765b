/* optim.c: one fused pass over a Param.
 *
 * Loops are plain C, compiled once for each instruction set; no multiply-add is fused, so an update has the same bits on
 * every instruction set and for every number of threads. */
#include <math.h>

#include "internal.h"

enum { STRIP = 64, AHEAD = 512, STREAMED = 1 << 18, CHUNK = 1 << 14, WIDE = 1 << 17, BLOCK = 64 };
enum { ROW_PART = 1024, SLOT = 4, PAD = 32, SCRATCH = WIDE + BLOCK * PAD };

/* ---- Loops ---- */
typedef struct {
    float decay;             /* 1 - lr * weight_decay */
    float beta1, one_beta1;  /* one_beta1: 1 - beta1, rounded once */
    float beta2, one_beta2;
    float grad_scale;
    float step;              /* adamw: lr / bias1; lion: lr */
    float root;              /* 1 / sqrt(bias2) */
    float eps;
} update;

#define LOOP static inline __attribute__((always_inline))

LOOP void adamw_strip(float *restrict p, float *restrict m, float *restrict v, const float *restrict g, size_t n,
                      const update *u) {
    update k = *u;
    for (size_t i = 0; i < n; i++) {
        float grad = g[i] * k.grad_scale;
        float first = k.beta1 * m[i] + k.one_beta1 * grad;
        float second = k.beta2 * v[i] + k.one_beta2 * grad * grad;
        m[i] = first;
        v[i] = second;
        p[i] = p[i] * k.decay - k.step * first / (sqrtf(second) * k.root + k.eps);
    }
}

LOOP void adamw_loop(float *restrict p, float *restrict m, float *restrict v, const float *restrict g, size_t n,
                     const update *u) {
    const update k = *u;
    size_t whole = n / STRIP * STRIP;
    for (size_t i = 0; i < whole; i += STRIP) { /* four streams are more than hardware prefetchers keep up with */
        for (size_t line = 0; line < STRIP; line += 16) {
            __builtin_prefetch(p + i + AHEAD + line, 1);
            __builtin_prefetch(m + i + AHEAD + line, 1);
            __builtin_prefetch(v + i + AHEAD + line, 1);
            __builtin_prefetch(g + i + AHEAD + line);
        }
        adamw_strip(p + i, m + i, v + i, g + i, STRIP, &k);
    }
    adamw_strip(p + whole, m + whole, v + whole, g + whole, n - whole, &k);
}

LOOP void lion_loop(float *restrict p, float *restrict m, const float *restrict g, size_t n, const update *u) {
    update k = *u;
    for (size_t i = 0; i < n; i++) {
        float grad = g[i] * k.grad_scale;
        float towards = k.beta1 * m[i] + k.one_beta1 * grad;
        float sign = (towards > 0.0f ? 1.0f : 0.0f) - (towards < 0.0f ? 1.0f : 0.0f);
        m[i] = k.beta2 * m[i] + k.one_beta2 * grad;
        p[i] = p[i] * k.decay - k.step * sign;
    }
}

typedef struct {
    void (*adamw)(float *p, float *m, float *v, const float *g, size_t n, const update *u);
    void (*lion)(float *p, float *m, const float *g, size_t n, const update *u);
} loops;

#define COMPILE_LOOPS(isa, target)                                                                                     \
    target static void adamw_##isa(float *p, float *m, float *v, const float *g, size_t n, const update *u) {          \
        adamw_loop(p, m, v, g, n, u);                                                                                  \
    }                                                                                                                  \
    target static void lion_##isa(float *p, float *m, const float *g, size_t n, const update *u) { lion_loop(p, m, g, n, u); } \
    static const loops loops_##isa = {adamw_##isa, lion_##isa};

#include "loops.h"

/* ---- Placements ---- */
typedef struct {
    const loops *loops;
    const anert_fp16_kernels *fp16;
    update u;
    float *master, *m, *v; /* m, v and grad are NULL where a pass has no use for them */
    const float *grad;
    int64_t rows, cols;
    int64_t tile_rows, tile_cols, across; /* tiles along a row */
    int64_t pitch; /* of a tile's rows of halves: does not alias */
    const anert_placement *placements;
    int32_t n_placements;
    uint16_t *wide; /* (threads, SCRATCH), or NULL: tiles hold a CHUNK */
    void (*copy)(const uint16_t *src, uint16_t *dst, size_t n);
    bool large; /* copies go past the caches */
    bool alone; /* the one placement is straight: halves go there without a copy */
    bool vector; /* a Param of one column, laid as one row: the placements' strides are swapped */
    _Atomic uint64_t clamped;
} pass;

static anert_placement placement_of(const pass *job, int32_t i) {
    anert_placement to = job->placements[i];
    if (job->vector) {
        int64_t stride = to.row_stride;
        to.row_stride = to.col_stride;
        to.col_stride = stride;
    }
    return to;
}

static bool is_straight(anert_placement to) { return to.col_stride == 1 && to.broadcast == 1; }
static bool is_transposed(anert_placement to) { return to.row_stride == 1 && to.broadcast == 1; }

static void copy_row(const uint16_t *src, uint16_t *dst, size_t n) { memcpy(dst, src, n * sizeof *dst); }

/* halves (rows, cols) with row stride hs go to `to`, wherever its strides lead. */
static void place_anywhere(const uint16_t *halves, int64_t hs, anert_placement to, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            uint16_t *out = to.base + r * to.row_stride + c * to.col_stride;
            for (int32_t i = 0; i < to.broadcast; i++)
                out[i] = halves[r * hs + c];
        }
}

/* Writes halves of the tile at (row, col) to the placements that are (or are not) straight. */
static void place(const pass *job, bool straight, const uint16_t *halves, int64_t row, int64_t col, int64_t rows,
                  int64_t cols) {
    for (int32_t i = 0; i < job->n_placements; i++) {
        anert_placement to = placement_of(job, i);
        if (is_straight(to) != straight)
            continue;
        to.base += row * to.row_stride + col * to.col_stride;
        if (straight)
            job->copy(halves, to.base, (size_t)cols); /* one row */
        else if (is_transposed(to))
            anert_fp16_turn(job->fp16, job->large, halves, (size_t)job->pitch, to.base, (size_t)to.col_stride, (size_t)rows,
                            (size_t)cols);
        else
            place_anywhere(halves, job->pitch, to, rows, cols);
    }
}

static void run_tile(void *arg, int64_t index, int32_t thread) {
    pass *job = arg;
    uint16_t here[CHUNK + BLOCK * PAD];
    uint16_t *halves = job->wide != NULL ? job->wide + (int64_t)thread * SCRATCH : here; /* (tile_rows, pitch) */
    int64_t row = index / job->across * job->tile_rows, col = index % job->across * job->tile_cols;
    int64_t rows = MIN(job->rows - row, job->tile_rows), cols = MIN(job->cols - col, job->tile_cols);
    size_t past = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c += ROW_PART) { /* what one part reads and writes stays in L1 */
            int64_t at = (row + r) * job->cols + col + c, n = MIN(cols - c, (int64_t)ROW_PART);
            uint16_t *part = halves + r * job->pitch + c;
            if (job->v != NULL)
                job->loops->adamw(job->master + at, job->m + at, job->v + at, job->grad + at, (size_t)n, &job->u);
            else if (job->m != NULL)
                job->loops->lion(job->master + at, job->m + at, job->grad + at, (size_t)n, &job->u);
            if (job->n_placements == 0)
                continue;
            if (job->alone) {
                anert_placement to = placement_of(job, 0);
                uint16_t *out = to.base + (row + r) * to.row_stride + col + c;
                past += (job->large ? job->fp16->stream_clamp : job->fp16->clamp)(job->master + at, out, (size_t)n);
                continue;
            }
            past += job->fp16->clamp(job->master + at, part, (size_t)n);
            place(job, true, part, row + r, col + c, 1, n);
        }
    place(job, false, halves, row, col, rows, cols);
    job->fp16->fence();
    if (past > 0)
        job->clamped += past;
}

static anert_status check_pass(const pass *job, anert_error *err) {
    int64_t n;
    if (job->rows < 0 || job->cols < 0 || __builtin_mul_overflow(job->rows, job->cols, &n) ||
        n > (int64_t)(PTRDIFF_MAX / sizeof(float)))
        return anert_fail(err, ANERT_EINVAL, "no Param has the shape (%lld, %lld)", (long long)job->rows,
                          (long long)job->cols);
    if (n > 0 && job->master == NULL)
        return anert_fail(err, ANERT_EINVAL, "master is NULL");
    if (job->n_placements < 0 || (job->n_placements > 0 && job->placements == NULL))
        return anert_fail(err, ANERT_EINVAL, "%d placements at %s", job->n_placements,
                          job->placements == NULL ? "NULL" : "an address");
    for (int32_t i = 0; i < job->n_placements; i++) {
        anert_placement to = job->placements[i];
        int64_t down, along, last;
        if (n == 0)
            continue;
        if (to.base == NULL || to.row_stride < 0 || to.col_stride < 0 || to.broadcast < 1)
            return anert_fail(err, ANERT_EINVAL, "placement %d has base %s, strides (%lld, %lld), broadcast %d; expected an "
                              "address, no negative stride, broadcast >= 1", i, to.base == NULL ? "NULL" : "set",
                              (long long)to.row_stride, (long long)to.col_stride, to.broadcast);
        if (__builtin_mul_overflow(job->rows - 1, to.row_stride, &down) ||
            __builtin_mul_overflow(job->cols - 1, to.col_stride, &along) || __builtin_add_overflow(down, along, &last) ||
            last > (int64_t)(PTRDIFF_MAX / sizeof(uint16_t)) - to.broadcast)
            return anert_fail(err, ANERT_EINVAL, "placement %d with strides (%lld, %lld) exceeds the address space", i,
                              (long long)to.row_stride, (long long)to.col_stride);
    }
    return ANERT_OK;
}

/* Tiles. Where something is transposed: BLOCK rows, as long as L2 holds their halves, since prefetchers like long rows
 * and the copy's lines are then written once. Else a CHUNK of one row or several. */
static void cut_tiles(anert_pool *pool, pass *job, bool blocked) {
    int64_t threads = anert_pool_threads(pool), size = CHUNK;
    if (blocked && job->rows * job->cols >= 2 * WIDE * threads) {
        job->wide = anert_pool_scratch(pool, 0, SLOT, sizeof *job->wide * SCRATCH * (size_t)threads);
        size = job->wide != NULL ? WIDE : CHUNK;
    }
    job->tile_cols = MIN(job->cols, blocked ? size / BLOCK : size);
    job->tile_rows = blocked ? BLOCK : MAX(1, size / job->tile_cols);
    job->across = (job->cols + job->tile_cols - 1) / job->tile_cols;
    job->pitch = blocked ? job->tile_cols + PAD : job->tile_cols;
}

static void run_pass(anert_pool *pool, pass *job, uint64_t *clamped) {
    if (job->cols == 1) {
        job->vector = true;
        job->cols = job->rows;
        job->rows = 1;
    }
    bool blocked = false, flat = true;
    for (int32_t i = 0; i < job->n_placements; i++) {
        anert_placement to = placement_of(job, i);
        blocked |= !is_straight(to);
        flat &= is_straight(to) && to.row_stride == job->cols;
    }
    if (flat) { /* one long row */
        job->cols *= job->rows;
        job->rows = 1;
    }
    if (job->rows > 0 && job->cols > 0) {
        job->loops = loops_for(anert_pool_isa(pool));
        job->fp16 = anert_fp16_kernels_for(anert_pool_isa(pool));
        job->large = job->rows * job->cols >= STREAMED;
        job->copy = job->large ? job->fp16->stream : copy_row;
        job->alone = job->n_placements == 1 && !blocked;
        anert_pool_enter(pool);
        cut_tiles(pool, job, blocked);
        int64_t down = (job->rows + job->tile_rows - 1) / job->tile_rows;
        anert_parallel_for(workers(pool, job->rows * job->cols), down * job->across, run_tile, job);
        anert_pool_leave(pool);
        for (int32_t i = 0; i < job->n_placements; i++)
            anert_surface_touch(job->placements[i].surface);
    }
    if (clamped != NULL)
        *clamped = job->clamped;
}

static anert_status check_update(const pass *job, const anert_adamw_args *args, bool adamw, anert_error *err) {
    if (job->rows > 0 && job->cols > 0 && (job->m == NULL || job->grad == NULL || (adamw && job->v == NULL)))
        return anert_fail(err, ANERT_EINVAL, "%s is NULL", job->grad == NULL ? "grad" : job->m == NULL ? "m" : "v");
    if (!(args->beta1 >= 0.0 && args->beta1 < 1.0) || !(args->beta2 >= 0.0 && args->beta2 < 1.0))
        return anert_fail(err, ANERT_EINVAL, "betas (%g, %g) must lie in [0, 1)", args->beta1,
                          args->beta2);
    if (!isfinite(args->lr) || !isfinite(args->weight_decay) || !isfinite(args->grad_scale))
        return anert_fail(err, ANERT_EINVAL, "lr %g, weight_decay %g and grad_scale %g must be finite", args->lr,
                          args->weight_decay, args->grad_scale);
    if (adamw && (!(args->eps >= 0.0) || !(args->bias1 > 0.0) || !(args->bias2 > 0.0)))
        return anert_fail(err, ANERT_EINVAL, "eps %g must be >= 0, bias1 %g and bias2 %g above 0", args->eps,
                          args->bias1, args->bias2);
    return ANERT_OK;
}

static update constants(const anert_adamw_args *args, bool adamw) {
    return (update){
        .decay = (float)(1.0 - args->lr * args->weight_decay),
        .beta1 = (float)args->beta1,
        .one_beta1 = (float)(1.0 - args->beta1),
        .beta2 = (float)args->beta2,
        .one_beta2 = (float)(1.0 - args->beta2),
        .grad_scale = (float)args->grad_scale,
        .step = (float)(adamw ? args->lr / args->bias1 : args->lr),
        .root = adamw ? (float)(1.0 / sqrt(args->bias2)) : 0.0f,
        .eps = (float)args->eps,
    };
}

static pass pass_of(const anert_param *p, bool adamw) {
    return (pass){.master = p->master, .m = p->m, .v = adamw ? p->v : NULL, .grad = p->grad, .rows = p->rows,
                  .cols = p->cols, .placements = p->placements, .n_placements = p->n_placements};
}

static anert_status update_all(anert_pool *pool, const anert_param *params, int64_t n, anert_adamw_args args, bool adamw,
                               uint64_t *clamped, anert_error *err) {
    if (n < 0 || (n > 0 && params == NULL))
        return anert_fail(err, ANERT_EINVAL, "%lld Params at %s", (long long)n, params == NULL ? "NULL" : "an address");
    for (int64_t i = 0; i < n; i++) {
        pass job = pass_of(&params[i], adamw);
        anert_status status = check_pass(&job, err);
        if (status == ANERT_OK)
            status = check_update(&job, &args, adamw, err);
        if (status != ANERT_OK)
            return status;
    }
    uint64_t total = 0, past;
    const double decay = args.weight_decay;
    anert_pool_enter(pool);
    for (int64_t i = 0; i < n; i++) {
        pass job = pass_of(&params[i], adamw);
        args.weight_decay = params[i].decays ? decay : 0.0;
        job.u = constants(&args, adamw);
        run_pass(pool, &job, &past);
        total += past;
    }
    anert_pool_leave(pool);
    if (clamped != NULL)
        *clamped = total;
    return ANERT_OK;
}

anert_status anert_adamw(anert_pool *pool, const anert_param *params, int64_t n, anert_adamw_args args, uint64_t *clamped,
                         anert_error *err) {
    return update_all(pool, params, n, args, true, clamped, err);
}

anert_status anert_lion(anert_pool *pool, const anert_param *params, int64_t n, anert_adamw_args args, uint64_t *clamped,
                        anert_error *err) {
    return update_all(pool, params, n, args, false, clamped, err);
}

anert_status anert_param_sync(anert_pool *pool, const float *master, int64_t rows, int64_t cols,
                              const anert_placement *placements, int32_t n_placements, uint64_t *clamped,
                              anert_error *err) {
    pass job = {.master = (float *)master, .rows = rows, .cols = cols, .placements = placements,
                .n_placements = n_placements}; /* without m and v, master is only read */
    anert_status status = check_pass(&job, err);
    if (status != ANERT_OK)
        return status;
    run_pass(pool, &job, clamped);
    return ANERT_OK;
}
