/* anert.h: the C API of anert's native core, and the only declaration of it.
 *
 * cffi reads this file with its comments and # lines dropped (an #include "x.h" is replaced by x.h), so: plain C, no macros,
 * no attributes, no #if around declarations. Every fallible function returns an anert_status and takes an anert_error last; it may be NULL.
 * Nothing prints, nothing exits, nothing is global: state lives in the handles below. */
#ifndef ANERT_H
#define ANERT_H
#include <stddef.h>
#include <stdint.h>

#include "status.h"

/* ---- Element types and instruction sets ---- */
enum { ANERT_F32 = 0, ANERT_F16 = 1, ANERT_BF16 = 2, ANERT_I32 = 3, ANERT_U8 = 4, ANERT_I8 = 5, ANERT_Q8 = 6 };
enum {
    ANERT_ISA_AUTO = -1,
    ANERT_ISA_SCALAR = 0,
    ANERT_ISA_AVX2 = 1,       /* AVX2 + FMA + F16C */
    ANERT_ISA_AVX512 = 2,     /* AVX-512 F, BW, VL, DQ */
    ANERT_ISA_AVX512BF16 = 3, /* the same + vdpbf16ps */
    ANERT_ISA_NEON = 4,       /* aarch64 base */
    ANERT_ISA_AMX = 5,        /* AVX512BF16 + AMX tiles of bf16, for GEMMs of that precision */
    ANERT_ISA_BLAS = 6        /* the CPU's best, with a BLAS for large GEMMs: supported once one is open, never AUTO */
};
int32_t anert_isa_supported(int32_t isa); /* 1 if this build and this CPU have it */
const char *anert_isa_name(int32_t isa);  /* "avx2"; NULL for an unknown number */
/* Opens the library that ANERT_ISA_BLAS multiplies with, by its cblas_sgemm; it stays for the process. EUNAVAILABLE if it does
 * not open or multiply, ESTATE if another one is open. */
anert_status anert_blas_open(const char *path, anert_error *err);
const char *anert_blas_path(void); /* of the library that is open; NULL: none is */

/* ---- Pool: the threads and the instruction set that everything below computes with ----
 * n_threads counts the caller. Workers take tiles from an atomic counter, spin briefly, then sleep. One call at a time
 * computes on a pool; a second caller waits. */
typedef struct anert_pool anert_pool;
anert_status anert_pool_new(int32_t n_threads, int32_t isa, anert_pool **out, anert_error *err);
void anert_pool_free(anert_pool *pool); /* NULL is fine */
int32_t anert_pool_threads(const anert_pool *pool);
int32_t anert_pool_isa(const anert_pool *pool);

/* ---- Heap and Surface: zeroed memory that Python, the CPU engine and the ANE all see ----
 * A heap hands out surfaces from 2 MiB-aligned slabs (huge pages where the kernel grants them). Surfaces are aligned to
 * 16 KiB pages when that large, else to 64 bytes, and keep their slab alive: a heap may be freed before its surfaces. */
typedef struct anert_heap anert_heap;
typedef struct anert_surface anert_surface;
anert_status anert_heap_new(anert_heap **out, anert_error *err);
void anert_heap_free(anert_heap *heap);
size_t anert_heap_bytes(const anert_heap *heap); /* bytes mapped now */
anert_status anert_surface_new(anert_heap *heap, size_t nbytes, anert_surface **out, anert_error *err);
/* A surface over memory that is somebody else's, who keeps it as it is for as long as the surface lives: a mapped file. Any
 * alignment. No lock is had for writing (ESTATE), and its seed stays. */
