/* gemm_blas.h: GEMM whose products a BLAS computes (blas.c): panels of A are (k, 64), panels of B (k, 256), fp32, and a tile is
 * one call of cblas_sgemm. Packing and stores are those of gemm_kernel.h for the file's instruction set.
 *
 * Every call has one size but for k, contiguous operands, and the same alignment: its bits then depend on k alone, as
 * long as the library's do not depend on where an element lies within its tile. Our threads make the calls, each for tiles of
 * its own, rather than one large call at a time: a matrix unit that cores share is then busy while another core packs, and
 * no thread waits for a library's own. 64 x 256 x 256 is 8.4 MFLOP, 5 us of a unit of 1.7 TFLOPS; a call's own cost is a
 * fraction of one. kc covers what k models have, so that C's tile is touched once. */
#include "blas.h"
#include "vec.h"
enum { MR = 64, NV = 256 / VL, KC = 1024 };
#include "gemm_kernel.h"
#include "gemm_stored.h"

VEC_FN void tile_blas(int64_t words, const float *a, const float *b, const gemm_out *out) {
    float *product = out->product;
    if (words > 0)
        anert_blas_multiply(MR, NR, (int32_t)words, a, b, product);
    else
        memset(product, 0, MR * NR * sizeof *product);
    for (int64_t i = 0; i < MR && !(out->first && out->last); i++)
        for (int64_t j = 0; j < NR; j += VL) {
            float *sum = out->sums + i * out->sums_stride + j, *to = out->last ? product + i * NR + j : sum;
            vf x = vf_load(product + i * NR + j);
            vf_store(to, out->first ? x : vf_add(vf_load(sum), x));
        }
    if (out->last)
        store_tile(product, out);
}

VEC_FN void end(void) {
    anert_blas_end();
    vf_fence();
}
