/* gemm.c: C = beta C + alpha A B from packed panels: checks, blocking and threads. The kernels are in gemm_<isa>.c.
 *
 * After Goto & van de Geijn (2008). A task owns a block of C. Per block of k it packs its columns of B, then its rows of A
 * a group at a time: a panel of B stays in L1 while the group's panels of A stream from L2. Tasks share nothing, so a block
 * of B is packed by each task that needs it: about 1 % of the work, and no barrier. */
#include <math.h>

#include "gemm.h"

enum {
    GROUP_ROWS = 192,       /* of A in L2: 192 x 320 words are 240 KiB */
    TASK_ROWS = 768,        /* of C per task, at most */
    TASK_COLS = 256,        /* of C per task, at most: 256 x 320 words of B are 320 KiB */
    TASKS_PER_THREAD = 4,   /* wanted, so that one late thread costs little */
    MIN_ROWS = 48,          /* below, packing would show */
    MIN_COLS = 64,
    COLUMN_BYTES = 1 << 16, /* of A per task when n = 1 */
    SCRATCH_SLOT = 0
};
#define SERIAL_FLOPS 2e6 /* below, waking a thread costs more than it saves */
#define SERIAL_BYTES 2e5 /* the same when n = 1 */

static const gemm_kernel *kernel_for(int32_t isa, int32_t precision) {
    (void)precision;
    switch (isa) {
#if defined(__x86_64__) || defined(VEC_EMULATED)
    case ANERT_ISA_AVX2: return &anert_gemm_avx2;
    case ANERT_ISA_AVX512: return &anert_gemm_avx512;
    case ANERT_ISA_AVX512BF16: return precision == ANERT_BF16 ? &anert_gemm_avx512bf16 : &anert_gemm_avx512;
#endif
#if defined(__aarch64__) || defined(VEC_EMULATED)
    case ANERT_ISA_NEON: return &anert_gemm_neon;
#endif
    default: return &anert_gemm_scalar;
    }
}

/* One problem, with C contiguous along its rows if it is along any axis. */
typedef struct {
    const gemm_kernel *kernel;
    bool bf16;
    int64_t batch, m, n, k, depth; /* depth of a block of k, the last one may be shallower */
    float alpha, beta;
    anert_matrix a, b, c;
    int64_t task_rows, task_cols, row_tasks, col_tasks, tasks;
    size_t scratch; /* bytes per thread */
    anert_pool *pool;
} problem;

static anert_matrix transposed(anert_matrix x) {
    return (anert_matrix){x.data, x.dtype, x.col_stride, x.row_stride, x.batch_stride};
}

static void *at(anert_matrix x, int64_t batch, int64_t row, int64_t col) {
    int64_t offset = batch * x.batch_stride + row * x.row_stride + col * x.col_stride;
    return (char *)x.data + offset * (x.dtype == ANERT_F32 ? 4 : 2);
}

static int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

/* Depth of a block of k: equal blocks, as few as the kernel's kc allows, of whole vectors. */
static int64_t block_depth(const gemm_kernel *kernel, int64_t k) {
    int64_t blocks = MAX(divide_up(k, kernel->kc), 1);
    return MIN(ROUND_UP(divide_up(k, blocks), 16 * kernel->pair), MAX(k, 1));
}

static int64_t block_words(const gemm_kernel *kernel, int64_t depth) { return divide_up(depth, kernel->pair); }

/* fp32 words of scratch: panels of A, panels of B, partial sums. */
static int64_t a_words(const gemm_kernel *kernel, int64_t words, int64_t rows) {
    return divide_up(MIN(rows, GROUP_ROWS), kernel->mr) * panel_size(kernel->mr, words) + 16;
}

static int64_t b_words(const gemm_kernel *kernel, int64_t words, int64_t cols) {
    return divide_up(cols, kernel->nr) * panel_size(kernel->nr, words) + 16;
}

static int64_t sum_words(const gemm_kernel *kernel, int64_t rows, int64_t cols) {
    return ROUND_UP(rows, kernel->mr) * ROUND_UP(cols, kernel->nr);
}

static int64_t column_rows(int64_t k) { return MAX(COLUMN_BYTES / 2 / MAX(k, 1) / 64 * 64, 64); }

static size_t scratch_bytes(const gemm_kernel *kernel, int64_t rows, int64_t cols, int64_t k) {
    int64_t depth = block_depth(kernel, k), words = block_words(kernel, depth);
    int64_t tiles = ROUND_UP(a_words(kernel, words, rows), 16) + ROUND_UP(b_words(kernel, words, cols), 16);
    if (k > depth)
        tiles += sum_words(kernel, rows, cols);
    int64_t one_column = k + column_rows(k) + 128;
    return (size_t)MAX(tiles, one_column) * sizeof(float);
}

