/* gemm_blas_neon.c: a BLAS' products, packed and stored with NEON. */
#if defined(__aarch64__) || defined(VEC_EMULATED)
#define VEC_NEON
#include "gemm_blas.h"

const gemm_kernel anert_gemm_blas_neon = {MR, NR, KC, 1, 1, MR * NR, pack_a, pack_b, tile_blas, NULL, NULL,
                                          anert_blas_begin, end, NULL, NULL};
#endif
