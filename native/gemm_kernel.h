/* gemm_kernel.h: the kernels of gemm.h, written once over vec.h. The file that includes it has chosen vec.h's instruction
 * set and the register tile: MR rows by NV vectors of columns. */
#include "gemm.h"
#include "vec.h"

enum { NR = NV * VL };

/* ---- Packing ---- */

/* dtype and rounding as constants: six copies of a packing loop, one chosen per call. */
#define FOR_DTYPE(x, loop, ...)                                                                                         \
    do {                                                                                                                \
        switch ((x)->dtype * 2 + (x)->bf16) {                                                                           \
        case ANERT_F32 * 2: loop(x, __VA_ARGS__, ANERT_F32, false); break;                                              \
        case ANERT_F32 * 2 + 1: loop(x, __VA_ARGS__, ANERT_F32, true); break;                                           \
        case ANERT_F16 * 2: loop(x, __VA_ARGS__, ANERT_F16, false); break;                                              \
        case ANERT_F16 * 2 + 1: loop(x, __VA_ARGS__, ANERT_F16, true); break;                                           \
        default: loop(x, __VA_ARGS__, ANERT_BF16, false); break; /* is bf16 already */                                  \
        }                                                                                                               \
    } while (0)

VEC_INLINE vf load_rounded(const void *p, int64_t i, int32_t dtype, bool bf16) {
    vf x = vf_load_as(p, i, dtype);
    return bf16 ? vf_round_bf16(x) : x;
}

VEC_INLINE float element_rounded(const gemm_operand *x, int64_t row, int64_t k) {
    float value = element(x->data, row * x->stride + k * x->k_stride, x->dtype);
    return x->bf16 ? bf16_float(bf16_of(value)) : value;
}

/* Contiguous along k: squares of VL rows by VL deep are transposed in registers. A store may run past the panel's width
 * into the next k, which is written later; k past the last whole square goes element by element. */
VEC_INLINE void pack_along_k(const gemm_operand *x, int64_t count, int64_t depth, int64_t width, float *panels,
                             int32_t dtype, bool bf16) {
    const int64_t line = 64 / (int64_t)dtype_size(dtype), whole = depth / VL * VL;
    for (int64_t base = 0; base < count; base += width, panels += panel_size(width, depth)) {
        for (int64_t r = 0; r < width; r += VL) {
            int64_t offset[VL], ahead = (base + width < x->count ? width : 0) * x->stride;
            for (int64_t i = 0; i < VL; i++)
                offset[i] = MIN(base + MIN(r + i, width - 1), x->count - 1) * x->stride;
            for (int64_t k = 0; k < whole; k += VL) {
                if (k % line == 0) /* the same rows of the next panel */
                    for (int i = 0; i < VL; i++)
                        __builtin_prefetch((const char *)x->data + (size_t)(offset[i] + ahead + k) * dtype_size(dtype));
                vf square[VL];
                for (int i = 0; i < VL; i++)
                    square[i] = load_rounded(x->data, offset[i] + k, dtype, bf16);
                vf_transpose(square);
                for (int i = 0; i < VL; i++)
                    vf_store(panels + (k + i) * width + r, square[i]);
            }
        }
        for (int64_t k = whole; k < depth; k++)
            for (int64_t r = 0; r < width; r++)
                panels[k * width + r] = element_rounded(x, MIN(base + r, x->count - 1), k);
    }
}

/* `width` elements, vector by vector; of the last vector, what x still has. */
VEC_INLINE void copy_row(const gemm_operand *x, int64_t start, int64_t left, int64_t width, float *out, int32_t dtype,
                         bool bf16) {
    for (int64_t r = 0; r < width && r < left; r += VL) {
        vf part = left - r >= VL ? vf_load_as(x->data, start + r, dtype)
                                 : vf_load_part(x->data, start + r, dtype, left - r);
        vf_store(out + r, bf16 ? vf_round_bf16(part) : part);
    }
}

/* Contiguous along the rows: copied, a few k for all panels, so that a line of the source is still near when the next
 * panel wants the rest of it. */
