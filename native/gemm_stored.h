/* gemm_stored.h: a register tile that lies in memory, (MR, NR) fp32, on its way to C: of kernels whose sums are not vectors.
 * After gemm_kernel.h. */
#ifndef ANERT_GEMM_STORED_H
#define ANERT_GEMM_STORED_H

VEC_INLINE void store_rows(const float *tile, const gemm_out *out, int32_t dtype, bool grad) {
    const gemm_out to = *out;
    vf squares = vf_zero();
    for (int64_t i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++)
            squares = store_vector(vf_load(tile + i * NR + j * VL), &to, i, j, dtype, grad, squares);
    if (grad)
        *to.squares = vf_sum(squares);
}

VEC_FN void store_tile(const float *tile, const gemm_out *out) {
    if (is_edge(out))
        store_edge(tile, out);
    else if (out->squares != NULL)
        store_rows(tile, out, ANERT_F32, true);
    else if (out->dtype == ANERT_F32)
        store_rows(tile, out, ANERT_F32, false);
    else if (out->dtype == ANERT_F16)
        store_rows(tile, out, ANERT_F16, false);
    else
        store_rows(tile, out, ANERT_BF16, false);
}
#endif