anert_status anert_surface_over(const void *base, size_t nbytes, anert_surface **out, anert_error *err);
void anert_surface_free(anert_surface *surface);
void *anert_surface_base(const anert_surface *surface);
size_t anert_surface_size(const anert_surface *surface);
uint64_t anert_surface_seed(const anert_surface *surface); /* advances at each write-unlock and native write */
void anert_surface_touch(anert_surface *surface);          /* a native writer wrote: advance the seed */
/* read_only: 1 shared with other readers, 0 exclusive. ESTATE if a writer holds it (or, for a writer, anybody). */
anert_status anert_surface_lock(anert_surface *surface, int32_t read_only, anert_error *err);
anert_status anert_surface_unlock(anert_surface *surface, int32_t read_only, anert_error *err);
/* All n locks or none, as a run takes its surfaces: `reads` of them for reading, the rest for writing. ESTATE sets *which (may
 * be NULL) to the one that is held otherwise. release undoes hold: the seeds of those written advance. */
anert_status anert_surface_hold(anert_surface *const *surfaces, int32_t n, int32_t reads, int32_t *which,
                                anert_error *err);
void anert_surface_release(anert_surface *const *surfaces, int32_t n, int32_t reads);

/* ---- Pages of a mapped file, read where they lie ----
 * finite[i]: whether all of the i-th of `count` fp16 arrays is finite. Its pages are asked for in one call each, where the
 * system has one, so that no reader waits for them one by one. */
anert_status anert_f16_finite(anert_pool *pool, const uint16_t *const *x, const size_t *n, int32_t count, int32_t *finite,
                              anert_error *err);
/* Puts huge pages with the same bytes, to be read alone, in the place of all 2 MiB of [base, base + nbytes) that a map of a file
 * holds to be read alone; others may read meanwhile, none may write or unmap. *settled (may be NULL): bytes that were. ENOMEM or
 * ESYSTEM leaves all as it was; systems without mremap do nothing. */
anert_status anert_pages_settle(const void *base, size_t nbytes, size_t *settled, anert_error *err);
/* Infinities among n halves of a map become +-65504, in pages of our own in its place; the file stays. Nobody may read them
 * meanwhile. *clamped (may be NULL): how many there were. */
anert_status anert_pages_clamp(const uint16_t *x, size_t n, uint64_t *clamped, anert_error *err);

/* ---- fp16: round to nearest even, subnormals kept, NaN by the hardware rule (sign | 0x7e00 | payload >> 13) ----
 * clamp: 1 turns anything past +-65504 (inf too, not NaN) into +-65504 and sets *clamped (may be NULL) to how many.
 * Strides are in elements. The transposes read src as (rows, cols) with row stride src_stride and write dst as
 * (cols, rows) with row stride dst_stride. pool may be NULL: one thread, the best instruction set. */
anert_status anert_f32_to_f16(anert_pool *pool, const float *src, uint16_t *dst, size_t n, int32_t clamp,
                              uint64_t *clamped, anert_error *err);
anert_status anert_f16_to_f32(anert_pool *pool, const uint16_t *src, float *dst, size_t n, anert_error *err);
anert_status anert_f32_to_f16_2d(anert_pool *pool, const float *src, size_t src_stride, uint16_t *dst,
                                 size_t dst_stride, size_t rows, size_t cols, int32_t transpose, int32_t clamp,
                                 uint64_t *clamped, anert_error *err);
anert_status anert_f16_to_f32_2d(anert_pool *pool, const uint16_t *src, size_t src_stride, float *dst,
                                 size_t dst_stride, size_t rows, size_t cols, int32_t transpose, anert_error *err);

/* ---- GEMM: C = beta * C + alpha * A B, A (m, k), B (k, n), batched, any strides (elements), fp32 accumulation ----
 * precision: F32, or BF16 (operands rounded to bf16 to nearest even, products and sums in fp32). Operands and C may be
 * F32, F16 or BF16. beta is 0 (C is not read) or 1. bias: NULL, or per row of C (bias_stride rows) fp32. Bits depend on
 * the instruction set, precision and the logical k alone: never on strides, dtype of equal values, or threads. With BLAS also
 * on whether m and n both reach 32: below, the CPU's own best instruction set computes. */