VEC_INLINE void pack_along_rows(const gemm_operand *x, int64_t count, int64_t depth, int64_t width, float *panels,
                                int32_t dtype, bool bf16) {
    enum { STRIP = 8 };
    for (int64_t strip = 0; strip < depth; strip += STRIP)
        for (int64_t base = 0; base < count; base += width) {
            float *out = panels + base / width * panel_size(width, depth) + strip * width;
            const int64_t start = strip * x->k_stride + base, left = x->count - base;
            const int64_t rows = MIN(STRIP, depth - strip);
            if (left < ROUND_UP(width, VL) || rows < STRIP) {
                for (int64_t k = 0; k < rows; k++)
                    copy_row(x, start + k * x->k_stride, left, width, out + k * width, dtype, bf16);
                continue;
            }
            const char *next = (const char *)x->data + (size_t)(start + STRIP * x->k_stride) * dtype_size(dtype);
            for (int64_t k = 0; k < STRIP; k++) {
                if (strip + 2 * STRIP <= depth)
                    __builtin_prefetch(next + (size_t)(k * x->k_stride) * dtype_size(dtype));
                for (int64_t r = 0; r < width; r += VL)
                    vf_store(out + k * width + r, load_rounded(x->data, start + k * x->k_stride + r, dtype, bf16));
            }
        }
}

VEC_FN void pack_strided(const gemm_operand *x, int64_t count, int64_t depth, int64_t width, float *panels) {
    for (int64_t base = 0; base < count; base += width, panels += panel_size(width, depth))
        for (int64_t k = 0; k < depth; k++)
            for (int64_t r = 0; r < width; r++)
                panels[k * width + r] = element_rounded(x, MIN(base + r, x->count - 1), k);
}

VEC_FN void pack_a(const gemm_operand *x, int64_t count, int64_t depth, float *panels) {
    if (x->k_stride == 1)
        FOR_DTYPE(x, pack_along_k, count, depth, MR, panels);
    else if (x->stride == 1)
        FOR_DTYPE(x, pack_along_rows, count, depth, MR, panels);
    else
        pack_strided(x, count, depth, MR, panels);
}

VEC_FN void pack_b(const gemm_operand *x, int64_t count, int64_t depth, float *panels) {
    if (x->k_stride == 1)
        FOR_DTYPE(x, pack_along_k, count, depth, NR, panels);
    else if (x->stride == 1)
        FOR_DTYPE(x, pack_along_rows, count, depth, NR, panels);
    else
        pack_strided(x, count, depth, NR, panels);
}

/* ---- Register tile ---- */

VEC_INLINE vf scaled(vf sum, const gemm_out *out, int64_t i, int64_t j, int32_t dtype) {
    if (out->beta == 0.0f)
        return vf_mul(vf_set1(out->alpha), sum);
    return vf_fma(vf_set1(out->alpha), sum, vf_load_as(out->c, i * out->row_stride + j, dtype));
}

/* Vector j of row i of a tile that lies within C. grad: C is F32 and out says whether to stream and to sum up squares. */
VEC_INLINE vf store_vector(vf sum, const gemm_out *out, int64_t i, int64_t j, int32_t dtype, bool grad, vf squares) {
    vf x = scaled(sum, out, i, j * VL, dtype);
    if (grad)
        squares = vf_fma(x, x, squares);
    if (grad && out->stream)
        vf_stream((float *)out->c + i * out->row_stride + j * VL, x);
    else
        vf_store_as(out->c, i * out->row_stride + j * VL, dtype, x);
    return squares;
}

VEC_INLINE vf store_row(const vf *sum, const gemm_out *out, int64_t i, int32_t dtype, bool grad, vf squares) {
    for (int j = 0; j < NV; j++)
        squares = store_vector(sum[j], out, i, j, dtype, grad, squares);
    return squares;
}

VEC_INLINE void store_whole(vf sum[MR][NV], const gemm_out *out, int32_t dtype, bool grad) {
    vf squares = vf_zero();
    for (int i = 0; i < MR; i++)
        squares = store_row(sum[i], out, i, dtype, grad, squares);
    if (grad)
        *out->squares = vf_sum(squares);
}

