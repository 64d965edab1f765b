/* head_scalar.c: the head's lane loops for any CPU. */
#define VEC_SCALAR
#define HEAD_TABLE anert_head_scalar
#include "head_kernels.h"
