/* tile_avx512.c: the lane loops for AVX-512. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define VEC_AVX512
#define TILE_TABLE anert_tile_avx512
#include "tile_kernels.h"
#else
typedef int anert_tile_avx512_unused;
#endif
