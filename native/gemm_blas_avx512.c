/* gemm_blas_avx512.c: a BLAS' products, packed and stored with AVX-512. */
#if defined(__x86_64__) || defined(VEC_EMULATED)
#define VEC_AVX512
#include "gemm_blas.h"

const gemm_kernel anert_gemm_blas_avx512 = {MR, NR, KC, 1, 1, MR * NR, pack_a, pack_b, tile_blas, NULL, NULL,
                                            anert_blas_begin, end, NULL, NULL};
#endif
