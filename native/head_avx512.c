/* head_avx512.c: the head's lane loops for AVX-512. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define VEC_AVX512
#define HEAD_TABLE anert_head_avx512
#include "head_kernels.h"
#else
typedef int anert_head_avx512_unused;
#endif
