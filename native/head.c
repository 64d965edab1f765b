/* head.c: embedding, final norm, classifier and cross-entropy with their backward.
 *
 * Positions are taken in chunks of CHUNK columns, so that fp32 logits of one chunk exist at a time and are turned into their gradient
 * in place: three GEMMs of (vocab, chunk, dim), none repeated. Softmax statistics are taken over blocks of VOCAB_BLOCK rows and
 * joined in order, so that nothing depends on the number of threads. */
#include <math.h>

#include "head.h"

enum { CHUNK = 256, VOCAB_BLOCK = 512, COLUMN_BLOCK = 32, CHANNEL_BLOCK = 64 };

extern const anert_head_kernels anert_head_scalar;
#if defined(__x86_64__)
extern const anert_head_kernels anert_head_avx2, anert_head_avx512;
#elif defined(__aarch64__)
extern const anert_head_kernels anert_head_neon;
#endif

static const anert_head_kernels *kernels_for(const anert_pool *pool) {
    switch (anert_isa_vectors(anert_pool_isa(pool))) {
#if defined(__x86_64__)
    case ANERT_ISA_AVX2: return &anert_head_avx2;
    case ANERT_ISA_AVX512: return &anert_head_avx512;
#elif defined(__aarch64__)
    case ANERT_ISA_NEON: return &anert_head_neon;
#endif
    default: return &anert_head_scalar;
    }
}

/* ---- Embedding ---- */

static anert_status check_tokens(const int32_t *tokens, int64_t n, int64_t vocab, int32_t least, const char *what,
                                 anert_error *err) {
    for (int64_t t = 0; t < n; t++)
        if (tokens[t] < least || tokens[t] >= vocab)
            return anert_fail(err, ANERT_EINVAL, "%s %d at position %lld is outside the vocabulary of %lld", what, (int)tokens[t],
                              (long long)t, (long long)vocab);
    return ANERT_OK;
}

typedef struct {
    const uint16_t *table, *dx;
    uint16_t *x;
    const int32_t *tokens;
    int64_t dim, n, stride, channels; /* channels: of a block of the backward pass */
    float alpha, *dtable;
    double *change; /* by block, of the sum of squares */
} embed_job;

static void embed_block(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const embed_job *j = arg;
    int64_t t0 = index * COLUMN_BLOCK, t1 = MIN(j->n, t0 + COLUMN_BLOCK);
    for (int64_t c0 = 0; c0 < j->dim; c0 += CHANNEL_BLOCK)
        for (int64_t c = c0; c < MIN(j->dim, c0 + CHANNEL_BLOCK); c++)
            for (int64_t t = t0; t < t1; t++)
                j->x[c * j->stride + t] = j->table[j->tokens[t] * j->dim + c];
}

anert_status anert_embed(anert_pool *pool, const uint16_t *table, int64_t vocab, int64_t dim, const int32_t *tokens, int64_t n,
                         uint16_t *x, int64_t x_stride, anert_error *err) {
    if (!pool || !table || !tokens || !x || vocab < 1 || dim < 1 || n < 0 || x_stride < n)
        return anert_fail(err, ANERT_EINVAL, "embed: NULL, or sizes vocab %lld, dim %lld, n %lld, stride %lld", (long long)vocab,
                          (long long)dim, (long long)n, (long long)x_stride);
    anert_status status = check_tokens(tokens, n, vocab, 0, "token id", err);
    if (status)
        return status;
    embed_job job = {.table = table, .x = x, .tokens = tokens, .dim = dim, .n = n, .stride = x_stride};
    anert_parallel_for(pool, (n + COLUMN_BLOCK - 1) / COLUMN_BLOCK, embed_block, &job);
    return ANERT_OK;
}

/* One owner per block of channels, tokens in order: the sum for a token that comes twice is always the same. */
static void embed_back_block(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const embed_job *j = arg;
    int64_t c0 = index * j->channels, c1 = MIN(j->dim, c0 + j->channels);
    double change = 0.0;
    for (int64_t t = 0; t < j->n; t++) {
        float *row = j->dtable + (int64_t)j->tokens[t] * j->dim;
        for (int64_t c = c0; c < c1; c++) {
            float old = row[c];
            row[c] += j->alpha * anert_float(j->dx[c * j->stride + t]);
            change += (double)row[c] * (double)row[c] - (double)old * (double)old;
        }
    }
    j->change[index] = change;
}