/* ---- One task ---- */

static gemm_operand rows_of(const problem *p, anert_matrix x, int64_t batch, int64_t row, int64_t count, int64_t k) {
    return (gemm_operand){at(x, batch, row, k), x.dtype, p->bf16 && x.dtype != ANERT_BF16, count, x.row_stride, x.col_stride};
}

static void multiply_panels(const gemm_kernel *kernel, int64_t words, const float *a, const float *b, int64_t rows,
                            int64_t cols, gemm_out out) {
    char *c = out.c;
    float *sums = out.sums;
    size_t size = out.dtype == ANERT_F32 ? 4 : 2;
    int64_t a_size = panel_size(kernel->mr, words), b_size = panel_size(kernel->nr, words);
    for (int64_t j = 0; j < cols; j += kernel->nr)
        for (int64_t i = 0; i < rows; i += kernel->mr) {
            out.c = c + (size_t)(i * out.row_stride + j * out.col_stride) * size;
            out.sums = sums == NULL ? NULL : sums + i * out.sums_stride + j;
            out.rows = MIN(rows - i, kernel->mr);
            out.cols = MIN(cols - j, kernel->nr);
            kernel->tile(words, a + i / kernel->mr * a_size, b + j / kernel->nr * b_size, &out);
        }
}

static void multiply_block(const problem *p, int64_t batch, int64_t row, int64_t col, void *scratch) {
    const gemm_kernel *kernel = p->kernel;
    int64_t rows = MIN(p->task_rows, p->m - row), cols = MIN(p->task_cols, p->n - col);
    int64_t words = block_words(kernel, p->depth), sums_stride = ROUND_UP(cols, kernel->nr);
    float *b_panels = scratch;
    float *a_panels = b_panels + ROUND_UP(b_words(kernel, words, cols), 16);
    float *sums = a_panels + ROUND_UP(a_words(kernel, words, rows), 16);
    for (int64_t k = 0; k == 0 || k < p->k; k += p->depth) {
        int64_t depth = MIN(p->depth, p->k - k);
        words = block_words(kernel, depth);
        gemm_operand b = rows_of(p, transposed(p->b), batch, col, p->n - col, k);
        kernel->pack(&b, cols, depth, kernel->nr, b_panels);
        for (int64_t i = 0; i < rows; i += GROUP_ROWS) {
            int64_t group = MIN(rows - i, GROUP_ROWS);
            gemm_operand a = rows_of(p, p->a, batch, row + i, p->m - row - i, k);
            kernel->pack(&a, group, depth, kernel->mr, a_panels);
            gemm_out out = {.sums = p->k > p->depth ? sums + i * sums_stride : NULL, .sums_stride = sums_stride,
                            .first = k == 0, .last = k + depth >= p->k, .alpha = p->alpha, .beta = p->beta,
                            .c = at(p->c, batch, row + i, col), .dtype = p->c.dtype, .row_stride = p->c.row_stride,
                            .col_stride = p->c.col_stride};
            multiply_panels(kernel, words, a_panels, b_panels, group, cols, out);
        }
    }
}

static void multiply_column(const problem *p, int64_t batch, int64_t row, void *scratch) {
    int64_t rows = MIN(p->task_rows, p->m - row);
    float *sums = scratch, *copy = sums + ROUND_UP(p->task_rows, 16) + 64;
    gemm_operand a = rows_of(p, p->a, batch, row, p->m - row, 0);
    gemm_operand b = rows_of(p, transposed(p->b), batch, 0, 1, 0);
    gemm_out out = {.alpha = p->alpha, .beta = p->beta, .c = at(p->c, batch, row, 0), .dtype = p->c.dtype,
                    .row_stride = p->c.row_stride};
    p->kernel->matvec(&a, rows, p->k, p->kernel->column(&b, p->k, copy), sums, &out);
}

static void run_task(const problem *p, int64_t index, void *scratch) {
    int64_t batch = index / (p->row_tasks * p->col_tasks), block = index % (p->row_tasks * p->col_tasks);
    int64_t row = block % p->row_tasks * p->task_rows, col = block / p->row_tasks * p->task_cols;
    if (p->n == 1)
        multiply_column(p, batch, row, scratch);
    else
        multiply_block(p, batch, row, col, scratch);
}

/* ---- Cutting C into tasks ---- */

/* Equal parts of at most `most`, each a multiple of `unit`. */
static int64_t even_part(int64_t whole, int64_t most, int64_t unit) {
    int64_t parts = divide_up(whole, MAX(most / unit * unit, unit));
    return ROUND_UP(divide_up(whole, parts), unit);
}

