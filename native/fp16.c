/* fp16.c: conversions between fp32 and fp16 over rows, matrices and transposed matrices, one owner per chunk or block. */
#include "internal.h"

enum { STREAMED = 1 << 20, CHUNK = 1 << 16, BLOCK = 64, TILE = 512, PITCH = TILE + 32, BAND = 4096, LINE = 64 };

void anert_fp16_down(const float *src, uint16_t *dst, size_t n) {
    for (size_t i = 0; i < n; i++)
        dst[i] = anert_half(src[i]);
}

void anert_fp16_up(const uint16_t *src, float *dst, size_t n) {
    for (size_t i = 0; i < n; i++)
        dst[i] = anert_float(src[i]);
}

void anert_fp16_down_block(const float *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            dst[c * ds + r] = anert_half(src[r * ss + c]);
}

void anert_fp16_up_block(const uint16_t *src, size_t ss, float *dst, size_t ds, size_t rows, size_t cols) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            dst[c * ds + r] = anert_float(src[r * ss + c]);
}

void anert_fp16_turn_block(const uint16_t *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            dst[c * ds + r] = src[r * ss + c];
}

size_t anert_fp16_clamp(const float *src, uint16_t *dst, size_t n) {
    size_t past = 0;
    for (size_t i = 0; i < n; i++) {
        float x = src[i] > 65504.0f ? 65504.0f : src[i] < -65504.0f ? -65504.0f : src[i];
        past += x != src[i] && src[i] == src[i];
        dst[i] = anert_half(x);
    }
    return past;
}

static void turn_square(const anert_fp16_kernels *kernels, bool stream, const uint16_t *src, size_t ss, uint16_t *dst, size_t ds,
                        size_t rows, size_t cols) {
    uint16_t turned[BLOCK * BLOCK];
    kernels->transpose(src, ss, turned, BLOCK, rows, cols);
    for (size_t c = 0; c < cols; c++)
        if (stream)
            kernels->stream(turned + c * BLOCK, dst + c * ds, rows);
        else
            memcpy(dst + c * ds, turned + c * BLOCK, rows * sizeof *dst);
}

void anert_fp16_turn(const anert_fp16_kernels *kernels, bool stream, const uint16_t *src, size_t ss, uint16_t *dst, size_t ds,
                     size_t rows, size_t cols) {
    bool lines = stream && kernels->turn_lines != NULL && (uintptr_t)dst % LINE == 0 && ds % (LINE / sizeof *dst) == 0;
    for (size_t c = 0; c < cols; c += BLOCK)
        for (size_t r = 0; r < rows; r += BLOCK) {
            size_t down = MIN(rows - r, (size_t)BLOCK), along = MIN(cols - c, (size_t)BLOCK);
            const uint16_t *from = src + r * ss + c;
            uint16_t *to = dst + c * ds + r;
            if (!lines || down < BLOCK || along < BLOCK) {
                turn_square(kernels, stream, from, ss, to, ds, down, along);
                continue;
            }
            for (size_t k = 0; k < BLOCK; k += 16) /* the two lines of a column one after the other: memory likes pairs */
                for (size_t i = 0; i < BLOCK; i += 32)
                    kernels->turn_lines(from + i * ss + k, ss, to + k * ds + i, ds);
        }
}

static void copy(const uint16_t *src, uint16_t *dst, size_t n) { memcpy(dst, src, n * sizeof *dst); }
static void fence(void) {}

static const anert_fp16_kernels scalar = {anert_fp16_down, anert_fp16_up, anert_fp16_down_block, anert_fp16_up_block,
                                          anert_fp16_turn_block, anert_fp16_clamp, anert_fp16_clamp, copy, anert_fp16_down,
                                          anert_fp16_up, fence, NULL};

const anert_fp16_kernels *anert_fp16_kernels_for(int32_t isa) {
    switch (anert_isa_vectors(isa)) {
#if defined(__x86_64__)
    case ANERT_ISA_AVX2: return &anert_fp16_avx2;
    case ANERT_ISA_AVX512: return &anert_fp16_avx512;
#elif defined(__aarch64__)
    case ANERT_ISA_NEON: return &anert_fp16_neon;
#endif
    default: return &scalar;
    }
}