anert_status anert_embed_backward(anert_pool *pool, float alpha, const uint16_t *dx, int64_t dx_stride, const int32_t *tokens,
                                  int64_t n, int64_t vocab, int64_t dim, float *dtable, double *change, anert_error *err) {
    enum { MOST = 512 }; /* blocks */
    double parts[MOST];
    if (!pool || !dx || !tokens || !dtable || !change || vocab < 1 || dim < 1 || n < 0 || dx_stride < n)
        return anert_fail(err, ANERT_EINVAL, "embed backward: NULL, or sizes vocab %lld, dim %lld, n %lld, stride %lld",
                          (long long)vocab, (long long)dim, (long long)n, (long long)dx_stride);
    anert_status status = check_tokens(tokens, n, vocab, 0, "token id", err);
    if (status)
        return status;
    embed_job job = {.dx = dx, .tokens = tokens, .dim = dim, .n = n, .stride = dx_stride, .alpha = alpha, .dtable = dtable,
                     .channels = ROUND_UP((dim + MOST - 1) / MOST, CHANNEL_BLOCK), .change = parts};
    int64_t blocks = (dim + job.channels - 1) / job.channels;
    anert_parallel_for(pool, blocks, embed_back_block, &job);
    *change = 0.0;
    for (int64_t i = 0; i < blocks; i++)
        *change += parts[i];
    return ANERT_OK;
}

/* ---- Scratch ---- */

typedef struct {
    float *logits, *h, *dh, *r, *top, *scale, *part_top, *part_sum;
} head_scratch;

static int64_t vocab_blocks(int64_t vocab) { return (vocab + VOCAB_BLOCK - 1) / VOCAB_BLOCK; }

static size_t carve(int64_t vocab, int64_t dim, int64_t n, char *base, head_scratch *s) {
    size_t cols = (size_t)MIN(n, CHUNK), at = 0;
    size_t sizes[] = {(size_t)vocab * cols, (size_t)dim * cols, (size_t)dim * cols, cols, cols, cols,
                      (size_t)vocab_blocks(vocab) * cols, (size_t)vocab_blocks(vocab) * cols};
    float **parts[] = {&s->logits, &s->h, &s->dh, &s->r, &s->top, &s->scale, &s->part_top, &s->part_sum};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (base)
            *parts[i] = (float *)(base + at);
        at += ROUND_UP(sizes[i] * sizeof(float), 64);
    }
    return at;
}

size_t anert_head_scratch(int64_t vocab, int64_t dim, int64_t n, int32_t threads) {
    (void)threads;
    head_scratch s;
    return vocab < 1 || dim < 1 || n < 1 ? 64 : carve(vocab, dim, n, NULL, &s);
}

/* ---- Loss ---- */

typedef struct {
    anert_head_args *a;
    const anert_head_kernels *k;
    head_scratch s;
    int64_t first, cols; /* the chunk: positions [first, first + cols) */
} head_job;

static void norm_block(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const head_job *j = arg;
    int64_t t = index * COLUMN_BLOCK;
    j->k->norm(j->a->x + j->first + t, j->a->x_stride, j->a->gain, j->a->norm_eps, j->a->dim, MIN(COLUMN_BLOCK, j->cols - t),
               j->s.h + t, j->cols, j->s.r + t);
}

static void part_block(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const head_job *j = arg;
    int64_t v = index * VOCAB_BLOCK;
    j->k->soft_part(j->s.logits + v * j->cols, j->cols, MIN(VOCAB_BLOCK, j->a->vocab - v), j->cols,
                    j->s.part_top + index * j->cols, j->s.part_sum + index * j->cols);
}

static void soft_block(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const head_job *j = arg;
    int64_t v = index * VOCAB_BLOCK;
    j->k->soft_grad(j->s.logits + v * j->cols, j->cols, MIN(VOCAB_BLOCK, j->a->vocab - v), j->cols, j->s.top, j->s.scale);
}