static void cut(problem *p, int32_t threads) {
    const gemm_kernel *kernel = p->kernel;
    int64_t wanted = threads > 1 ? (int64_t)threads * TASKS_PER_THREAD : 1;
    int64_t rows = TASK_ROWS, cols = TASK_COLS;
    if (p->n == 1) {
        p->task_rows = column_rows(p->k);
        p->task_cols = 1;
    } else {
        for (;;) {
            p->task_rows = even_part(p->m, rows, kernel->mr);
            p->task_cols = even_part(p->n, cols, kernel->nr);
            int64_t tasks = p->batch * divide_up(p->m, p->task_rows) * divide_up(p->n, p->task_cols);
            if (tasks >= wanted || (rows <= MIN_ROWS && cols <= MIN_COLS))
                break;
            if (rows > MIN_ROWS && (rows >= cols || cols <= MIN_COLS))
                rows /= 2;
            else
                cols /= 2;
        }
    }
    p->row_tasks = divide_up(p->m, p->task_rows);
    p->col_tasks = divide_up(p->n, p->task_cols);
    p->tasks = p->batch * p->row_tasks * p->col_tasks;
    p->scratch = scratch_bytes(kernel, p->task_rows, p->task_cols, p->k);
}

/* C = A B read as C^T = B^T A^T where that makes C contiguous along its rows, or the one row a column. Products commute,
 * so the bits stay. */
static problem oriented(const gemm_kernel *kernel, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k,
                        float alpha, anert_matrix a, anert_matrix b, float beta, anert_matrix c) {
    problem p = {.kernel = kernel, .bf16 = precision == ANERT_BF16, .batch = batch, .m = m, .n = n, .k = k, .alpha = alpha,
                 .beta = beta, .a = a, .b = b, .c = c, .depth = block_depth(kernel, k)};
    if (n != 1 && (m == 1 || (c.col_stride != 1 && c.row_stride == 1))) {
        p.m = n, p.n = m;
        p.a = transposed(b), p.b = transposed(a), p.c = transposed(c);
    }
    return p;
}

size_t anert_gemm_scratch(int32_t isa, int64_t n, int64_t k) {
    size_t f32 = scratch_bytes(kernel_for(isa, ANERT_F32), TASK_ROWS, TASK_COLS, k);
    size_t bf16 = scratch_bytes(kernel_for(isa, ANERT_BF16), TASK_ROWS, TASK_COLS, k);
    (void)n;
    return MAX(f32, bf16);
}

void anert_gemm_serial(int32_t isa, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha, anert_matrix a,
                       anert_matrix b, float beta, anert_matrix c, void *scratch) {
    problem p = oriented(kernel_for(isa, precision), precision, 1, m, n, k, alpha, a, b, beta, c);
    if (m == 0 || n == 0)
        return;
    cut(&p, 1);
    for (int64_t i = 0; i < p.tasks; i++)
        run_task(&p, i, scratch);
}

/* ---- The public entry ---- */

static void gemm_body(void *arg, int64_t index, int32_t thread) {
    const problem *p = arg;
    run_task(p, index, anert_pool_scratch(p->pool, thread, SCRATCH_SLOT, p->scratch));
}

static void serial_body(void *arg, int64_t index, int32_t thread) {
    const problem *p = arg;
    (void)index;
    for (int64_t i = 0; i < p->tasks; i++)
        gemm_body(arg, i, thread);
}

/* Does batch, row, col fit in an address: checks (count - 1) * stride summed over the axes. */
static bool span_fits(anert_matrix x, int64_t batch, int64_t rows, int64_t cols) {
    int64_t a, b, c, sum;
    if (__builtin_mul_overflow(batch - 1, x.batch_stride, &a) || __builtin_mul_overflow(rows - 1, x.row_stride, &b) ||
        __builtin_mul_overflow(cols - 1, x.col_stride, &c) || __builtin_add_overflow(a, b, &sum) ||
        __builtin_add_overflow(sum, c, &sum))
        return false;
    return sum < INT64_MAX / 8;
}

