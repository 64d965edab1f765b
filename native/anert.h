/* anert.h: the C API of anert's native core, and the only declaration of it.
 *
 * cffi reads this file with its comments and # lines dropped, so: plain C, no macros, no attributes, no #if around
 * declarations. Every fallible function returns an anert_status and takes an anert_error last; it may be NULL.
 * Nothing prints, nothing exits, nothing is global: state lives in the handles below. */
#ifndef ANERT_H
#define ANERT_H
#include <stddef.h>
#include <stdint.h>

/* ---- Errors: 0 is success. `message` is one line, NUL-terminated. ---- */
typedef int32_t anert_status;
enum {
    ANERT_OK = 0,
    ANERT_EINVAL = -1,       /* an argument is out of range or inconsistent */
    ANERT_ENOMEM = -2,       /* memory was not granted */
    ANERT_ESTATE = -3,       /* right call, wrong moment: locked, busy, released */
    ANERT_EUNSUPPORTED = -4, /* this CPU or build cannot do it */
    ANERT_ESYSTEM = -5       /* a system call failed */
};
typedef struct {
    int32_t status;
    char message[508];
} anert_error;

/* ---- Element types and instruction sets ---- */
enum { ANERT_F32 = 0, ANERT_F16 = 1, ANERT_BF16 = 2, ANERT_I32 = 3, ANERT_U8 = 4, ANERT_I8 = 5 };
enum {
    ANERT_ISA_AUTO = -1,
    ANERT_ISA_SCALAR = 0,
    ANERT_ISA_AVX2 = 1,       /* AVX2 + FMA + F16C */
    ANERT_ISA_AVX512 = 2,     /* AVX-512 F, BW, VL, DQ */
    ANERT_ISA_AVX512BF16 = 3, /* the same + vdpbf16ps */
    ANERT_ISA_NEON = 4        /* aarch64 base */
};
int32_t anert_isa_supported(int32_t isa); /* 1 if this build and this CPU have it */
const char *anert_isa_name(int32_t isa);  /* "avx2"; NULL for an unknown number */

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
void anert_surface_free(anert_surface *surface);
void *anert_surface_base(const anert_surface *surface);
size_t anert_surface_size(const anert_surface *surface);
uint64_t anert_surface_seed(const anert_surface *surface); /* advances at each write-unlock and native write */
void anert_surface_touch(anert_surface *surface);          /* a native writer wrote: advance the seed */
/* read_only: 1 shared with other readers, 0 exclusive. ESTATE if a writer holds it (or, for a writer, anybody). */
anert_status anert_surface_lock(anert_surface *surface, int32_t read_only, anert_error *err);
anert_status anert_surface_unlock(anert_surface *surface, int32_t read_only, anert_error *err);

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
 * the instruction set, precision and the logical k alone: never on strides, dtype of equal values, or threads. */
typedef struct {
    void *data;
    int32_t dtype;
    int64_t row_stride, col_stride, batch_stride;
} anert_matrix;
anert_status anert_gemm(anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k,
                        float alpha, anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err);

/* ---- Optimizer: one fused pass over a Param ---- */
/* Where an fp16 copy of a Param (rows, cols) lives: element (r, c) goes to base[r * row_stride + c * col_stride],
 * repeated `broadcast` times at stride 1 (a norm gain wired to a legal width; 1 for matrices). */
typedef struct {
    uint16_t *base;
    int64_t row_stride, col_stride;
    int32_t broadcast;
} anert_placement;
typedef struct {
    float lr, beta1, beta2, eps, weight_decay;
    float bias1, bias2;  /* 1 - beta1^t, 1 - beta2^t */
    float grad_scale;    /* multiplies the gradient: clip factor over accumulation */
} anert_adamw_args;
/* AdamW (Loshchilov & Hutter 2019): reads grad, updates m, v and master (fp32, rows*cols each), then writes every
 * placement, clamped to +-65504; *clamped (may be NULL) is set to the number of weights that were past it. */
