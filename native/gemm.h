/* gemm.h: what gemm.c asks of an instruction set. Each gemm_<isa>.c defines its kernels from gemm_kernel.h.
 *
 * One definition of the result for all of them. k is cut into blocks of equal depth, as few as kc allows. Within a block
 * an element's products are added one by one in order of k, the blocks' sums are then added in order. So the bits of C
 * depend on the kernel and k alone. A column, or a few, are added differently, see matvec. */
#ifndef ANERT_GEMM_H
#define ANERT_GEMM_H
#include "internal.h"

/* An operand from one element on: `count` rows (of A) or columns (of B), each `k_stride` along the contraction. */
typedef struct {
    const void *data;
    int32_t dtype;
    bool bf16; /* round to bf16 */
    int64_t count, stride, k_stride;
} gemm_operand;

/* Memory that a later block of A will be packed from: `runs` runs of `bytes`, `stride` apart. A kernel faster than memory asks
 * for `per_step` lines of it in every step of k. */
typedef struct {
    const char *run;
    int64_t runs, bytes, stride, at; /* at: within the run */
    int64_t per_step;
} gemm_ahead;

typedef struct gemm_between gemm_between;

/* Where a register tile of C goes. sums: fp32 partial sums of whole tiles, used unless one block covers k. */
typedef struct {
    float *sums;
    int64_t sums_stride;
    bool first, last; /* is this the first, the last block of k */
    float alpha, beta;
    void *c;
    int32_t dtype;
    int64_t row_stride, col_stride, rows, cols; /* of C, and how much of the tile lies inside it */
    float *squares; /* NULL, or where the sum of squares of the tile's part of C goes (C is F32) */
    gemm_between *between;
    float *product; /* of gemm_kernel.product words, aligned to 64 bytes */
    bool stream;    /* C is written past the caches: F32, aligned to 64 bytes, beta 0 */
} gemm_out;

/* What a kernel whose products leave the vector units idle does between them, some of it in every step of k: it packs the next
 * block of A, stores the register tile before this one, and asks for the memory of the block of A after the next. */
struct gemm_between {
    gemm_operand x; /* `count` rows of it, `depth` deep, become panels */
    int64_t count, depth;
    float *panels;
    int64_t pieces, per_step; /* left to pack, and of them in every step of k */
    int64_t row, word;        /* of the next piece */
    gemm_ahead ahead;
    gemm_out late; /* a register tile in late.product, whose first `stored` rows are in C */
    int64_t stored;
};

enum { FEW_COLS = 4 };

/* 32-bit words of a panel. The slack takes what a vector store writes past the panel's last row. */
static inline int64_t panel_size(int64_t width, int64_t words) { return width * words + 16; }

typedef struct {
    int32_t mr, nr; /* register tile: rows of A, columns of B */
    int32_t kc;     /* deepest block of k */
    int32_t pair;   /* elements of k in a 32-bit word of a panel */
    int32_t step;   /* a panel's words come in multiples of it, zeros at the end */
    int32_t product; /* fp32 words of scratch that a tile wants, a multiple of 16 */
    /* Packs x's first `count` rows, `depth` deep, into panels of mr or nr rows: panel, k, row (pack_a of AMX: panel, 16
     * words of k, row, k). Reads nothing outside x. Rows past the end of x are arbitrary numbers: what they yield lies
     * outside C. */
    void (*pack_a)(const gemm_operand *x, int64_t count, int64_t depth, float *panels);
    void (*pack_b)(const gemm_operand *x, int64_t count, int64_t depth, float *panels);
    /* One register tile from a panel of A and a panel of B, `words` deep. */
    void (*tile)(int64_t words, const float *a, const float *b, const gemm_out *out);
    /* C = beta C + alpha w x for `rows` rows of w and out->cols columns, one behind the other: 2 VL running sums per row and
     * column, element k into sum k mod 2 VL, added up by halves; the same bits at any strides and beside any other column.
     * w that is contiguous along k is read once for FEW_COLS of them. sums: (FEW_COLS, rows + 64). x: fp32, rounded already. */
    void (*matvec)(const gemm_operand *w, int64_t rows, int64_t k, const float *x, float *sums, const gemm_out *out);
    /* The k elements of a column as contiguous fp32: x itself, or a copy in `copy`. */
    const float *(*column)(const gemm_operand *x, int64_t k, float *copy);
    /* Around the tiles of a task, on its thread: begin may be NULL, end makes streamed stores visible. matvec and column are
     * NULL where small products are another kernel's. */
    void (*begin)(void);
    void (*end)(void);
    /* NULL, or of a kernel that uses gemm_between: in how many pieces it can pack a block of A, 0 for one that pack_a must take
     * whole; and what is left of pieces and of a late tile. Its panels of A stay in L1 while those of B stream from L2. */
    int64_t (*pieces)(const gemm_operand *x, int64_t count, int64_t depth);
    void (*drain)(gemm_between *between);
} gemm_kernel;

/* Of a call of anert_gemm: sizes, strides, NULLs, a C that overlaps itself. */
anert_status anert_gemm_check(anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k, float alpha,
                              anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err);

extern const gemm_kernel anert_gemm_scalar, anert_gemm_blas_scalar;
#if defined(__x86_64__) || defined(VEC_EMULATED)
extern const gemm_kernel anert_gemm_avx2, anert_gemm_avx512, anert_gemm_avx512bf16;
extern const gemm_kernel anert_gemm_blas_avx2, anert_gemm_blas_avx512;
#endif
#if defined(ANERT_HAS_AMX)
extern const gemm_kernel anert_gemm_amx;
#endif
#if defined(__aarch64__) || defined(VEC_EMULATED)
extern const gemm_kernel anert_gemm_neon, anert_gemm_blas_neon;
#endif
#endif
