/* gemm.c: C = beta C + alpha A B from packed panels: checks, blocking and threads. The kernels are in gemm_<isa>.c.
 *
 * After Goto & van de Geijn (2008). B is packed once, by all threads, into panels that they share. A task then owns a block
 * of C. Per block of k it packs its rows of A: a panel of B stays in L1 while the panels of A stream from L2 (AMX: the other
 * way). With tiles that multiply ten times faster than packing converts, packing an operand twice would show. */
#include <stdlib.h>

#include "gemm.h"

enum {
    TASK_ROWS = 192,          /* of C per task, at most: 192 x 320 words of A are 240 KiB of L2 */
    TURN_ROWS = TASK_ROWS / 2, /* the same where the next block of A is packed meanwhile */
    TASK_COLS = 512,          /* of C per task, at most: with TASK_ROWS of fp32 sums, 384 KiB of L2; twice that without sums */
    PACK_COLS = 128,          /* of B per packing task */
    SHARED_WORDS = 1 << 22,   /* of packed B at a time, unless one panel is larger: 16 MiB */
    SERIAL_WORDS = 1 << 17,   /* the same for one thread alone: 512 KiB */
    TASKS_PER_THREAD = 4,     /* wanted, so that one late thread costs little */
    MIN_ROWS = 48,            /* below, tiles would be cut */
    MIN_COLS = 64,
    COLUMN_BYTES = 1 << 16,   /* of A per task when C is thin */
    THIN_COLS = 8,            /* of C: more of them are worth panels of A */
    THIN_ROWS = 16,           /* per task, a multiple: a line of fp32 */
    SCRATCH_SLOT = 0,
    SHARED_SLOT = 5,
    SQUARES_SLOT = 6,
    BLAS_LEAST = 32,          /* rows and columns of a product that a BLAS computes */
    STREAMED = 1 << 18         /* elements of a gradient from which on caches would not keep it */
};
#define SERIAL_FLOPS 2e6 /* below, waking a thread costs more than it saves */
#define SERIAL_BYTES 5e4 /* the same when C is thin */

/* Packs and stores with the CPU's own vectors, multiplies with a BLAS. */
static const gemm_kernel *blas_kernel(void) {
    switch (anert_isa_vectors(ANERT_ISA_BLAS)) {
#if defined(__x86_64__) || defined(VEC_EMULATED)
    case ANERT_ISA_AVX2: return &anert_gemm_blas_avx2;
    case ANERT_ISA_AVX512: return &anert_gemm_blas_avx512;
#endif
#if defined(__aarch64__) || defined(VEC_EMULATED)
    case ANERT_ISA_NEON: return &anert_gemm_blas_neon;
#endif
    default: return &anert_gemm_blas_scalar;
    }
}

static const gemm_kernel *kernel_for(int32_t isa, int32_t precision) {
    (void)precision;
    switch (isa) {
#if defined(__x86_64__) || defined(VEC_EMULATED)
    case ANERT_ISA_AVX2: return &anert_gemm_avx2;
    case ANERT_ISA_AVX512: return &anert_gemm_avx512;
    case ANERT_ISA_AVX512BF16: return precision == ANERT_BF16 ? &anert_gemm_avx512bf16 : &anert_gemm_avx512;
#endif
#if defined(ANERT_HAS_AMX)
    case ANERT_ISA_AMX: return precision == ANERT_BF16 ? &anert_gemm_amx : &anert_gemm_avx512;
#endif
#if defined(__aarch64__) || defined(VEC_EMULATED)
    case ANERT_ISA_NEON: return &anert_gemm_neon;
#endif
    default: return &anert_gemm_scalar;
    }
}

/* The kernel of a product (m, n): a BLAS' where both fill a good part of its tile. A column, a few positions of a decode and
 * the like are bound by memory, which our own kernels read as it is. */
static const gemm_kernel *kernel_of(int32_t isa, int32_t precision, int64_t m, int64_t n) {
    if (isa == ANERT_ISA_BLAS)
        return MIN(m, n) < BLAS_LEAST ? kernel_for(anert_isa_own(isa), precision) : blas_kernel();
    return kernel_for(isa, precision);
}