/* A tile at C's edge, or with C not contiguous along its rows: the arithmetic of store_whole on copies. */
VEC_FN void store_edge(const float *tile, const gemm_out *out) {
    float squares = 0.0f;
    for (int64_t i = 0; i < out->rows; i++)
        for (int64_t j = 0; j < out->cols; j += VL) {
            float old[VL] = {0};
            int64_t n = MIN(out->cols - j, VL), start = i * out->row_stride + j * out->col_stride;
            gemm_out row = {.alpha = out->alpha, .beta = out->beta, .c = old};
            for (int64_t l = 0; l < n && out->beta != 0.0f; l++)
                old[l] = element(out->c, start + l * out->col_stride, out->dtype);
            vf_store(old, scaled(vf_load(tile + i * NR + j), &row, 0, 0, ANERT_F32));
            for (int64_t l = 0; l < n; l++) {
                set_element(out->c, start + l * out->col_stride, out->dtype, old[l]);
                squares += old[l] * old[l];
            }
        }
    if (out->squares != NULL)
        *out->squares = squares;
}

VEC_INLINE bool is_edge(const gemm_out *out) { return out->rows < MR || out->cols < NR || out->col_stride != 1; }

VEC_INLINE void finish(vf sum[MR][NV], const gemm_out *out) {
    if (!out->first)
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++)
                sum[i][j] = vf_add(vf_load(out->sums + i * out->sums_stride + j * VL), sum[i][j]);
    if (!out->last) {
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++)
                vf_store(out->sums + i * out->sums_stride + j * VL, sum[i][j]);
    } else if (is_edge(out)) {
        float tile[MR * NR];
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++)
                vf_store(tile + i * NR + j * VL, sum[i][j]);
        store_edge(tile, out);
    } else if (out->squares != NULL) {
        store_whole(sum, out, ANERT_F32, true);
    } else if (out->dtype == ANERT_F32) {
        store_whole(sum, out, ANERT_F32, false);
    } else if (out->dtype == ANERT_F16) {
        store_whole(sum, out, ANERT_F16, false);
    } else {
        store_whole(sum, out, ANERT_BF16, false);
    }
}

/* What finish will read, asked for before the products begin. */
VEC_INLINE void prefetch(const gemm_out *out) {
    size_t size = dtype_size(out->dtype);
    for (int64_t i = 0; i < MR && !out->first; i++)
        for (int64_t j = 0; j < NR; j += 16)
            __builtin_prefetch(out->sums + i * out->sums_stride + j);
    for (int64_t i = 0; i < out->rows && out->last; i++)
        __builtin_prefetch((const char *)out->c + (size_t)(i * out->row_stride) * size);
}

VEC_FN void tile(int64_t words, const float *a, const float *b, const gemm_out *out) {
    vf sum[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++)
            sum[i][j] = vf_zero();
    prefetch(out);
    for (int64_t k = 0; k < words; k++, a += MR, b += NR) {
        vf right[NV];
        for (int j = 0; j < NV; j++)
            right[j] = vf_load(b + j * VL);
        for (int i = 0; i < MR; i++) {
            vf left = vf_set1(a[i]);
            for (int j = 0; j < NV; j++)
                sum[i][j] = vf_fma(left, right[j], sum[i][j]);
        }
    }
    finish(sum, out);
}

/* ---- One column ---- */

enum {
    LANES = 2 * VL,
    AHEAD = 8192 /* bytes: hardware prefetch stops at each page; weights that stream from memory come 1.3x as fast */
};

VEC_FN const float *column(const gemm_operand *x, int64_t k, float *copy) {
    if (x->dtype == ANERT_F32 && x->k_stride == 1 && !x->bf16)
        return x->data;
    for (int64_t i = 0; i < k; i++)
        copy[i] = element_rounded(x, 0, i);
    return copy;
}

