/* vmath.h: exp, log, tanh, sigmoid and erf over the lanes of vec.h, fp32, within 2.5 ulp (3 without a fused multiply-add),
 * subnormal results of exp included. inf, NaN and signed zeros as in C. Include after choosing vec.h's instruction set.
 * exp and tanh: our own minimax fits. log and erf: after N. Juffa's public-domain logf and erff. */
#ifndef ANERT_VMATH_H
#define ANERT_VMATH_H
#include <math.h>

#include "vec.h"

/* e^x = 2^n e^r, |r| <= ln 2 / 2, ln 2 in two parts so that n times the first is exact. What rounds to 0 is not computed: an
 * underflow takes an x86 CPU 30 times as long, and half of all attention scores are masked. */
VEC_INLINE vf vf_exp(vf x) {
    vm none = vf_le(x, vf_set1(-104.0f));
    x = vf_min(vf_set1(89.0f), vf_select(none, vf_zero(), x));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fnma(n, vf_set1(0.693359375f), x);
    r = vf_fnma(n, vf_set1(-2.12194440e-4f), r);
    vf p = vf_fma(vf_set1(0.00138145394f), r, vf_set1(0.00836874638f));
    p = vf_fma(p, r, vf_set1(0.0416683927f));
    p = vf_fma(p, r, vf_set1(0.166665211f));
    p = vf_fma(p, r, vf_set1(0.49999994f));
    p = vf_fma(vf_mul(r, r), p, r);
    return vf_select(none, vf_zero(), vf_scale(vf_add(p, vf_set1(1.0f)), n));
}

/* x = m 2^e, m in [2/3, 4/3): log(1 + (m - 1)) + e ln 2 */
VEC_INLINE vf vf_log(vf x) {
    vm tiny = vf_lt(x, vf_set1(0x1p-126f));
    vf e, m = vf_split(vf_select(tiny, vf_mul(x, vf_set1(0x1p23f)), x), &e);
    e = vf_sub(e, vf_select(tiny, vf_set1(23.0f), vf_zero()));
    vf f = vf_sub(m, vf_set1(1.0f)), s = vf_mul(f, f);
    vf r = vf_fma(vf_set1(-0.130310059f), s, vf_set1(-0.121483512f));
    vf t = vf_fma(vf_set1(0.140869141f), s, vf_set1(0.139814854f));
    r = vf_fma(r, s, vf_set1(-0.166846126f));
    t = vf_fma(t, s, vf_set1(0.200120345f));
    r = vf_fma(r, s, vf_set1(-0.249996200f));
    r = vf_fma(t, f, r);
    r = vf_fma(r, f, vf_set1(0.333331972f));
    r = vf_fma(r, f, vf_set1(-0.5f));
    r = vf_fma(e, vf_set1(0.693147182f), vf_fma(r, s, f));
    r = vf_select(vf_eq(x, vf_zero()), vf_set1(-INFINITY), r);
    r = vf_select(vf_eq(x, vf_set1(INFINITY)), x, r);
    return vf_select(vf_le(vf_zero(), x), r, vf_set1(NAN));
}

/* 1 / (1 + e^-x), from e^-|x| so that neither side cancels */
VEC_INLINE vf vf_sigmoid(vf x) {
    vf z = vf_exp(vf_neg(vf_abs(x)));
    vf top = vf_select(vf_lt(x, vf_zero()), z, vf_set1(1.0f));
    return vf_div(top, vf_add(vf_set1(1.0f), z));
}

VEC_INLINE vf vf_tanh(vf x) {
    vf s = vf_mul(x, x), a = vf_abs(x);
    vf p = vf_fma(vf_set1(0.00214752974f), s, vf_set1(-0.00818266626f));
    p = vf_fma(p, s, vf_set1(0.0217029639f));
    p = vf_fma(p, s, vf_set1(-0.0539472029f));
    p = vf_fma(p, s, vf_set1(0.133332103f));
    p = vf_fma(p, s, vf_set1(-0.333333313f));
    vf small = vf_fma(vf_mul(x, s), p, x);
    vf large = vf_sub(vf_set1(1.0f), vf_div(vf_set1(2.0f), vf_add(vf_exp(vf_add(a, a)), vf_set1(1.0f))));
    return vf_copysign(vf_select(vf_lt(a, vf_set1(0.625f)), small, large), x);
}

VEC_INLINE vf vf_erf(vf x) {
    vf a = vf_abs(x), s = vf_mul(x, x);
    vf r = vf_fma(vf_set1(-1.72853470e-5f), a, vf_set1(3.83197126e-4f));
    vf u = vf_fma(vf_set1(-3.88396438e-3f), a, vf_set1(2.42546219e-2f));
    r = vf_fma(r, s, u);
    r = vf_fma(r, a, vf_set1(-1.06777877e-1f));
    r = vf_fma(r, a, vf_set1(-6.34846687e-1f));
    r = vf_fma(r, a, vf_set1(-1.28717512e-1f));
    vf large = vf_sub(vf_set1(1.0f), vf_exp(vf_sub(vf_mul(r, a), a)));
    vf p = vf_fma(vf_set1(-5.96761703e-4f), s, vf_set1(4.99119423e-3f));
    p = vf_fma(p, s, vf_set1(-2.67681349e-2f));
    p = vf_fma(p, s, vf_set1(1.12819925e-1f));
    p = vf_fma(p, s, vf_set1(-3.76125336e-1f));
    p = vf_fma(p, s, vf_set1(1.28379166e-1f));
    large = vf_select(vf_lt(vf_set1(4.0f), a), vf_set1(1.0f), large); /* the polynomial turns back far out */
    return vf_copysign(vf_select(vf_lt(vf_set1(0.927734375f), a), large, vf_fma(p, x, x)), x);
}
#endif
