/* tile_neon.c: the lane loops for NEON, which every aarch64 CPU has. */
#if defined(__aarch64__)
#define VEC_NEON
#define TILE_TABLE anert_tile_neon
#include "tile_kernels.h"
#else
typedef int anert_tile_neon_unused;
#endif