/* Rows contiguous along k, two at a time, times `cols` columns that lie k apart. */
VEC_INLINE void dot_rows_by(int cols, const gemm_operand *w, int64_t rows, int64_t k, const float *x, float *sums, int32_t dtype,
                            bool bf16) {
    for (int64_t r = 0; r < rows; r += 2) {
        int64_t start[2] = {r * w->stride, MIN(r + 1, rows - 1) * w->stride}, i = 0;
        vf lanes[2][2][FEW_COLS];
        for (int c = 0; c < cols; c++)
            lanes[0][0][c] = lanes[0][1][c] = lanes[1][0][c] = lanes[1][1][c] = vf_zero();
        for (; i + LANES <= k; i += LANES)
            for (int j = 0; j < 2; j++) {
                __builtin_prefetch((const char *)w->data + (size_t)(start[j] + i) * dtype_size(dtype) + AHEAD, 0, 2);
                for (int h = 0; h < 2; h++) {
                    vf left = load_rounded(w->data, start[j] + i + h * VL, dtype, bf16);
                    for (int c = 0; c < cols; c++)
                        lanes[j][h][c] = vf_fma(left, vf_load(x + c * k + i + h * VL), lanes[j][h][c]);
                }
            }
        for (int h = 0; i < k; h++, i += VL) {
            int64_t n = MIN(k - i, VL);
            for (int j = 0; j < 2; j++) {
                vf left = n == VL ? vf_load_as(w->data, start[j] + i, dtype) : vf_load_part(w->data, start[j] + i, dtype, n);
                left = bf16 ? vf_round_bf16(left) : left;
                for (int c = 0; c < cols; c++) {
                    vf right = n == VL ? vf_load(x + c * k + i) : vf_load_part(x + c * k, i, ANERT_F32, n);
                    lanes[j][h][c] = vf_fma(left, right, lanes[j][h][c]);
                }
            }
        }
        for (int c = 0; c < cols; c++)
            for (int j = 0; j < 2; j++)
                sums[c * (rows + 64) + r + j] = vf_sum(vf_add(lanes[j][0][c], lanes[j][1][c]));
    }
}

VEC_INLINE void dot_rows(const gemm_operand *w, int64_t cols, int64_t rows, int64_t k, const float *x, float *sums, int32_t dtype,
                         bool bf16) {
    switch (cols) {
    case 1: dot_rows_by(1, w, rows, k, x, sums, dtype, bf16); break;
    case 2: dot_rows_by(2, w, rows, k, x, sums, dtype, bf16); break;
    case 3: dot_rows_by(3, w, rows, k, x, sums, dtype, bf16); break;
    default: dot_rows_by(FEW_COLS, w, rows, k, x, sums, dtype, bf16);
    }
}

enum { WIDE = 4 }; /* vectors of rows that add_columns takes at once */

/* Rows from `start` on, in vectors of VL: what lane `lane` of LANES running sums holds of w x. rest: rows in the last vector. */
VEC_INLINE void lane_sums(const gemm_operand *w, int64_t start, int64_t lane, int64_t k, const float *x, int vectors, int64_t rest,
                          vf *out, int32_t dtype, bool bf16) {
    for (int v = 0; v < vectors; v++)
        out[v] = vf_zero();
    for (int64_t i = lane; i < k; i += LANES) {
        int64_t at = i * w->k_stride + start;
        vf right = vf_set1(x[i]);
        for (int v = 0; v < vectors; v++) {
            bool whole = v + 1 < vectors || rest == VL;
            vf left = whole ? load_rounded(w->data, at + v * VL, dtype, bf16) : vf_load_part(w->data, at + v * VL, dtype, rest);
            out[v] = vf_fma(!whole && bf16 ? vf_round_bf16(left) : left, right, out[v]);
        }
    }
}

/* The lanes of dot_rows, each a vector of rows, and their sum by the same halves: lane l joins l + 16, these join l + 8, ... A
 * lane's sum is held until its other half is there. */
