/* tile_kernels.h: the lane loops of tile programs, compiled once per instruction set: the including file sets the
 * target, defines one of vec.h's sets and TILE_TABLE, the name of its table. Arithmetic is plain C that the compiler
 * turns into the set's vectors; exp and its kin are vmath.h's, in the last lanes too, so that a value never depends on
 * its place. */
#include <math.h>

#include "plan.h"
#include "vmath.h"

static inline __attribute__((unused)) int32_t as_i32(float x) { return ((lane_word){.f = x}).i; }
static inline __attribute__((unused)) float of_i32(int32_t x) { return ((lane_word){.i = x}).f; }

#define UNARY(name, expr)                                                         \
    static void op_##name(tile_args *g) {                                         \
        for (int64_t r = 0; r < g->rows; r++) {                                   \
            float *d = g->d + r * g->d_row;                                       \
            const float *a = g->a + r * g->a_row;                                 \
            if (g->a_lane)                                                        \
                for (int64_t i = 0; i < g->lanes; i++) {                          \
                    float x = a[i];                                               \
                    d[i] = expr;                                                  \
                }                                                                 \
            else {                                                                \
                float x = *a, y = expr;                                           \
                for (int64_t i = 0; i < g->lanes; i++) d[i] = y;                  \
            }                                                                     \
        }                                                                         \
    }

#define VECTOR(name, function)                                                    \
    static void op_##name(tile_args *g) {                                         \
        for (int64_t r = 0; r < g->rows; r++) {                                   \
            float *d = g->d + r * g->d_row;                                       \
            const float *a = g->a + r * g->a_row;                                 \
            int64_t i = 0;                                                        \
            if (!g->a_lane) {                                                     \
                float y[VL];                                                      \
                vf_store(y, function(vf_set1(*a)));                               \
                for (; i < g->lanes; i++) d[i] = y[0];                            \
            }                                                                     \
            for (; i + VL <= g->lanes; i += VL) vf_store(d + i, function(vf_load(a + i))); \
            if (i < g->lanes) {                                                   \
                float x[VL] = {0}, y[VL];                                         \
                memcpy(x, a + i, (size_t)(g->lanes - i) * sizeof(float));         \
                vf_store(y, function(vf_load(x)));                                \
                memcpy(d + i, y, (size_t)(g->lanes - i) * sizeof(float));         \
            }                                                                     \
        }                                                                         \
    }

#define BINARY(name, expr)                                                        \
    static void op_##name(tile_args *g) {                                         \
        for (int64_t r = 0; r < g->rows; r++) {                                   \
            float *d = g->d + r * g->d_row;                                       \
            const float *a = g->a + r * g->a_row, *b = g->b + r * g->b_row;       \
            if (g->a_lane && g->b_lane)                                           \
                for (int64_t i = 0; i < g->lanes; i++) {                          \
                    float x = a[i], y = b[i];                                     \
                    d[i] = expr;                                                  \
                }                                                                 \
            else if (g->a_lane) {                                                 \
                float y = *b;                                                     \
                for (int64_t i = 0; i < g->lanes; i++) {                          \
                    float x = a[i];                                               \
                    d[i] = expr;                                                  \
                }                                                                 \
            } else if (g->b_lane) {                                               \
                float x = *a;                                                     \
                for (int64_t i = 0; i < g->lanes; i++) {                          \
                    float y = b[i];                                               \
                    d[i] = expr;                                                  \
                }                                                                 \
            } else {                                                              \
                float x = *a, y = *b, z = expr;                                   \
                for (int64_t i = 0; i < g->lanes; i++) d[i] = z;                  \
            }                                                                     \
        }                                                                         \
    }

BINARY(add, x + y)
BINARY(sub, x - y)
BINARY(mul, x * y)
BINARY(div, x / y)
BINARY(max, x > y || x != x ? x : y)
BINARY(min, x < y || x != x ? x : y)
BINARY(pow, powf(x, y))
BINARY(mod, x - floorf(x / y) * y)
BINARY(eq, x == y ? 1.0f : 0.0f)
BINARY(ne, x != y ? 1.0f : 0.0f)
BINARY(lt, x < y ? 1.0f : 0.0f)
BINARY(le, x <= y ? 1.0f : 0.0f)
BINARY(i32_add, of_i32((int32_t)((uint32_t)as_i32(x) + (uint32_t)as_i32(y))))
BINARY(i32_sub, of_i32((int32_t)((uint32_t)as_i32(x) - (uint32_t)as_i32(y))))
BINARY(i32_mul, of_i32((int32_t)((uint32_t)as_i32(x) * (uint32_t)as_i32(y))))
BINARY(i32_max, of_i32(MAX(as_i32(x), as_i32(y))))
BINARY(i32_min, of_i32(MIN(as_i32(x), as_i32(y))))
BINARY(i32_eq, as_i32(x) == as_i32(y) ? 1.0f : 0.0f)
BINARY(i32_lt, as_i32(x) < as_i32(y) ? 1.0f : 0.0f)
BINARY(i32_le, as_i32(x) <= as_i32(y) ? 1.0f : 0.0f)

