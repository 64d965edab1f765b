/* gemm_avx512bf16.c: GEMM of bf16 operands by vdpbf16ps. Tiles and stores are those of gemm_kernel.h. */
#if defined(__x86_64__) || defined(VEC_EMULATED)
#define VEC_AVX512BF16
enum { MR = 6, NV = 4, PAIR_STEP = 1 };
#include "gemm_kernel.h"
#include "gemm_pairs.h"

VEC_FN void pack_rows(const gemm_operand *x, int64_t count, int64_t depth, float *panels) {
    pack_pairs(x, count, depth, MR, panels);
}

VEC_FN void pack_cols(const gemm_operand *x, int64_t count, int64_t depth, float *panels) {
    pack_pairs(x, count, depth, NR, panels);
}

VEC_FN void tile_pairs(int64_t words, const float *a, const float *b, const gemm_out *out) {
    vf sum[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++)
            sum[i][j] = vf_zero();
    for (int64_t k = 0; k < words; k++, a += MR, b += NR) {
        vf right[NV];
        for (int j = 0; j < NV; j++)
            right[j] = vf_load(b + j * VL);
        for (int i = 0; i < MR; i++) {
            vf left = vf_set1(a[i]);
            for (int j = 0; j < NV; j++)
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
    finish(sum, out);
}

const gemm_kernel anert_gemm_avx512bf16 = {MR, NR, 640, 2, PAIR_STEP, 0, pack_rows, pack_cols, tile_pairs, matvec, column, NULL,
                                           vf_fence, NULL, NULL};
#endif
