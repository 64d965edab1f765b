/* gemm_amx.c: GEMM of bf16 operands by AMX: tiles of 16 x 16 fp32 sums, 2 x 2 of them a register tile, 32 of k at a time
 * (Intel SDM 1, chapter 18). A panel of A holds, for every 16 words of k, 32 rows of 64 bytes; a panel of B every word of k
 * for 32 columns: both are what TILELOADD takes. B streams through L1, whose place is a panel of A; partial sums stay tiles:
 * they are loaded and added to. The vector units have nothing to do meanwhile but what gemm_between holds. */
#include "internal.h"
#if defined(ANERT_HAS_AMX)
#define VEC_AVX512BF16
enum { MR = 32, NV = 2, PAIR_STEP = 16, ROW_BYTES = 64, TILE_ROWS = 16, QUAD = 4 };
#include "gemm_kernel.h"
#include "gemm_pairs.h"

#define AMX_FN static __attribute__((target("amx-tile,amx-bf16"))) VEC_TARGET

/* ---- Panels of A ---- */

/* 32 values from start on as bf16 in k order */
VEC_INLINE vf bf16_line(const gemm_operand *x, int64_t start, int32_t dtype) {
    if (dtype == ANERT_BF16)
        return (vf)_mm512_loadu_si512((const uint16_t *)x->data + start);
    return narrow(vf_load_as(x->data, start, dtype), vf_load_as(x->data, start + VL, dtype));
}

/* Words from `word` on of one row, up to 16, zeros past the end. */
VEC_FN vf row_end(const gemm_operand *x, int64_t row, int64_t word, int64_t depth) {
    float line[VL] = {0};
    for (int64_t w = 0; w < VL && 2 * (word + w) < depth; w++)
        line[w] = element_pair(x, row, 2 * (word + w), depth);
    return vf_load(line);
}

/* Words [word, word + VL) of QUAD rows that lie contiguous along k. */
VEC_INLINE void quad(const gemm_operand *x, int64_t row, int64_t word, int64_t size, float *panels, int32_t dtype) {
    float *out = panels + row / MR * size + word * MR + row % MR * VL;
    for (int64_t i = 0; i < QUAD; i++)
        vf_store(out + i * VL, bf16_line(x, MIN(row + i, x->count - 1) * x->stride + 2 * word, dtype));
}

VEC_INLINE void rows_along_k(const gemm_operand *x, int64_t count, int64_t depth, float *panels, int32_t dtype, bool bf16) {
    (void)bf16;
    const int64_t words = pair_words(depth), whole = depth / (2 * VL) * VL, size = panel_size(MR, words);
    for (int64_t row = 0; row < ROUND_UP(count, MR); row += QUAD) {
        for (int64_t w = 0; w < whole; w += VL)
            quad(x, row, w, size, panels, dtype);
        for (int64_t w = whole; w < words; w += VL)
            for (int64_t i = row; i < row + QUAD; i++)
                vf_store(panels + i / MR * size + w * MR + i % MR * VL, row_end(x, MIN(i, x->count - 1), w, depth));
    }
}

/* The same of VL rows, which lie contiguous along the rows: interleaved, then transposed in registers. */
VEC_INLINE void square(const gemm_operand *x, int64_t row, int64_t word, int64_t size, float *panels, int32_t dtype) {
    float *out = panels + row / MR * size + word * MR + row % MR * VL;
    vf square[VL];
    for (int i = 0; i < VL; i++) {
        int64_t start = 2 * (word + i) * x->k_stride + row;
        square[i] = interleave(narrow(vf_load_as(x->data, start, dtype), vf_load_as(x->data, start + x->k_stride, dtype)));
    }
    vf_transpose(square);
    for (int i = 0; i < VL; i++)
        vf_store(out + i * VL, square[i]);
}

VEC_INLINE void rows_along_rows(const gemm_operand *x, int64_t count, int64_t depth, float *panels, int32_t dtype, bool bf16) {
    (void)bf16;
    const int64_t words = pair_words(depth), size = panel_size(MR, words);
    for (int64_t w = 0; w < words; w += VL)
        for (int64_t row = 0; row < count; row += VL) {
            if (row + VL <= x->count && 2 * (w + VL) <= depth) {
                square(x, row, w, size, panels, dtype);
                continue;
            }
            for (int64_t i = row; i < row + VL; i++)
                vf_store(panels + i / MR * size + w * MR + i % MR * VL, row_end(x, MIN(i, x->count - 1), w, depth));
        }
}

VEC_FN void pack_rows(const gemm_operand *x, int64_t count, int64_t depth, float *panels) {
    if (x->k_stride == 1) {
        FOR_DTYPE(x, rows_along_k, count, depth, panels);
    } else if (x->stride == 1) {
        FOR_DTYPE(x, rows_along_rows, count, depth, panels);
    } else {
        const int64_t words = pair_words(depth), size = panel_size(MR, words);
        for (int64_t row = 0; row < count; row++)
            for (int64_t w = 0; w < words; w += VL)
                vf_store(panels + row / MR * size + w * MR + row % MR * VL, row_end(x, row, w, depth));
    }
}

/* ---- Between products ---- */

static inline void ask(gemm_ahead *a) {
    for (int64_t i = 0; i < a->per_step && a->runs > 0; i++) {
        __builtin_prefetch(a->run + a->at, 0, 2);
        a->at += 64;
        if (a->at >= a->bytes) {
            a->at = 0;
            a->run += a->stride;
            a->runs--;
        }
    }
}