typedef struct {
    void *data;
    int32_t dtype;
    int64_t row_stride, col_stride, batch_stride;
} anert_matrix;
anert_status anert_gemm(anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k,
                        float alpha, anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err);
/* A weight's gradient, dw = beta dw + alpha A B, dw (m, n) fp32 contiguous. *squares is the sum of squares of dw as written,
 * the same for every number of threads; inf or NaN if dw holds one (or magnitudes past 1e19). Large gradients go past the
 * caches, which will not keep them until the optimizer comes. */
anert_status anert_gemm_grad(anert_pool *pool, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha, anert_matrix a,
                             anert_matrix b, float beta, float *dw, double *squares, anert_error *err);

/* ---- int8 weights (Q8): (rows, cols) in groups of 32 columns that share a scale; quant.c has the layout ----
 * C = beta C + alpha A B with A encoded: a single column of B is quantised too, by groups of 32; several are not. Bits do
 * not depend on the instruction set or the threads. */
size_t anert_q8_bytes(int64_t rows, int64_t cols); /* of an encoded matrix; 0 if cols is no multiple of 32 */
anert_status anert_q8_encode(anert_pool *pool, const float *src, int64_t rows, int64_t cols, uint8_t *dst,
                             anert_error *err);
anert_status anert_q8_gemm(anert_pool *pool, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha,
                           const uint8_t *a, anert_matrix b, float beta, anert_matrix c, anert_error *err);

/* ---- Optimizer: one fused pass over a Param ---- */
/* Where an fp16 copy of a Param (rows, cols) lives: element (r, c) goes to base[r * row_stride + c * col_stride],
 * repeated `broadcast` times at stride 1 (a norm gain wired to a legal width; 1 for matrices). */
typedef struct {
    uint16_t *base;
    int64_t row_stride, col_stride;
    int32_t broadcast;
    anert_surface *surface; /* whose seed advances; NULL: nobody's */
} anert_placement;
typedef struct {
    double lr, beta1, beta2, eps, weight_decay; /* double: 1 - 0.999f is off by 1e-5 */
    double bias1, bias2; /* 1 - beta1^t, 1 - beta2^t */
    double grad_scale;   /* multiplies the gradient: clip factor over accumulation */
} anert_adamw_args;
/* A Param: its weights, in training what an optimizer reads and writes beside them, and where its copies lie. */
typedef struct {
    float *master;          /* fp32 (rows, cols), and so are m, v and grad */
    const uint16_t *halves; /* the weights, where master is NULL; optimizers want a master */
    float *m, *v;
    const float *grad;
    int64_t rows, cols;
    int32_t decays; /* whether weight decay applies */
    int32_t n_placements;
    const anert_placement *placements;
    uint8_t *encoded; /* NULL, or a copy by anert_q8_encode, which a sync writes and an optimizer does not */
} anert_param;
/* AdamW (Loshchilov & Hutter 2019) of some Params: reads grad, updates m, v and master, then writes every placement, clamped
 * to +-65504; *clamped (may be NULL) is set to the number of weights that were past it. Nothing is written unless all
 * Params can be. */
anert_status anert_adamw(anert_pool *pool, const anert_param *params, int64_t n, anert_adamw_args args, uint64_t *clamped,
                         anert_error *err);
/* Lion (Chen et al. 2023): sign of the interpolated momentum; v, bias1, bias2 and eps unused. */
anert_status anert_lion(anert_pool *pool, const anert_param *params, int64_t n, anert_adamw_args args, uint64_t *clamped,
                        anert_error *err);
/* Write master to its placements and nothing else: the weight sync of a load or an init. */
anert_status anert_param_sync(anert_pool *pool, const float *master, int64_t rows, int64_t cols,
                              const anert_placement *placements, int32_t n_placements, uint64_t *clamped,
                              anert_error *err);
