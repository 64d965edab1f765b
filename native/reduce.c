/* reduce.c: sums over gradients and activations, and the gradients that are made of them.
 *
 * Loops are plain C, compiled once for each instruction set. Sums run over fixed chunks that are added in index order, so that
 * they have the same bits on every instruction set and for every number of threads. */
#include <math.h>
#include <stdlib.h>

#include "internal.h"

enum { LANES = 16, CHUNK = 1 << 14, BLOCK = 64, ROW_PART = 1024 };

/* ---- Loops ---- */
#define LOOP static inline __attribute__((always_inline))

/* Lane j sums elements j, j + LANES, ...; lanes are added pairwise. Squares of fp32 are exact in float64. */
LOOP double squares_loop(const float *x, size_t n) {
    double lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++)
            lanes[j] += (double)x[i + j] * (double)x[i + j];
    for (; i < n; i++)
        lanes[i % LANES] += (double)x[i] * (double)x[i];
    for (size_t width = LANES / 2; width > 0; width /= 2)
        for (size_t j = 0; j < width; j++)
            lanes[j] += lanes[j + width];
    return lanes[0];
}

/* The same over products of fp16 values, which are exact in fp32; b may be NULL: ones. */
LOOP float products_loop(const float *a, const float *b, size_t n) {
    float lanes[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++)
            lanes[j] += b == NULL ? a[i + j] : a[i + j] * b[i + j];
    for (; i < n; i++)
        lanes[i % LANES] += b == NULL ? a[i] : a[i] * b[i];
    for (size_t width = LANES / 2; width > 0; width /= 2)
        for (size_t j = 0; j < width; j++)
            lanes[j] += lanes[j + width];
    return lanes[0];
}

LOOP void axpy_loop(float alpha, const float *restrict x, float *restrict y, size_t n) {
    for (size_t i = 0; i < n; i++)
        y[i] += alpha * x[i];
}

/* Largest magnitude bits: 0x7c00 is inf, more is NaN. */
LOOP uint16_t amax_loop(const uint16_t *x, size_t n) {
    uint16_t most = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t magnitude = x[i] & 0x7fff;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

typedef struct {
    double (*squares)(const float *x, size_t n);
    float (*products)(const float *a, const float *b, size_t n);
    float (*sum)(const float *a, size_t n);
    void (*axpy)(float alpha, const float *x, float *y, size_t n);
    uint16_t (*amax)(const uint16_t *x, size_t n);
} loops;

#define COMPILE_LOOPS(isa, target)                                                                                     \
    target static double squares_##isa(const float *x, size_t n) { return squares_loop(x, n); }                        \
    target static float products_##isa(const float *a, const float *b, size_t n) { return products_loop(a, b, n); }    \
    target static float sum_##isa(const float *a, size_t n) { return products_loop(a, NULL, n); }                      \
    target static void axpy_##isa(float alpha, const float *x, float *y, size_t n) { axpy_loop(alpha, x, y, n); }      \
    target static uint16_t amax_##isa(const uint16_t *x, size_t n) { return amax_loop(x, n); }                         \
    static const loops loops_##isa = {squares_##isa, products_##isa, sum_##isa, axpy_##isa, amax_##isa};

#include "loops.h"

/* ---- Reductions ---- */
typedef struct {
    const loops *loops;
    const float *x;
    size_t n;
    double *partial; /* a sum per chunk */
} squares;

static void square_chunk(void *arg, int64_t index, int32_t thread) {
    squares *job = arg;
    size_t at = (size_t)index * CHUNK;
    (void)thread;
    job->partial[index] = job->loops->squares(job->x + at, MIN(job->n - at, (size_t)CHUNK));
}

anert_status anert_sum_squares(anert_pool *pool, const float *x, size_t n, double *out, int32_t *finite,
                               anert_error *err) {
    if (n > PTRDIFF_MAX / sizeof(float) || (n > 0 && x == NULL) || out == NULL)
        return anert_fail(err, ANERT_EINVAL, "sum of squares of %zu values: %s", n,
                          out == NULL ? "out is NULL" : x == NULL ? "x is NULL" : "too many");
    size_t chunks = (n + CHUNK - 1) / CHUNK;
    double few[64];
    double *partial = chunks <= 64 ? few : malloc(chunks * sizeof *partial);
    if (partial == NULL)
        return anert_fail(err, ANERT_ENOMEM, "no memory for %zu partial sums", chunks);
    squares job = {loops_for(anert_pool_isa(pool)), x, n, partial};
    anert_parallel_for(workers(pool, (int64_t)n), (int64_t)chunks, square_chunk, &job);
    double sum = 0.0;
    for (size_t i = 0; i < chunks; i++)
        sum += partial[i];
    if (partial != few)
        free(partial);
    *out = sum;
    if (finite != NULL) /* squares of finite fp32 values cannot overflow a float64 sum */
        *finite = isfinite(sum) != 0;
    return ANERT_OK;
}

anert_status anert_grad_squares(anert_pool *pool, const anert_param *params, int64_t n, double *squares, double *total,
                                anert_error *err) {
    if (n < 0 || (n > 0 && (params == NULL || squares == NULL)) || total == NULL)
        return anert_fail(err, ANERT_EINVAL, "squares of %lld gradients: %s is NULL", (long long)n,
                          total == NULL ? "total" : params == NULL ? "params" : "squares");
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        double own = squares[i];
        squares[i] = NAN;
        anert_status status = isfinite(own) ? ANERT_OK
                                            : anert_sum_squares(pool, params[i].grad,
                                                                (size_t)(params[i].rows * params[i].cols), &own, NULL, err);
        if (status != ANERT_OK)
            return status;
        sum += own;
    }
    *total = sum;
    return ANERT_OK;
}

