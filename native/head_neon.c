/* head_neon.c: the head's lane loops for NEON. */
#if defined(__aarch64__)
#define VEC_NEON
#define HEAD_TABLE anert_head_neon
#include "head_kernels.h"
#else
typedef int anert_head_neon_unused;
#endif