/* A conversion cut into pieces: rows of at most CHUNK elements, or BLOCK by BAND bands to transpose. */
typedef struct {
    const anert_fp16_kernels *kernels;
    const void *src;
    void *dst;
    size_t ss, ds, rows, cols;
    size_t across; /* pieces along a row */
    bool down, clamp, large; /* large: past the caches */
    _Atomic uint64_t clamped;
} conversion;

static void convert_chunk(void *arg, int64_t index, int32_t thread) {
    conversion *job = arg;
    size_t row = (size_t)index / job->across, col = (size_t)index % job->across * CHUNK;
    size_t n = MIN(job->cols - col, (size_t)CHUNK);
    size_t from = row * job->ss + col, to = row * job->ds + col;
    const anert_fp16_kernels *kernels = job->kernels;
    (void)thread;
    if (!job->down)
        (job->large ? kernels->stream_up : kernels->f16_to_f32)((const uint16_t *)job->src + from, (float *)job->dst + to, n);
    else if (!job->clamp)
        (job->large ? kernels->stream_down : kernels->f32_to_f16)((const float *)job->src + from, (uint16_t *)job->dst + to, n);
    else
        job->clamped += (job->large ? kernels->stream_clamp : kernels->clamp)((const float *)job->src + from,
                                                                              (uint16_t *)job->dst + to, n);
    kernels->fence();
}

/* Rows of a tile as halves: long runs, and at a pitch that does not alias. Returns how many were clamped. */
static size_t gather(const conversion *job, size_t from, size_t rows, size_t cols, uint16_t *halves) {
    size_t past = 0;
    for (size_t r = 0; r < rows; r++, from += job->ss, halves += PITCH)
        if (!job->down)
            memcpy(halves, (const uint16_t *)job->src + from, cols * sizeof *halves);
        else if (job->clamp)
            past += job->kernels->clamp((const float *)job->src + from, halves, cols);
        else
            job->kernels->f32_to_f16((const float *)job->src + from, halves, cols);
    return past;
}

/* Asks for part `step` of the next tile, of the parts that a whole tile has columns, row after row as prefetchers like
 * it. */
static void ask(const conversion *job, const char *next, size_t rows, size_t step) {
    size_t size = job->down ? sizeof(float) : sizeof(uint16_t), row = step / (TILE / BLOCK);
    if (next == NULL || row >= rows)
        return;
    next += (row * job->ss + step % (TILE / BLOCK) * BLOCK) * size;
    for (size_t at = 0; at < BLOCK * size; at += LINE)
        __builtin_prefetch(next + at);
}

static void widen_square(const conversion *job, const uint16_t *halves, float *dst, size_t rows, size_t cols) {
    uint16_t turned[BLOCK * BLOCK];
    job->kernels->transpose(halves, PITCH, turned, BLOCK, rows, cols);
    for (size_t c = 0; c < cols; c++)
        (job->large ? job->kernels->stream_up : job->kernels->f16_to_f32)(turned + c * BLOCK, dst + c * job->ds, rows);
}

static void convert_band(void *arg, int64_t index, int32_t thread) {
    conversion *job = arg;
    const anert_fp16_kernels *kernels = job->kernels;
    uint16_t halves[BLOCK * PITCH];
    size_t row = (size_t)index / job->across * BLOCK, first = (size_t)index % job->across * BAND, past = 0;
    size_t rows = MIN(job->rows - row, (size_t)BLOCK), end = MIN(job->cols, first + BAND);
    size_t size = job->down ? sizeof(float) : sizeof(uint16_t);
    (void)thread;
    for (size_t col = first; col < end; col += TILE) {
        size_t cols = MIN(end - col, (size_t)TILE), from = row * job->ss + col;
        const char *next = col + 2 * TILE <= end ? (const char *)job->src + (from + TILE) * size : NULL;
        past += gather(job, from, rows, cols, halves);
        for (size_t c = 0; c < cols; c += BLOCK) {
            size_t along = MIN(cols - c, (size_t)BLOCK), to = (col + c) * job->ds + row;
            for (size_t k = 0; k < along; k++)
                ask(job, next, rows, c + k);
            if (job->down)
                anert_fp16_turn(kernels, job->large, halves + c, PITCH, (uint16_t *)job->dst + to, job->ds, rows, along);
            else
                widen_square(job, halves + c, (float *)job->dst + to, rows, along);
        }
    }
    kernels->fence();
    if (past > 0)
        job->clamped += past;
}