typedef struct {
    const loops *loops;
    const uint16_t *x;
    size_t n;
    _Atomic uint32_t most, past;
} amax;

static void raise_to(_Atomic uint32_t *held, uint32_t value) {
    uint32_t old = atomic_load(held);
    while (old < value && !atomic_compare_exchange_weak(held, &old, value))
        ;
}

static void amax_chunk(void *arg, int64_t index, int32_t thread) {
    amax *job = arg;
    size_t at = (size_t)index * CHUNK;
    size_t n = MIN(job->n - at, (size_t)CHUNK);
    uint16_t past = job->loops->amax(job->x + at, n), most = past;
    (void)thread;
    if (past > 0x7c00) { /* NaN is not counted */
        most = 0;
        for (size_t i = at; i < at + n; i++)
            if ((job->x[i] & 0x7fff) <= 0x7c00)
                most = MAX(most, (uint16_t)(job->x[i] & 0x7fff));
    }
    raise_to(&job->most, most);
    raise_to(&job->past, past);
}

anert_status anert_f16_amax(anert_pool *pool, const uint16_t *x, size_t n, float *most, int32_t *finite,
                            anert_error *err) {
    if (n > PTRDIFF_MAX / sizeof(uint16_t) || (n > 0 && x == NULL) || most == NULL)
        return anert_fail(err, ANERT_EINVAL, "amax of %zu values: %s", n,
                          most == NULL ? "amax is NULL" : x == NULL ? "x is NULL" : "too many");
    amax job = {.loops = loops_for(anert_pool_isa(pool)), .x = x, .n = n};
    anert_parallel_for(workers(pool, (int64_t)n), (int64_t)((n + CHUNK - 1) / CHUNK), amax_chunk, &job);
    *most = anert_float((uint16_t)job.most);
    if (finite != NULL)
        *finite = job.past < 0x7c00;
    return ANERT_OK;
}

