/* gemm_amx.c: GEMM of bf16 operands by AMX: tiles of 16 x 16 fp32 sums, 2 x 2 of them a register tile, 32 of k at a time
 * (Intel SDM 1, chapter 18). A panel of A holds, for every 16 words of k, 32 rows of 64 bytes; a panel of B every word of k
 * for 32 columns: both are what TILELOADD takes. A streams through L1, whose place is a panel of B; partial sums stay tiles:
 * they are loaded and added to. */
#include "internal.h"
#if defined(ANERT_HAS_AMX)
#define VEC_AVX512BF16
enum { MR = 32, NV = 2, PAIR_STEP = 16, ROW_BYTES = 64, TILE_ROWS = 16 };
#include "gemm_kernel.h"
#include "gemm_stored.h"
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

VEC_INLINE void rows_along_k(const gemm_operand *x, int64_t count, int64_t depth, float *panels, int32_t dtype, bool bf16) {
    (void)bf16;
    const int64_t words = pair_words(depth), whole = depth / (2 * VL) * VL;
    for (int64_t base = 0; base < count; base += MR, panels += panel_size(MR, words))
        for (int64_t r = 0; r < MR; r += 4) {
            int64_t row[4], w = 0;
            for (int64_t i = 0; i < 4; i++)
                row[i] = MIN(base + r + i, x->count - 1);
            for (; w < whole; w += VL)
                for (int i = 0; i < 4; i++)
                    vf_store(panels + w * MR + (r + i) * VL, bf16_line(x, row[i] * x->stride + 2 * w, dtype));
            for (; w < words; w += VL)
                for (int i = 0; i < 4; i++)
                    vf_store(panels + w * MR + (r + i) * VL, row_end(x, row[i], w, depth));
        }
}

/* Contiguous along the rows: 16 words of 16 rows are interleaved, then transposed in registers. */
VEC_INLINE void rows_along_rows(const gemm_operand *x, int64_t count, int64_t depth, float *panels, int32_t dtype, bool bf16) {
    (void)bf16;
    const int64_t words = pair_words(depth), size = panel_size(MR, words);
    for (int64_t w = 0; w < words; w += VL)
        for (int64_t base = 0; base < count; base += VL) {
            float *out = panels + base / MR * size + w * MR + base % MR * VL;
            if (base + VL > x->count || 2 * (w + VL) > depth) {
                for (int64_t r = 0; r < VL; r++)
                    vf_store(out + r * VL, row_end(x, MIN(base + r, x->count - 1), w, depth));
                continue;
            }
            vf square[VL];
            for (int i = 0; i < VL; i++) {
                int64_t start = 2 * (w + i) * x->k_stride + base;
                square[i] = interleave(narrow(vf_load_as(x->data, start, dtype), vf_load_as(x->data, start + x->k_stride, dtype)));
            }
            vf_transpose(square);
            for (int i = 0; i < VL; i++)
                vf_store(out + i * VL, square[i]);
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
    const int64_t stride = out->sums_stride * 4;
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
        _tile_loadd(6, b, NR * 4);
        _tile_stream_loadd(4, a, ROW_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + VL, NR * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, a + A_TILE, ROW_BYTES);
        _tile_dpbf16ps(2, 5, 6);
        ask_ahead(out->ahead);
        _tile_dpbf16ps(3, 5, 7);
    }
    float tile[MR * NR] __attribute__((aligned(64)));
    float *sums = out->last ? tile : out->sums;
    const int64_t sums_stride = out->last ? NR : out->sums_stride;
    _tile_stored(0, sums, sums_stride * 4);
    _tile_stored(1, sums + VL, sums_stride * 4);
    _tile_stored(2, sums + TILE_ROWS * sums_stride, sums_stride * 4);
    _tile_stored(3, sums + TILE_ROWS * sums_stride + VL, sums_stride * 4);
    if (out->last)
        store_tile(tile, out);
}

const gemm_kernel anert_gemm_amx = {MR, NR, 384, 2, PAIR_STEP, 0, pack_rows, pack_cols, tile_amx, matvec, column, begin, end};
#endif