/* One problem, with C contiguous along its rows if it is along any axis. */
typedef struct {
    const gemm_kernel *kernel;
    bool bf16;
    bool thin; /* a column or a few: A is multiplied as it lies, see matvec */
    int64_t batch, m, n, k, depth; /* depth of a block of k, the last one may be shallower */
    float alpha, beta;
    anert_matrix a, b, c;
    bool stream;
    float *squares; /* NULL, or sums of squares of C by tile: (m / mr, n / nr), both rounded up */
    int64_t group_batch, group_cols;            /* of B, packed at a time */
    int64_t first_batch, batches, first_col, cols; /* the group that is being computed */
    float *b_panels;                            /* (batch, block of k, panel); C thin: (batch, n, k), unless n = 1 */
    int64_t task_rows, task_cols, row_tasks, col_tasks, tasks;
    size_t scratch; /* bytes per thread, without shared panels */
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

/* Depth of a block of k, 1 at least: equal blocks, as few as the kernel's kc allows, of whole vectors. */
static int64_t block_depth(const gemm_kernel *kernel, int64_t k) {
    if (k == 0)
        return 1;
    int64_t blocks = divide_up(k, kernel->kc);
    return MIN(ROUND_UP(divide_up(k, blocks), 16 * kernel->pair), k);
}

static int64_t block_words(const gemm_kernel *kernel, int64_t depth) {
    return ROUND_UP(divide_up(depth, kernel->pair), kernel->step);
}

static int64_t blocks_of(int64_t k, int64_t depth) { return MAX(divide_up(k, depth), 1); }

static int64_t most_rows(const gemm_kernel *kernel) { return kernel->pieces == NULL ? TASK_ROWS : TURN_ROWS; }

/* fp32 words of scratch: panels of a block of A, of B in one block of k and in all, partial sums. */
static int64_t a_words(const gemm_kernel *kernel, int64_t words) {
    return ROUND_UP(divide_up(most_rows(kernel), kernel->mr) * panel_size(kernel->mr, words) + 16, 16);
}

static int64_t b_block(const gemm_kernel *kernel, int64_t k, int64_t cols) {
    return ROUND_UP(divide_up(cols, kernel->nr) * panel_size(kernel->nr, block_words(kernel, block_depth(kernel, k))) + 16, 16);
}

static int64_t b_words(const gemm_kernel *kernel, int64_t k, int64_t cols) {
    return b_block(kernel, k, cols) * blocks_of(k, block_depth(kernel, k));
}

static int64_t sum_words(const gemm_kernel *kernel, int64_t k) {
    return k > kernel->kc ? (most_rows(kernel) + kernel->mr) * (TASK_COLS + kernel->nr) : 0;
}

static int64_t column_rows(int64_t k) { return MAX(COLUMN_BYTES / 2 / MAX(k, 1) / 64 * 64, 64); }

/* Columns of B whose panels fill `most` words, whole panels and at least one. */
static int64_t columns_in(const gemm_kernel *kernel, int64_t k, int64_t most) {
    return MAX(most / b_words(kernel, k, kernel->nr), 1) * kernel->nr;
}

/* A block of A, and at the start of a thread's scratch which of them its panels hold already. */
typedef struct {
    int64_t batch, row, k;
} block;

typedef struct {
    block packed; /* row -1: none */
    int64_t buffer; /* of two */
    char to_line[64 - sizeof(block) - sizeof(int64_t)];
} turn;

/* Per thread, without panels of B. Grows with k alone. */
static size_t task_scratch(const gemm_kernel *kernel, int64_t k) {
    int64_t words = block_words(kernel, MIN(MAX(k, 1) + 16 * kernel->pair, kernel->kc));
    int64_t thin = k + FEW_COLS * (column_rows(k) + 128);
    int64_t panels = (kernel->pieces == NULL ? 1 : 2) * a_words(kernel, words);
    return sizeof(turn) + (size_t)MAX(kernel->product + panels + sum_words(kernel, k), thin) * sizeof(float);
}

/* ---- One task ---- */

static gemm_operand rows_of(const problem *p, anert_matrix x, int64_t batch, int64_t row, int64_t count, int64_t k) {
    return (gemm_operand){at(x, batch, row, k), x.dtype, p->bf16 && x.dtype != ANERT_BF16, count, x.row_stride, x.col_stride};
}

static float *b_panel(const problem *p, int64_t batch, int64_t block, int64_t col, int64_t words) {
    const gemm_kernel *kernel = p->kernel;
    int64_t blocks = blocks_of(p->k, p->depth);
    float *first = p->b_panels + (batch * blocks + block) * b_block(kernel, p->k, p->group_cols);
    return first + col / kernel->nr * panel_size(kernel->nr, words);
}

static int64_t pack_cols(const problem *p) { return ROUND_UP(PACK_COLS, p->kernel->nr); }

static int64_t pack_tasks(const problem *p) {
    if (p->thin)
        return p->n == 1 ? 0 : p->batches * p->n;
    return p->batches * blocks_of(p->k, p->depth) * divide_up(p->cols, pack_cols(p));
}

static gemm_operand column_of(const problem *p, int64_t batch, int64_t col) {
    return rows_of(p, transposed(p->b), batch, col, 1, 0);
}

/* Some columns of B in one block of k; C thin: one whole column. */
static void pack_columns(const problem *p, int64_t index) {
    if (p->thin) {
        gemm_operand b = column_of(p, p->first_batch + index / p->n, index % p->n);
        float *to = p->b_panels + index * p->k;
        const float *column = p->kernel->column(&b, p->k, to);
        if (column != to)
            memcpy(to, column, (size_t)p->k * sizeof *to);
        return;
    }
    int64_t parts = divide_up(p->cols, pack_cols(p)), blocks = blocks_of(p->k, p->depth);
    int64_t col = index % parts * pack_cols(p), block = index / parts % blocks, batch = index / parts / blocks;
    int64_t k = block * p->depth, depth = MIN(p->depth, p->k - k);
    gemm_operand b = rows_of(p, transposed(p->b), p->first_batch + batch, p->first_col + col, p->n - p->first_col - col, k);
    float *panels = b_panel(p, batch, block, col, block_words(p->kernel, depth));
    p->kernel->pack_b(&b, MIN(pack_cols(p), p->cols - col), depth, panels);
}

/* Steps to the block that the thread will want next: of the same rows deeper in k, or the first of its next task, unless another
 * thread is faster. False behind the last. */
static bool step_on(const problem *p, block *at, int64_t col) {
    at->k += p->depth;
    if (at->k < p->k)
        return true;
    at->k = 0;
    at->row += p->task_rows;
    if (at->row < p->m)
        return true;
    at->row = 0;
    at->batch += col + p->task_cols >= p->cols;
    return at->batch < p->batches;
}

static gemm_operand block_of(const problem *p, block at) {
    return rows_of(p, p->a, p->first_batch + at.batch, at.row, p->m - at.row, at.k);
}

/* The lines of a block of A, over some steps of k. */
static gemm_ahead lines_of(const problem *p, block at, int64_t steps) {
    int64_t rows = MIN(p->task_rows, p->m - at.row), depth = MIN(p->depth, p->k - at.k);
    gemm_operand x = block_of(p, at);
    int64_t size = x.dtype == ANERT_F32 ? 4 : 2;
    if (steps == 0 || (x.k_stride != 1 && x.stride != 1))
        return (gemm_ahead){0};
    bool along_k = x.k_stride == 1;
    gemm_ahead ahead = {.run = x.data, .runs = along_k ? rows : depth, .bytes = (along_k ? depth : rows) * size,
                        .stride = (along_k ? x.stride : x.k_stride) * size};
    ahead.per_step = divide_up(ahead.runs * divide_up(ahead.bytes, 64), steps);
    return ahead;
}

/* What there is to do between the products of a block, which take `steps` steps of k: to pack the next one, to ask for the one
 * behind it. Their panels go to `panels`. */
static gemm_between between_for(const problem *p, block next, int64_t col, int64_t steps, float *panels) {
    gemm_between between = {.panels = panels, .count = MIN(p->task_rows, p->m - next.row), .depth = MIN(p->depth, p->k - next.k)};
    block later = next;
    between.x = block_of(p, next);
    between.pieces = p->kernel->pieces(&between.x, between.count, between.depth);
    between.per_step = steps > 0 ? divide_up(between.pieces, steps) : 0;
    if (between.pieces == 0)
        between.ahead = lines_of(p, next, steps);
    else if (step_on(p, &later, col))
        between.ahead = lines_of(p, later, steps);
    return between;
}

/* (row, col): where the block lies in C, in units of register tiles for p->squares. */
static void multiply_panels(const problem *p, int64_t words, const float *a, const float *b, int64_t row, int64_t col,
                            int64_t rows, int64_t cols, gemm_out out) {
    const gemm_kernel *kernel = p->kernel;
    char *c = out.c;
    float *sums = out.sums;
    size_t size = out.dtype == ANERT_F32 ? 4 : 2;
    int64_t a_size = panel_size(kernel->mr, words), b_size = panel_size(kernel->nr, words);
    int64_t across = divide_up(p->n, kernel->nr), down = divide_up(rows, kernel->mr), tiles = down * divide_up(cols, kernel->nr);
    for (int64_t t = 0; t < tiles; t++) { /* whose panels stay in L1: see gemm_kernel.pieces */
        int64_t i = (kernel->pieces == NULL ? t % down : t / (tiles / down)) * kernel->mr;
        int64_t j = (kernel->pieces == NULL ? t / down : t % (tiles / down)) * kernel->nr;
        out.c = c + (size_t)(i * out.row_stride + j * out.col_stride) * size;
        out.sums = sums == NULL ? NULL : sums + i * out.sums_stride + j;
        out.rows = MIN(rows - i, kernel->mr);
        out.cols = MIN(cols - j, kernel->nr);
        if (p->squares != NULL && out.last)
            out.squares = p->squares + (row + i) / kernel->mr * across + (col + j) / kernel->nr;
        kernel->tile(words, a + i / kernel->mr * a_size, b + j / kernel->nr * b_size, &out);
    }
}

/* col: within the group. */
static void multiply_block(const problem *p, int64_t batch, int64_t row, int64_t col, void *scratch) {
    const gemm_kernel *kernel = p->kernel;
    int64_t rows = MIN(p->task_rows, p->m - row), cols = MIN(p->task_cols, p->cols - col);
    int64_t sums_stride = ROUND_UP(cols, kernel->nr), c_col = p->first_col + col;
    turn *turn = scratch;
    float *product = (float *)(turn + 1), *panels[2] = {product + kernel->product};
    int64_t a_size = a_words(kernel, block_words(kernel, p->depth));
    int64_t tiles = divide_up(rows, kernel->mr) * divide_up(cols, kernel->nr);
    panels[1] = panels[0] + (kernel->pieces == NULL ? 0 : a_size);
    for (int64_t k = 0; k == 0 || k < p->k; k += p->depth) {
        int64_t depth = MIN(p->depth, p->k - k), words = block_words(kernel, depth);
        block here = {batch, row, k}, next = here;
        float *a_panels = panels[turn->buffer];
        if (turn->packed.batch != batch || turn->packed.row != row || turn->packed.k != k) {
            gemm_operand a = block_of(p, here);
            kernel->pack_a(&a, rows, depth, a_panels);
        }
        gemm_between between = {0};
        if (kernel->pieces != NULL && step_on(p, &next, col))
            between = between_for(p, next, col, tiles * (words / kernel->step), panels[1 - turn->buffer]);
        bool packs = between.pieces > 0;
        gemm_out out = {.between = &between, .product = product, .sums = p->k > p->depth ? panels[1] + a_size : NULL,
                        .sums_stride = sums_stride, .first = k == 0, .last = k + depth >= p->k, .alpha = p->alpha,
                        .beta = p->beta, .stream = p->stream, .c = at(p->c, p->first_batch + batch, row, c_col),
                        .dtype = p->c.dtype, .row_stride = p->c.row_stride, .col_stride = p->c.col_stride};
        multiply_panels(p, words, a_panels, b_panel(p, batch, k / p->depth, col, words), row, c_col, rows, cols, out);
        if (kernel->drain != NULL)
            kernel->drain(&between);
        if (packs) {
            turn->packed = next;
            turn->buffer = 1 - turn->buffer;
        }
    }
}

/* batch: within the group. */
static void multiply_thin(const problem *p, int64_t batch, int64_t row, void *scratch) {
    int64_t rows = MIN(p->task_rows, p->m - row), at_batch = p->first_batch + batch;
    float *sums = (float *)((turn *)scratch + 1), *copy = sums + FEW_COLS * (ROUND_UP(p->task_rows, 16) + 64);
    gemm_operand a = rows_of(p, p->a, at_batch, row, p->m - row, 0), b = column_of(p, at_batch, 0);
    const float *x = p->n == 1 ? p->kernel->column(&b, p->k, copy) : p->b_panels + batch * p->n * p->k;
    gemm_out out = {.alpha = p->alpha, .beta = p->beta, .c = at(p->c, at_batch, row, 0), .dtype = p->c.dtype,
                    .row_stride = p->c.row_stride, .col_stride = p->c.col_stride, .cols = p->n};
    p->kernel->matvec(&a, rows, p->k, x, sums, &out);
}

static void run_task(const problem *p, int64_t index, void *scratch) {
    int64_t batch = index / (p->row_tasks * p->col_tasks), block = index % (p->row_tasks * p->col_tasks);
    int64_t row = block % p->row_tasks * p->task_rows, col = block / p->row_tasks * p->task_cols;
    if (p->thin) {
        multiply_thin(p, batch, row, scratch);
        return;
    }
    if (p->kernel->begin != NULL)
        p->kernel->begin();
    multiply_block(p, batch, row, col, scratch);
    if (p->kernel->end != NULL)
        p->kernel->end();
}

/* ---- Cutting C into tasks ---- */

/* Equal parts of at most `most`, each a multiple of `unit`. */
static int64_t even_part(int64_t whole, int64_t most, int64_t unit) {
    int64_t parts = divide_up(whole, MAX(most / unit * unit, unit));
    return ROUND_UP(divide_up(whole, parts), unit);
}

/* The group's C in tasks: cut along its rows first, since a cut along its columns packs A again. */
static void cut(problem *p, int32_t threads) {
    const gemm_kernel *kernel = p->kernel;
    int64_t wanted = threads > 1 ? (int64_t)threads * TASKS_PER_THREAD : 1;
    int64_t rows = most_rows(kernel), cols = p->k > p->depth ? TASK_COLS : 2 * TASK_COLS;
    if (p->thin) {
        int64_t each = divide_up(p->m, divide_up(wanted, p->batches));
        p->task_rows = even_part(p->m, MIN(column_rows(p->k), each), THIN_ROWS);
        p->task_cols = p->n;
    } else {
        for (;;) {
            p->task_rows = even_part(p->m, rows, kernel->mr);
            p->task_cols = even_part(p->cols, cols, kernel->nr);
            int64_t tasks = p->batches * divide_up(p->m, p->task_rows) * divide_up(p->cols, p->task_cols);
            if (tasks >= wanted || (rows <= MIN_ROWS && cols <= MIN_COLS))
                break;
            if (rows > MIN_ROWS)
                rows /= 2;
            else
                cols /= 2;
        }
    }
    p->row_tasks = divide_up(p->m, p->task_rows);
    p->col_tasks = divide_up(p->cols, p->task_cols);
    p->tasks = p->batches * p->row_tasks * p->col_tasks;
}

/* Groups of whole batches, or of some columns of one, whose panels of B fill at most `most` words. */
static void group(problem *p, int64_t most) {
    int64_t one = b_words(p->kernel, p->k, p->n);
    p->group_cols = p->thin ? p->n : even_part(p->n, columns_in(p->kernel, p->k, most), p->kernel->nr);
    if (p->n == 1)
        p->group_batch = p->batch;
    else if (p->thin)
        p->group_batch = MIN(MAX(most / MAX(p->n * p->k, 1), 1), p->batch);
    else
        p->group_batch = p->group_cols < p->n ? 1 : MIN(MAX(most / one, 1), p->batch);
    p->scratch = task_scratch(p->kernel, p->k);
}

static size_t shared_bytes(const problem *p) {
    if (p->thin)
        return p->n == 1 ? 0 : (size_t)(p->group_batch * p->n * p->k) * sizeof(float);
    return (size_t)(p->group_batch * b_words(p->kernel, p->k, p->group_cols)) * sizeof(float);
}

/* Steps to the next group; false after the last. Begins where batches is 0. */
static bool next_group(problem *p) {
    if (p->batches == 0) {
        p->first_batch = p->first_col = 0;
    } else {
        p->first_col += p->group_cols;
        if (p->first_col >= p->n) {
            p->first_col = 0;
            p->first_batch += p->group_batch;
        }
    }
    p->batches = MIN(p->group_batch, p->batch - p->first_batch);
    p->cols = MIN(p->group_cols, p->n - p->first_col);
    return p->first_batch < p->batch;
}

/* C = A B read as C^T = B^T A^T where that makes C contiguous along its rows, or the one row a column. Products commute,
 * so the bits stay. */
static problem oriented(const gemm_kernel *kernel, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k,
                        float alpha, anert_matrix a, anert_matrix b, float beta, anert_matrix c) {
    problem p = {.kernel = kernel, .bf16 = precision == ANERT_BF16, .batch = batch, .m = m, .n = n, .k = k, .alpha = alpha,
                 .beta = beta, .a = a, .b = b, .c = c, .depth = block_depth(kernel, k)};
    p.thin = n <= THIN_COLS || m == 1; /* by the shape alone: bits do not depend on strides */
    if (n > THIN_COLS && (m == 1 || (c.col_stride != 1 && c.row_stride == 1))) {
        p.m = n, p.n = m;
        p.a = transposed(b), p.b = transposed(a), p.c = transposed(c);
    }
    return p;
}

static size_t serial_scratch(const gemm_kernel *kernel, int64_t k) {
    int64_t panels = MAX(MAX(SERIAL_WORDS, b_words(kernel, k + 16 * kernel->pair, kernel->nr)), THIN_COLS * k) + 16;
    return (size_t)ROUND_UP(panels, 16) * sizeof(float) + task_scratch(kernel, k);
}

size_t anert_gemm_scratch(int32_t isa, int64_t k) {
    isa = anert_isa_own(isa);
    return MAX(serial_scratch(kernel_for(isa, ANERT_F32), k), serial_scratch(kernel_for(isa, ANERT_BF16), k));
}

void anert_gemm_serial(int32_t isa, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha, anert_matrix a,
                       anert_matrix b, float beta, anert_matrix c, void *scratch) {
    problem p = oriented(kernel_for(anert_isa_own(isa), precision), precision, 1, m, n, k, alpha, a, b, beta, c);
    if (m == 0 || n == 0)
        return;
    group(&p, SERIAL_WORDS);
    p.b_panels = scratch;
    char *rest = (char *)scratch + ROUND_UP(shared_bytes(&p), 64);
    while (next_group(&p)) {
        cut(&p, 1);
        *(turn *)rest = (turn){.packed = {.row = -1}};
        for (int64_t i = 0; i < pack_tasks(&p); i++)
            pack_columns(&p, i);
        for (int64_t i = 0; i < p.tasks; i++)
            run_task(&p, i, rest);
    }
}

/* ---- The public entries ---- */

static void pack_body(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    pack_columns(arg, index);
}

static void gemm_body(void *arg, int64_t index, int32_t thread) {
    const problem *p = arg;
    run_task(p, index, anert_pool_scratch(p->pool, thread, SCRATCH_SLOT, p->scratch));
}

/* for_each: on the pool, or in order on this thread. */
static void for_each(problem *p, int32_t threads, int64_t n, anert_body *body) {
    if (threads > 1)
        anert_parallel_for(p->pool, n, body, p);
    for (int64_t i = 0; threads == 1 && i < n; i++)
        body(p, i, 0);
}

/* Worth a second thread? */
static bool is_large(const problem *p) {
    double size = (double)p->batch * (double)p->m * (double)p->k;
    if (p->thin)
        return size * (p->a.dtype == ANERT_F32 ? 4 : 2) > SERIAL_BYTES;
    return 2.0 * size * (double)p->n > SERIAL_FLOPS;
}

static anert_status multiply(problem *p, anert_pool *pool, anert_error *err) {
    int32_t threads = is_large(p) ? anert_pool_threads(pool) : 1;
    anert_status status = ANERT_OK;
    p->pool = pool;
    group(p, SHARED_WORDS);
    anert_pool_enter(pool);
    for (int32_t i = 0; i < threads && status == ANERT_OK; i++)
        if (anert_pool_scratch(pool, i, SCRATCH_SLOT, p->scratch) == NULL)
            status = anert_fail(err, ANERT_ENOMEM, "gemm: no memory for %zu bytes of scratch", p->scratch);
    p->b_panels = anert_pool_scratch(pool, 0, SHARED_SLOT, shared_bytes(p));
    if (status == ANERT_OK && p->b_panels == NULL)
        status = anert_fail(err, ANERT_ENOMEM, "gemm: no memory for %zu bytes of panels", shared_bytes(p));
    while (status == ANERT_OK && next_group(p)) {
        cut(p, threads);
        for (int32_t i = 0; i < threads; i++)
            *(turn *)anert_pool_scratch(pool, i, SCRATCH_SLOT, p->scratch) = (turn){.packed = {.row = -1}};
        if (pack_tasks(p) > 0)
            for_each(p, threads, pack_tasks(p), pack_body);
        for_each(p, threads, p->tasks, gemm_body);
    }
    anert_pool_leave(pool);
    return status;
}

anert_status anert_gemm(anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k, float alpha,
                        anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err) {
    anert_status status = anert_gemm_check(pool, precision, batch, m, n, k, alpha, a, b, beta, c, err);
    if (status != ANERT_OK || batch == 0 || m == 0 || n == 0)
        return status;
    problem p = oriented(kernel_of(anert_pool_isa(pool), precision, m, n), precision, batch, m, n, k, alpha, a, b, beta, c);
    return multiply(&p, pool, err);
}

/* ---- A gradient: C is written past the caches, and its squares summed up on the way ---- */

static double sum_of_squares(const float *x, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sum;
}

anert_status anert_gemm_grad(anert_pool *pool, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha, anert_matrix a,
                             anert_matrix b, float beta, float *dw, double *squares, anert_error *err) {
    anert_matrix c = {dw, ANERT_F32, n, 1, 0};
    anert_status status = anert_gemm_check(pool, precision, 1, m, n, k, alpha, a, b, beta, c, err);
    if (status == ANERT_OK && squares == NULL)
        status = anert_fail(err, ANERT_EINVAL, "gemm: squares is NULL");
    if (status != ANERT_OK)
        return status;
    *squares = 0.0;
    if (m == 0 || n == 0)
        return ANERT_OK;
    problem p = oriented(kernel_of(anert_pool_isa(pool), precision, m, n), precision, 1, m, n, k, alpha, a, b, beta, c);
    int64_t tiles = divide_up(p.m, p.kernel->mr) * divide_up(p.n, p.kernel->nr);
    anert_pool_enter(pool);
    if (!p.thin) {
        p.squares = anert_pool_scratch(pool, 0, SQUARES_SLOT, (size_t)tiles * sizeof(float));
        if (p.squares == NULL)
            status = anert_fail(err, ANERT_ENOMEM, "gemm: no memory for %lld sums of squares", (long long)tiles);
        p.stream = beta == 0.0f && m * n >= STREAMED && (uintptr_t)dw % 64 == 0 && n % 16 == 0;
    }
    if (status == ANERT_OK)
        status = multiply(&p, pool, err);
    if (status == ANERT_OK && p.thin)
        *squares = sum_of_squares(dw, m * n);
    for (int64_t i = 0; status == ANERT_OK && !p.thin && i < tiles; i++)
        *squares += (double)p.squares[i];
    anert_pool_leave(pool);
    return status;
}