static inline __attribute__((unused)) int32_t floor_mod(int32_t x, int32_t y) {
    if (y == 0 || y == -1) return 0;
    return x - floor_div(x, y) * y;
}
BINARY(i32_div, of_i32(floor_div(as_i32(x), as_i32(y))))
BINARY(i32_mod, of_i32(floor_mod(as_i32(x), as_i32(y))))

static inline __attribute__((unused)) int32_t to_i32(float x) { /* toward zero, saturating; NaN is 0 */
    return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : (int32_t)x;
}

UNARY(mov, x)
UNARY(abs, of_i32(as_i32(x) & 0x7fffffff))
VECTOR(sqrt, vf_sqrt)
static inline __attribute__((always_inline)) vf vf_rsqrt(vf x) { return vf_div(vf_set1(1.0f), vf_sqrt(x)); }
VECTOR(rsqrt, vf_rsqrt)
VECTOR(exp, vf_exp)
VECTOR(log, vf_log)
VECTOR(tanh, vf_tanh)
VECTOR(sigmoid, vf_sigmoid)
VECTOR(erf, vf_erf)
UNARY(sin, sinf(x))
UNARY(cos, cosf(x))
UNARY(tan, tanf(x))
UNARY(asin, asinf(x))
UNARY(acos, acosf(x))
UNARY(atan, atanf(x))
UNARY(sinh, sinhf(x))
UNARY(cosh, coshf(x))
UNARY(atanh, atanhf(x))
UNARY(floor, floorf(x))
UNARY(ceil, ceilf(x))
UNARY(round, rintf(x))
UNARY(trunc, truncf(x))
UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x)
UNARY(to_f32, (float)as_i32(x))
UNARY(to_i32, of_i32(to_i32(x)))

static void op_select(tile_args *g) { /* a ? b : c */
    for (int64_t r = 0; r < g->rows; r++) {
        float *d = g->d + r * g->d_row;
        const float *a = g->a + r * g->a_row, *b = g->b + r * g->b_row, *c = g->c + r * g->c_row;
        if (g->a_lane && g->b_lane && g->c_lane)
            for (int64_t i = 0; i < g->lanes; i++) {
                float y = b[i], z = c[i];
                d[i] = a[i] != 0.0f ? y : z;
            }
        else
            for (int64_t i = 0; i < g->lanes; i++)
                d[i] = a[i * g->a_lane] != 0.0f ? b[i * g->b_lane] : c[i * g->c_lane];
    }
}

/* Rounds to fp16 by the fp32 adder: |x| < 2^-14 rounds at 2^-24, else at 11 bits; 65520 and up is inf. */
static inline __attribute__((unused)) float round_half(float x) {
    uint32_t magnitude = (uint32_t)as_i32(x) & 0x7fffffffu, sign = (uint32_t)as_i32(x) & 0x80000000u;
    uint32_t odd = (magnitude >> 13) & 1u;
    uint32_t normal = (magnitude + 0xfffu + odd) & ~0x1fffu;
    normal = magnitude >= 0x477ff000u ? (magnitude > 0x7f800000u ? magnitude : 0x7f800000u) : normal;
    float small = (of_i32((int32_t)magnitude) + 0.5f) - 0.5f; /* 0.5's last place is 2^-24 */
    uint32_t bits = magnitude < 0x38800000u ? (uint32_t)as_i32(small) : normal;
    return of_i32((int32_t)(bits | sign));
}

static void op_half(tile_args *g) {
    uint64_t overflows = 0; /* finite values past imm, the largest magnitude that stays finite */
    for (int64_t r = 0; r < g->rows; r++) {
        float *d = g->d + r * g->d_row;
        const float *a = g->a + r * g->a_row;
        uint32_t row = 0;
        for (int64_t i = 0; i < g->lanes; i++) {
            float x = a[i * g->a_lane];
            uint32_t magnitude = (uint32_t)as_i32(x) & 0x7fffffffu;
            float y = round_half(x), size = of_i32(as_i32(y) & 0x7fffffff);
            bool over = size > g->imm;
            row += over && magnitude < 0x7f800000u;
            d[i] = over ? of_i32((as_i32(y) & INT32_MIN) | 0x7f800000) : y;
        }
        overflows += row;
    }
    g->overflows = overflows;
}

static void to_bf16(const float *src, uint16_t *dst, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vf_store_bf16(dst + i, vf_load(src + i));
    for (; i < n; i++) dst[i] = bf16_of(src[i]);
}

#define FOLD_SUM(x, y) ((x) + (y))
#define FOLD_MAX(x, y) ((x) > (y) || (x) != (x) ? (x) : (y))
#define FOLD_MIN(x, y) ((x) < (y) || (x) != (x) ? (x) : (y))

