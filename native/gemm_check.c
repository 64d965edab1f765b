/* gemm_check.c: what a caller of the GEMMs may have got wrong. */
#include <math.h>

#include "gemm.h"

/* Does batch, row, col fit in an address: checks (count - 1) * stride summed over the axes. */
static bool span_fits(anert_matrix x, int64_t batch, int64_t rows, int64_t cols) {
    int64_t a, b, c, sum;
    if (__builtin_mul_overflow(batch - 1, x.batch_stride, &a) || __builtin_mul_overflow(rows - 1, x.row_stride, &b) ||
        __builtin_mul_overflow(cols - 1, x.col_stride, &c) || __builtin_add_overflow(a, b, &sum) ||
        __builtin_add_overflow(sum, c, &sum))
        return false;
    return sum < INT64_MAX / 8;
}

static anert_status check_matrix(char name, anert_matrix x, int64_t batch, int64_t rows, int64_t cols, anert_error *err) {
    if (x.dtype != ANERT_F32 && x.dtype != ANERT_F16 && x.dtype != ANERT_BF16)
        return anert_fail(err, ANERT_EINVAL, "gemm: dtype of %c is %d, expected F32, F16 or BF16", name, x.dtype);
    if (x.row_stride < 0 || x.col_stride < 0 || x.batch_stride < 0)
        return anert_fail(err, ANERT_EINVAL, "gemm: strides of %c are %lld, %lld, batch %lld, expected none below 0", name,
                          (long long)x.row_stride, (long long)x.col_stride, (long long)x.batch_stride);
    if (batch == 0 || rows == 0 || cols == 0)
        return ANERT_OK;
    if (x.data == NULL)
        return anert_fail(err, ANERT_EINVAL, "gemm: %c is NULL", name);
    if (!span_fits(x, batch, rows, cols))
        return anert_fail(err, ANERT_EINVAL, "gemm: %c of %lld x %lld x %lld spans more than memory can", name,
                          (long long)batch, (long long)rows, (long long)cols);
    return ANERT_OK;
}

/* C's elements must be distinct: each axis strides past all that the axes of smaller stride span. */
static anert_status check_distinct(anert_matrix c, int64_t batch, int64_t rows, int64_t cols, anert_error *err) {
    int64_t count[3] = {batch, rows, cols}, stride[3] = {c.batch_stride, c.row_stride, c.col_stride};
    int64_t span = 1;
    bool used[3] = {false, false, false};
    if (batch == 0 || rows == 0 || cols == 0)
        return ANERT_OK;
    for (int turn = 0; turn < 3; turn++) {
        int next = -1;
        for (int i = 0; i < 3; i++)
            if (!used[i] && (next < 0 || stride[i] < stride[next]))
                next = i;
        used[next] = true;
        if (count[next] <= 1)
            continue;
        if (stride[next] < span)
            return anert_fail(err, ANERT_EINVAL, "gemm: C overlaps itself: strides %lld, %lld, batch %lld for %lld x %lld x %lld",
                              (long long)c.row_stride, (long long)c.col_stride, (long long)c.batch_stride, (long long)batch,
                              (long long)rows, (long long)cols);
        span += (count[next] - 1) * stride[next];
    }
    return ANERT_OK;
}

anert_status anert_gemm_check(anert_pool *pool, int32_t precision, int64_t batch, int64_t m, int64_t n, int64_t k, float alpha,
                          anert_matrix a, anert_matrix b, float beta, anert_matrix c, anert_error *err) {
    anert_status status;
    if (pool == NULL)
        return anert_fail(err, ANERT_EINVAL, "gemm: pool is NULL");
    if (precision != ANERT_F32 && precision != ANERT_BF16)
        return anert_fail(err, ANERT_EINVAL, "gemm: precision is %d, expected F32 or BF16", precision);
    if (batch < 0 || m < 0 || n < 0 || k < 0)
        return anert_fail(err, ANERT_EINVAL, "gemm: batch %lld, m %lld, n %lld, k %lld, expected none below 0",
                          (long long)batch, (long long)m, (long long)n, (long long)k);
    if (!isfinite(alpha))
        return anert_fail(err, ANERT_EINVAL, "gemm: alpha is %g, expected a finite number", (double)alpha);
    if (beta != 0.0f && beta != 1.0f)
        return anert_fail(err, ANERT_EINVAL, "gemm: beta is %g, expected 0 or 1", (double)beta);
    if ((status = check_matrix('A', a, batch, m, k, err)) || (status = check_matrix('B', b, batch, k, n, err)) ||
        (status = check_matrix('C', c, batch, m, n, err)))
        return status;
    return check_distinct(c, batch, m, n, err);
}