/* anert_param_sync of many, in one call. */
anert_status anert_params_sync(anert_pool *pool, const anert_param *params, int64_t n, uint64_t *clamped, anert_error *err);
/* Sum of squares in float64 by fixed chunks, thread-count independent; *finite is 0 if any value is inf or NaN. */
anert_status anert_sum_squares(anert_pool *pool, const float *x, size_t n, double *out, int32_t *finite,
                               anert_error *err);
/* Sum of squares of the gradients of n Params, in their order. squares[i] is that of one, where it is known: finite; each is NaN
 * afterwards. *total is inf or NaN if a gradient holds one. */
anert_status anert_grad_squares(anert_pool *pool, const anert_param *params, int64_t n, double *squares, double *total,
                                anert_error *err);
/* Largest magnitude of an fp16 array (inf counts, NaN does not) and whether all are finite. */
anert_status anert_f16_amax(anert_pool *pool, const uint16_t *x, size_t n, float *amax, int32_t *finite,
                            anert_error *err);
/* Gradient recipes that are not GEMMs; tap and cot are (c, n) fp16 with row strides, dw is fp32 and added to.
 * rowsum: dw[c] += alpha * sum_n tap[c, n] * cot[c, n] (tap.data NULL: 1). add: dw[r, c] += alpha * cot[r, c]. */
anert_status anert_rowsum(anert_pool *pool, float alpha, const uint16_t *tap, int64_t tap_stride, const uint16_t *cot,
                          int64_t cot_stride, int64_t c, int64_t n, float *dw, anert_error *err);
anert_status anert_accumulate(anert_pool *pool, float alpha, const uint16_t *cot, int64_t row_stride,
                              int64_t col_stride, int64_t rows, int64_t cols, float *dw, anert_error *err);
/* A weight's gradient as a record, made by the call of its kind: dw (m, n) out of k positions. Gemm: a (m, k), b (k, n), *squares
 * as written (NULL: nobody asks). Rowsum: tap a (NULL: ones) and cot b, (m, k), n is 1. Add: cot b (m, n). Where `first` and
 * the step is fresh, dw is set, whatever it held; else it is added to. */
enum { ANERT_GRAD_GEMM = 0, ANERT_GRAD_ROWSUM = 1, ANERT_GRAD_ADD = 2 };
typedef struct {
    int32_t kind, precision, first;
    int64_t m, n, k;
    anert_matrix a, b;
    float *dw;
    double *squares;
} anert_gradient;
anert_status anert_gradient_run(anert_pool *pool, const anert_gradient *gradient, float alpha, int32_t fresh, anert_error *err);

/* ---- Head: embedding, final norm, classifier, cross-entropy and their backward, outside MIL ----
 * x is (dim, n) fp16 with row stride x_stride: column t is position t. Token ids are int32 in [0, vocab). */
/* x[:, t] = table[token[t], :]; table (vocab, dim) fp16. EINVAL names the first id that is out of range. */
anert_status anert_embed(anert_pool *pool, const uint16_t *table, int64_t vocab, int64_t dim, const int32_t *tokens,
                         int64_t n, uint16_t *x, int64_t x_stride, anert_error *err);
/* dtable[token[t], :] += alpha * dx[:, t], in token order; change: by how much its sum of squares grows. */
anert_status anert_embed_backward(anert_pool *pool, float alpha, const uint16_t *dx, int64_t dx_stride,
                                  const int32_t *tokens, int64_t n, int64_t vocab, int64_t dim, float *dtable,
                                  double *change, anert_error *err);
