/* gemm_avx2.c: GEMM for AVX2 + FMA + F16C. The 6 x 16 tile holds 12 of 16 registers and reads 8 words for 12 products. */
#if defined(__x86_64__) || defined(VEC_EMULATED)
#define VEC_AVX2
enum { MR = 6, NV = 2 };
#include "gemm_kernel.h"

const gemm_kernel anert_gemm_avx2 = {MR, NR, 320, 1, 1, 0, pack_a, pack_b, tile, matvec, column, NULL, vf_fence, NULL, NULL};
#endif