static void back_block(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const head_job *j = arg;
    int64_t t = index * COLUMN_BLOCK;
    j->k->norm_back(j->s.dh + t, j->cols, j->a->x + j->first + t, j->a->x_stride, j->s.r + t, j->a->gain, j->a->dim,
                    MIN(COLUMN_BLOCK, j->cols - t), j->a->loss_scale, j->a->dx + j->first + t, j->a->dx_stride);
}

static void gain_block(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    const head_job *j = arg;
    int64_t c = index * CHANNEL_BLOCK;
    j->k->gain_grad(j->s.dh + c * j->cols, j->cols, j->a->x + j->first + c * j->a->x_stride, j->a->x_stride, j->s.r,
                    MIN(CHANNEL_BLOCK, j->a->dim - c), j->cols, j->a->grad_alpha, j->a->dgain + c);
}

static anert_matrix matrix(const void *data, int32_t dtype, int64_t row, int64_t col) {
    return (anert_matrix){.data = (void *)data, .dtype = dtype, .row_stride = row, .col_stride = col};
}

/* logits (vocab, cols) = table h */
static anert_status classify(anert_pool *pool, head_job *j, anert_error *err) {
    const anert_head_args *a = j->a;
    anert_parallel_for(pool, (j->cols + COLUMN_BLOCK - 1) / COLUMN_BLOCK, norm_block, j);
    return anert_gemm(pool, a->precision, 1, a->vocab, j->cols, a->dim, 1.0f, matrix(a->table, ANERT_F16, a->dim, 1),
                      matrix(j->s.h, ANERT_F32, j->cols, 1), 0.0f, matrix(j->s.logits, ANERT_F32, j->cols, 1), err);
}

/* Joins the blocks' statistics; adds the chunk's losses to *loss; top and scale become those of the gradient. */
static void join(head_job *j, double weight, double *loss) {
    int64_t blocks = vocab_blocks(j->a->vocab);
    for (int64_t t = 0; t < j->cols; t++) {
        float top = j->s.part_top[t];
        for (int64_t b = 1; b < blocks; b++) {
            float m = j->s.part_top[b * j->cols + t];
            top = m > top || m != m ? m : top; /* a NaN stays */
        }
        double sum = 0.0;
        for (int64_t b = 0; b < blocks; b++)
            sum += (double)j->s.part_sum[b * j->cols + t] * exp((double)j->s.part_top[b * j->cols + t] - (double)top);
        int32_t target = j->a->targets[j->first + t];
        j->s.top[t] = top;
        j->s.scale[t] = target < 0 ? 0.0f : (float)(weight / sum);
        if (target >= 0)
            *loss += log(sum) + (double)top - (double)j->s.logits[target * j->cols + t];
    }
}

/* dlogits in place, then dtable += alpha dlogits h^T, dh = table^T dlogits, and through the norm to dx and dgain. */
static anert_status chunk_back(anert_pool *pool, head_job *j, double weight, anert_error *err) {
    anert_head_args *a = j->a;
    anert_parallel_for(pool, vocab_blocks(a->vocab), soft_block, j);
    for (int64_t t = 0; t < j->cols; t++)
        if (a->targets[j->first + t] >= 0)
            j->s.logits[a->targets[j->first + t] * j->cols + t] -= (float)weight;
    anert_matrix dlogits = matrix(j->s.logits, ANERT_F32, j->cols, 1);
    anert_status status = ANERT_OK;
    if (a->dtable)
        status = anert_gemm_grad(pool, a->precision, a->vocab, a->dim, j->cols, a->grad_alpha, dlogits,
                                 matrix(j->s.h, ANERT_F32, 1, j->cols), j->first == 0 ? a->table_beta : 1.0f, a->dtable,
                                 &a->table_squares, err);
    if (!status)
        status = anert_gemm(pool, a->precision, 1, a->dim, j->cols, a->vocab, 1.0f, matrix(a->table, ANERT_F16, 1, a->dim), dlogits,
                            0.0f, matrix(j->s.dh, ANERT_F32, j->cols, 1), err);
    if (status)
        return status;
    anert_parallel_for(pool, (j->cols + COLUMN_BLOCK - 1) / COLUMN_BLOCK, back_block, j);
    if (a->dgain && a->gain)
        anert_parallel_for(pool, (a->dim + CHANNEL_BLOCK - 1) / CHANNEL_BLOCK, gain_block, j);
    return ANERT_OK;
}