typedef struct {
    int64_t vocab, dim, n;     /* n positions */
    float norm_eps;            /* RMSNorm: x * rsqrt(mean(x^2) + eps) * gain */
    int32_t precision;         /* of the classifier's GEMMs: ANERT_F32 or ANERT_BF16 */
    const uint16_t *x;         /* (dim, n) fp16, the residual stream */
    int64_t x_stride;
    const float *gain;         /* (dim) final norm gain; NULL: no norm */
    const uint16_t *table;     /* (vocab, dim) fp16 classifier, row stride dim */
    const uint8_t *table_q8;   /* the same encoded, read by anert_head_logits in its place; NULL: none */
    const int32_t *targets;    /* (n); -1 is ignored */
    float loss_scale;          /* dx comes out multiplied by it */
    float grad_alpha;          /* dtable and dgain are added alpha * d(mean loss): no loss scale inside */
    uint16_t *dx;              /* (dim, n) fp16 out, or NULL: loss alone */
    int64_t dx_stride;
    float *dgain;              /* (dim) fp32, added to; may be NULL */
    float *dtable;             /* (vocab, dim) fp32, may be NULL: set if table_beta is 0, added to if it is 1 */
    float table_beta;
    double table_squares;      /* out: sum of squares of dtable as written */
    void *scratch;             /* anert_head_scratch bytes, 64-byte aligned */
} anert_head_args;
size_t anert_head_scratch(int64_t vocab, int64_t dim, int64_t n, int32_t threads);
/* *loss: mean cross-entropy over targets >= 0, in nats (float64 sum in position order); *count: how many they are. */
anert_status anert_head_loss(anert_pool *pool, anert_head_args *args, double *loss, int64_t *count,
                             anert_error *err);
/* logits (n_out, vocab) fp32 of the positions columns[0..n_out). */
anert_status anert_head_logits(anert_pool *pool, const anert_head_args *args, const int32_t *columns, int64_t n_out,
                               float *logits, anert_error *err);

/* ---- Plan: what the CPU engine runs. Built by anert/backend, validated in full by anert_plan_new ----
 * A plan is a list of steps over buffers. Buffer 0 is the arena (interior values), the others are constants and ports,
 * whose addresses each run brings. A view places a step's index space in a buffer: element (i0, i1, ...) is at
 * offset + sum(i_d * strides[d]), in elements of its dtype. No step of a valid plan touches memory outside its buffers. */
enum { ANERT_DIMS = 6 };
typedef struct {
    int64_t nbytes;
    int32_t writable;
} anert_buffer;
typedef struct {
    int32_t buffer; /* -1: scratch of the running tile; -2: scratch of the running place of a region */
    int32_t dtype;
    int64_t offset;
    int64_t strides[6];
    int64_t loops[4]; /* strides of the enclosing region's loops: three batch dims, query row; else 0 */
} anert_view;

/* Tile programs: instructions over registers of fp32 (int32 for I32_*) lanes. A register varies over the lanes (bit 0 of
 * `kind`), over the rows (bit 1), both or neither. Truth is 1.0 or 0.0. Operand -1 - i is register-less: -1 reads imm. */
