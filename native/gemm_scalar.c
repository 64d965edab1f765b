/* gemm_scalar.c: GEMM without vectors, for a CPU that none of the others fits. */
#define VEC_SCALAR
enum { MR = 4, NV = 4 };
#include "gemm_kernel.h"

const gemm_kernel anert_gemm_scalar = {MR, NR, 320, 1, 1, 0, pack_a, pack_b, tile, matvec, column, NULL, vf_fence, NULL, NULL};
