/* tile_scalar.c: the lane loops for any CPU. */
#define VEC_SCALAR
#define TILE_TABLE anert_tile_scalar
#include "tile_kernels.h"