anert_status anert_adamw(anert_pool *pool, float *master, float *m, float *v, const float *grad, int64_t rows,
                         int64_t cols, anert_adamw_args args, const anert_placement *placements, int32_t n_placements,
                         uint64_t *clamped, anert_error *err);
/* Lion (Chen et al. 2023): sign of the interpolated momentum; bias1, bias2, eps unused. */
anert_status anert_lion(anert_pool *pool, float *master, float *m, const float *grad, int64_t rows, int64_t cols,
                        anert_adamw_args args, const anert_placement *placements, int32_t n_placements,
                        uint64_t *clamped, anert_error *err);
/* Write master to its placements and nothing else: the weight sync of a load or an init. */
anert_status anert_param_sync(anert_pool *pool, const float *master, int64_t rows, int64_t cols,
                              const anert_placement *placements, int32_t n_placements, uint64_t *clamped,
                              anert_error *err);
/* Sum of squares in float64 by fixed chunks, thread-count independent; *finite is 0 if any value is inf or NaN. */
anert_status anert_sum_squares(anert_pool *pool, const float *x, size_t n, double *out, int32_t *finite,
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

/* ---- Head: embedding, final norm, classifier, cross-entropy and their backward, outside MIL ----
 * x is (dim, n) fp16 with row stride x_stride: column t is position t. Token ids are int32 in [0, vocab). */
/* x[:, t] = table[token[t], :]; table (vocab, dim) fp16. EINVAL names the first id that is out of range. */
anert_status anert_embed(anert_pool *pool, const uint16_t *table, int64_t vocab, int64_t dim, const int32_t *tokens,
                         int64_t n, uint16_t *x, int64_t x_stride, anert_error *err);
/* dtable[token[t], :] += alpha * dx[:, t], in token order. */
anert_status anert_embed_backward(anert_pool *pool, float alpha, const uint16_t *dx, int64_t dx_stride,
                                  const int32_t *tokens, int64_t n, int64_t vocab, int64_t dim, float *dtable,
                                  anert_error *err);
typedef struct {
    int64_t vocab, dim, n;     /* n positions */
    float norm_eps;            /* RMSNorm: x * rsqrt(mean(x^2) + eps) * gain */
    int32_t precision;         /* of the classifier's GEMMs: ANERT_F32 or ANERT_BF16 */
    const uint16_t *x;         /* (dim, n) fp16, the residual stream */
    int64_t x_stride;
    const float *gain;         /* (dim) final norm gain; NULL: no norm */
    const uint16_t *table;     /* (vocab, dim) fp16 classifier, row stride dim */
    const int32_t *targets;    /* (n); -1 is ignored */
    float loss_scale;          /* dx comes out multiplied by it */
    float grad_alpha;          /* dtable and dgain are added alpha * d(mean loss): no loss scale inside */
    uint16_t *dx;              /* (dim, n) fp16 out, or NULL: loss alone */
    int64_t dx_stride;
    float *dgain;              /* (dim) fp32, added to; may be NULL */
    float *dtable;             /* (vocab, dim) fp32, added to; may be NULL */
    void *scratch;             /* anert_head_scratch bytes, 64-byte aligned */
} anert_head_args;
size_t anert_head_scratch(int64_t vocab, int64_t dim, int64_t n, int32_t threads);
/* *loss: mean cross-entropy over targets >= 0, in nats (float64 sum in position order); *count: how many they are. */
anert_status anert_head_loss(anert_pool *pool, const anert_head_args *args, double *loss, int64_t *count,
                             anert_error *err);
/* logits (n_out, vocab) fp32 of the positions columns[0..n_out). */
anert_status anert_head_logits(anert_pool *pool, const anert_head_args *args, const int32_t *columns, int64_t n_out,
                               float *logits, anert_error *err);
#endif
