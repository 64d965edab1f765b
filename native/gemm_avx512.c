/* gemm_avx512.c: GEMM for AVX-512. The 6 x 64 tile holds 24 of 32 registers. */
#if defined(__x86_64__) || defined(VEC_EMULATED)
#define VEC_AVX512
enum { MR = 6, NV = 4 };
#include "gemm_kernel.h"

const gemm_kernel anert_gemm_avx512 = {MR, NR, 320, 1, 1, 0, pack_a, pack_b, tile, matvec, column, NULL, vf_fence, NULL, NULL};
#endif
