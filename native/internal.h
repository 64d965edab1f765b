/* internal.h: what the core's C files share with each other and with nobody else. */
#ifndef ANERT_INTERNAL_H
#define ANERT_INTERNAL_H
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "anert.h"

/* AMX needs the kernel's permission, which Linux grants by arch_prctl. */
#if defined(__x86_64__) && defined(__linux__) && !defined(VEC_EMULATED)
#define ANERT_HAS_AMX
#endif
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(x, m) (((x) + (m) - 1) / (m) * (m))
/* Compiles one function for an instruction set beyond the baseline: TARGET("avx2,fma,f16c"). Empty where a test builds the
 * same source against emulated intrinsics. */
#if defined(ANERT_NO_TARGET)
#define TARGET(isa)
#else
#define TARGET(isa) __attribute__((target(isa)))
#endif

/* Of a function whose __builtin_prefetch(p, 1, 3) asks for lines to write, which another core then gives up: PREFETCHW, a no-op on
 * x86-64 CPUs that lack it. */
#if defined(__x86_64__) && !defined(ANERT_NO_TARGET)
#define OWNING __attribute__((target("prfchw")))
#else
#define OWNING
#endif

/* Writes status and a printf-style message into err (NULL is fine) and returns the status: one-line checks. */
anert_status anert_fail(anert_error *err, anert_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* fp16 and bf16 scalars: the hardware's rounding, portable. */
uint16_t anert_half(float x);
float anert_float(uint16_t h);
static inline __attribute__((unused)) uint16_t bf16_of(float x) { /* to nearest even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline __attribute__((unused)) float bf16_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* pool.c: body(arg, index, thread) for every index in [0, n), each exactly once; returns when all are done. thread is in
 * [0, anert_pool_threads). Takes the pool's mutex: never call it from inside a body. */
typedef void anert_body(void *arg, int64_t index, int32_t thread);
void anert_parallel_for(anert_pool *pool, int64_t n, anert_body *body, void *arg);
/* The pool's mutex, recursive: whoever asks for scratch or runs several loops that belong together holds it from the first
 * anert_pool_scratch to the last use, since another caller may grow, hence move, the scratch. NULL is fine. */
void anert_pool_enter(anert_pool *pool);
void anert_pool_leave(anert_pool *pool);
int32_t anert_isa_best(void); /* what ANERT_ISA_AUTO means here */
void anert_isa_add(int32_t isa);        /* supported from now on: blas.c has opened a library */
int32_t anert_isa_own(int32_t isa);     /* the CPU's own: of BLAS, the best one; any other is itself */
int32_t anert_isa_vectors(int32_t isa); /* what an instruction set computes vectors with: AMX and AVX512BF16 are AVX512 */
/* Per-thread scratch that grows and stays: at least nbytes, 64-byte aligned; NULL if memory was not granted. Call it for
 * all threads before entering a parallel region. slot separates users that nest (gemm 0, tile 1, plan 2,
 * head 3, optim 4, gemm's shared panels 5,
 * its squares 6). */
void *anert_pool_scratch(anert_pool *pool, int32_t thread, int32_t slot, size_t nbytes);

/* fp16.c: row converters of one instruction set, any alignment, any n >= 0. */
typedef struct {
    void (*f32_to_f16)(const float *src, uint16_t *dst, size_t n);
    void (*f16_to_f32)(const uint16_t *src, float *dst, size_t n);
    /* dst (cols, rows) = transpose of src (rows, cols), rows and cols at most 64 */
    void (*transpose_f32_to_f16)(const float *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols);
    void (*transpose_f16_to_f32)(const uint16_t *src, size_t ss, float *dst, size_t ds, size_t rows, size_t cols);
    void (*transpose)(const uint16_t *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols);
    /* f32_to_f16 and stream_down with everything past +-65504, inf too but not NaN, written as +-65504; returns how many. */
    size_t (*clamp)(const float *src, uint16_t *dst, size_t n);
    size_t (*stream_clamp)(const float *src, uint16_t *dst, size_t n);
    /* The same written past the caches: halves, halves narrowed, halves widened; fence makes them visible to others. */
    void (*stream)(const uint16_t *src, uint16_t *dst, size_t n);
    void (*stream_down)(const float *src, uint16_t *dst, size_t n);
    void (*stream_up)(const uint16_t *src, float *dst, size_t n);
    void (*fence)(void);
    /* Past the caches too: 32 rows by 16 columns become 16 lines of dst, aligned to 64 bytes and ds apart; NULL where the CPU
     * has no such store. */
    void (*turn_lines)(const uint16_t *src, size_t ss, uint16_t *dst, size_t ds);
} anert_fp16_kernels;
const anert_fp16_kernels *anert_fp16_kernels_for(int32_t isa); /* isa resolved, not AUTO */
/* fp16.c: dst (cols, rows) = transpose of halves (rows, cols), of any size; stream: past the caches, fence behind it. */
void anert_fp16_turn(const anert_fp16_kernels *kernels, bool stream, const uint16_t *src, size_t ss, uint16_t *dst, size_t ds,
                     size_t rows, size_t cols);
/* fp16_x86.c, fp16_neon.c */
extern const anert_fp16_kernels anert_fp16_avx2, anert_fp16_avx512, anert_fp16_neon;
/* The scalar converters, for what is left over beside a vector loop. */
void anert_fp16_down(const float *src, uint16_t *dst, size_t n);
void anert_fp16_up(const uint16_t *src, float *dst, size_t n);
size_t anert_fp16_clamp(const float *src, uint16_t *dst, size_t n);
void anert_fp16_down_block(const float *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols);
void anert_fp16_up_block(const uint16_t *src, size_t ss, float *dst, size_t ds, size_t rows, size_t cols);
void anert_fp16_turn_block(const uint16_t *src, size_t ss, uint16_t *dst, size_t ds, size_t rows, size_t cols);
/* gemm.c: the same as anert_gemm, without the pool: on the calling thread alone, with that thread's scratch, for use inside
 * parallel bodies (attention by head). isa resolved. scratch: anert_gemm_scratch(isa, k) bytes, 64-byte aligned. */
size_t anert_gemm_scratch(int32_t isa, int64_t k);
void anert_gemm_serial(int32_t isa, int32_t precision, int64_t m, int64_t n, int64_t k, float alpha, anert_matrix a,
                       anert_matrix b, float beta, anert_matrix c, void *scratch);
#endif