enum {
    ANERT_TILE_LOAD, ANERT_TILE_STORE, ANERT_TILE_MOV, /* MOV: also fills from imm */
    ANERT_TILE_ADD, ANERT_TILE_SUB, ANERT_TILE_MUL, ANERT_TILE_DIV, ANERT_TILE_MAX, ANERT_TILE_MIN, ANERT_TILE_POW,
    ANERT_TILE_MOD, ANERT_TILE_EQ, ANERT_TILE_NE, ANERT_TILE_LT, ANERT_TILE_LE, ANERT_TILE_SELECT,
    ANERT_TILE_ABS, ANERT_TILE_SQRT, ANERT_TILE_RSQRT, ANERT_TILE_EXP, ANERT_TILE_LOG, ANERT_TILE_TANH,
    ANERT_TILE_SIGMOID, ANERT_TILE_ERF, ANERT_TILE_SIN, ANERT_TILE_COS, ANERT_TILE_TAN, ANERT_TILE_ASIN,
    ANERT_TILE_ACOS, ANERT_TILE_ATAN, ANERT_TILE_SINH, ANERT_TILE_COSH, ANERT_TILE_ATANH, ANERT_TILE_FLOOR,
    ANERT_TILE_CEIL, ANERT_TILE_ROUND, ANERT_TILE_TRUNC, ANERT_TILE_SIGN,
    ANERT_TILE_HALF,      /* round to fp16; past imm (65504 or less) is inf and adds to the counter */
    ANERT_TILE_TO_F32, ANERT_TILE_TO_I32, /* int32 lanes -> fp32, fp32 -> int32 toward zero */
    ANERT_TILE_I32_ADD, ANERT_TILE_I32_SUB, ANERT_TILE_I32_MUL, ANERT_TILE_I32_DIV, ANERT_TILE_I32_MOD,
    ANERT_TILE_I32_MAX, ANERT_TILE_I32_MIN, ANERT_TILE_I32_EQ, ANERT_TILE_I32_LT, ANERT_TILE_I32_LE,
    ANERT_TILE_SUM, ANERT_TILE_RMAX, ANERT_TILE_RMIN, /* over the reduced dims; ready after its pass */
    ANERT_TILE_OPS
};
typedef struct {
    int32_t op, kind;
    int32_t pass;  /* 2 p: for every chunk of pass p; 2 p + 1: once, after pass p, over registers that do not reduce */
    int32_t dst, a, b, c; /* registers; -1: imm */
    int32_t view;  /* of LOAD and STORE; STORE's source is a */
    int32_t counter; /* of HALF; -1: none */
    float imm;     /* its bits are an int32 in I32_* */
} anert_instr;

/* Steps. `args` by kind, indices along an axis are checked when the step runs:
 * TILE      dims: the space, rows and lanes last; reduced: bit d set where dim d is reduced; args: passes, registers,
 *           rows a chunk, lanes a chunk. views and instrs are ranges.
 * GEMM      dims: batch, batch, m, n, k; views a (batch, batch, m, k), b (batch, batch, k, n), c (batch, batch, m, n), and
 *           if there are four, bias (m). alpha, beta, precision as in anert_gemm. a may be Q8, a whole buffer, without batch.
 * GATHER    dims: the box of y; views y, x (stride 0 where only the index moves it), indices int32; element i of y is element i of
 *           x plus index * args[1], the gathered axis' stride; its extent is args[0]. A negative index counts from the end.
 * SCATTER   dims: the box of updates; views y, updates, indices; args[0], args[1] of y's axis; args[2]: ANERT_SCATTER_*. In
 *           row-major order, so repeats have an order too.
 * ARG       dims: the box of x, the axis last; views y int32, x; args[0]: 1 largest, 0 smallest; the first of equals.
 * IM2COL    dims: batch, channels, kernel h, kernel w, out h, out w; views y (6 dims), x (batch, channels, -, -, h, w); args: stride
 *           h, w, dilation h, w, pad top, left, input h, w. Outside the input is 0.
 * REGION    the next args[1] steps, TILE and GEMM, run for every place of dims 0 to 2 (batch) and every block of args[0] rows
 *           of dim 3 (queries), last block first, on thread-private scratch of args[4] bytes: attention without a (T, T)
 *           matrix in memory. Dim 4 is the keys; args[2]: 1 if rows [q, q + n) need the keys [0, q + n + args[3]) alone.
 *           args[5]: 1 if blocks are independent of each other. In its tile programs rows are queries and lanes keys; its
 *           GEMMs say in args[0] and args[1] which of m, n, k (0, 1, 2; -1 none) is the query and the key, and in args[2]
 *           whether blocks add up in C.
 * COL2IM    the adjoint: dims as IM2COL; views y the columns, x the image, which is set to the sum of its columns. */