VEC_INLINE void add_lanes(const gemm_operand *w, int64_t start, int64_t k, const float *x, int vectors, int64_t rest, float *sums,
                          int32_t dtype, bool bf16) {
    vf held[8][WIDE], sum[WIDE];
    int depth = 0;
    for (int turn = 0; turn < LANES; turn++) {
        int lane = 0;
        for (int half = LANES / 2, bit = 1; half > 0; half /= 2, bit *= 2)
            lane += turn & bit ? half : 0;
        lane_sums(w, start, lane, k, x, vectors, rest, sum, dtype, bf16);
        for (int bits = turn; bits & 1; bits /= 2) {
            depth--;
            for (int v = 0; v < vectors; v++)
                sum[v] = vf_add(held[depth][v], sum[v]);
        }
        for (int v = 0; v < vectors; v++)
            held[depth][v] = sum[v];
        depth++;
    }
    for (int v = 0; v < vectors; v++)
        vf_store(sums + v * VL, held[0][v]);
}

/* Contiguous along the rows. `sums` has room for whole vectors. */
VEC_INLINE void add_columns(const gemm_operand *w, int64_t rows, int64_t k, const float *x, float *sums, int32_t dtype,
                            bool bf16) {
    int64_t r = 0;
    for (; r + WIDE * VL <= rows; r += WIDE * VL)
        add_lanes(w, r, k, x, WIDE, VL, sums + r, dtype, bf16);
    for (; r < rows; r += VL)
        add_lanes(w, r, k, x, 1, MIN(rows - r, VL), sums + r, dtype, bf16);
}

VEC_FN void dot_strided(const gemm_operand *w, int64_t rows, int64_t k, const float *x, float *sums) {
    for (int64_t r = 0; r < rows; r++) {
        float lanes[LANES] = {0};
        for (int64_t i = 0; i < k; i += LANES) {
            float left[LANES] = {0}, right[LANES] = {0};
            for (int64_t l = 0; l < MIN(k - i, LANES); l++) {
                left[l] = element_rounded(w, r, i + l);
                right[l] = x[i + l];
            }
            for (int h = 0; h < LANES; h += VL)
                vf_store(lanes + h, vf_fma(vf_load(left + h), vf_load(right + h), vf_load(lanes + h)));
        }
        sums[r] = vf_sum(vf_add(vf_load(lanes), vf_load(lanes + VL)));
    }
}

/* One vector of a row of C, `out` at its first element. */
VEC_INLINE void store_part(vf sum, const gemm_out *out) {
    switch (out->dtype) {
    case ANERT_F32: store_vector(sum, out, 0, 0, ANERT_F32, false, sum); return;
    case ANERT_F16: store_vector(sum, out, 0, 0, ANERT_F16, false, sum); return;
    default: store_vector(sum, out, 0, 0, ANERT_BF16, false, sum);
    }
}

VEC_INLINE void store_column(int64_t rows, float *sums, const gemm_out *out, int64_t col) {
    gemm_out part = *out;
    part.rows = 1;
    part.col_stride = out->row_stride; /* the column lies along a tile's row */
    for (int64_t r = 0; r < rows; r += VL) {
        part.cols = MIN(rows - r, VL);
        part.c = (char *)out->c + (size_t)(r * out->row_stride + col * out->col_stride) * dtype_size(out->dtype);
        if (part.cols == VL && part.col_stride == 1)
            store_part(vf_load(sums + r), &part);
        else
            store_edge(sums + r, &part);
    }
}

VEC_FN void matvec(const gemm_operand *w, int64_t rows, int64_t k, const float *x, float *sums, const gemm_out *out) {
    for (int64_t col = 0, cols; col < out->cols; col += cols, x += cols * k) {
        cols = w->k_stride == 1 ? MIN(out->cols - col, FEW_COLS) : 1;
        if (w->k_stride == 1)
            FOR_DTYPE(w, dot_rows, cols, rows, k, x, sums);
        else if (w->stride == 1)
            FOR_DTYPE(w, add_columns, rows, k, x, sums);
        else
            dot_strided(w, rows, k, x, sums);
        for (int64_t c = 0; c < cols; c++)
            store_column(rows, sums + c * (rows + 64), out, col + c);
    }
}