static anert_status check_args(anert_pool *pool, const anert_head_args *a, anert_error *err) {
    if (!pool || !a || !a->x || !a->table || !a->scratch)
        return anert_fail(err, ANERT_EINVAL, "head: pool, x, table and scratch must not be NULL");
    if (a->vocab < 1 || a->dim < 1 || a->n < 1 || a->x_stride < a->n || (a->dx && a->dx_stride < a->n))
        return anert_fail(err, ANERT_EINVAL, "head: sizes vocab %lld, dim %lld, n %lld, strides %lld and %lld", (long long)a->vocab,
                          (long long)a->dim, (long long)a->n, (long long)a->x_stride, (long long)a->dx_stride);
    if (a->precision != ANERT_F32 && a->precision != ANERT_BF16)
        return anert_fail(err, ANERT_EINVAL, "head: precision %d is neither F32 nor BF16", (int)a->precision);
    return ANERT_OK;
}

anert_status anert_head_loss(anert_pool *pool, anert_head_args *args, double *loss, int64_t *count, anert_error *err) {
    anert_status status = check_args(pool, args, err);
    if (!status && (!args->targets || !loss || !count))
        status = anert_fail(err, ANERT_EINVAL, "head: targets, loss and count must not be NULL");
    if (!status)
        status = check_tokens(args->targets, args->n, args->vocab, -1, "target", err);
    if (status)
        return status;
    int64_t counted = 0;
    for (int64_t t = 0; t < args->n; t++)
        counted += args->targets[t] >= 0;
    double weight = counted ? 1.0 / (double)counted : 0.0, total = 0.0;
    head_job job = {.a = args, .k = kernels_for(pool)};
    carve(args->vocab, args->dim, args->n, args->scratch, &job.s);
    for (job.first = 0; job.first < args->n; job.first += CHUNK) {
        job.cols = MIN(CHUNK, args->n - job.first);
        if ((status = classify(pool, &job, err)))
            return status;
        anert_parallel_for(pool, vocab_blocks(args->vocab), part_block, &job);
        join(&job, weight, &total);
        if (args->dx && (status = chunk_back(pool, &job, weight, err)))
            return status;
    }
    *loss = total * weight;
    *count = counted;
    return ANERT_OK;
}

anert_status anert_head_logits(anert_pool *pool, const anert_head_args *args, const int32_t *columns, int64_t n_out,
                               float *logits, anert_error *err) {
    anert_status status = check_args(pool, args, err);
    if (status)
        return status;
    if (!columns || !logits || n_out < 0)
        return anert_fail(err, ANERT_EINVAL, "head logits: columns and logits must not be NULL, n_out not negative");
    if ((status = check_tokens(columns, n_out, args->n, 0, "column", err)))
        return status;
    head_scratch s;
    carve(args->vocab, args->dim, args->n, args->scratch, &s);
    const anert_head_kernels *k = kernels_for(pool);
    int64_t room = MIN(args->n, CHUNK);
    for (int64_t first = 0; first < n_out; first += room) {
        int64_t cols = MIN(room, n_out - first);
        for (int64_t t = 0; t < cols; t++)
            k->norm(args->x + columns[first + t], args->x_stride, args->gain, args->norm_eps, args->dim, 1, s.h + t, cols, s.r + t);
        anert_matrix h = matrix(s.h, ANERT_F32, cols, 1), out = matrix(logits + first * args->vocab, ANERT_F32, 1, args->vocab);
        if (args->table_q8)
            status = anert_q8_gemm(pool, args->precision, args->vocab, cols, args->dim, 1.0f, args->table_q8, h, 0.0f, out, err);
        else
            status = anert_gemm(pool, args->precision, 1, args->vocab, cols, args->dim, 1.0f,
                                matrix(args->table, ANERT_F16, args->dim, 1), h, 0.0f, out, err);
        if (status)
            return status;
    }
    return ANERT_OK;
}