/* A piece is a quad or a square: whole ones alone. */
static int64_t pieces(const gemm_operand *x, int64_t count, int64_t depth) {
    if (depth % (2 * VL) != 0 || depth == 0)
        return 0;
    if (x->k_stride == 1)
        return ROUND_UP(count, MR) / QUAD * (depth / (2 * VL));
    return x->stride == 1 && ROUND_UP(count, VL) <= x->count ? ROUND_UP(count, VL) / VL * (depth / (2 * VL)) : 0;
}

VEC_INLINE void some_quads(const gemm_operand *x, gemm_between *b, int64_t n, int32_t dtype, bool bf16) {
    (void)bf16;
    const int64_t words = b->depth / 2, size = panel_size(MR, words);
    int64_t row = b->row, word = b->word;
    for (int64_t i = 0; i < n; i++) {
        quad(x, row, word, size, b->panels, dtype);
        word += VL;
        row += word == words ? QUAD : 0;
        word = word == words ? 0 : word;
    }
    b->row = row;
    b->word = word;
}

VEC_INLINE void some_squares(const gemm_operand *x, gemm_between *b, int64_t n, int32_t dtype, bool bf16) {
    (void)bf16;
    const int64_t size = panel_size(MR, b->depth / 2);
    int64_t row = b->row, word = b->word;
    for (int64_t i = 0; i < n; i++) {
        square(x, row, word, size, b->panels, dtype);
        row += VL;
        word += row >= b->count ? VL : 0;
        row = row >= b->count ? 0 : row;
    }
    b->row = row;
    b->word = word;
}

VEC_FN void pack_some(gemm_between *b, int64_t n) {
    n = MIN(n, b->pieces);
    if (n == 0)
        return;
    b->pieces -= n;
    if (b->x.k_stride == 1)
        FOR_DTYPE(&b->x, some_quads, b, n);
    else
        FOR_DTYPE(&b->x, some_squares, b, n);
}

VEC_INLINE void some_rows(gemm_between *b, int64_t n, int32_t dtype, bool grad) {
    const gemm_out *to = &b->late;
    const float *tile = to->product;
    float *sums = to->product + MR * NR;
    vf squares = grad && b->stored > 0 ? vf_load(sums) : vf_zero();
    int64_t end = MIN(b->stored + n, MR);
    for (int64_t i = b->stored; i < end; i++)
        for (int j = 0; j < NV; j++)
            squares = store_vector(vf_load(tile + i * NR + j * VL), to, i, j, dtype, grad, squares);
    if (grad && end < MR)
        vf_store(sums, squares);
    else if (grad)
        *to->squares = vf_sum(squares);
    b->stored = end;
}

/* Some rows of the late tile into C. */
VEC_FN void store_some(gemm_between *b, int64_t n) {
    const gemm_out *to = &b->late;
    if (to->c == NULL || b->stored == MR)
        return;
    if (to->squares != NULL)
        some_rows(b, n, ANERT_F32, true);
    else if (to->dtype == ANERT_F32)
        some_rows(b, n, ANERT_F32, false);
    else if (to->dtype == ANERT_F16)
        some_rows(b, n, ANERT_F16, false);
    else
        some_rows(b, n, ANERT_BF16, false);
}

static void drain(gemm_between *b) {
    pack_some(b, b->pieces);
    store_some(b, MR);
}

VEC_FN void pack_cols(const gemm_operand *x, int64_t count, int64_t depth, float *panels) {
    pack_pairs(x, count, depth, NR, panels);
}

/* ---- Register tile ---- */

/* What LDTILECFG reads: palette 1, and for each of 8 tiles the bytes of a row and the rows. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} CONFIG = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

AMX_FN void begin(void) { _tile_loadconfig(&CONFIG); }

AMX_FN void end(void) {
    _tile_release();
    vf_fence();
}

AMX_FN void tile_amx(int64_t words, const float *a, const float *b, const gemm_out *out) {
    enum { A_TILE = TILE_ROWS * VL };
    const int64_t stride = out->sums_stride * 4, rows = words > 0 ? (MR * PAIR_STEP + words - 1) / words : 0;
    gemm_between *between = out->between;
    if (out->first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, out->sums, stride);
        _tile_loadd(1, out->sums + VL, stride);
        _tile_loadd(2, out->sums + TILE_ROWS * out->sums_stride, stride);
        _tile_loadd(3, out->sums + TILE_ROWS * out->sums_stride + VL, stride);
    }
    for (int64_t w = 0; w < words; w += PAIR_STEP, a += 2 * A_TILE, b += PAIR_STEP * NR) {
        _tile_loadd(4, a, ROW_BYTES);
        _tile_stream_loadd(6, b, NR * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, b + VL, NR * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + A_TILE, ROW_BYTES);
        _tile_dpbf16ps(2, 5, 6);
        ask(&between->ahead);
        pack_some(between, between->per_step);
        store_some(between, rows);
        _tile_dpbf16ps(3, 5, 7);
    }
    store_some(between, MR);
    float *sums = out->last ? out->product : out->sums;
    const int64_t sums_stride = out->last ? NR : out->sums_stride;
    _tile_stored(0, sums, sums_stride * 4);
    _tile_stored(1, sums + VL, sums_stride * 4);
    _tile_stored(2, sums + TILE_ROWS * sums_stride, sums_stride * 4);
    _tile_stored(3, sums + TILE_ROWS * sums_stride + VL, sums_stride * 4);
    if (out->last && is_edge(out)) {
        store_edge(out->product, out);
    } else if (out->last) {
        between->late = *out;
        between->stored = 0;
    }
}

const gemm_kernel anert_gemm_amx = {
    .mr = MR, .nr = NR, .kc = 384, .pair = 2, .step = PAIR_STEP, .product = MR * NR + VL,
    .pack_a = pack_rows, .pack_b = pack_cols, .tile = tile_amx, .matvec = matvec, .column = column,
    .begin = begin, .end = end, .pieces = pieces, .drain = drain};
#endif