#define FOLDS(name, FOLD)                                                                  \
    static void rows_##name(tile_args *g) {                                                \
        float *d = g->d;                                                                   \
        for (int64_t r = 0; r < g->rows; r++) {                                            \
            const float *a = g->a + r * g->a_row;                                          \
            if (g->a_lane)                                                                 \
                for (int64_t i = 0; i < g->lanes; i++) d[i] = FOLD(d[i], a[i]);            \
            else                                                                           \
                for (int64_t i = 0; i < g->lanes; i++) d[i] = FOLD(d[i], *a);              \
        }                                                                                  \
    }                                                                                      \
    static void lanes_##name(tile_args *g) {                                               \
        for (int64_t r = 0; r < g->rows; r++) {                                            \
            float *restrict d = g->d + r * TILE_PARTIALS;                                  \
            const float *a = g->a + r * g->a_row;                                          \
            int64_t i = 0;                                                                 \
            if (g->a_lane) {                                                               \
                float part[TILE_PARTIALS];                                                 \
                memcpy(part, d, sizeof part);                                              \
                for (; i + TILE_PARTIALS <= g->lanes; i += TILE_PARTIALS)                  \
                    for (int j = 0; j < TILE_PARTIALS; j++) part[j] = FOLD(part[j], a[i + j]); \
                memcpy(d, part, sizeof part);                                              \
            }                                                                              \
            for (; i < g->lanes; i++) {                                                    \
                float y = a[i * g->a_lane], x = d[i % TILE_PARTIALS];                      \
                d[i % TILE_PARTIALS] = FOLD(x, y);                                         \
            }                                                                              \
        }                                                                                  \
    }
/* The partial results of a row, by halves, into the first. */
#define JOIN(name, FOLD)                                                                   \
    static void join_##name(float *part) {                                                 \
        for (int i = 0; i < 16; i++) part[i] = FOLD(part[i], part[i + 16]);                \
        for (int i = 0; i < 8; i++) part[i] = FOLD(part[i], part[i + 8]);                  \
        for (int i = 0; i < 4; i++) part[i] = FOLD(part[i], part[i + 4]);                  \
        for (int i = 0; i < 2; i++) part[i] = FOLD(part[i], part[i + 2]);                  \
        part[0] = FOLD(part[0], part[1]);                                                  \
    }
JOIN(sum, FOLD_SUM)
JOIN(max, FOLD_MAX)
JOIN(min, FOLD_MIN)

FOLDS(sum, FOLD_SUM)
FOLDS(max, FOLD_MAX)
FOLDS(min, FOLD_MIN)

#define ENTRY(NAME, name) [ANERT_TILE_##NAME] = op_##name
const anert_tile_kernels TILE_TABLE = {
    .op = {ENTRY(MOV, mov), ENTRY(ADD, add), ENTRY(SUB, sub), ENTRY(MUL, mul), ENTRY(DIV, div), ENTRY(MAX, max),
           ENTRY(MIN, min), ENTRY(POW, pow), ENTRY(MOD, mod), ENTRY(EQ, eq), ENTRY(NE, ne), ENTRY(LT, lt),
           ENTRY(LE, le), ENTRY(SELECT, select), ENTRY(ABS, abs), ENTRY(SQRT, sqrt), ENTRY(RSQRT, rsqrt),
           ENTRY(EXP, exp), ENTRY(LOG, log), ENTRY(TANH, tanh), ENTRY(SIGMOID, sigmoid), ENTRY(ERF, erf),
           ENTRY(SIN, sin), ENTRY(COS, cos), ENTRY(TAN, tan), ENTRY(ASIN, asin), ENTRY(ACOS, acos),
           ENTRY(ATAN, atan), ENTRY(SINH, sinh), ENTRY(COSH, cosh), ENTRY(ATANH, atanh), ENTRY(FLOOR, floor),
           ENTRY(CEIL, ceil), ENTRY(ROUND, round), ENTRY(TRUNC, trunc), ENTRY(SIGN, sign), ENTRY(HALF, half),
           ENTRY(TO_F32, to_f32), ENTRY(TO_I32, to_i32), ENTRY(I32_ADD, i32_add), ENTRY(I32_SUB, i32_sub),
           ENTRY(I32_MUL, i32_mul), ENTRY(I32_DIV, i32_div), ENTRY(I32_MOD, i32_mod), ENTRY(I32_MAX, i32_max),
           ENTRY(I32_MIN, i32_min), ENTRY(I32_EQ, i32_eq), ENTRY(I32_LT, i32_lt), ENTRY(I32_LE, i32_le)},
    .by_rows = {rows_sum, rows_max, rows_min},
    .by_lanes = {lanes_sum, lanes_max, lanes_min},
    .join = {join_sum, join_max, join_min},
    .to_bf16 = to_bf16,
};