static void convert(anert_pool *pool, conversion *job, bool transpose) {
    if (job->rows == 0 || job->cols == 0)
        return;
    size_t down = job->rows;
    job->large = job->cols >= STREAMED / job->rows;
    if (transpose) {
        down = (job->rows + BLOCK - 1) / BLOCK;
        job->across = (job->cols + BAND - 1) / BAND;
    } else {
        if (job->ss == job->cols && job->ds == job->cols) { /* one long row */
            job->cols *= job->rows;
            job->rows = down = 1;
        }
        job->across = (job->cols + CHUNK - 1) / CHUNK;
    }
    job->kernels = anert_fp16_kernels_for(anert_pool_isa(pool));
    anert_pool *workers = job->cols <= CHUNK / job->rows ? NULL : pool; /* waking them would cost more */
    anert_parallel_for(workers, (int64_t)(down * job->across), transpose ? convert_band : convert_chunk, job);
}

/* Elements from the first to one past the last of (rows, cols) at `stride`; false if no array can have that many. */
static bool extent(size_t rows, size_t cols, size_t stride, size_t *out) {
    if (rows == 0 || cols == 0) {
        *out = 0;
        return true;
    }
    return !__builtin_mul_overflow(rows - 1, stride, out) && !__builtin_add_overflow(*out, cols, out) &&
           *out <= PTRDIFF_MAX / sizeof(float);
}

static anert_status check(const conversion *job, bool transpose, anert_error *err) {
    size_t rows = job->rows, cols = job->cols, unused;
    size_t out_rows = transpose ? cols : rows, out_cols = transpose ? rows : cols;
    if (!extent(rows, cols, job->ss, &unused) || !extent(out_rows, out_cols, job->ds, &unused))
        return anert_fail(err, ANERT_EINVAL, "%zu rows of %zu at strides %zu and %zu exceed the address space", rows, cols,
                          job->ss, job->ds);
    if (rows == 0 || cols == 0)
        return ANERT_OK;
    if (job->src == NULL || job->dst == NULL)
        return anert_fail(err, ANERT_EINVAL, "%s is NULL", job->src == NULL ? "src" : "dst");
    if (rows > 1 && job->ss < cols)
        return anert_fail(err, ANERT_EINVAL, "src_stride %zu is less than a row of %zu", job->ss, cols);
    if (out_rows > 1 && job->ds < out_cols)
        return anert_fail(err, ANERT_EINVAL, "dst_stride %zu is less than a row of %zu", job->ds, out_cols);
    return ANERT_OK;
}

anert_status anert_f32_to_f16_2d(anert_pool *pool, const float *src, size_t src_stride, uint16_t *dst,
                                 size_t dst_stride, size_t rows, size_t cols, int32_t transpose, int32_t clamp,
                                 uint64_t *clamped, anert_error *err) {
    conversion job = {.src = src, .dst = dst, .ss = src_stride, .ds = dst_stride, .rows = rows, .cols = cols,
                      .down = true, .clamp = clamp != 0};
    anert_status status = check(&job, transpose, err);
    if (status == ANERT_OK)
        convert(pool, &job, transpose);
    if (clamped != NULL)
        *clamped = atomic_load(&job.clamped);
    return status;
}

anert_status anert_f16_to_f32_2d(anert_pool *pool, const uint16_t *src, size_t src_stride, float *dst,
                                 size_t dst_stride, size_t rows, size_t cols, int32_t transpose, anert_error *err) {
    conversion job = {.src = src, .dst = dst, .ss = src_stride, .ds = dst_stride, .rows = rows, .cols = cols};
    anert_status status = check(&job, transpose, err);
    if (status == ANERT_OK)
        convert(pool, &job, transpose);
    return status;
}

anert_status anert_f32_to_f16(anert_pool *pool, const float *src, uint16_t *dst, size_t n, int32_t clamp,
                              uint64_t *clamped, anert_error *err) {
    return anert_f32_to_f16_2d(pool, src, n, dst, n, 1, n, 0, clamp, clamped, err);
}

anert_status anert_f16_to_f32(anert_pool *pool, const uint16_t *src, float *dst, size_t n, anert_error *err) {
    return anert_f16_to_f32_2d(pool, src, n, dst, n, 1, n, 0, err);
}
