/* gemm_pairs.h: panels of bf16 pairs, for gemm_avx512bf16.c and gemm_amx.c, on top of gemm_kernel.h. A word of a panel is
 * a pair (k, k + 1), k even in the lower half; an odd depth is padded with a zero, and a panel to PAIR_STEP words. */
/* Words of a panel that is `depth` deep. */
VEC_INLINE int64_t pair_words(int64_t depth) { return ROUND_UP((depth + 1) / 2, PAIR_STEP); }

/* bf16 of 32 values, `low` in the lower half; the bits travel as vf */
VEC_INLINE vf narrow(vf low, vf high) { return (vf)_mm512_cvtne2ps_pbh(high, low); }

/* low[0], high[0], low[1], ... of narrow(low, high) */
VEC_INLINE vf interleave(vf x) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                           4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(x)));
}

VEC_FN float element_pair(const gemm_operand *x, int64_t row, int64_t k, int64_t depth) {
    uint32_t low = bf16_of(element_rounded(x, row, k));
    uint32_t high = k + 1 < depth ? bf16_of(element_rounded(x, row, k + 1)) : 0;
    uint32_t bits = low | high << 16;
    float word;
    memcpy(&word, &bits, sizeof word);
    return word;
}

VEC_INLINE void pairs_along_k(const gemm_operand *x, int64_t count, int64_t depth, int64_t width, float *panels,
                              int32_t dtype, bool bf16) {
    (void)bf16;
    const int64_t words = (depth + 1) / 2, size = panel_size(width, pair_words(depth));
    for (int64_t base = 0; base < count; base += width, panels += size) {
        int64_t k = 0;
        for (int64_t r = 0; r < width; r += VL) {
            int64_t offset[VL];
            for (int64_t i = 0; i < VL; i++)
                offset[i] = MIN(base + MIN(r + i, width - 1), x->count - 1) * x->stride;
            for (k = 0; 2 * (k + VL) <= depth; k += VL) {
                vf square[VL];
                for (int i = 0; i < VL; i++)
                    square[i] = narrow(vf_load_as(x->data, offset[i] + 2 * k, dtype),
                                       vf_load_as(x->data, offset[i] + 2 * k + VL, dtype));
                vf_transpose(square);
                for (int i = 0; i < VL; i++)
                    vf_store(panels + (k + i) * width + r, square[i]);
            }
        }
        for (; k < words; k++)
            for (int64_t r = 0; r < width; r++)
                panels[k * width + r] = element_pair(x, MIN(base + r, x->count - 1), 2 * k, depth);
    }
}

VEC_INLINE void pairs_along_rows(const gemm_operand *x, int64_t count, int64_t depth, int64_t width, float *panels,
                                 int32_t dtype, bool bf16) {
    (void)bf16;
    enum { STRIP = 8 };
    const int64_t words = (depth + 1) / 2, size = panel_size(width, pair_words(depth));
    for (int64_t strip = 0; strip < words; strip += STRIP)
        for (int64_t base = 0; base < count; base += width)
            for (int64_t k = strip; k < MIN(strip + STRIP, words); k++) {
                float *out = panels + base / width * size + k * width;
                int64_t start = 2 * k * x->k_stride + base;
                for (int64_t r = 0; r < width && base + r < x->count; r += VL) {
                    int64_t n = MIN(x->count - base - r, VL);
                    bool whole = n == VL, odd = 2 * k + 1 == depth;
                    vf low = whole ? vf_load_as(x->data, start + r, dtype) : vf_load_part(x->data, start + r, dtype, n);
                    vf high = vf_zero();
                    if (!odd && whole)
                        high = vf_load_as(x->data, start + x->k_stride + r, dtype);
                    else if (!odd)
                        high = vf_load_part(x->data, start + x->k_stride + r, dtype, n);
                    vf_store(out + r, interleave(narrow(low, high)));
                }
            }
}

VEC_INLINE void pack_pairs(const gemm_operand *x, int64_t count, int64_t depth, int64_t width, float *panels) {
    const int64_t words = (depth + 1) / 2, all = pair_words(depth);
    if (x->k_stride == 1)
        FOR_DTYPE(x, pairs_along_k, count, depth, width, panels);
    else if (x->stride == 1)
        FOR_DTYPE(x, pairs_along_rows, count, depth, width, panels);
    else
        for (int64_t base = 0; base < count; base += width)
            for (int64_t k = 0; k < words; k++)
                for (int64_t r = 0; r < width; r++)
                    panels[base / width * panel_size(width, all) + k * width + r] =
                        element_pair(x, MIN(base + r, x->count - 1), 2 * k, depth);
    for (int64_t base = 0; words < all && base < count; base += width)
        memset(panels + base / width * panel_size(width, all) + words * width, 0, (size_t)((all - words) * width) * 4);
}

