/* quant.c: int8 weights: rows of groups of 32 that share a scale, multiplied by a column quantised alike.
 *
 * An encoded matrix (rows, cols) is blocks of 16 rows. A block is its scales, fp16, group by group (16 rows each), padded to
 * 64 bytes; then its weights, group by group, of each group 8 vectors of 64 bytes: 4 neighbours of each of the 16 rows, plus
 * 128. So one instruction (vpdpbusd) multiplies 64 unsigned weights by 4 signed bytes of the column, and the 128 comes off
 * once per group. Sums of a group are whole numbers and groups are added in order, so every instruction set gives the same bits. */
#include <math.h>

#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { GROUP = 32, ROWS = 16, PARTS = GROUP / 4, TASK_BYTES = 1 << 16, TASKS_PER_THREAD = 4, SCRATCH = 6, AHEAD = 4096 };
#define SERIAL_BYTES 30000 /* below, waking a thread costs more than it saves */

static int64_t scale_bytes(int64_t groups) { return ROUND_UP(groups * ROWS * 2, (int64_t)64); }
static int64_t block_bytes(int64_t cols) { return scale_bytes(cols / GROUP) + cols / GROUP * GROUP * ROWS; }
static int64_t blocks_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }

size_t anert_q8_bytes(int64_t rows, int64_t cols) {
    if (rows < 1 || cols < GROUP || cols % GROUP || rows > INT32_MAX || cols > INT32_MAX)
        return 0;
    return (size_t)blocks_of(rows) * (size_t)block_bytes(cols);
}

static anert_status check_shape(int64_t rows, int64_t cols, anert_error *err) {
    if (anert_q8_bytes(rows, cols) == 0)
        return anert_fail(err, ANERT_EINVAL, "int8: a matrix of %lld x %lld: expected columns in groups of %d", (long long)rows,
                          (long long)cols, GROUP);
    return ANERT_OK;
}

/* ---- Encoding ---- */
typedef struct {
    const float *src;
    int64_t rows, cols;
    uint8_t *dst;
} encoding;

static void encode_block(void *arg, int64_t block, int32_t thread) {
    const encoding *e = arg;
    (void)thread;
    uint8_t *at = e->dst + block * block_bytes(e->cols), *weights = at + scale_bytes(e->cols / GROUP);
    uint16_t *scales = (uint16_t *)at;
    for (int64_t r = 0; r < ROWS; r++) {
        const float *row = block * ROWS + r < e->rows ? e->src + (block * ROWS + r) * e->cols : NULL;
        for (int64_t g = 0; g < e->cols / GROUP; g++) {
            float top = 0.0f;
            for (int i = 0; row != NULL && i < GROUP; i++)
                top = MAX(top, fabsf(row[g * GROUP + i]));
            uint16_t half = anert_half(MIN(top / 127.0f, 65504.0f));
            float scale = anert_float(half), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            scales[g * ROWS + r] = half;
            for (int i = 0; i < GROUP; i++) {
                float q = row == NULL ? 0.0f : rintf(row[g * GROUP + i] * inverse);
                weights[((g * PARTS + i / 4) * ROWS + r) * 4 + i % 4] = (uint8_t)(int32_t)(128.0f + MAX(-127.0f, MIN(127.0f, q)));
            }
        }
    }
}

anert_status anert_q8_encode(anert_pool *pool, const float *src, int64_t rows, int64_t cols, uint8_t *dst, anert_error *err) {
    anert_status status = check_shape(rows, cols, err);
    if (status)
        return status;
    if (src == NULL || dst == NULL)
        return anert_fail(err, ANERT_EINVAL, "int8: src and dst must not be NULL");
    encoding e = {src, rows, cols, dst};
    anert_parallel_for(pool, blocks_of(rows), encode_block, &e);
    return ANERT_OK;
}

/* ---- A column ---- */
typedef struct {
    int8_t *q;      /* (k) */
    float *scale;   /* (k / 32) */
    int32_t *fix;   /* (k / 32): -128 times the sum of the group */
} column;

/* The groups of v (k) in int8, each in the scale of its largest magnitude. */
typedef void quantise_fn(const float *v, int64_t k, column x);

static void quantise_scalar(const float *v, int64_t k, column x) {
    for (int64_t g = 0; g < k / GROUP; g++, v += GROUP) {
        float top = 0.0f;
        for (int i = 0; i < GROUP; i++)
            top = MAX(top, fabsf(v[i]));
        float inverse = top > 0.0f ? 127.0f / top : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) {
            int32_t q = (int32_t)rintf(v[i] * inverse);
            x.q[g * GROUP + i] = (int8_t)q;
            sum += q;
        }
        x.scale[g] = top / 127.0f;
        x.fix[g] = -128 * sum;
    }
}

