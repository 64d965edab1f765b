/* gemm_neon.c: GEMM for NEON of aarch64. The 8 x 12 tile holds 24 of 32 registers. */
#if defined(__aarch64__) || defined(VEC_EMULATED)
#define VEC_NEON
enum { MR = 8, NV = 3 };
#include "gemm_kernel.h"

const gemm_kernel anert_gemm_neon = {MR, NR, 320, 1, 1, 0, pack_a, pack_b, tile, matvec, column, NULL, vf_fence, NULL, NULL};
#endif
