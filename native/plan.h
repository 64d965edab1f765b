/* plan.h: what plan.c, tile.c and their kernels share. */
#ifndef ANERT_PLAN_H
#define ANERT_PLAN_H
#include "internal.h"

enum { TILE_REGS = 64, TILE_MAX_CHUNK = 4096, TILE_PARTIALS = 32, SCRATCH_TILE = -1 };

/* One instruction on one chunk: rows x lanes results. Operand x is read at x + row * x_row + lane * x_lane, x_lane 0 or 1. */
typedef struct {
    float *d;
    const float *a, *b, *c;
    int64_t d_row, a_row, b_row, c_row;
    int32_t a_lane, b_lane, c_lane;
    int64_t rows, lanes;
    float imm;
    uint64_t overflows; /* out, of HALF */
} tile_args;
typedef void tile_fn(tile_args *args);

/* Reductions fold a (rows, lanes) into d: by rows d[lane] op= a, rows in order; by lanes d[row * 32 + lane % 32] op= a. */
typedef struct {
    tile_fn *op[ANERT_TILE_OPS];
    tile_fn *by_rows[3], *by_lanes[3]; /* SUM, RMAX, RMIN */
} anert_tile_kernels;
const anert_tile_kernels *anert_tile_kernels_for(int32_t isa); /* isa resolved, not AUTO */

/* An instruction with what validation found out about it. */
typedef struct {
    anert_instr i;
    int32_t ka, kb, kc; /* kinds of the operands */
    int32_t direct;     /* the view that dst is written through, or -1 */
    int32_t skip;       /* a STORE that its producer has done */
} tile_instr;

struct anert_plan {
    anert_buffer *buffers;
    anert_view *views;
    tile_instr *instrs;
    anert_step *steps;
    _Atomic uint64_t *counters;
    int32_t n_buffers, n_views, n_instrs, n_steps, n_counters;
    size_t tile_scratch; /* bytes a thread needs for the largest tile program */
};

/* Where a run finds things. loops: coordinates of the enclosing region. */
typedef struct {
    const anert_plan *plan;
    anert_pool *pool;
    void *const *bases; /* bases[0] replaced by the arena */
    void *arena;
    int64_t loops[3];
    int32_t isa;
} plan_run;

typedef union {
    float f;
    int32_t i;
    uint32_t u;
} lane_word;

static inline uint16_t bf16_round(lane_word w) { /* to nearest even; NaN stays NaN */
    if ((w.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(w.u >> 16 | 0x40u);
    return (uint16_t)((w.u + 0x7fffu + (w.u >> 16 & 1u)) >> 16);
}

static inline size_t dtype_bytes(int32_t dtype) {
    return dtype == ANERT_F32 || dtype == ANERT_I32 ? 4 : dtype == ANERT_F16 || dtype == ANERT_BF16 ? 2 : 1;
}

static inline char *view_base(const plan_run *run, const anert_view *v) {
    char *base = v->buffer == 0 ? run->arena : run->bases[v->buffer];
    int64_t at = v->offset;
    for (int d = 0; d < 3; d++) at += run->loops[d] * v->loops[d];
    return base + at * (int64_t)dtype_bytes(v->dtype);
}

static inline float load_scalar(const char *base, int32_t dtype, int64_t i) {
    lane_word w = {0};
    switch (dtype) {
    case ANERT_F16: return anert_float(((const uint16_t *)base)[i]);
    case ANERT_BF16: w.u = (uint32_t)((const uint16_t *)base)[i] << 16; return w.f;
    case ANERT_U8: return (float)((const uint8_t *)base)[i];
    case ANERT_I8: return (float)((const int8_t *)base)[i];
    default: return ((const float *)base)[i]; /* F32, and I32 as bits */
    }
}

/* Floor division; x / 0 is 0 and INT32_MIN / -1 wraps, so that no input traps. */
static inline int32_t floor_div(int32_t x, int32_t y) {
    if (y == 0) return 0;
    if (y == -1) return (int32_t)(0u - (uint32_t)x);
    int32_t q = x / y;
    return q - (x % y != 0 && (x < 0) != (y < 0));
}

/* EINVAL unless every element of the box `dims` of view v lies in its buffer; write: the buffer must be writable. */
anert_status plan_check_view(const anert_plan *plan, int32_t step, int32_t view, const int64_t *dims, int32_t n_dims,
                             int32_t write, anert_error *err);
/* The same where an index in [0, extent) moves the view by `stride` more. */
anert_status plan_check_reach(const anert_plan *plan, int32_t step, int32_t view, const int64_t *dims, int64_t extent,
                              int64_t stride, anert_error *err);
anert_status tile_check(anert_plan *plan, int32_t step, anert_error *err);
void tile_run(const plan_run *run, const anert_step *step);
size_t tile_scratch_bytes(const anert_step *step);

anert_status move_check(anert_plan *plan, int32_t step, anert_error *err);
anert_status move_run(const plan_run *run, const anert_step *step, anert_error *err);
#endif