#if defined(__x86_64__)
#define VNNI TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
VNNI static void quantise_vnni(const float *v, int64_t k, column x) {
    for (int64_t g = 0; g < k / GROUP; g++, v += GROUP) {
        __m512 low = _mm512_loadu_ps(v), high = _mm512_loadu_ps(v + 16);
        float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        __m512 inverse = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
        __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)), second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
        _mm_storeu_si128((__m128i *)(x.q + g * GROUP), _mm512_cvtepi32_epi8(first));
        _mm_storeu_si128((__m128i *)(x.q + g * GROUP + 16), _mm512_cvtepi32_epi8(second));
        x.scale[g] = top / 127.0f;
        x.fix[g] = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    }
}
#endif

typedef void block_fn(const uint8_t *block, int64_t groups, const column *x, float *sums);

static void block_scalar(const uint8_t *block, int64_t groups, const column *x, float *sums) {
    const uint16_t *scales = (const uint16_t *)block;
    const uint8_t *weights = block + scale_bytes(groups);
    for (int r = 0; r < ROWS; r++)
        sums[r] = 0.0f;
    for (int64_t g = 0; g < groups; g++)
        for (int r = 0; r < ROWS; r++) {
            int32_t dot = x->fix[g];
            for (int i = 0; i < GROUP; i++)
                dot += weights[((g * PARTS + i / 4) * ROWS + r) * 4 + i % 4] * x->q[g * GROUP + i];
            sums[r] = fmaf((float)dot, anert_float(scales[g * ROWS + r]) * x->scale[g], sums[r]);
        }
}

#if defined(__x86_64__)
VNNI static void block_vnni(const uint8_t *block, int64_t groups, const column *x, float *sums) {
    const uint8_t *scales = block, *weights = block + scale_bytes(groups);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, weights += GROUP * ROWS) {
        __m512i even = _mm512_set1_epi32(x->fix[g]), odd = _mm512_setzero_si512();
        for (int j = 0; j < PARTS; j += 2) {
            int32_t four[2];
            memcpy(four, x->q + g * GROUP + 4 * j, sizeof four);
            _mm_prefetch((const char *)weights + 64 * j + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)weights + 64 * j + 64 + AHEAD, _MM_HINT_T0);
            even = _mm512_dpbusd_epi32(even, _mm512_loadu_si512(weights + 64 * j), _mm512_set1_epi32(four[0]));
            odd = _mm512_dpbusd_epi32(odd, _mm512_loadu_si512(weights + 64 * j + 64), _mm512_set1_epi32(four[1]));
        }
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + g * ROWS * 2)));
        scale = _mm512_mul_ps(scale, _mm512_set1_ps(x->scale[g]));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), scale, sum);
    }
    _mm512_storeu_ps(sums, sum);
}
#endif

#if defined(__x86_64__)
static bool has_vnni(int32_t isa) {
    return anert_isa_vectors(isa) == ANERT_ISA_AVX512 && __builtin_cpu_supports("avx512vnni");
}
#endif

typedef struct {
    block_fn *block;
    const anert_fp16_kernels *fp16;
    const uint8_t *a;
    int64_t m, k, blocks, grain;
    column x;
    float alpha, beta;
    anert_matrix c;
} column_job;

/* c = beta c + sums for `rows` rows from `row` on */
static void put(const column_job *j, int64_t row, const float *sums, int64_t rows) {
    const anert_matrix *c = &j->c;
    int64_t at = row * c->row_stride, step = c->row_stride;
    if (c->dtype == ANERT_F32) {
        float *y = (float *)c->data + at;
        if (rows == ROWS && step == 1 && j->beta == 0.0f)
            memcpy(y, sums, ROWS * sizeof *y);
        else
            for (int64_t r = 0; r < rows; r++)
                y[r * step] = j->beta != 0.0f ? y[r * step] + sums[r] : sums[r];
        return;
    }
    uint16_t *y = (uint16_t *)c->data + at;
    if (rows == ROWS && step == 1 && j->beta == 0.0f)
        j->fp16->f32_to_f16(sums, y, ROWS);
    else
        for (int64_t r = 0; r < rows; r++)
            y[r * step] = anert_half(j->beta != 0.0f ? anert_float(y[r * step]) + sums[r] : sums[r]);
}

static void column_body(void *arg, int64_t index, int32_t thread) {
    const column_job *j = arg;
    (void)thread;
    for (int64_t b = index * j->grain; b < MIN((index + 1) * j->grain, j->blocks); b++) {
        float sums[ROWS];
        j->block(j->a + b * block_bytes(j->k), j->k / GROUP, &j->x, sums);
        for (int r = 0; r < ROWS; r++)
            sums[r] *= j->alpha;
        put(j, b * ROWS, sums, MIN(j->m - b * ROWS, (int64_t)ROWS));
    }
}

/* ---- Many columns: decoded to fp16, then the GEMM that there is ---- */
typedef struct {
    const uint8_t *a;
    int64_t m, k;
    uint16_t *dst;
} decoding;

