/* gemm_blas_scalar.c: a BLAS' products, packed and stored in plain C. */
#define VEC_SCALAR
#include "gemm_blas.h"

const gemm_kernel anert_gemm_blas_scalar = {MR, NR, KC, 1, 1, MR * NR, pack_a, pack_b, tile_blas, NULL, NULL,
                                            anert_blas_begin, end, NULL, NULL};
