/* blas.h: the product of a BLAS that anert_blas_open has opened; only where ANERT_ISA_BLAS is supported. */
#ifndef ANERT_BLAS_H
#define ANERT_BLAS_H
#include "internal.h"

/* c (m, n) = a^T b, with a (k, m) and b (k, n) contiguous. k >= 1. */
void anert_blas_multiply(int32_t m, int32_t n, int32_t k, const float *a, const float *b, float *c);
/* Around products on a thread: the library leaves them to it. */
void anert_blas_begin(void);
void anert_blas_end(void);
#endif
