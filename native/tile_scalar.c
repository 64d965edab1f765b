/* tile_scalar.c: the lane loops for any CPU; on aarch64 the compiler makes NEON of them, which every aarch64 CPU has. */
#define TILE_TABLE anert_tile_scalar
#include "tile_kernels.h"