enum {
    ANERT_STEP_TILE, ANERT_STEP_GEMM, ANERT_STEP_GATHER, ANERT_STEP_SCATTER, ANERT_STEP_ARG, ANERT_STEP_IM2COL,
    ANERT_STEP_COL2IM, ANERT_STEP_REGION, ANERT_STEP_KINDS
};
enum {
    ANERT_SCATTER_UPDATE, ANERT_SCATTER_ADD, ANERT_SCATTER_SUB, ANERT_SCATTER_MUL, ANERT_SCATTER_DIV, ANERT_SCATTER_MAX,
    ANERT_SCATTER_MIN
};
typedef struct {
    int32_t kind, reduced;
    int64_t dims[6];
    int64_t args[8];
    int32_t first_view, n_views, first_instr, n_instrs;
    float alpha, beta;
    int32_t precision;
} anert_step;
typedef struct {
    const anert_buffer *buffers;
    const anert_view *views;
    const anert_instr *instrs;
    const anert_step *steps;
    int32_t n_buffers, n_views, n_instrs, n_steps, n_counters;
} anert_plan_def;
typedef struct anert_plan anert_plan;
/* Copies def and checks it: EINVAL names the step. */
anert_status anert_plan_new(const anert_plan_def *def, anert_plan **out, anert_error *err);
void anert_plan_free(anert_plan *plan); /* NULL is fine */
/* Runs all steps. bases[i] is the address of buffer i; bases[0] is ignored, the arena is given apart. Nothing is allocated
 * beyond the pool's scratch, which grows once. Re-entrant for different bases and arenas. */
anert_status anert_plan_run(const anert_plan *plan, anert_pool *pool, void *const *bases, int32_t n_bases, void *arena,
                            anert_error *err);
/* What follows each other, in one call: plans, each on its bases and all in the same arena, and gradients. */
typedef struct {
    const anert_plan *plan; /* NULL: a gradient */
    void *const *bases;
    int32_t n_bases, part;
    const anert_gradient *gradient;
} anert_link;
/* alpha and fresh: of the gradients. ms: NULL, or ms[part] gains the time that the links of that part took. */
anert_status anert_chain_run(const anert_link *links, int32_t n_links, anert_pool *pool, void *arena, float alpha, int32_t fresh,
                             double *ms, anert_error *err);
/* Columns [from, from + count) of src (rows, src_cols) fp16 become columns [to, to + count) of dst (rows, dst_cols), for each of
 * n: new keys and values into their cache, rotations out of their table. Strides of rows are in elements. pool: NULL, or whose
 * threads share the rows. */
typedef struct {
    const uint16_t *src;
    uint16_t *dst;
    int64_t rows, src_cols, dst_cols, src_stride, dst_stride;
} anert_columns;
anert_status anert_columns_move(anert_pool *pool, const anert_columns *columns, int32_t n, int64_t from, int64_t to, int64_t count,
                                anert_error *err);
/* New positions of a model in one call: embeddings into x, rotations out of their tables, all blocks, keys and values into their
 * caches, logits of the last position. Its parts check what they are given. */
typedef struct {
    anert_pool *pool;
    const uint16_t *table; /* (vocab, dim) */
    int64_t vocab, dim, n; /* n: positions of the programs */
    const int32_t *tokens; /* (n) */
    uint16_t *x;           /* (dim, n), rows x_stride apart */
    int64_t x_stride;
    const anert_columns *before, *after;
    const anert_link *links;
    anert_surface *const *touched; /* whose seeds advance */
    int32_t n_before, n_after, n_links, n_touched;
    const anert_head_args *head;
} anert_positions;
/* `count` of them follow the `at` that are cached; logits (vocab): NULL if nobody wants them. */
anert_status anert_positions_run(const anert_positions *p, void *arena, int64_t at, int64_t count, float *logits,
                                 anert_error *err);
/* How many values counter i saw overflow fp16 since the plan was made; reset sets it to 0. */
uint64_t anert_plan_counter(anert_plan *plan, int32_t i, int32_t reset);
#endif