static void decode_block(void *arg, int64_t block, int32_t thread) {
    const decoding *d = arg;
    (void)thread;
    const uint8_t *at = d->a + block * block_bytes(d->k), *weights = at + scale_bytes(d->k / GROUP);
    const uint16_t *scales = (const uint16_t *)at;
    const anert_fp16_kernels *kernels = anert_fp16_kernels_for(anert_isa_best());
    for (int64_t r = 0; r < MIN(d->m - block * ROWS, (int64_t)ROWS); r++)
        for (int64_t g = 0; g < d->k / GROUP; g++) {
            float v[GROUP], scale = anert_float(scales[g * ROWS + r]);
            for (int i = 0; i < GROUP; i++)
                v[i] = scale * (float)(weights[((g * PARTS + i / 4) * ROWS + r) * 4 + i % 4] - 128);
            kernels->f32_to_f16(v, d->dst + (block * ROWS + r) * d->k + g * GROUP, GROUP);
        }
}

static anert_status many(anert_pool *pool, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha, const uint8_t *a,
                         anert_matrix b, float beta, anert_matrix c, anert_error *err) {
    decoding d = {a, m, k, anert_pool_scratch(pool, 0, SCRATCH, (size_t)m * (size_t)k * 2)};
    if (d.dst == NULL)
        return anert_fail(err, ANERT_ENOMEM, "int8: no memory for %lld x %lld weights", (long long)m, (long long)k);
    anert_parallel_for(pool, blocks_of(m), decode_block, &d);
    return anert_gemm(pool, precision, 1, m, n, k, alpha, (anert_matrix){d.dst, ANERT_F16, k, 1, 0}, b, beta, c, err);
}

/* The k elements of b as fp32 in a row: b's own, or `copy`. */
static const float *floats_of(const anert_matrix *b, int64_t k, const anert_fp16_kernels *fp16, float *copy) {
    const uint16_t *halves = b->data;
    if (b->dtype == ANERT_F16 && b->row_stride == 1)
        fp16->f16_to_f32(halves, copy, (size_t)k);
    else if (b->row_stride == 1)
        return b->data;
    else
        for (int64_t i = 0; i < k; i++)
            copy[i] = b->dtype == ANERT_F32 ? ((const float *)b->data)[i * b->row_stride] : anert_float(halves[i * b->row_stride]);
    return copy;
}

static anert_status one(anert_pool *pool, int64_t m, int64_t k, float alpha, const uint8_t *a, anert_matrix b, float beta,
                        anert_matrix c, anert_error *err) {
    int64_t groups = k / GROUP, room = ROUND_UP(k, 64);
    char *scratch = anert_pool_scratch(pool, 0, SCRATCH, (size_t)(room * 5 + ROUND_UP(groups * 8, 64)));
    if (scratch == NULL)
        return anert_fail(err, ANERT_ENOMEM, "int8: no memory for a column of %lld", (long long)k);
    int32_t isa = anert_pool_isa(pool);
    column_job j = {.block = block_scalar, .fp16 = anert_fp16_kernels_for(isa), .a = a, .m = m, .k = k, .blocks = blocks_of(m),
                    .alpha = alpha, .beta = beta, .c = c};
    j.x = (column){(int8_t *)scratch, (float *)(scratch + room), (int32_t *)(scratch + room + groups * 4)};
    const float *v = floats_of(&b, k, j.fp16, (float *)(scratch + room + ROUND_UP(groups * 8, 64)));
    quantise_fn *quantise = quantise_scalar;
#if defined(__x86_64__)
    if (has_vnni(isa))
        j.block = block_vnni, quantise = quantise_vnni;
#endif
    quantise(v, k, j.x);
    bool small = j.blocks * block_bytes(k) < SERIAL_BYTES;
    int64_t wanted = (int64_t)anert_pool_threads(pool) * TASKS_PER_THREAD;
    j.grain = small ? j.blocks : MAX(MIN(TASK_BYTES / block_bytes(k), (j.blocks + wanted - 1) / wanted), (int64_t)1);
    anert_parallel_for(pool, (j.blocks + j.grain - 1) / j.grain, column_body, &j);
    return ANERT_OK;
}

anert_status anert_q8_gemm(anert_pool *pool, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha, const uint8_t *a,
                           anert_matrix b, float beta, anert_matrix c, anert_error *err) {
    anert_status status = check_shape(m, k, err);
    if (status)
        return status;
    if (pool == NULL || a == NULL || b.data == NULL || c.data == NULL || n < 1 || (beta != 0.0f && beta != 1.0f))
        return anert_fail(err, ANERT_EINVAL, "int8: pool, a, b and c must not be NULL, n %lld at least 1, beta %g 0 or 1",
                          (long long)n, (double)beta);
    anert_pool_enter(pool);
    bool plain = b.dtype != ANERT_BF16 && (c.dtype == ANERT_F32 || c.dtype == ANERT_F16);
    status = n == 1 && plain ? one(pool, m, k, alpha, a, b, beta, c, err)
                             : many(pool, precision, m, n, k, alpha, a, b, beta, c, err);
    anert_pool_leave(pool);
    return status;
}
