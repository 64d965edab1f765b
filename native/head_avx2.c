/* head_avx2.c: the head's lane loops for AVX2 + FMA. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define VEC_AVX2
#define HEAD_TABLE anert_head_avx2
#include "head_kernels.h"
#else
typedef int anert_head_avx2_unused;
#endif