/* ---- Gradient recipes ---- */
typedef struct {
    const loops *loops;
    const anert_fp16_kernels *fp16;
    float alpha;
    const uint16_t *tap, *cot;
    int64_t tap_stride, row_stride, col_stride; /* the last two are cot's */
    int64_t rows, cols, across;
    float *dw;
} recipe;

enum { RECIPE_ROWS = 8, BAND = 256 };

static float product_of_row(const recipe *job, int64_t row) {
    float tap[ROW_PART], cot[ROW_PART];
    double sum = 0.0;
    for (int64_t at = 0; at < job->cols; at += ROW_PART) {
        size_t n = (size_t)MIN(job->cols - at, (int64_t)ROW_PART);
        job->fp16->f16_to_f32(job->cot + row * job->row_stride + at, cot, n);
        if (job->tap == NULL) {
            sum += (double)job->loops->sum(cot, n);
        } else {
            job->fp16->f16_to_f32(job->tap + row * job->tap_stride + at, tap, n);
            sum += (double)job->loops->products(tap, cot, n);
        }
    }
    return (float)sum;
}

static void rowsum_rows(void *arg, int64_t index, int32_t thread) {
    const recipe *job = arg;
    (void)thread;
    for (int64_t row = index * RECIPE_ROWS; row < MIN(job->rows, (index + 1) * RECIPE_ROWS); row++)
        job->dw[row] += job->alpha * product_of_row(job, row);
}

anert_status anert_rowsum(anert_pool *pool, float alpha, const uint16_t *tap, int64_t tap_stride, const uint16_t *cot,
                          int64_t cot_stride, int64_t c, int64_t n, float *dw, anert_error *err) {
    int64_t last;
    if (c < 0 || n < 0 || (c > 1 && (cot_stride < n || (tap != NULL && tap_stride < n))) ||
        __builtin_mul_overflow(c, MAX(n, MAX(cot_stride, tap_stride)), &last) ||
        last > (int64_t)(PTRDIFF_MAX / sizeof(uint16_t)))
        return anert_fail(err, ANERT_EINVAL, "rowsum of (%lld, %lld) at strides %lld and %lld: a stride is at least a row",
                          (long long)c, (long long)n, (long long)tap_stride, (long long)cot_stride);
    if (c > 0 && (dw == NULL || (n > 0 && cot == NULL)))
        return anert_fail(err, ANERT_EINVAL, "%s is NULL", dw == NULL ? "dw" : "cot");
    recipe job = {.loops = loops_for(anert_pool_isa(pool)), .fp16 = anert_fp16_kernels_for(anert_pool_isa(pool)),
                  .alpha = alpha, .tap = tap, .cot = cot, .tap_stride = tap_stride, .row_stride = cot_stride,
                  .rows = c, .cols = n, .dw = dw};
    anert_parallel_for(workers(pool, c * n), (c + RECIPE_ROWS - 1) / RECIPE_ROWS, rowsum_rows, &job);
    return ANERT_OK;
}

/* dw (rows, BLOCK) of cot whose columns are contiguous: a transposed block. */
static void add_transposed(const recipe *job, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    float block[BLOCK * BLOCK];
    job->fp16->transpose_f16_to_f32(job->cot + row + col * job->col_stride, (size_t)job->col_stride, block, (size_t)cols,
                                    (size_t)cols, (size_t)rows);
    for (int64_t r = 0; r < rows; r++)
        job->loops->axpy(job->alpha, block + r * cols, job->dw + (row + r) * job->cols + col, (size_t)cols);
}

static void add_rows(const recipe *job, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    float part[BAND];
    for (int64_t r = row; r < row + rows; r++) {
        const uint16_t *from = job->cot + r * job->row_stride + col * job->col_stride;
        if (job->col_stride == 1)
            job->fp16->f16_to_f32(from, part, (size_t)cols);
        for (int64_t c = 0; job->col_stride != 1 && c < cols; c++)
            part[c] = anert_float(from[c * job->col_stride]);
        job->loops->axpy(job->alpha, part, job->dw + r * job->cols + col, (size_t)cols);
    }
}