static anert_status check_matrix(char name, anert_matrix x, int64_t batch, int64_t rows, int64_t cols, anert_error *err) {
    if (x.dtype != ANERT_F32 && x.dtype != ANERT_F16 && x.dtype != ANERT_BF16)
        return anert_fail(err, ANERT_EINVAL, "gemm: dtype of %c is %d, expected F32, F16 or BF16", name, x.dtype);
    if (x.row_stride < 0 || x.col_stride < 0 || x.batch_stride < 0)
        return anert_fail(err, ANERT_EINVAL, "gemm: strides of %c are %lld, %lld, batch %lld, expected none below 0", name,
                          (long long)x.row_stride, (long long)x.col_stride, (long long)x.batch_stride);
    if (batch == 0 || rows == 0 || cols == 0)
        return ANERT_OK;
    if (x.data == NULL)
        return anert_fail(err, ANERT_EINVAL, "gemm: %c is NULL", name);
    if (!span_fits(x, batch, rows, cols))
        return anert_fail(err, ANERT_EINVAL, "gemm: %c of %lld x %lld x %lld spans more than memory can", name,
                          (long long)batch, (long long)rows, (long long)cols);
    return ANERT_OK;
}

/* C's elements must be distinct: each axis strides past all that the axes of smaller stride span. */
static anert_status check_distinct(anert_matrix c, int64_t batch, int64_t rows, int64_t cols, anert_error *err) {
    int64_t count[3] = {batch, rows, cols}, stride[3] = {c.batch_stride, c.row_stride, c.col_stride};
    int64_t span = 1;
    bool used[3] = {false, false, false};
    if (batch == 0 || rows == 0 || cols == 0)
        return ANERT_OK;
    for (int turn = 0; turn < 3; turn++) {
        int next = -1;
        for (int i = 0; i < 3; i++)
            if (!used[i] && (next < 0 || stride[i] < stride[next]))
                next = i;
        used[next] = true;
        if (count[next] <= 1)
            continue;
        if (stride[next] < span)
            return anert_fail(err, ANERT_EINVAL, "gemm: C overlaps itself: strides %lld, %lld, batch %lld for %lld x %lld x %lld",
                              (long long)c.row_stride, (long long)c.col_stride, (long long)c.batch_stride, (long long)batch,
                              (long long)rows, (long long)cols);
        span += (count[next] - 1) * stride[next];
    }
    return ANERT_OK;
}

static anert_status check(anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k, float alpha,
                          anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err) {
    anert_status status;
    if (pool == NULL)
        return anert_fail(err, ANERT_EINVAL, "gemm: pool is NULL");
    if (precision != ANERT_F32 && precision != ANERT_BF16)
        return anert_fail(err, ANERT_EINVAL, "gemm: precision is %d, expected F32 or BF16", precision);
    if (batch < 0 || m < 0 || n < 0 || k < 0)
        return anert_fail(err, ANERT_EINVAL, "gemm: batch %lld, m %lld, n %lld, k %lld, expected none below 0",
                          (long long)batch, (long long)m, (long long)n, (long long)k);
    if (!isfinite(alpha))
        return anert_fail(err, ANERT_EINVAL, "gemm: alpha is %g, expected a finite number", (double)alpha);
    if (beta != 0.0f && beta != 1.0f)
        return anert_fail(err, ANERT_EINVAL, "gemm: beta is %g, expected 0 or 1", (double)beta);
    if ((status = check_matrix('A', a, batch, m, k, err)) || (status = check_matrix('B', b, batch, k, n, err)) ||
        (status = check_matrix('C', c, batch, m, n, err)))
        return status;
    return check_distinct(c, batch, m, n, err);
}

/* Worth a second thread? */
static bool is_large(const problem *p) {
    double size = (double)p->batch * (double)p->m * (double)p->k;
    if (p->n == 1)
        return size * (p->a.dtype == ANERT_F32 ? 4 : 2) > SERIAL_BYTES;
    return 2.0 * size * (double)p->n > SERIAL_FLOPS;
}

anert_status anert_gemm(anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k, float alpha,
                        anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err) {
    anert_status status = check(pool, precision, batch, m, n, k, alpha, a, b, beta, c, err);
    if (status != ANERT_OK || batch == 0 || m == 0 || n == 0)
        return status;
    problem p = oriented(kernel_for(anert_pool_isa(pool), precision), precision, batch, m, n, k, alpha, a, b, beta, c);
    p.pool = pool;
    int32_t threads = is_large(&p) ? anert_pool_threads(pool) : 1;
    cut(&p, threads);
    anert_pool_enter(pool);
    for (int32_t i = 0; i < threads && status == ANERT_OK; i++)
        if (anert_pool_scratch(pool, i, SCRATCH_SLOT, p.scratch) == NULL)
            status = anert_fail(err, ANERT_ENOMEM, "gemm: no memory for %zu bytes of scratch", p.scratch);
    if (status == ANERT_OK)
        anert_parallel_for(pool, threads == 1 ? 1 : p.tasks, threads == 1 ? serial_body : gemm_body, &p);
    anert_pool_leave(pool);
    return status;
}
