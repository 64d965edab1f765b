/* tile_avx2.c: the lane loops for AVX2 + FMA. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define VEC_AVX2
#define TILE_TABLE anert_tile_avx2
#include "tile_kernels.h"
#else
typedef int anert_tile_avx2_unused;
#endif