static void accumulate_tile(void *arg, int64_t index, int32_t thread) {
    const recipe *job = arg;
    int64_t row = index / job->across * BLOCK, col = index % job->across * BAND;
    int64_t rows = MIN(job->rows - row, (int64_t)BLOCK), cols = MIN(job->cols - col, (int64_t)BAND);
    (void)thread;
    if (job->row_stride != 1 || job->col_stride == 1) {
        add_rows(job, row, col, rows, cols);
        return;
    }
    for (int64_t c = 0; c < cols; c += BLOCK)
        add_transposed(job, row, col + c, rows, MIN(cols - c, (int64_t)BLOCK));
}

anert_status anert_accumulate(anert_pool *pool, float alpha, const uint16_t *cot, int64_t row_stride,
                              int64_t col_stride, int64_t rows, int64_t cols, float *dw, anert_error *err) {
    int64_t n, down, along, last;
    if (rows < 0 || cols < 0 || row_stride < 0 || col_stride < 0 || __builtin_mul_overflow(rows, cols, &n) ||
        __builtin_mul_overflow(rows, row_stride, &down) || __builtin_mul_overflow(cols, col_stride, &along) ||
        __builtin_add_overflow(down, along, &last) || MAX(n, last) > (int64_t)(PTRDIFF_MAX / sizeof(float)))
        return anert_fail(err, ANERT_EINVAL, "no gradient has the shape (%lld, %lld) at strides (%lld, %lld)",
                          (long long)rows, (long long)cols, (long long)row_stride, (long long)col_stride);
    if (n == 0)
        return ANERT_OK;
    if (cot == NULL || dw == NULL)
        return anert_fail(err, ANERT_EINVAL, "%s is NULL", dw == NULL ? "dw" : "cot");
    recipe job = {.loops = loops_for(anert_pool_isa(pool)), .fp16 = anert_fp16_kernels_for(anert_pool_isa(pool)),
                  .alpha = alpha, .cot = cot, .row_stride = row_stride, .col_stride = col_stride, .rows = rows,
                  .cols = cols, .dw = dw};
    if (cols == 1) { /* a vector is one row */
        job.rows = 1;
        job.cols = rows;
        job.row_stride = col_stride;
        job.col_stride = row_stride;
    }
    job.across = (job.cols + BAND - 1) / BAND;
    anert_parallel_for(workers(pool, n), (job.rows + BLOCK - 1) / BLOCK * job.across, accumulate_tile, &job);
    return ANERT_OK;
}

anert_status anert_gradient_run(anert_pool *pool, const anert_gradient *gradient, float alpha, int32_t fresh, anert_error *err) {
    if (gradient == NULL || (uint32_t)gradient->kind > ANERT_GRAD_ADD)
        return anert_fail(err, ANERT_EINVAL, "no gradient of kind %d", gradient == NULL ? -1 : gradient->kind);
    const anert_gradient g = *gradient;
    bool set = g.first && fresh;
    double squares;
    if (g.kind == ANERT_GRAD_GEMM)
        return anert_gemm_grad(pool, g.precision, g.m, g.n, g.k, alpha, g.a, g.b, set ? 0.0f : 1.0f, g.dw,
                               g.squares != NULL ? g.squares : &squares, err);
    if (set && g.dw != NULL && g.m > 0 && g.n > 0)
        memset(g.dw, 0, (size_t)g.m * (size_t)g.n * sizeof *g.dw);
    if (g.kind == ANERT_GRAD_ROWSUM)
        return anert_rowsum(pool, alpha, g.a.data, g.a.row_stride, g.b.data, g.b.row_stride, g.m, g.k, g.dw, err);
    return anert_accumulate(pool, alpha, g.b.data, g.b.row_stride, g.b.col_stride, g.m, g.n, g.dw, err);
}
